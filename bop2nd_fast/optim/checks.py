"""What is checked before a step, a group or a saved state changes anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..binary_tensor import BinaryTensor, check_plus_minus_one
from .distributed import local_tensor
from .group import HyperGroup, Range
from .plan import Lane, Plan, State, is_laid_like

MOMENT_DTYPES = (torch.float32, torch.bfloat16)
# Of gradients and dense weights; the contract is in ops/bop_step.py.
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (Tensor, torch.nn.Parameter)


# ------------------------------------------------------------------------------------------------ groups


def option(name: str, value: Any, together: Mapping[str, Any]) -> Any:
    """Raise if a group's item may not have this value, alone or with the others; returns it as plain type."""
    if name == "moment_dtype" and value not in MOMENT_DTYPES:
        raise ValueError(f"moment_dtype must be one of {MOMENT_DTYPES}, got {value}")
    if name in ("warmup_steps", "seed"):
        if isinstance(value, bool) or not isinstance(value, Integral) or (name != "seed" and value < 0):
            wanted = "an integer" if name == "seed" else "an integer >= 0"
            raise ValueError(f"{name} must be {wanted}, got {value!r}")
        value = int(value)
    if name in ("maximize", "capturable"):
        if type(value).__name__ not in ("bool", "bool_"):  # numpy's too
            raise ValueError(f"{name} must be True or False, got {value!r}")
        value = bool(value)
    if name == "target_flip_rate" and value is not None:
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < 1:
            raise ValueError(f"target_flip_rate must be None or in (0, 1), got {value!r}")
        value = float(value)
    if name in ("threshold", "target_flip_rate") and together.get("target_flip_rate") is not None:
        threshold = together["threshold"]
        if not isinstance(threshold, Tensor) and threshold == 0:
            raise ValueError("target_flip_rate multiplies the threshold, so the threshold must be > 0")
    return value


def one_device(params: Iterable[Tensor]) -> None:
    devices = {p.device for p in params}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"a group's parameters must share a device, got {names}: use a group for each")


def knobs(group: HyperGroup, ranges: Mapping[str, Range], params: Sequence[Tensor]) -> None:
    """Values that contradict the parameters."""
    for name in ranges:
        value = group[name]
        if isinstance(value, Tensor) and group["capturable"] and params and value.device != params[0].device:
            raise ValueError(
                f"with capturable=True, {name} must lie on {params[0].device}, got {value.device}"
            )
    if group["target_flip_rate"] is not None and any(hasattr(p, "to_local") for p in params):
        raise ValueError(
            "target_flip_rate steers by the flips of a whole parameter; of a sharded one each process counts "
            "only its block"
        )


def is_group(g: int, group: Any) -> None:
    if not isinstance(group, dict):
        raise TypeError(f"param_groups[{g}] is of type {type(group).__name__}; a param group is a dict")
    if "params" not in group:
        raise ValueError(f"param_groups[{g}] has no 'params'")


def each_once(groups: Sequence[Mapping[str, Any]]) -> None:
    """A parameter that two groups (or one group twice) hold would be stepped twice."""
    seen: dict[int, int] = {}
    for g, group in enumerate(groups):
        for p in group["params"]:
            if id(p) in seen:
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} is in param_groups[{seen[id(p)]}] and in "
                    f"param_groups[{g}]: it may be in one group only, once"
                )
            seen[id(p)] = g


def weight(p: Any, what: str) -> None:
    """Raise unless ``p`` (a local block) can be stepped: packed, or dense +-1 in a dtype of the step."""
    if not isinstance(p, Tensor) or not p.is_floating_point():
        kind = f"a tensor of {p.dtype}" if isinstance(p, Tensor) else type(p).__name__
        raise TypeError(f"{what} must be a floating point tensor or a BinaryTensor, got {kind}")
    if isinstance(p, BinaryTensor):
        return
    if p.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{what} is {p.dtype}; dense weights may be {_names(FLOAT_DTYPES)}")
    if p.is_meta:
        return
    if p.numel() and not is_laid_like(p, p):
        raise ValueError(
            f"{what} must be dense in memory, got strides {p.stride()} for shape {tuple(p.shape)}"
        )
    check_plus_minus_one(p, what)


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


# ------------------------------------------------------------------------------------------------- steps


