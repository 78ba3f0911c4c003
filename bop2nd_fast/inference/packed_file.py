"""Reading packed files: safetensors without any code. ``docs/packed_file.md`` is their specification.

Whoever reads one needs only the layer kinds and operators that are listed there; nothing else can be in a
file. A checksum covers all of it, and nothing that it covers is trusted: references, shapes, attributes, tail
bits and sizes are checked one by one, and a file that is refused has run nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..binary_tensor import LAYOUT_VERSION, BinaryTensor, Layout
from . import graph_json as gj
from . import tensor_file
from .kinds import LAYERS
from .layers import DTYPES
from .packed_graph import PackedGraph
from .packed_writer import FORMAT, FORMAT_VERSION
from .tensor_file import PackedFileError, printable

# What torch and Python raise for arguments that make no sense, once the reader's own checks have passed.
_MALFORMED = (KeyError, TypeError, IndexError, AttributeError, ValueError, RuntimeError, OverflowError)


def read(path: str | Path) -> PackedGraph:
    """What a file holds. Whether the steps can run is for who runs them to say, under :func:`refusals`.

    Raises:
        OSError: no such file, or one that cannot be read.
        PackedFileError: not a packed model, truncated or altered, of another format version, or one that
            contradicts itself.
    """
    try:
        metadata, tensors = _contents(Path(path))
    except PackedFileError as error:
        raise _named(path, error) from None
    with refusals(path):
        graph = _decode(tensor_file.parse_json(metadata["graph"]), tensors)
        profile = graph.profile
        if profile.name != metadata["profile"]:
            says, reasons = metadata["profile"], "; ".join(profile.because[:3])
            raise PackedFileError(f"it says profile {says!r}, but is {profile.name!r}: {reasons}")
    return graph


@contextmanager
def refusals(path: str | Path) -> Iterator[None]:
    """Around building what a file describes: what makes no sense there becomes a ``PackedFileError``."""
    try:
        yield
    except PackedFileError as error:
        raise _named(path, error) from None
    except _MALFORMED as error:
        raise _named(path, f"the graph does not describe a model: {error}") from None


def _named(path: str | Path, error: object) -> PackedFileError:
    return PackedFileError(f"{printable(path)}: {printable(error)}")


def _contents(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors, as they were when the file was written."""
    metadata, tensors = tensor_file.read(path)
    _check_kind(metadata)
    if tensor_file.checksum(metadata, tensors) != metadata["sha256"]:
        raise PackedFileError("it was altered after it was written: its checksum does not match")
    return metadata, tensors


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


def _decode(described: Any, tensors: dict[str, Tensor]) -> PackedGraph:
    signature, inputs, constants, layers, steps = gj.fields(
        described, ("signature", "inputs", "constants", "layers", "steps"), "the graph"
    )
    left = dict(tensors)
    held = _take("constants", constants, left)
    built = {name: _build_layer(name, d, left) for name, d in gj.typed(layers, dict, "layers").items()}
    if left:
        raise ValueError(f"tensor {min(left)!r} belongs to no layer")
    named = [gj.decode_input(i) for i in gj.typed(inputs, list, "inputs")]
    graph = PackedGraph(
        steps=tuple(gj.decode_step(step, built) for step in gj.typed(steps, list, "steps")),
        layers=built,
        inputs=tuple(spec for _, spec in named),
        constants=held,
        signature=gj.decode_signature(signature),
    )
    if [name for name, _ in named] != graph.input_names:
        raise ValueError("the inputs are not those of the steps")
    return graph


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
