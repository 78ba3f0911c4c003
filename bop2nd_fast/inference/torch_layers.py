"""Modules, functions and methods of torch that a file can hold beside layers and operators."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Modules a file can hold, with the attributes that are also their constructor's arguments.
_POOL = ("kernel_size", "stride", "padding")
_CONV = ("in_channels", "out_channels", *_POOL, "dilation", "groups", "padding_mode")
_NORM = ("num_features", "eps", "momentum", "affine", "track_running_stats")
MODULES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.AdaptiveAvgPool2d: ("output_size",),
    nn.AvgPool2d: (*_POOL, "ceil_mode", "count_include_pad", "divisor_override"),
    nn.BatchNorm1d: _NORM,
    nn.BatchNorm2d: _NORM,
    nn.Conv1d: _CONV,
    nn.Conv2d: _CONV,
    nn.ELU: ("alpha",),
    nn.Flatten: ("start_dim", "end_dim"),
    nn.GELU: ("approximate",),
    nn.GroupNorm: ("num_groups", "num_channels", "eps", "affine"),
    nn.Hardswish: (),
    nn.Hardtanh: ("min_val", "max_val"),
    nn.LayerNorm: ("normalized_shape", "eps", "elementwise_affine"),
    nn.LeakyReLU: ("negative_slope",),
    nn.Linear: ("in_features", "out_features"),
    nn.LogSoftmax: ("dim",),
    nn.MaxPool2d: (*_POOL, "dilation", "return_indices", "ceil_mode"),
    nn.PReLU: ("num_parameters",),
    nn.ReLU: (),
    nn.ReLU6: (),
    nn.SiLU: (),
    nn.Sigmoid: (),
    nn.Softmax: ("dim",),
    nn.Tanh: (),
    nn.Unflatten: ("dim", "unflattened_size"),
    nn.ZeroPad2d: ("padding",),
}
_MODULE_NAMES = {cls.__name__: cls for cls in MODULES}

# Functions and tensor methods a file can hold.
_OF_OPERATOR = "add floordiv getitem iadd imul isub mul neg sub truediv"
_OF_TORCH = (
    "abs add cat clamp exp flatten log_softmax mean mul neg relu reshape sigmoid sign softmax sub sum tanh"
)
_OF_F = (
    "adaptive_avg_pool2d avg_pool2d gelu hardtanh interpolate leaky_relu log_softmax max_pool2d pad relu "
    "relu6 softmax"
)
_OF_TENSORS = (
    "abs add add_ clamp clamp_ contiguous exp expand flatten float mean mul mul_ neg permute relu relu_ "
    "reshape sigmoid size softmax squeeze sub sub_ sum t tanh transpose unflatten unsqueeze view"
)
FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"{prefix}.{name}": getattr(module, name)
    for prefix, module, names in (
        ("operator", operator, _OF_OPERATOR),
        ("torch", torch, _OF_TORCH),
        ("F", F, _OF_F),
    )
    for name in names.split()
}
_FUNCTION_NAMES: dict[Any, str] = {function: name for name, function in FUNCTIONS.items()}
METHODS = frozenset(_OF_TENSORS.split())


def is_plain(module: nn.Module) -> bool:
    """Whether a module does what its class says: the class's ``forward``, no hooks, no parametrization."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return not hooks and not hasattr(module, "parametrizations") and "forward" not in vars(module)


def describe_module(name: str, layer: nn.Module) -> dict[str, Any]:
    if type(layer) not in MODULES or not is_plain(layer):
        raise ValueError(
            f"layer {name!r} is a {type(layer).__qualname__}{'' if is_plain(layer) else ' with hooks'}, "
            f"which a file cannot hold. Beside packed layers it can hold {', '.join(sorted(_MODULE_NAMES))}"
        )
    config = {key: getattr(layer, key) for key in MODULES[type(layer)]}
    if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.LayerNorm)):
        config["bias"] = layer.bias is not None
    if getattr(layer, "inplace", False):
        config["inplace"] = True
    return {"class": type(layer).__name__, "config": config}


def build_module(
    name: str, class_name: str, settings: dict[str, Any], tensors: dict[str, Tensor]
) -> nn.Module:
    if class_name not in _MODULE_NAMES:
        raise ValueError(f"layer {name!r} is of unknown kind {class_name!r}")
    cls = _MODULE_NAMES[class_name]
    if unknown := set(settings) - {*MODULES[cls], "bias", "inplace"}:
        raise ValueError(f"layer {name!r}: {cls.__name__} has no settings {sorted(unknown)}")
    with torch.device("meta"):
        module = cls(**settings)
    module.load_state_dict(tensors, strict=True, assign=True)
    return module


def target_name(what: str, target: Any) -> str:
    if isinstance(target, str):
        if target not in METHODS:
            raise ValueError(f"{what} calls the tensor method {target!r}, which a file cannot hold")
        return target
    if target not in _FUNCTION_NAMES:
        shown = getattr(target, "__qualname__", target)
        raise ValueError(f"{what} calls the function {shown}, which a file cannot hold")
    return _FUNCTION_NAMES[target]
