"""What happens to a tile of exact integer dot products before it is stored.

Values: ``dot * scale[n] + shift[n] + residual[m, n]`` in fp32, each operation rounded on its own and only
those that are given, then cast. Sign words, 32 neighbouring outputs to a word: bit 1 (-1) where
``dot < threshold[n]`` (a batch norm and a sign fold into that threshold), or without thresholds where the
fp32 value is negative. Either or both in one pass: values are the larger part of a layer's memory traffic,
2 or 4 bytes per output against 1/8 for bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pack_bits import pack_bits


class Outputs(NamedTuple):
    """What a product stores, and what that is made of; kernels take the tuple, with None for what is absent.

    ``reals``: values in their dtype; ``signs``: their sign words. Empty tensors: not asked for.
    """

    reals: Any
    signs: Any
    threshold: Any = None
    scale: Any = None
    shift: Any = None
    residual: Any = None

    def asked(self) -> Outputs:
        """This tuple with None in the place of empty results."""
        reals, signs = (t if t.numel() else None for t in (self.reals, self.signs))
        return self._replace(reals=reals, signs=signs)


@triton.jit
def store_tile(
    dot, to, row, row_live, first_column, end_column, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Store ``dot`` int32 ``[BLOCK_M, BLOCK_N]`` as rows ``row`` (int64), columns from ``first_column``.

    ``to``: Outputs. ``reals`` has ``width`` columns, ``signs`` ``ceil(width / 32)`` words; columns from
    ``end_column`` on are left out. With ``signs`` ``first_column`` and ``BLOCK_N`` are multiples of 32.
    """
    column = first_column + tl.arange(0, BLOCK_N)
    column_live = column < end_column
    live = row_live[:, None] & column_live[None, :]
    at = row[:, None] * width + column[None, :]
    value = dot.to(tl.float32)
    if to.scale is not None:
        value = value * tl.load(to.scale + column, mask=column_live, other=0.0)[None, :]
    if to.shift is not None:
        value = value + tl.load(to.shift + column, mask=column_live, other=0.0)[None, :]
    if to.residual is not None:
        value = value + tl.load(to.residual + at, mask=live, other=0.0).to(tl.float32)
    if to.reals is not None:
        tl.store(to.reals + at, value.to(to.reals.dtype.element_ty), mask=live)
    if to.signs is not None:
        if to.threshold is not None:
            limit = tl.load(to.threshold + column, mask=column_live, other=0)
            negative = dot < limit[None, :]
        else:
            negative = value < 0
        lanes = (negative & column_live[None, :]).to(tl.int32)
        lanes = tl.reshape(lanes, (BLOCK_M, BLOCK_N // 32, 32)) << tl.arange(0, 32)[None, None, :]
        words = tl.sum(lanes, axis=2)
        word = first_column // 32 + tl.arange(0, BLOCK_N // 32)
        n_words = (width + 31) // 32
        words_live = row_live[:, None] & (word < n_words)[None, :]
        tl.store(to.signs + row[:, None] * n_words + word[None, :], words, mask=words_live)


def outputs_for(
    like: Tensor,
    shape: tuple[int, ...],
    values: bool = True,
    signs: bool = False,
    threshold: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    blocked: Tensor | None = None,
) -> Outputs:
    """Memory for the outputs ``shape`` of a packed product; ``blocked`` is the CPU's and unused.

    Raises:
        ValueError: nothing asked for, a threshold without signs, or operands of another shape or dtype.
    """
    n = shape[-1]
    if not (values or signs) or (threshold is not None and not signs):
        raise ValueError(f"values={values}, signs={signs}: one is needed, and thresholds belong to signs")
    for name, tensor, wanted, kind in (
        ("threshold", threshold, (n,), torch.int32),
        ("scale", scale, (n,), torch.float32),
        ("shift", shift, (n,), torch.float32),
        ("residual", residual, tuple(shape), dtype),
    ):
        if tensor is not None and (tuple(tensor.shape) != wanted or tensor.dtype != kind):
            raise ValueError(f"{name} must be {kind} {list(wanted)}, got {tensor.dtype} {list(tensor.shape)}")
        if tensor is not None and tensor.device != like.device:
            raise ValueError(f"{name} is on {tensor.device}, the first operand on {like.device}")
    words = (*shape[:-1], -(-n // 32))
    return Outputs(
        like.new_empty(shape if values else 0, dtype=dtype),
        like.new_empty(words if signs else 0, dtype=torch.int32),
        *(None if t is None else t.contiguous() for t in (threshold, scale, shift, residual)),
    )


def finish_in_torch(dot: Tensor, outputs: Outputs) -> None:
    """The epilogue of fp32 ``dot`` in memory, where a kernel cannot write whole sign words."""
    values, signs, *_ = outputs.asked()
    value = dot if outputs.scale is None else dot * outputs.scale
    value = value if outputs.shift is None else value + outputs.shift
    value = value if outputs.residual is None else value + outputs.residual.float()
    if values is not None:
        values.copy_(value)
    if signs is not None:
        signs.copy_(pack_bits(value if outputs.threshold is None else dot - outputs.threshold))
