"""Writing the packed file (``packed_file`` reads it): the same parts always give the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..atomic_write import atomic_write
from ..binary_tensor import BinaryTensor
from . import graph_json as gj
from . import tensor_file
from .packed_graph import PackedGraph
from .packed_layer import PackedLayer

FORMAT = "bop2nd_fast.packed_model"
FORMAT_VERSION = 2


def save(graph: PackedGraph, path: str | Path) -> None:
    """Write a packed file; an existing file is replaced only by a complete one.

    Raises:
        ValueError: a module, function or argument that a file cannot hold; nothing is written.
    """
    data = to_bytes(graph)
    atomic_write(path, lambda file: file.write(data))


def to_bytes(graph: PackedGraph) -> bytes:
    """The file's bytes: the same parts always give the same ones."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in graph.constants.items():
        tensors[f"constants.{gj.text(name, 'a constant')}"] = _plain(tensor, name)
    layers = {name: describe_layer(name, layer, tensors) for name, layer in graph.layers.items()}
    described = {
        "signature": gj.encode_signature(graph.signature),
        "inputs": [gj.encode_input(*named) for named in zip(graph.input_names, graph.inputs, strict=True)],
        "constants": list(graph.constants),
        "layers": layers,
        "steps": [gj.encode_step(step, graph.layers) for step in graph.steps],
    }
    metadata = {
        "format": FORMAT,
        "version": str(FORMAT_VERSION),
        "profile": graph.profile.name,
        "graph": json.dumps(described, separators=(",", ":"), ensure_ascii=True, allow_nan=False),
    }
    metadata["sha256"] = tensor_file.checksum(metadata, tensors)
    return tensor_file.write(metadata, tensors)


def describe_layer(name: str, layer: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The layer as a graph in JSON names it; its tensors go into ``tensors``."""
    gj.text(name, "a layer")
    if not isinstance(layer, PackedLayer):
        raise ValueError(f"layer {name!r} is a {type(layer).__qualname__}, which a file cannot hold")
    own = layer.state_dict()
    layouts = {}
    for key, tensor in own.items():
        if isinstance(tensor, BinaryTensor):
            layouts[key] = tensor.bit_layout.to_dict()
            tensor = tensor.memory.words  # only read
        tensors[f"layers.{name}.{key}"] = _plain(tensor, name)
    attributes = {key: layer.config.get(key) for key in layer.attributes}
    encoded = {key: gj.encode(value, f"layer {name!r}") for key, value in attributes.items()}
    return {"kind": layer.kind, "attributes": encoded, "tensors": list(own), "layouts": layouts}


def _plain(tensor: Tensor, name: str) -> Tensor:
    if not tensor_file.known(tensor):
        raise ValueError(f"{name!r} holds a tensor of {tensor.dtype}, which a file cannot hold")
    return tensor.detach().cpu().contiguous()
