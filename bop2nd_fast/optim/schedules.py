"""Every scheduler of ``torch.optim.lr_scheduler`` can drive any hyperparameter.

torch's schedulers know one thing about an optimizer: its groups' ``"lr"``. A :class:`Knob` is a tiny
optimizer whose ``"lr"`` *is* another optimizer's gamma, sigma or threshold, so the schedulers themselves are
used as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR

S = TypeVar("S")
_ROUNDING = 1e-12  # of the first value: the error of some thousand roundings in double precision


class _Slot(dict[str, Any]):
    """A group of a :class:`Knob`: ``"lr"`` reads and writes the target's hyperparameter, the rest is its own
    (schedulers keep ``initial_lr`` and the like there, so several on one group do not meet)."""

    def __init__(self, knob: Knob, index: int) -> None:
        self._knob, self._index = knob, index
        self._group = knob.target.param_groups[index]
        super().__init__(params=[], lr=self._group[knob.name])
        value = self["lr"]
        self._first = 0.0 if isinstance(value, Tensor) else abs(value)

    def group(self) -> dict[str, Any]:
        """The group that is driven: this object wherever it stands in the optimizer's list, or out of it.

        ``load_state_dict`` of torch's optimizers puts new objects in the groups' places; these are taken."""
        groups = self._knob.target.param_groups
        if not any(group is self._group for group in groups) and self._index < len(groups):
            new = groups[self._index]
            if self._knob.name in new and not self._knob.has_driven(new):
                self._group = new
        return self._group

    def position(self) -> int:
        """Where the driven group stands in the optimizer's list."""
        groups = self._knob.target.param_groups
        return next((i for i, group in enumerate(groups) if group is self.group()), self._index)

    def drives(self, group: dict[str, Any]) -> bool:
        return group is self._group

    def __getitem__(self, key: str) -> Any:
        return self.group()[self._knob.name] if key == "lr" else super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        return self["lr"] if key == "lr" else super().get(key, default)

    def __setitem__(self, key: str, value: Any) -> None:
        if key != "lr":
            super().__setitem__(key, value)
            return
        if not isinstance(value, Tensor) and -_ROUNDING * self._first < value < 0:
            value = 0.0  # schedulers multiply their way down, and may miss their end 0 by a rounding error
        self.group()[self._knob.name] = value


class Knob(Optimizer):
    """One hyperparameter of an optimizer, as an optimizer whose learning rate it is. Give it to schedulers
    that are composed of others; for a single one :func:`schedule` is shorter.

    >>> gamma = bf.optim.Knob(optimizer, "gamma")
    >>> warm, decay = LinearLR(gamma, 0.1, total_iters=100), ExponentialLR(gamma, 0.999)
    >>> scheduler = SequentialLR(gamma, [warm, decay], milestones=[100])

    Args:
        optimizer: whose hyperparameter it is; its own ``step`` is never called.
        name: ``"gamma"``, ``"sigma"``, ``"threshold"``, ``"lr"``...
        groups: indices of the param groups; default: every group that has ``name``.

    Raises:
        ValueError: no group, or one of ``groups``, has a hyperparameter of that name.
    """

    def __init__(self, optimizer: Optimizer, name: str, groups: Sequence[int] | None = None) -> None:
        having = [i for i, group in enumerate(optimizer.param_groups) if name in group]
        chosen = having if groups is None else [range(len(optimizer.param_groups))[i] for i in groups]
        if not chosen or not set(chosen) <= set(having):
            raise ValueError(f"hyperparameter {name!r} is in groups {having}, asked for {groups or 'any'}")
        self.target, self.name = optimizer, name
        self._slots: list[_Slot] = []
        self._slots = [_Slot(self, i) for i in chosen]
        super().__init__([torch.zeros(0)], {"lr": 0.0})
        self.param_groups = list(self._slots)
        # Schedulers warn when they step before their optimizer has; this one has nothing to step.
        self._opt_called = True

    def __getstate__(self) -> dict[str, Any]:
        own = [{key: value for key, value in slot.items() if key != "lr"} for slot in self._slots]
        places = [slot.position() for slot in self._slots]
        return {"target": self.target, "name": self.name, "places": places, "own": own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Knob.__init__(self, state["target"], state["name"], state["places"])
        for slot, own in zip(self._slots, state["own"], strict=True):
            slot.update(own)

    def has_driven(self, group: dict[str, Any]) -> bool:
        return any(slot.drives(group) for slot in self._slots)

    def __eq__(self, other: object) -> bool:
        """Equal to its target: trainers ask whether a scheduler's optimizer is one of theirs."""
        return other is self or other is self.target

    def __hash__(self) -> int:
        return hash(self.target)

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Does nothing: the target takes its own steps."""


def schedule(
    optimizer: Optimizer,
    name: str,
    scheduler: Callable[..., S],
    *args: Any,
    groups: Sequence[int] | None = None,
    **options: Any,
) -> S:
    """Make a torch scheduler that drives hyperparameter ``name``; what it returns is a plain torch object.

    >>> gamma = bf.optim.schedule(optimizer, "gamma", torch.optim.lr_scheduler.StepLR, step_size=100)
    >>> tau = bf.optim.schedule(optimizer, "threshold", torch.optim.lr_scheduler.ExponentialLR, 0.99)
    >>> optimizer.step(); gamma.step(); tau.step()

    Args:
        optimizer: any torch optimizer, :class:`MixedOptimizer` too.
        name: the hyperparameter.
        scheduler: a class of ``torch.optim.lr_scheduler``; it gets ``args`` and ``options``.
        groups: indices of the param groups; default: every group that has ``name``.

    To resume, load the optimizer's and the scheduler's ``state_dict``, in either order. (``OneCycleLR`` and
    ``CyclicLR`` want ``cycle_momentum=False``.)

    Raises:
        ValueError: no group has a hyperparameter of that name.
    """
    return scheduler(Knob(optimizer, name, groups), *args, **options)


def linear(
    optimizer: Optimizer,
    name: str,
    start: float,
    end: float,
    total_steps: int,
    groups: Sequence[int] | None = None,
) -> LinearLR:
    """A ``LinearLR`` that takes ``name`` from ``start`` to ``end`` over ``total_steps`` steps, up or down.

    After k steps the value is ``start + (end - start) * k / total_steps`` (the papers' schedule).

    >>> gamma = bf.optim.linear(optimizer, "gamma", 1e-2, 1e-5, total_steps=epochs * len(loader))

    Raises:
        ValueError: a start that is not positive (a multiple of 0 stays 0), an end below 0; no group with that
            hyperparameter.
    """
    if not (start > 0 and end >= 0):
        raise ValueError(
            f"a linear schedule of {name} starts above 0 and ends at 0 or above, not {start}, {end}"
        )
    knob, top = Knob(optimizer, name, groups), max(start, end)
    for group in knob.param_groups:
        group["lr"] = top
    return LinearLR(knob, start_factor=start / top, end_factor=end / top, total_iters=total_steps)
