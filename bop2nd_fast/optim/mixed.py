"""MixedOptimizer: one optimizer object for a network of binary and real parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..binary_tensor import BinaryTensor
from .base import BopBase
from .bop import Bop2ndOrder
from .distributed import local_tensor
from .telemetry import FlipCounts, LayerReport

Maker: TypeAlias = "Callable[[list[tuple[str, Tensor]]], Optimizer] | Optimizer"


def is_binary(name: str, p: Tensor) -> bool:
    """Whether a parameter is a BinaryTensor (the default routing)."""
    return isinstance(local_tensor(p), BinaryTensor)


class _JoinedState(MutableMapping[Tensor, Any]):
    """The members' states as one mapping; a write goes to the member that owns the parameter."""

    def __init__(self, members: tuple[Optimizer, ...]) -> None:
        self._members = members

    def _owner(self, p: Tensor) -> Optimizer:
        for member in self._members:
            if any(p is q for group in member.param_groups for q in group["params"]):
                return member
        raise KeyError(p)

    def __getitem__(self, p: Tensor) -> Any:
        for member in self._members:
            if p in member.state:
                return member.state[p]
        raise KeyError(p)

    def __setitem__(self, p: Tensor, value: Any) -> None:
        self._owner(p).state[p] = value

    def __delitem__(self, p: Tensor) -> None:
        del self._owner(p).state[p]

    def __iter__(self) -> Iterator[Tensor]:
        return (p for member in self._members for p in member.state)

    def __len__(self) -> int:
        return sum(len(member.state) for member in self._members)


class MixedOptimizer(Optimizer):
    """Binary parameters by one optimizer, all others by another, behind one ``step`` and one ``state_dict``.

    >>> optimizer = bf.optim.MixedOptimizer(
    ...     model,
    ...     binary=functools.partial(bf.optim.Bop2ndOrder, gamma=1e-7, sigma=1e-3),
    ...     real=functools.partial(torch.optim.Adam, lr=0.01),
    ... )
    >>> gamma = bf.optim.schedule(optimizer, "gamma", StepLR, step_size=100)
    >>> lr = torch.optim.lr_scheduler.StepLR(optimizer.real, step_size=100)

    ``param_groups`` are the members' own groups, binary ones first; ``state_dict`` has torch's ordinary form,
    with parameters numbered in that order. A scheduler of the learning rate takes ``.real``.

    Args:
        parameters: a module, or pairs (name, parameter). Parameters that need no gradient are left out.
        binary, real: what to make the members with (called with a list of (name, parameter)), or optimizers
            that exist already. Optimizers that must call a closure several times (LBFGS) cannot be members.
        route: called with (name, parameter), says whether ``binary`` gets it; by default BinaryTensors are
            binary. Not to be given with optimizers that exist.

    Raises:
        ValueError: an optimizer that would claim no parameter, a parameter claimed by both or by none.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        parameters: nn.Module | Iterable[tuple[str, Tensor]],
        binary: Maker = Bop2ndOrder,
        real: Maker = torch.optim.Adam,
        *,
        route: Callable[[str, Tensor], bool] | None = None,
    ) -> None:
        pairs = parameters.named_parameters() if isinstance(parameters, nn.Module) else parameters
        named = [(name, p) for name, p in pairs if p.requires_grad]
        sides = (binary, real)
        if route is not None and any(isinstance(side, Optimizer) for side in sides):
            raise ValueError("route decides for optimizers that are yet to be made; these exist already")
        decide = route or is_binary
        shares = ([n for n in named if decide(*n)], [n for n in named if not decide(*n)])
        for side, share, what in zip(sides, shares, ("binary", "real"), strict=True):
            if not share and not isinstance(side, Optimizer):
                raise ValueError(
                    f"the {what} optimizer would claim no parameter: use the other one by itself"
                )
        self.binary, self.real = (
            side if isinstance(side, Optimizer) else side(share)
            for side, share in zip(sides, shares, strict=True)
        )
        self._members = (self.binary, self.real)
        _check_claims(named, self._members)
        super().__init__([p for _, p in named], {})

    # torch's constructor, copying and unpickling assign these; the members own what they stand for.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for member in self._members for group in member.param_groups]

    @param_groups.setter
    def param_groups(self, groups: Any) -> None:
        pass

    @property
    def state(self) -> Any:
        return _JoinedState(self._members)

    @state.setter
    def state(self, state: Any) -> None:
        pass

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the member it belongs to: BinaryTensors to ``binary``, others to ``real``.

        Raises:
            ValueError: a group that mixes both kinds.
        """
        entries = param_group["params"]
        entries = [entries] if isinstance(entries, Tensor) else list(entries)
        tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in entries]
        owned = {id(p) for group in self.param_groups for p in group["params"]}
        if tensors and all(id(p) in owned for p in tensors):
            return  # torch's constructor announces what the members already have
        kinds = {is_binary("", p) for p in tensors}
        if len(kinds) != 1:
            raise ValueError("a group must be all binary or all real")
        member = self.binary if kinds == {True} else self.real
        member.add_param_group({**param_group, "params": entries})

    # ------------------------------------------------------------------ the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both members. Under a GradScaler nothing moves if any gradient is infinite or NaN."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            for member in self._members:
                _step_traced(member)
            return loss
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for member in self._members:
            if found_inf is None:
                member.step()
            else:
                _step_scaled(member, grad_scale, found_inf)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop (or zero) the gradients of both members."""
        for member in self._members:
            member.zero_grad(set_to_none)

    # ------------------------------------------------------------------ saving, copying

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume both members from :meth:`state_dict`.

        Raises:
            ValueError: the number of groups or parameters does not fit, or a member refuses its part.
        """
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, dict(state_dict)) or state_dict
        groups = state_dict["param_groups"]
        if len(groups) != len(self.param_groups):
            raise ValueError(
                f"the saved state has {len(groups)} groups, this optimizer {len(self.param_groups)}"
            )
        for mine, saved in zip(self.param_groups, groups, strict=True):
            if len(mine["params"]) != len(saved["params"]):
                raise ValueError(
                    f"a saved group has {len(saved['params'])} parameters, not {len(mine['params'])}"
                )
        n_binary = len(self.binary.param_groups)
        for member, part in ((self.binary, groups[:n_binary]), (self.real, groups[n_binary:])):
            keys = {key for group in part for key in group["params"]}
            state = {key: value for key, value in state_dict["state"].items() if key in keys}
            member.load_state_dict({"state": state, "param_groups": part})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        return {"defaults": self.defaults, "binary": self.binary, "real": self.real}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._members = (state["binary"], state["real"])
        super().__setstate__(state)

    # ------------------------------------------------------------------ telemetry

    def telemetry(self) -> list[FlipCounts]:
        """What the last step did to the binary parameters; see :meth:`Bop2ndOrder.telemetry`."""
        return self._bop().telemetry()

    def report(self, quiet: bool = False) -> list[LayerReport]:
        """The binary layers' regimes; see :meth:`Bop2ndOrder.report`."""
        return self._bop().report(quiet)

    def signal_histogram(self, bins: int = 40, limit: float = 8.0) -> dict[str, Tensor]:
        """Of the binary parameters; see :meth:`Bop2ndOrder.signal_histogram`."""
        return self._bop().signal_histogram(bins, limit)

    def _bop(self) -> BopBase:
        if not isinstance(self.binary, BopBase):
            raise TypeError(f"{type(self.binary).__name__} keeps no counts of flips")
        return self.binary


