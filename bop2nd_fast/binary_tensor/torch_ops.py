"""torch operators on a BinaryTensor that need no unpacking: aliases, copies, conversions, buffers like it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .tensor import HANDLERS, BinaryTensor, check_plus_minus_one

aten = torch.ops.aten


def _alias(func: Any, x: BinaryTensor) -> BinaryTensor:
    if x.memory.is_traced:
        return BinaryTensor(func(x.memory.words), x.bit_layout)
    return x.sharing()  # one memory, so that a write through either is known to both


def _pin(func: Any, x: BinaryTensor, *args: Any, **kwargs: Any) -> BinaryTensor:
    return BinaryTensor(func(x.memory.words, *args, **kwargs), x.bit_layout)


def _clone(func: Any, x: BinaryTensor, *, memory_format: torch.memory_format | None = None) -> BinaryTensor:
    return BinaryTensor(x.memory.words.clone(), x.bit_layout)  # the layout fixes the memory format


def _to_copy(func: Any, x: BinaryTensor, **kwargs: Any) -> Tensor:
    dtype = kwargs.pop("dtype", None) or x.dtype
    if not dtype.is_floating_point:
        return func(x.unpack(), dtype=dtype, **kwargs)
    kwargs.pop("memory_format", None)
    return BinaryTensor(func(x.memory.words, **kwargs), x.bit_layout.with_dtype(dtype))


def _copy_(func: Any, x: Any, source: Tensor, non_blocking: bool = False) -> Any:
    if not isinstance(x, BinaryTensor):
        return x.copy_(source.unpack() if isinstance(source, BinaryTensor) else source, non_blocking)
    x.memory.write(_words_for(x, source))
    return x


def _words_for(x: BinaryTensor, source: Tensor) -> Tensor:
    """Words that make ``x`` a copy of ``source``; raises unless its values are signs that fit."""
    if tuple(source.shape) != x.bit_layout.shape:
        source = source.expand(x.bit_layout.shape)  # raises as a dense copy_ would
    if isinstance(source, BinaryTensor) and source.bit_layout.dim == x.bit_layout.dim:
        return source.memory.words
    dense = source.unpack() if isinstance(source, BinaryTensor) else source
    check_plus_minus_one(dense, "copy_ into a BinaryTensor")
    return torch.ops.bop2nd.pack_bits(dense.to(x.device), x.bit_layout.dim)


def _foreach_copy_(
    func: Any, targets: list[Tensor], sources: list[Tensor], non_blocking: bool = False
) -> Any:
    """Each ``copy_``; all sources are looked at before the first target is written."""
    for x, source in zip(targets, sources, strict=True):
        if isinstance(x, BinaryTensor):
            _words_for(x, source)
        else:
            source.expand(x.shape)
    for x, source in zip(targets, sources, strict=True):
        x.copy_(source, non_blocking)


def _empty_like(func: Any, x: BinaryTensor, **kwargs: Any) -> Tensor:
    """A BinaryTensor of undefined signs (``Module.to_empty``, buffers for ``dist.scatter``).

    Dense where the dtype has no signs, and in a compiler's trace: dynamo makes gradients so.
    """
    dtype = kwargs.get("dtype") or x.dtype
    if not dtype.is_floating_point or x.memory.is_traced:
        return _dense_like(func, x, **kwargs)
    device = kwargs.get("device") or x.device
    words = torch.zeros(x.bit_layout.words_shape, dtype=torch.int32, device=device)  # tail bits are 0
    return BinaryTensor(words, x.bit_layout.with_dtype(dtype))


def _dense_like(func: Any, x: BinaryTensor, *args: Any, **kwargs: Any) -> Tensor:
    """``zeros_like(weight)`` and its kin make dense tensors, in the weight's walk order."""
    dense = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return func(dense, *args, **kwargs)


_MAKE_DENSE = (
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.rand_like.default,
    aten.randn_like.default,
    aten.new_empty.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty_strided.default,
)
HANDLERS.update(
    {
        aten.detach.default: _alias,
        aten.alias.default: _alias,
        aten._pin_memory.default: _pin,
        aten.pin_memory.default: _pin,
        aten.clone.default: _clone,
        aten._to_copy.default: _to_copy,
        aten.copy_.default: _copy_,
        aten._foreach_copy_.default: _foreach_copy_,
        aten.empty_like.default: _empty_like,
        aten.is_pinned.default: lambda func, x, *args, **kwargs: func(x.memory.words, *args, **kwargs),
        aten.record_stream.default: lambda func, x, stream: func(x.memory.words, stream),
        **dict.fromkeys(_MAKE_DENSE, _dense_like),
    }
)
