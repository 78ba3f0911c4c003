"""MixedOptimizer: one optimizer object for a network of binary and real parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..binary_tensor import BinaryTensor
from . import checks, saved_state
from .base import BopBase
from .bop import Bop2ndOrder
from .distributed import local_tensor
from .telemetry import FlipCounts, LayerReport

Maker: TypeAlias = "Callable[[list[tuple[str, Tensor]]], Optimizer] | Optimizer"


def is_binary(name: str, p: Tensor) -> bool:
    """Whether a parameter is a BinaryTensor (the default routing)."""
    return isinstance(local_tensor(p), BinaryTensor)


class _JoinedState(MutableMapping[Tensor, Any]):
    """The members' states of the parameters in their groups as one mapping; a write goes to the owner."""

    def __init__(self, members: tuple[Optimizer, ...]) -> None:
        self._members = members

    def _owner(self, p: Tensor) -> Optimizer:
        for member in self._members:
            if any(p is q for group in member.param_groups for q in group["params"]):
                return member
        raise KeyError(p)

    def __getitem__(self, p: Tensor) -> Any:
        return self._owner(p).state[p]

    def __contains__(self, p: object) -> bool:
        return any(p is q for q in self)

    def __setitem__(self, p: Tensor, value: Any) -> None:
        self._owner(p).state[p] = value

    def __delitem__(self, p: Tensor) -> None:
        del self._owner(p).state[p]

    def __iter__(self) -> Iterator[Tensor]:
        for member in self._members:
            listed = {id(p) for group in member.param_groups for p in group["params"]}
            yield from [p for p in member.state if id(p) in listed]

    def __len__(self) -> int:
        return sum(1 for _ in self)


class _JoinedGroups(list[dict[str, Any]]):
    """The members' groups as one list; an edit of the list is an edit of theirs."""

    def __init__(self, mixed: MixedOptimizer, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups)
        self._mixed = mixed

    def __reduce__(self) -> Any:
        return list, (list(self),)


def _through(name: str) -> Callable[..., Any]:
    def edit(self: _JoinedGroups, *args: Any, **kwargs: Any) -> Any:
        edited = list(self)
        result = getattr(edited, name)(*args, **kwargs)
        self._mixed.param_groups = edited
        list.__init__(self, edited)
        return self if result is edited else result

    return edit


for _name in (
    *("append", "extend", "insert", "pop", "remove", "clear", "reverse", "sort"),
    *("__setitem__", "__delitem__", "__iadd__", "__imul__"),
):
    setattr(_JoinedGroups, _name, _through(_name))


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
    _ready = False

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
        self._ready = True

    # The members own what these stand for. Torch's constructor assigns empty ones first.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return _JoinedGroups(self, [group for member in self._members for group in member.param_groups])

    @param_groups.setter
    def param_groups(self, groups: Iterable[dict[str, Any]]) -> None:
        if not self._ready:
            return
        groups = list(groups)
        sides = [self._is_binary_group(group) for group in groups]
        if sides != sorted(sides, reverse=True):
            raise ValueError("param_groups of a MixedOptimizer are the binary groups, then the real ones")
        n_binary = sum(sides)
        for member, share in ((self.binary, groups[:n_binary]), (self.real, groups[n_binary:])):
            member.param_groups = share

    @property
    def state(self) -> Any:
        return _JoinedState(self._members)

    @state.setter
    def state(self, state: Mapping[Tensor, Any]) -> None:
        if not self._ready:
            return
        joined = _JoinedState(self._members)
        owners = [(joined._owner(p), p, own) for p, own in state.items()]
        for member in self._members:
            member.state.clear()
        for owner, p, own in owners:
            owner.state[p] = own

    def _is_binary_group(self, group: Mapping[str, Any]) -> bool:
        for member in self._members:
            if any(group is own for own in member.param_groups):
                return member is self.binary
        params = group["params"]
        owned = {id(p) for own in self.binary.param_groups for p in own["params"]}
        kinds = {id(p) in owned or is_binary("", p) for p in params}
        if len(kinds) > 1:
            raise ValueError("a group must be all binary or all real")
        return kinds == {True} or (not params and "gamma" in group)

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
        """One step of both members. Under a GradScaler nothing moves if any gradient is infinite or NaN.

        Raises:
            ValueError: a gradient that does not fit its parameter, as the members say. Nothing has been
                changed then, in neither of them.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            for member in self._members:
                _step_traced(member)
            return loss
        self._check_step()
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        # The real one first: a step that torch refuses has then changed no binary weight.
        for member in (self.real, self.binary):
            if found_inf is None:
                member.step()
            else:
                _step_scaled(member, grad_scale, found_inf)
        return loss

    def _check_step(self) -> None:
        for member in self._members:
            if isinstance(member, (BopBase, MixedOptimizer)):
                member._check_step()
            else:
                checks.other_optimizers_gradients(member)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop (or zero) the gradients of both members."""
        for member in self._members:
            member.zero_grad(set_to_none)

    # ------------------------------------------------------------------ saving, copying

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume both members from :meth:`state_dict`.

        Raises:
            ValueError: the number of groups or parameters does not fit, or a member refuses its part. Nothing
                is changed then.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        saved_state.paired(self.param_groups, state_dict)
        groups, n_binary = state_dict["param_groups"], len(self.binary.param_groups)
        parts = []
        for part in (groups[:n_binary], groups[n_binary:]):
            keys = {key for group in part for key in group["params"]}
            state = {key: value for key, value in state_dict["state"].items() if key in keys}
            parts.append({"state": state, "param_groups": part})
        if isinstance(self.binary, BopBase):
            self.binary._check_state_dict(parts[0])
        self.real.load_state_dict(parts[1])
        self.binary.load_state_dict(parts[0])
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        return {"defaults": self.defaults, "binary": self.binary, "real": self.real}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._members = (state["binary"], state["real"])
        super().__setstate__(state)
        self._ready = True

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