def parameter(p: Tensor, lane: Lane | None) -> None:
    """Raise unless the gradient of ``p`` fits and can be read, and a dense weight is still +-1."""
    grad = p.grad
    assert grad is not None
    shape, dtype = grad.shape, grad.dtype
    if grad.layout != torch.strided:
        raise ValueError(
            f"gradient of a parameter of shape {tuple(p.shape)} is {grad.layout}; it must be dense"
        )
    if shape != p.shape or grad.device != p.device or not dtype.is_floating_point:
        raise ValueError(
            f"gradient ({tuple(shape)}, {dtype}, {grad.device}) does not fit its parameter "
            f"({tuple(p.shape)}, {p.dtype}, {p.device})"
        )
    if dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"gradient of a parameter of shape {tuple(shape)} is {dtype}; it may be {_names(FLOAT_DTYPES)}"
        )
    if lane is not None and lane.is_packed and not lane.is_sharded:
        return
    local = local_tensor(p)
    if local_tensor(grad).shape != local.shape:
        raise ValueError(
            f"gradient of a sharded parameter of shape {tuple(p.shape)} is not sharded alike: this process "
            f"has {tuple(local_tensor(grad).shape)} of it and {tuple(local.shape)} of the parameter"
        )
    # Somebody else may have written to it. Versions do not tell of writes through `.data`, so on CPUs the
    # values do; on accelerators reading them would synchronise at every step.
    if lane is None or local.is_cpu or lane.version != p._version or lane.dtype != local.dtype:
        if type(local) in _PLAIN and backends.all_signs(local):
            return  # which says all that `weight` asks
        weight(local, f"parameter of shape {tuple(p.shape)}")


def capture(plans: Iterable[Plan]) -> None:
    """Raise in a CUDA graph capture unless every group is meant for one."""
    if not torch.cuda.is_initialized():  # nothing is captured, and without a driver the question is an error
        return
    if torch.cuda.is_current_stream_capturing() and not all(plan.capturable for plan in plans):
        raise RuntimeError(
            "a CUDA graph captures this step, and capturable is False: schedules would not reach the graph, "
            "whose step would read freed memory. Make the optimizer with capturable=True"
        )


def other_optimizers_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Raise if a gradient does not fit its parameter, in an optimizer that is not ours."""
    takes_sparse = isinstance(optimizer, (torch.optim.SGD, torch.optim.SparseAdam, torch.optim.Adagrad))
    for group in optimizer.param_groups:
        for p in group["params"]:
            grad = p.grad
            if grad is None:
                continue
            if grad.layout != torch.strided and not takes_sparse:
                raise ValueError(
                    f"gradient of a parameter of shape {tuple(p.shape)} is {grad.layout}, which "
                    f"{type(optimizer).__name__} does not take"
                )
            if grad.shape != p.shape or grad.device != p.device or grad.dtype != p.dtype:
                raise ValueError(
                    f"gradient ({tuple(grad.shape)}, {grad.dtype}, {grad.device}) does not fit its parameter "
                    f"({tuple(p.shape)}, {p.dtype}, {p.device})"
                )


# ------------------------------------------------------------------------------------------------- state


def states(params: Iterable[Tensor], state: State, moments: Sequence[str]) -> None:
    """Raise if the state of one of ``params`` cannot be its own: names, kinds, shapes; no moment twice."""
    seen: set[int] = set()
    for p in params:
        if not (own := state.get(p)):
            continue
        own_state(p, own, moments, f"the state of a parameter of shape {tuple(p.shape)}")
        for name in moments:
            if id(own[name]) in seen:
                raise ValueError(f"two parameters share one {name}; each needs its own")
            seen.add(id(own[name]))


def own_state(p: Tensor, own: Mapping[str, Any], moments: Sequence[str], what: str) -> None:
    """Raise if ``own`` is not a state of parameter ``p``."""
    wanted = {"step", *moments}
    if set(own) - {"threshold_scale"} != wanted:
        raise ValueError(f"{what} has {sorted(map(str, own))}; this optimizer keeps {sorted(wanted)}")
    for name in moments:
        moment = own[name]
        if not isinstance(moment, Tensor) or not moment.is_floating_point():
            kind = moment.dtype if isinstance(moment, Tensor) else type(moment).__name__
            raise ValueError(f"{name} of {what} must be a floating tensor, got {kind}")
        if moment.shape != p.shape:
            raise ValueError(f"{name} of {what} has shape {tuple(moment.shape)}, not {tuple(p.shape)}")
    for name in ("step", "threshold_scale"):
        value = own.get(name, 0)
        if not isinstance(value, Real) and not (isinstance(value, Tensor) and value.numel() == 1):
            raise ValueError(f"{name} of {what} must be one number, got {value!r}")
