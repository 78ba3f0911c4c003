"""The packed file: one safetensors file, no code in it. ``docs/packed_file.md`` is its specification.

Whoever reads one needs only the layer kinds and operators that are listed there; nothing else can be in a
file. A checksum covers all of it, and nothing that it covers is trusted: references, shapes, attributes, tail
bits and sizes are checked one by one, and a file that is refused has run nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..atomic_write import atomic_write
from ..binary_tensor import LAYOUT_VERSION, BinaryTensor, Layout
from . import graph_json as gj
from . import tensor_file
from .kinds import LAYERS
from .layers import DTYPES
from .memory import LIMIT
from .packed_layer import PackedLayer
from .packed_model import PackedModel
from .tensor_file import PackedFileError, printable

FORMAT = "bop2nd_fast.packed_model"
FORMAT_VERSION = 2
# What torch and Python raise for arguments that make no sense, once the reader's own checks have passed.
_MALFORMED = (KeyError, TypeError, IndexError, AttributeError, ValueError, RuntimeError, OverflowError)

__all__ = ["FORMAT", "FORMAT_VERSION", "PackedFileError", "load", "save"]


# ------------------------------------------------------------------------------------------- saving


def save(model: PackedModel, path: str | Path) -> None:
    """Write a packed model; an existing file is replaced only by a complete one.

    Raises:
        ValueError: a module, function or argument that a file cannot hold; nothing is written.
    """
    data = to_bytes(model)
    atomic_write(path, lambda file: file.write(data))


def to_bytes(model: PackedModel) -> bytes:
    """The file's bytes: the same model always gives the same ones."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.constants.items():
        tensors[f"constants.{gj.text(name, 'a constant')}"] = _plain(tensor, name)
    layers = {name: _describe_layer(name, layer, tensors) for name, layer in model.layers.items()}
    names = [step.name for step in model.steps if step.kind == "input"]
    graph = {
        "signature": gj.encode_signature(model.signature),
        "inputs": [gj.encode_input(n, spec) for n, spec in zip(names, model.inputs, strict=True)],
        "constants": list(model.constants),
        "layers": layers,
        "steps": [gj.encode_step(step, dict(model.layers.items())) for step in model.steps],
    }
    metadata = {
        "format": FORMAT,
        "version": str(FORMAT_VERSION),
        "profile": model.profile.name,
        "graph": json.dumps(graph, separators=(",", ":"), ensure_ascii=True, allow_nan=False),
    }
    metadata["sha256"] = tensor_file.checksum(metadata, tensors)
    return tensor_file.write(metadata, tensors)


def _describe_layer(name: str, layer: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Any]:
    gj.text(name, "a layer")
    if not isinstance(layer, PackedLayer):
        raise ValueError(f"layer {name!r} is a {type(layer).__qualname__}, which a file cannot hold")
    own = layer.state_dict()
    layouts = {}
    for key, tensor in own.items():
        if isinstance(tensor, BinaryTensor):
            layouts[key] = tensor.bit_layout.to_dict()
            tensor = tensor.words
        tensors[f"layers.{name}.{key}"] = _plain(tensor, name)
    attributes = {key: layer.config.get(key) for key in layer.attributes}
    encoded = {key: gj.encode(value, f"layer {name!r}") for key, value in attributes.items()}
    return {"kind": layer.kind, "attributes": encoded, "tensors": list(own), "layouts": layouts}


def _plain(tensor: Tensor, name: str) -> Tensor:
    if not tensor_file.known(tensor):
        raise ValueError(f"{name!r} holds a tensor of {tensor.dtype}, which a file cannot hold")
    return tensor.detach().cpu().contiguous()


# ------------------------------------------------------------------------------------------ loading


def load(path: str | Path, device: torch.device | str = "cpu") -> PackedModel:
    """Read a packed model. Needs neither the class of the trained model nor anything but this package.

    The time is linear in the file's size, the memory at most 32 times it (re-laid weights of few outputs; a
    graph's text takes most). Calls of the model are bounded too: see ``PackedModel.memory_limit``.

    Raises:
        OSError: no such file, or one that cannot be read.
        PackedFileError: not a packed model, truncated or altered, of another format version, or one that
            contradicts itself.
    """
    with torch.inference_mode(False), torch.no_grad():
        try:
            model = _read(Path(path))
        except PackedFileError as error:
            raise PackedFileError(f"{printable(path)}: {printable(error)}") from None
    return model.to(device).prepare()


def _read(path: Path) -> PackedModel:
    metadata, tensors = tensor_file.read(path)
    _check_kind(metadata)
    if tensor_file.checksum(metadata, tensors) != metadata["sha256"]:
        raise PackedFileError("it was altered after it was written: its checksum does not match")
    graph = tensor_file.parse_json(metadata["graph"])
    try:
        model = _build(graph, tensors)
        profile = model.profile
    except (
        KeyError,
        TypeError,
        IndexError,
        AttributeError,
        ValueError,
        RuntimeError,
        OverflowError,
    ) as error:
        raise PackedFileError(f"the graph does not describe a model: {error}") from error
    if profile.name != metadata["profile"]:
        reasons = "; ".join(profile.because[:3])
        raise PackedFileError(f"it says profile {metadata['profile']!r}, but is {profile.name!r}: {reasons}")
    return model


