"""Which parameters of a model are binary and which are real."""

from __future__ import annotations

import torch
from torch.nn import Parameter

from ..binary_tensor import BinaryTensor
from .distributed import local_tensor


def split_parameters(model: torch.nn.Module) -> tuple[list[Parameter], list[Parameter]]:
    """``(binary, real)``: the trainable parameters of ``model`` that are BinaryTensors, and all others."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    binary: list[Parameter] = [p for p in trainable if isinstance(local_tensor(p), BinaryTensor)]
    return binary, [p for p in trainable if not isinstance(local_tensor(p), BinaryTensor)]