def _check_claims(named: list[tuple[str, Tensor]], members: tuple[Optimizer, ...]) -> None:
    claims = [{id(p) for group in member.param_groups for p in group["params"]} for member in members]
    known = {id(p) for _, p in named}
    if any(not claim for claim in claims):
        raise ValueError("one of the optimizers claims no parameter")
    both = [name for name, p in named if all(id(p) in claim for claim in claims)]
    if both or claims[0] & claims[1]:
        raise ValueError(f"claimed by both optimizers: {', '.join(both) or 'a parameter that was not given'}")
    none = [name for name, p in named if not any(id(p) in claim for claim in claims)]
    if none:
        raise ValueError(f"claimed by no optimizer: {', '.join(none)}")
    if (claims[0] | claims[1]) - known:
        raise ValueError("the optimizers claim parameters that were not given, or that need no gradient")


def _step_traced(member: Optimizer) -> None:
    """Step under a compiler. torch wraps its optimizers' step into deliberate graph breaks, for a switch of
    gradient mode that has happened already here: the function inside is called."""
    if isinstance(member, (BopBase, MixedOptimizer)):
        member.step()
    else:
        inspect.unwrap(type(member).step)(member)


def _step_scaled(member: Optimizer, grad_scale: Tensor | None, found_inf: Tensor) -> None:
    """Step under a GradScaler: unscaling and skipping inside the member where it can, before it where not."""
    if getattr(member, "_step_supports_amp_scaling", False):
        member.grad_scale, member.found_inf = grad_scale, found_inf  # type: ignore[attr-defined]
        try:
            member.step()
        finally:
            del member.grad_scale, member.found_inf  # type: ignore[attr-defined]
        return
    if found_inf.item():  # as GradScaler itself does for such optimizers
        return
    if grad_scale is not None:
        inv_scale = grad_scale.double().reciprocal().float()
        for group in member.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(inv_scale.to(p.grad.device))
    member.step()
