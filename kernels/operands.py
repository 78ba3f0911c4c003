"""What launchers ask of their operands: a kernel reads memory by address and dtype, whatever lies there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_floats(tensor: Tensor, what: str, axes: int = 1) -> None:
    """Raises TypeError unless the tensor is float32, bfloat16 or float16, ValueError below ``axes``."""
    if tensor.dtype not in FLOATS or tensor.layout != torch.strided:
        raise TypeError(f"{what} must be float32, bfloat16 or float16, got {tensor.dtype} ({tensor.layout})")
    if tensor.dim() < axes:
        raise ValueError(f"{what} needs {axes} axes or more, got {list(tensor.shape)}")


def check_words(tensor: Tensor, what: str, axes: int, beside: Tensor) -> None:
    """Raises TypeError unless the tensor is int32, ValueError for other axes or another device."""
    if tensor.dtype != torch.int32:
        raise TypeError(f"{what} must be int32 words, got {tensor.dtype}")
    if tensor.dim() != axes:
        raise ValueError(f"{what} must have {axes} axes, got {list(tensor.shape)}")
    if tensor.device != beside.device:
        raise ValueError(f"{what} is on {tensor.device}, the first operand on {beside.device}")


def check_mask(mask: Tensor, shape: Sequence[int], beside: Tensor) -> None:
    """Raises as ``check_words`` does, unless the mask is empty or words of this shape."""
    if mask.numel() == 0 and mask.dim() == 1:
        return
    check_words(mask, "mask", len(shape), beside)
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(f"mask words {list(mask.shape)} do not fit sign words {list(shape)}")
