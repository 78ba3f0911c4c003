"""The packed file: one safetensors file, no code in it.

Tensors are named ``<layer>.<tensor>``: int32 words and thresholds, and real parameters as they were. The
metadata holds ``format`` (what the file is), ``version``, ``graph`` (JSON: inputs, steps, layers with their
plain settings, and the Layout of every packed tensor) and ``sha256`` over version, graph and the bytes of all
tensors. A reader needs only the layer kinds, torch modules and functions listed here; nothing else can be in
a file.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..atomic_write import atomic_write
from ..binary_tensor import BinaryTensor, Layout
from .chains import is_plain
from .layers import LAYERS, dtype_name
from .packed_layer import PackedLayer
from .packed_model import InputSpec, PackedModel, Ref, Step, references

FORMAT = "bop2nd_fast.packed_model"
FORMAT_VERSION = 1

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

# Arguments that are constants of torch, by the key that names their kind in a file.
_CONSTANTS: dict[str, type] = {"dtype": torch.dtype, "memory_format": torch.memory_format}


class PackedFileError(ValueError):
    """The file is not a packed model, is damaged, or is of a format version this package does not read."""


# ------------------------------------------------------------------------------------------- saving


def save(model: PackedModel, path: str | Path) -> None:
    """Write a packed model; an existing file is replaced only by a complete one.

    Raises:
        ValueError: a module, function or argument that a file cannot hold; nothing is written.
    """
    tensors: dict[str, Tensor] = {}
    layers = {name: _describe_layer(name, layer, tensors) for name, layer in model.layers.items()}
    graph = json.dumps(
        {
            "inputs": [{"shape": s.shape, "dtype": dtype_name(s.dtype)} for s in model.inputs],
            "steps": [_describe_step(step) for step in model.steps],
            "layers": layers,
        },
        separators=(",", ":"),
    )
    metadata = {
        "format": FORMAT,
        "version": str(FORMAT_VERSION),
        "graph": graph,
        "sha256": _digest(str(FORMAT_VERSION), graph, tensors),
    }
    data = _in_fixed_order(safetensors.torch.save(tensors, metadata))
    atomic_write(path, lambda file: file.write(data))


def _in_fixed_order(data: bytes) -> bytes:
    """The same safetensors file with its metadata sorted: one model always gives the same bytes."""
    end = 8 + int.from_bytes(data[:8], "little")
    fields = json.loads(data[8:end])
    metadata = dict(sorted(fields.pop("__metadata__").items()))
    header = json.dumps({"__metadata__": metadata, **fields}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors start on 8 bytes
    return len(header).to_bytes(8, "little") + header + data[end:]


def _describe_layer(name: str, layer: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Any]:
    layouts = {}
    for key, tensor in layer.state_dict().items():
        if isinstance(tensor, BinaryTensor):
            layouts[key] = tensor.bit_layout.to_dict()
            tensor = tensor.words
        tensors[f"{name}.{key}"] = tensor.detach().cpu().contiguous().clone()
    if isinstance(layer, PackedLayer):
        return {"kind": layer.kind, "config": layer.config, "layouts": layouts}
    if type(layer) not in MODULES or not is_plain(layer):
        raise ValueError(
            f"layer {name!r} is a {type(layer).__qualname__}{'' if is_plain(layer) else ' with hooks'}, "
            f"which a file cannot hold. Beside packed layers it can hold {', '.join(sorted(_MODULE_NAMES))}"
        )
    config = {key: _encode(getattr(layer, key), f"layer {name!r}") for key in MODULES[type(layer)]}
    if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.LayerNorm)):
        config["bias"] = layer.bias is not None
    if getattr(layer, "inplace", False):
        config["inplace"] = True
    return {"kind": "torch", "class": type(layer).__name__, "config": config}


def _describe_step(step: Step) -> dict[str, Any]:
    what = f"step {step.name!r}"
    target = step.target
    if step.kind == "method" and target not in METHODS:
        raise ValueError(f"{what} calls the tensor method {target!r}, which a file cannot hold")
    if step.kind == "function":
        if target not in _FUNCTION_NAMES:
            shown = getattr(target, "__qualname__", target)
            raise ValueError(f"{what} calls the function {shown}, which a file cannot hold")
        target = _FUNCTION_NAMES[target]
    return {
        "name": step.name,
        "kind": step.kind,
        "target": target,
        "args": [_encode(a, what) for a in step.args],
        "kwargs": {key: _encode(a, what) for key, a in step.kwargs.items()},
    }


def _encode(tree: Any, what: str) -> Any:
    """Arguments as JSON; what JSON does not know becomes an object with one key."""
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    if isinstance(tree, Ref):
        return {"ref": tree.name}
    for key, kind in _CONSTANTS.items():
        if isinstance(tree, kind):
            return {key: str(tree).removeprefix("torch.")}
    if isinstance(tree, slice):
        return {"slice": [_encode(v, what) for v in (tree.start, tree.stop, tree.step)]}
    if tree is Ellipsis:
        return {"ellipsis": True}
    if isinstance(tree, tuple):
        return {"tuple": [_encode(v, what) for v in tree]}
    if isinstance(tree, list):
        return [_encode(v, what) for v in tree]
    if isinstance(tree, dict):
        return {"dict": [[_encode(k, what), _encode(v, what)] for k, v in tree.items()]}
    raise ValueError(f"{what} has an argument of type {type(tree).__name__}, which a file cannot hold")


def _digest(version: str, graph: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(f"{FORMAT}\n{version}\n{graph}\n".encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------ loading


def load(path: str | Path, device: torch.device | str = "cpu") -> PackedModel:
    """Read a packed model. Needs neither the class of the trained model nor anything but this package.

    Raises:
        FileNotFoundError: no such file.
        PackedFileError: not a packed model, truncated or altered, or of another format version.
    """
    with torch.inference_mode(False), torch.no_grad():
        graph, tensors = _read(Path(path))
        try:
            model = _build(graph, tensors)
        except (KeyError, TypeError, IndexError, AttributeError, ValueError, RuntimeError) as error:
            raise PackedFileError(f"{path}: the graph does not describe a model: {error}") from error
        return model.to(device).prepare()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors, checked: what it is, that this package reads it, that nothing was altered."""
    with path.open("rb"):  # a missing or unreadable file is the caller's OSError
        pass
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_kind(path, metadata)
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise PackedFileError(f"{path} is damaged or not a packed model: {error}") from error
    if _digest(metadata["version"], metadata.get("graph", ""), tensors) != metadata.get("sha256"):
        raise PackedFileError(f"{path} was altered after it was written: its checksum does not match")
    return json.loads(metadata["graph"]), tensors


