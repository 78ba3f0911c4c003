"""Loading an optimizer's ``state_dict``: everything is checked before anything changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .group import HyperGroup

if TYPE_CHECKING:
    from .base import BopBase


def load(optimizer: BopBase, state_dict: dict[str, Any]) -> None:
    """``optimizer.load_state_dict``: hooks, checks, groups in place, state laid out like the parameters."""
    state_dict = state_dict.copy()
    for pre_hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        replaced = pre_hook(optimizer, state_dict)
        if replaced is not None:
            state_dict = replaced
    saved_groups = state_dict["param_groups"]
    pairs = _paired(optimizer, saved_groups)
    saved_states = {id(p): state_dict["state"].get(key, {}) for p, key in pairs}
    for p, key in pairs:
        _check_state(optimizer, p, saved_states[id(p)], f"parameter {key}")
    for group, saved in zip(optimizer.param_groups, saved_groups, strict=True):
        assert isinstance(group, HyperGroup)
        group.check_all({name: value for name, value in saved.items() if name != "params"})

    optimizer.state.clear()
    for group, saved in zip(optimizer.param_groups, saved_groups, strict=True):
        states = {p: dict(saved_states[id(p)]) for p in group["params"] if saved_states[id(p)]}
        merge_steps(states)
        for p, state in states.items():
            optimizer.state[p] = {name: _taken(p, name, value) for name, value in state.items()}
        assert isinstance(group, HyperGroup)
        group.load(saved)
    optimizer._plans = [optimizer._plan(group) for group in optimizer.param_groups]  # type: ignore[arg-type]
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def merge_steps(states: dict[Tensor, dict[str, Any]]) -> None:
    """Give parameters with equal step counts one step tensor: from here on they may step together.

    Files do not keep which tensors were one. Synchronises.
    """
    shared: dict[int, Tensor] = {}
    for p, state in states.items():
        count = int(state["step"])
        if count not in shared:
            shared[count] = torch.full((), count, dtype=torch.int64, device=p.device)
        state["step"] = shared[count]


def _paired(optimizer: BopBase, saved_groups: list[dict[str, Any]]) -> list[tuple[Tensor, Any]]:
    groups = optimizer.param_groups
    if len(groups) != len(saved_groups):
        raise ValueError(
            f"the saved state has {len(saved_groups)} parameter groups, this optimizer {len(groups)}"
        )
    pairs = []
    for i, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        if len(group["params"]) != len(saved["params"]):
            raise ValueError(
                f"group {i} of the saved state has {len(saved['params'])} parameters, "
                f"this optimizer's has {len(group['params'])}"
            )
        pairs += list(zip(group["params"], saved["params"], strict=True))
    return pairs


def _check_state(optimizer: BopBase, p: Tensor, state: dict[str, Any], what: str) -> None:
    if not state:
        return
    wanted = {"step", *optimizer._moments}
    if set(state) - {"threshold_scale"} != wanted:
        raise ValueError(
            f"the saved state of {what} has {sorted(state)}; "
            f"{type(optimizer).__name__} keeps {sorted(wanted)}"
        )
    for name in optimizer._moments:
        if state[name].shape != p.shape:
            raise ValueError(
                f"the saved {name} of {what} has shape {tuple(state[name].shape)}, "
                f"the parameter {tuple(p.shape)}"
            )


def _taken(p: Tensor, name: str, value: Any) -> Any:
    """A copy of one entry on the parameter's device; moments in its memory order and their own precision."""
    if name == "step":
        return value  # made by merge_steps
    if name == "threshold_scale":
        return value.detach().to(p.device, torch.float64, copy=True)
    return torch.zeros_like(p, dtype=value.dtype).copy_(value)
