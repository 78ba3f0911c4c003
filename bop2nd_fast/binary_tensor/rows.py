"""Rows of a BinaryTensor as tensors of their own, sharing its words.

What ``torch.distributed`` does to a parameter: FSDP2 (``fully_shard``) cuts it into blocks of rows (axis 0),
pads the last block, keeps a flat alias of it, gathers the blocks before a layer runs and reads the result
through ``as_strided``; distributed checkpoints copy blocks of rows; DDP flattens and broadcasts. The handlers
below answer each of these without unpacking, so that one weight is one bit in memory and on the wire.

    w[2:5], w.split(4), w.chunk(3)   views that share words (axis 0; other axes unpack, as arithmetic does)
    w.view(-1)                       FlatSigns: an alias that unpacks when it is read
    w.new_zeros(rows, *w.shape[1:])  RowBlock: reads as zeros until signs are copied into its leading rows
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from .layout import Layout
from .memory import Memory
from .tensor import HANDLERS, BinaryTensor, UnpackedView, call_on_values, wrapper

aten = torch.ops.aten


class RowBlock(BinaryTensor):
    """Leading rows of a padded block: ``words`` is ``padded[:rows]``, and only signs copied in count.

    Args:
        padded: int32 words of the whole block, contiguous, rows on axis 0.
        layout: logical layout of the leading rows; its ``shape[0]`` is at most ``padded.shape[0]``.
        n_filled: one number shared by all views of the block: how many leading rows hold signs. Rows beyond
            read as zeros.
    """

    __slots__ = ("n_filled", "padded")

    padded: Tensor
    n_filled: list[int]

    @staticmethod
    def __new__(cls, padded: Tensor, layout: Layout, n_filled: list[int]) -> RowBlock:
        block: RowBlock = BinaryTensor._wrap(cls, Memory(padded[: layout.shape[0]]), layout)
        block.padded, block.n_filled = padded, n_filled
        return block

    def is_filled(self) -> bool:
        return self.n_filled[0] >= self.shape[0]

    def unpack(self, dtype: torch.dtype | None = None) -> Tensor:
        if self.is_filled():
            return super().unpack(dtype)
        layout = self.bit_layout
        dense: Tensor = torch.ops.bop2nd.unpack_bits(
            self.memory.words, layout.length, layout.dim, dtype=dtype or self.dtype
        )
        dense[self.n_filled[0] :] = 0
        return dense

    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[Tensor, ...], None]:
        """All ranks send blocks of the same size: the padded ones."""
        return (self.padded,), None

    def __reduce_ex__(self, protocol: Any) -> Any:
        if not self.is_filled():
            raise RuntimeError("a block of rows that still holds zeros cannot be saved as signs")
        return super().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = _BLOCK_HANDLERS.get(func)
        if handler is not None and isinstance(args[0], RowBlock):
            return handler(func, *args, **kwargs)
        if any(isinstance(x, RowBlock) and not x.is_filled() for x in pytree.tree_leaves((args, kwargs))):
            if func.namespace in ("bop2nd", "c10d"):
                raise RuntimeError(f"{func} takes signs, but rows of this block are still zeros")
            return call_on_values(func, args, kwargs)
        return super().__torch_dispatch__(func, types, args, kwargs)


class FlatSigns(UnpackedView):
    """``BinaryTensor.view(-1)``: values in row-major order, unpacked each time they are read."""

    source: BinaryTensor

    @staticmethod
    def __new__(cls, source: BinaryTensor) -> FlatSigns:
        size, is_traced = (source.numel(),), source.memory.is_traced
        return wrapper(cls, is_traced, size=size, dtype=source.dtype, device=source.device)

    def __init__(self, source: BinaryTensor) -> None:
        self.source = source

    @property
    def dense(self) -> Tensor:  # type: ignore[override]
        return self.source.unpack().reshape(-1)


# ------------------------------------------------------------------------------------- rows


def _rows(x: BinaryTensor, start: int, end: int) -> BinaryTensor:
    layout = x.bit_layout
    shape = (end - start, *layout.shape[1:])
    return BinaryTensor(
        x.memory.lend_rows(start, end), Layout(shape, layout.dim, layout.dtype, layout.version)
    )


def _can_cut(x: BinaryTensor, dim: int, step: int = 1) -> bool:
    """Whether pieces along ``dim`` are words of their own: rows, and not the packed axis."""
    is_signs = not isinstance(x, RowBlock) or x.is_filled()
    return dim % x.dim() == 0 and x.bit_layout.dim != 0 and step == 1 and is_signs


def _slice(
    func: Any, x: BinaryTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Tensor:
    if not _can_cut(x, dim, step):
        return call_on_values(func, (x, dim, start, end, step), {})
    first, last, _ = slice(start, end).indices(x.shape[0])
    return _rows(x, first, max(first, last))


def _split(func: Any, x: BinaryTensor, size: Any, dim: int = 0) -> list[Tensor]:
    if not _can_cut(x, dim):
        return call_on_values(func, (x, size, dim), {})
    bounds = [0]
    for piece in func(torch.empty(x.shape[0], 0, device="meta"), size, 0):  # torch's own rule and errors
        bounds.append(bounds[-1] + piece.shape[0])
    return [_rows(x, a, b) for a, b in itertools.pairwise(bounds)]


def _view(func: Any, x: BinaryTensor, size: Any, stride: Any = None) -> Tensor:
    size = tuple(size)
    if size == x.bit_layout.shape:
        return aten.alias.default(x)
    if size in ((-1,), (x.numel(),)) and not x.memory.is_traced:
        return FlatSigns(x)
    return UnpackedView(x.unpack().reshape(size))


def _new_zeros(func: Any, x: BinaryTensor, size: Any, *, dtype: Any = None, **kwargs: Any) -> Tensor:
    layout = x.bit_layout
    is_rows = len(size) == x.dim() and tuple(size[1:]) == layout.shape[1:] and layout.dim != 0
    elsewhere = dtype not in (None, x.dtype) or kwargs.get("device") not in (None, x.device)
    if not is_rows or elsewhere or x.memory.is_traced:
        dense = torch.empty(0, dtype=x.dtype, device=x.device)
        return func(dense, size, dtype=dtype, **kwargs)
    block = Layout(tuple(size), layout.dim, layout.dtype, layout.version)
    return RowBlock(torch.zeros(block.words_shape, dtype=torch.int32, device=x.device), block, [0])


# ------------------------------------------------------------------------------------- blocks


def _block_alias(func: Any, x: RowBlock) -> RowBlock:
    return RowBlock(func(x.padded), x.bit_layout, x.n_filled)


def _block_slice(
    func: Any, x: RowBlock, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Tensor:
    first, last, _ = slice(start, end).indices(x.shape[0])
    if dim % x.dim() != 0 or first != 0 or step != 1:
        return _slice(func, x, dim, start, end, step)
    layout = x.bit_layout
    rows = Layout((max(last, 0), *layout.shape[1:]), layout.dim, layout.dtype, layout.version)
    return RowBlock(x.padded, rows, x.n_filled)


def _block_copy_(func: Any, x: RowBlock, source: Tensor, non_blocking: bool = False) -> RowBlock:
    HANDLERS[func](func, x, source, non_blocking)
    x.n_filled[0] = max(x.n_filled[0], x.shape[0])
    return x


def _block_as_strided(func: Any, x: RowBlock, size: Any, stride: Any, offset: int | None = None) -> Tensor:
    """FSDP2 reads a gathered block as the parameter: its leading rows, whatever strides it asks for."""
    if tuple(size[1:]) != x.bit_layout.shape[1:] or size[0] > x.shape[0] or offset:
        raise RuntimeError(f"{tuple(size)} are not leading rows of a block of shape {tuple(x.shape)}")
    return _rows(x, 0, size[0])


_BLOCK_HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _block_alias,
    aten.alias.default: _block_alias,
    aten.slice.Tensor: _block_slice,
    aten.copy_.default: _block_copy_,
    aten.as_strided.default: _block_as_strided,
}


def gathered_rows(
    shard: BinaryTensor, words: Tensor, dtype: torch.dtype, out: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    """FSDP2's all-gather of ``shard``: all ranks' blocks under each other, the last ones padded.

    ``words`` is the buffer that FSDP keeps, frees and fills again, so the weight made the first time
    (``out``) already sees the new bits. It is never alone with its memory, so nothing is kept beside it.

    Raises:
        RuntimeError: ``out`` does not lie in ``words``.
    """
    if out is None:
        layout = shard.bit_layout
        whole = Layout((words.shape[0], *layout.shape[1:]), layout.dim, dtype, layout.version)
        return RowBlock(words, whole, [words.shape[0]]), ()
    if not isinstance(out, BinaryTensor) or out.memory.words.data_ptr() != words.data_ptr():
        raise RuntimeError("the gathered weight does not lie in the buffer it is gathered into")
    return None


HANDLERS.update(
    {
        aten.slice.Tensor: _slice,
        aten.split.Tensor: _split,
        aten.split_with_sizes.default: _split,
        aten.view.default: _view,
        aten._unsafe_view.default: _view,
        aten._reshape_alias.default: _view,
        "all_gather": gathered_rows,
        aten.new_zeros.default: _new_zeros,
    }
)
