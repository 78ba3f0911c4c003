"""Step each parameter inside backward, as soon as its gradient exists, and free that gradient at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .base import BopBase
from .mixed import MixedOptimizer


class StepInBackward:
    """What :func:`step_in_backward` returns: ``remove()``, or leaving a ``with`` block, ends it."""

    def __init__(self, handles: list[torch.utils.hooks.RemovableHandle]) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> StepInBackward:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def step_in_backward(model: nn.Module, optimizer: Optimizer) -> StepInBackward:
    """Make ``loss.backward()`` take the optimizer's steps; gradients never exist all at the same time.

    >>> bf.optim.step_in_backward(model, optimizer)
    >>> for x, y in batches:
    ...     loss_fn(model(x), y).backward()      # no step(), no zero_grad()

    Same bits as the ordinary step (with bf16 moments: other random bits of the same kind). Every backward is
    a step, so gradients cannot be accumulated over several, clipped by their common norm, or skipped by a
    GradScaler, which learns of an infinity too late. ``optimizer.step()`` afterwards finds nothing to do.

    Args:
        model: its parameters get the hooks.
        optimizer: Bop, Bop2ndOrder, a MixedOptimizer or another torch optimizer, for ``model``'s parameters.

    Raises:
        ValueError: a parameter of the optimizer that is not the model's, or gradients that wait for a step.
    """
    ours = {id(p) for p in model.parameters()}
    handles = []
    members = [optimizer.binary, optimizer.real] if isinstance(optimizer, MixedOptimizer) else [optimizer]
    owned = [(p, member) for member in members for group in member.param_groups for p in group["params"]]
    if any(id(p) not in ours for p, _ in owned):
        raise ValueError("the optimizer has parameters that are not the model's")
    if any(p.grad is not None for p, _ in owned):
        raise ValueError("there are gradients waiting for a step: take it, or call zero_grad(), first")
    for p, member in owned:
        if p.requires_grad:
            handles.append(p.register_post_accumulate_grad_hook(_Stepper(member)))
    return StepInBackward(handles)


class _Stepper:
    """The hook of one parameter: steps it and frees its gradient, in a time that does not depend on how many
    parameters the optimizer has."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._place = 0, 0  # group and index where the parameter was found last

    def __call__(self, p: Tensor) -> None:
        place = self._find(p)
        if place is None:
            return  # somebody took the parameter out of the optimizer
        g, i = self._place = place
        if isinstance(self._optimizer, BopBase):
            self._optimizer._step_only(g, i, p)
        else:
            _step_alone(self._optimizer, g, p)
        p.grad = None

    def _find(self, p: Tensor) -> tuple[int, int] | None:
        groups = self._optimizer.param_groups
        g, i = self._place
        if g < len(groups) and i < len(groups[g]["params"]) and groups[g]["params"][i] is p:
            return self._place
        places = [(g, i) for g, group in enumerate(groups) for i, q in enumerate(group["params"]) if q is p]
        return places[0] if places else None


def _step_alone(optimizer: Optimizer, g: int, p: Tensor) -> None:
    """Let an optimizer that is not ours see one parameter only, for one step."""
    groups = optimizer.param_groups
    group = groups[g]
    params = group["params"]
    optimizer.param_groups, group["params"] = [group], [p]
    try:
        optimizer.step()
    finally:
        optimizer.param_groups, group["params"] = groups, params
