"""torch operators on a BinaryTensor that need no unpacking: aliases, copies, conversions, buffers like it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .binary_tensor import HANDLERS, BinaryTensor, check_plus_minus_one

aten = torch.ops.aten


def _same_layout(func: Any, x: BinaryTensor, *args: Any, **kwargs: Any) -> BinaryTensor:
    return BinaryTensor(func(x.words, *args, **kwargs), x.bit_layout)


def _clone(func: Any, x: BinaryTensor, *, memory_format: torch.memory_format | None = None) -> BinaryTensor:
    return BinaryTensor(x.words.clone(), x.bit_layout)  # the layout fixes the memory format


def _to_copy(func: Any, x: BinaryTensor, **kwargs: Any) -> Tensor:
    dtype = kwargs.pop("dtype", None) or x.dtype
    if not dtype.is_floating_point:
        return func(x.unpack(), dtype=dtype, **kwargs)
    kwargs.pop("memory_format", None)
    return BinaryTensor(func(x.words, **kwargs), x.bit_layout.with_dtype(dtype))


def _copy_(func: Any, x: Any, source: Tensor, non_blocking: bool = False) -> Any:
    if not isinstance(x, BinaryTensor):
        return x.copy_(source.unpack() if isinstance(source, BinaryTensor) else source, non_blocking)
    if tuple(source.shape) != x.bit_layout.shape:
        source = source.expand(x.bit_layout.shape)  # raises as a dense copy_ would
    if isinstance(source, BinaryTensor) and source.bit_layout.dim == x.bit_layout.dim:
        x.words.copy_(source.words, non_blocking)
        return x
    dense = source.unpack() if isinstance(source, BinaryTensor) else source
    check_plus_minus_one(dense, "copy_ into a BinaryTensor")
    x.words.copy_(torch.ops.bop2nd.pack_bits(dense.to(x.device), x.bit_layout.dim))
    return x


def _dense_like(func: Any, x: BinaryTensor, *args: Any, **kwargs: Any) -> Tensor:
    """``zeros_like(weight)`` and its kin make dense tensors, in the weight's walk order."""
    dense = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return func(dense, *args, **kwargs)


_MAKE_DENSE = (
    aten.empty_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.rand_like.default,
    aten.randn_like.default,
    aten.new_empty.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty_strided.default,
)
HANDLERS.update(
    {
        aten.detach.default: _same_layout,
        aten.alias.default: _same_layout,
        aten._pin_memory.default: _same_layout,
        aten.pin_memory.default: _same_layout,
        aten.clone.default: _clone,
        aten._to_copy.default: _to_copy,
        aten.copy_.default: _copy_,
        aten.is_pinned.default: lambda func, x, *args, **kwargs: func(x.words, *args, **kwargs),
        aten.record_stream.default: lambda func, x, stream: func(x.words, stream),
        **dict.fromkeys(_MAKE_DENSE, _dense_like),
    }
)