def _check_kind(metadata: dict[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise PackedFileError("a safetensors file, but not a packed model of bop2nd_fast")
    version = metadata.get("version", "")
    if not version.isascii() or not version.isdecimal() or len(version) > 9:
        raise PackedFileError(f"damaged: {version!r} is not a format version")
    if int(version) > FORMAT_VERSION:
        raise PackedFileError(
            f"it has format version {version}; this bop2nd_fast reads {FORMAT_VERSION}: use a newer one"
        )
    if int(version) != FORMAT_VERSION:
        raise PackedFileError(f"it has format version {version}, which does not exist")
    if metadata.keys() != {"format", "version", "profile", "graph", "sha256"}:
        raise PackedFileError(f"damaged: its metadata has the keys {sorted(metadata)}")


def _build(graph: Any, tensors: dict[str, Tensor]) -> PackedModel:
    signature, inputs, constants, layers, steps = gj.fields(
        graph, ("signature", "inputs", "constants", "layers", "steps"), "the graph"
    )
    left = dict(tensors)
    held = _take("constants", constants, left)
    built = {name: _build_layer(name, d, left) for name, d in gj.typed(layers, dict, "layers").items()}
    if left:
        raise ValueError(f"tensor {min(left)!r} belongs to no layer")
    described = [gj.decode_input(i) for i in gj.typed(inputs, list, "inputs")]
    decoded = [gj.decode_step(step, built) for step in gj.typed(steps, list, "steps")]
    if [name for name, _ in described] != [step.name for step in decoded if step.kind == "input"]:
        raise ValueError("the inputs are not those of the steps")
    specs = [spec for _, spec in described]
    return PackedModel(decoded, built, specs, held, gj.decode_signature(signature), LIMIT)


def _build_layer(name: str, described: Any, left: dict[str, Tensor]) -> nn.Module:
    what = f"layer {gj.text(name, 'a layer')!r}"
    if not isinstance(described, dict) or not isinstance(described.get("kind"), str):
        raise ValueError(f"{what} has no kind")
    kind = described["kind"]
    if kind not in LAYERS:
        raise ValueError(f"{what} is of unknown kind {kind!r}")
    _, attributes, keys, layouts = gj.fields(described, ("kind", "attributes", "tensors", "layouts"), what)
    cls = LAYERS[kind]
    own = _take(f"layers.{name}", keys, left)
    if unknown := own.keys() - set(cls.tensors):
        raise ValueError(f"{what}: {kind} has no tensors {sorted(unknown)}")
    for key, layout in gj.typed(layouts, dict, what).items():
        if key not in own:
            raise ValueError(f"{what}: a layout for {key!r}, which is not there")
        own[key] = _binary(own[key], layout, f"{what}: {key}")
    if attributes.keys() != cls.attributes.keys():
        raise ValueError(f"{what}: {kind} has attributes {sorted(cls.attributes)}, not {sorted(attributes)}")
    config = {key: gj.decode(value) for key, value in attributes.items()}
    return cls(**own, **config)


def _take(prefix: str, keys: Any, left: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with that prefix, taken from those that are left."""
    own = {}
    for key in gj.typed(keys, list, f"the tensors of {prefix!r}"):
        tensor = left.pop(f"{prefix}.{gj.text(key, 'a tensor')}", None)
        if tensor is None:
            raise ValueError(f"the tensor {prefix}.{key} is missing, or named twice")
        own[key] = tensor
    return own


def _binary(words: Tensor, described: Any, what: str) -> BinaryTensor:
    """Words with their layout, checked: version, shape, length, dtype, tail bits."""
    version, shape, dim, length, dtype = gj.fields(
        described, ("version", "shape", "dim", "length", "dtype"), what
    )
    if type(version) is not int or version != LAYOUT_VERSION:
        raise ValueError(f"{what}: layout version {version!r} is not known, only {LAYOUT_VERSION}")
    numbers = (*gj.typed(shape, list, what), dim, length)
    if any(type(n) is not int or not 0 <= n < 2**31 for n in numbers) or dim >= len(shape):
        raise ValueError(f"{what}: impossible numbers in the layout {described}")
    if length != shape[dim]:
        raise ValueError(f"{what}: length {length} contradicts shape {shape}, axis {dim}")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{what}: unknown dtype {dtype!r} in a layout")
    if words.dtype != torch.int32:
        raise ValueError(f"{what}: words must be int32, got {words.dtype}")
    layout = Layout(tuple(shape), dim, DTYPES[dtype])
    if tuple(words.shape) != layout.words_shape:
        raise ValueError(f"{what}: words of shape {list(words.shape)} do not fit logical shape {shape}")
    used = length % 32
    if used and words.numel() and bool((words[..., -1] >> used).any()):
        raise ValueError(f"{what}: bits behind the last of {length} are set")
    return BinaryTensor(words, layout)