def _check_kind(path: Path, metadata: dict[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise PackedFileError(f"{path} is a safetensors file, but not a packed model of bop2nd_fast")
    version = metadata.get("version", "")
    if not version.isdecimal():
        raise PackedFileError(f"{path} is damaged: {version!r} is not a format version")
    if int(version) > FORMAT_VERSION:
        raise PackedFileError(
            f"{path} has format version {version}; this bop2nd_fast reads {FORMAT_VERSION}: use a newer one"
        )
    if int(version) != FORMAT_VERSION:
        raise PackedFileError(f"{path} has format version {version}, which does not exist")


def _build(graph: dict[str, Any], tensors: dict[str, Tensor]) -> PackedModel:
    layers: dict[str, nn.Module] = {}
    for name, described in graph["layers"].items():
        own = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
        layers[name] = _build_layer(name, described, own)
    steps = [_build_step(described) for described in graph["steps"]]
    inputs = [InputSpec(tuple(s["shape"]), getattr(torch, s["dtype"])) for s in graph["inputs"]]
    known: set[str] = set()
    for step in steps:
        if step.kind == "layer" and step.target not in layers:
            raise ValueError(f"step {step.name!r} calls layer {step.target!r}, which is not in the file")
        if missing := references(step) - known:
            raise ValueError(f"step {step.name!r} reads {sorted(missing)}, which no earlier step makes")
        known.add(step.name)
    if not steps or steps[-1].kind != "output" or sum(s.kind == "input" for s in steps) != len(inputs):
        raise ValueError("its inputs or its output are missing")
    return PackedModel(steps, layers, inputs)


def _build_layer(name: str, described: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    kind, config = described["kind"], described["config"]
    if kind in LAYERS:
        for key, layout in described["layouts"].items():
            tensors[key] = BinaryTensor(tensors[key], Layout.from_dict(layout))
        return LAYERS[kind](**tensors, **config)
    if kind != "torch" or described["class"] not in _MODULE_NAMES:
        raise ValueError(f"layer {name!r} is of unknown kind {described.get('class', kind)!r}")
    cls = _MODULE_NAMES[described["class"]]
    settings = {key: _decode(value) for key, value in config.items()}
    if unknown := set(settings) - {*MODULES[cls], "bias", "inplace"}:
        raise ValueError(f"layer {name!r}: {cls.__name__} has no settings {sorted(unknown)}")
    with torch.device("meta"):
        module = cls(**settings)
    module.load_state_dict(tensors, strict=True, assign=True)
    return module


def _build_step(described: dict[str, Any]) -> Step:
    kind, target = described["kind"], described["target"]
    if kind not in ("input", "layer", "function", "method", "output"):
        raise ValueError(f"step {described['name']!r} is of unknown kind {kind!r}")
    if kind == "method" and target not in METHODS:
        raise ValueError(f"step {described['name']!r} calls an unknown method {target!r}")
    if kind == "function":
        target = FUNCTIONS[target]
    args = tuple(_decode(a) for a in described["args"])
    kwargs = {key: _decode(value) for key, value in described["kwargs"].items()}
    return Step(described["name"], kind, target, args, kwargs)


def _decode(tree: Any) -> Any:
    if isinstance(tree, list):
        return [_decode(v) for v in tree]
    if not isinstance(tree, dict):
        return tree
    ((key, value),) = tree.items()
    if key == "ref":
        return Ref(value)
    if key in _CONSTANTS:
        constant = getattr(torch, value)
        if not isinstance(constant, _CONSTANTS[key]):
            raise ValueError(f"{value!r} is not a {key.replace('_', ' ')}")
        return constant
    if key == "slice":
        return slice(*(_decode(v) for v in value))
    if key == "ellipsis":
        return Ellipsis
    if key == "tuple":
        return tuple(_decode(v) for v in value)
    if key == "dict":
        return {_decode(k): _decode(v) for k, v in value}
    raise ValueError(f"unknown argument {key!r}")
