"""A saved optimizer state and the parameters that it belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def paired(groups: Sequence[Mapping[str, Any]], state_dict: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """The saved state of every parameter of ``groups`` by its id, {} where there is none.

    Raises:
        ValueError: ``state_dict`` is none, or has other numbers of groups or parameters.
    """
    if not isinstance(state_dict.get("param_groups"), Sequence) or not isinstance(
        state_dict.get("state"), Mapping
    ):
        raise ValueError(f"this is no optimizer's state_dict: it has {sorted(map(str, state_dict))}")
    saved_groups = state_dict["param_groups"]
    if len(groups) != len(saved_groups):
        raise ValueError(
            f"the saved state has {len(saved_groups)} parameter groups, this optimizer {len(groups)}"
        )
    states = {}
    for i, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        if len(group["params"]) != len(saved["params"]):
            raise ValueError(
                f"group {i} of the saved state has {len(saved['params'])} parameters, "
                f"this optimizer's has {len(group['params'])}"
            )
        for p, key in zip(group["params"], saved["params"], strict=True):
            states[id(p)] = dict(state_dict["state"].get(key, {}))
    return states


def taken(params: Iterable[Tensor], states: Mapping[int, Mapping[str, Any]]) -> dict[Tensor, dict[str, Any]]:
    """Copies of the saved states of a group's parameters on their devices; moments in their own precision.

    Equal step counts become one tensor: these parameters may step together. Files do not keep which tensors
    were one. Synchronises.
    """
    shared: dict[int, Tensor] = {}
    result = {}
    for p in params:
        if not (saved := states[id(p)]):
            continue
        count = int(saved["step"])
        if count not in shared:
            shared[count] = torch.full((), count, dtype=torch.int64, device=p.device)
        own: dict[str, Any] = {"step": shared[count]}
        for name, value in saved.items():
            if name == "threshold_scale":
                own[name] = torch.as_tensor(value).detach().to(p.device, torch.float64, copy=True).reshape(())
            elif name != "step":
                own[name] = torch.zeros_like(p, dtype=value.dtype).copy_(value)
        result[p] = own
    return result
