"""A packed model as plain parts: what files are read to and written from, and what a ``PackedModel`` runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import operators
from .graph import InputSpec, Signature, Step, dtype_name
from .packed_layer import PackedLayer


class Profile(NamedTuple):
    """``bits``: any language can run the file by its specification. ``torch``: ``because`` of what not."""

    name: str
    because: tuple[str, ...] = ()


@dataclass(frozen=True)
class PackedGraph:
    """Steps in order, the layers and constants they name, what the inputs are and how a call gives them."""

    steps: tuple[Step, ...]
    layers: Mapping[str, nn.Module]
    inputs: tuple[InputSpec, ...]  # in the order of the input steps
    constants: Mapping[str, Tensor]
    signature: Signature

    @property
    def input_names(self) -> list[str]:
        return [step.name for step in self.steps if step.kind == "input"]

    @property
    def profile(self) -> Profile:
        """Which profile of the file format it is of, and if it is ``torch``, because of what."""
        because = []
        for name, spec in zip(self.input_names, self.inputs, strict=True):
            if spec.dtype not in (torch.float32, torch.int8, torch.uint8):
                because.append(f"input {name!r} is {dtype_name(spec.dtype)}")
        for name, constant in self.constants.items():
            if constant.is_floating_point() and constant.dtype != torch.float32:
                because.append(f"constant {name!r} is {dtype_name(constant.dtype)}")
        for name, layer in self.layers.items():
            dtype = (
                layer.config.get("dtype", "float32") if isinstance(layer, PackedLayer) else "a torch module"
            )
            if dtype != "float32":
                because.append(f"layer {name!r} is {dtype}")
        because += [
            f"step {step.name!r} is {step.target}"
            for step in self.steps
            if step.kind == "operator" and operators.find(step.target).profile != "bits"
        ]
        return Profile("torch" if because else "bits", tuple(because))
