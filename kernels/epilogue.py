"""What happens to a tile of exact integer dot products before it is stored.

Real output: ``dot * scale[n] + shift[n] + residual[m, n]`` in fp32, each operation rounded on its own and
only those that are given, then cast. Bit output: bit 1 (-1) where ``dot < threshold[n]``, 32 neighbouring
outputs to a word; a batch norm and a sign fold into that threshold. Real output is the larger part of a
layer's memory traffic: 2 or 4 bytes per output against 1/8 for bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store_tile(
    dot, out, threshold, scale, shift, residual, row, row_live, first_column, end_column, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store ``dot`` int32 ``[BLOCK_M, BLOCK_N]`` as rows ``row`` (int64), columns from ``first_column``.

    ``out`` has ``width`` columns, or ``ceil(width / 32)`` words; columns from ``end_column`` on are left
    out. With a threshold ``first_column`` and ``BLOCK_N`` are multiples of 32.
    """
    column = first_column + tl.arange(0, BLOCK_N)
    column_live = column < end_column
    if threshold is not None:
        limit = tl.load(threshold + column, mask=column_live, other=0)
        below = (dot < limit[None, :]) & column_live[None, :]
        lanes = (
            tl.reshape(below.to(tl.int32), (BLOCK_M, BLOCK_N // 32, 32)) << tl.arange(0, 32)[None, None, :]
        )
        words = tl.sum(lanes, axis=2)
        word = first_column // 32 + tl.arange(0, BLOCK_N // 32)
        n_words = (width + 31) // 32
        live = row_live[:, None] & (word < n_words)[None, :]
        tl.store(out + row[:, None] * n_words + word[None, :], words, mask=live)
    else:
        live = row_live[:, None] & column_live[None, :]
        at = row[:, None] * width + column[None, :]
        value = dot.to(tl.float32)
        if scale is not None:
            value = value * tl.load(scale + column, mask=column_live, other=0.0)[None, :]
        if shift is not None:
            value = value + tl.load(shift + column, mask=column_live, other=0.0)[None, :]
        if residual is not None:
            value = value + tl.load(residual + at, mask=live, other=0.0).to(tl.float32)
        tl.store(out + at, value.to(out.dtype.element_ty), mask=live)
