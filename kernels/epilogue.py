"""What happens to a tile of dot products before it is stored: exact integers, or fp32 sums of real inputs.

With everything that may be given, in fp32, each operation rounded on its own (``reference.epilogue``)::

    value = act(clamp(dot, low, high) * input_scale[m] * scale[n] + shift[n] + residual[m, n]) + post_shift[n]
    bit   = dot < threshold[n]    or without thresholds    value + sign_shift[n] < 0        (1 means -1)

``act``: none, ReLU, or PReLU with ``slope[n]``. Values are cast at the end, sign words hold 32 neighbouring
outputs (a batch norm and a sign fold into the threshold). Either or both in one pass: values are the larger
part of a layer's memory traffic, 2 or 4 bytes per output against 1/8 for bits.

An operand more is a field of ``Outputs`` and its line in :func:`store_tile`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bits import to_float32
from .geometry import words_for
from .grid import grid_of, program_of
from .outputs import Outputs, check_outputs
from .tuning import on_device_of


@triton.jit
def store_tile(
    dot, to, row, row_live, first_column, end_column, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    input_scale=None, rows_per_scale=1,
):  # fmt: skip
    """Store ``dot`` ``[BLOCK_M, BLOCK_N]`` as rows ``row`` (int64), columns from ``first_column``.

    ``dot``: int32 or fp32. ``to``: Outputs. ``reals`` has ``width`` columns, ``signs`` ``ceil(width / 32)``
    words; columns from ``end_column`` on are left out. With ``signs`` ``first_column`` and ``BLOCK_N`` are
    multiples of 32. ``input_scale``: fp32, one for every ``rows_per_scale`` rows, or None.
    """
    column = first_column + tl.arange(0, BLOCK_N)
    column_live = column < end_column
    live = row_live[:, None] & column_live[None, :]
    at = row[:, None] * width + column[None, :]
    clamped = dot
    if to.low is not None:
        clamped = tl.where(clamped < to.low, to.low, clamped)  # NaN stays
    if to.high is not None:
        clamped = tl.where(clamped > to.high, to.high, clamped)
    value = clamped.to(tl.float32)
    if input_scale is not None:
        at_scale = row.to(tl.int32) // rows_per_scale
        value = value * tl.load(input_scale + at_scale, mask=row_live, other=0.0)[:, None]
    if to.scale is not None:
        value = value * tl.load(to.scale + column, mask=column_live, other=0.0)[None, :]
    if to.shift is not None:
        value = value + tl.load(to.shift + column, mask=column_live, other=0.0)[None, :]
    if to.residual is not None:
        value = value + to_float32(tl.load(to.residual + at, mask=live, other=0.0))
    if to.relu is not None:
        value = tl.where(value < 0, 0.0, value)
    if to.slope is not None:
        slope = tl.load(to.slope + column, mask=column_live, other=0.0)
        value = tl.where(value < 0, value * slope[None, :], value)
    if to.post_shift is not None:
        value = value + tl.load(to.post_shift + column, mask=column_live, other=0.0)[None, :]
    if to.reals is not None:
        if to.reals.dtype.element_ty == tl.int32:
            tl.store(to.reals + at, dot, mask=live)
        else:
            tl.store(to.reals + at, value.to(to.reals.dtype.element_ty), mask=live)
    if to.signs is not None:
        if to.threshold is not None:
            limit = tl.load(to.threshold + column, mask=column_live, other=0)
            negative = dot < limit[None, :]
        else:
            if to.sign_shift is not None:
                value = value + tl.load(to.sign_shift + column, mask=column_live, other=0.0)[None, :]
            negative = value < 0
        lanes = (negative & column_live[None, :]).to(tl.int32)
        lanes = tl.reshape(lanes, (BLOCK_M, BLOCK_N // 32, 32)) << tl.arange(0, 32)[None, None, :]
        words = tl.sum(lanes, axis=2)
        word = first_column // 32 + tl.arange(0, BLOCK_N // 32)
        n_words = (width + 31) // 32
        words_live = row_live[:, None] & (word < n_words)[None, :]
        tl.store(to.signs + row[:, None] * n_words + word[None, :], words, mask=words_live)


@triton.jit(do_not_specialize=["rows"])
def finish_kernel(
    dots, to, input_scale, rows_per_scale, rows, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Program (block of rows, block of columns): the epilogue of ``dots`` ``[rows, width]``."""
    block, column_block, _ = program_of(tl.cdiv(rows, BLOCK_M), tl.cdiv(width, BLOCK_N))
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    first = column_block * BLOCK_N
    column = first + tl.arange(0, BLOCK_N)
    live = (row < rows)[:, None] & (column < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    dot = tl.load(dots + at, mask=live, other=0)
    store_tile(
        dot, to, row.to(tl.int64), row < rows, first, width, width, BLOCK_M, BLOCK_N,
        input_scale, rows_per_scale,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------- launchers


def outputs_for(like: Tensor, shape: tuple[int, ...], **asked: Any) -> Outputs:
    """Memory for the outputs ``shape`` of a packed product; raises as ``check_outputs`` does."""
    check_outputs(like, shape, **asked)
    given: dict[str, Any] = {k: v.contiguous() if isinstance(v, Tensor) else v for k, v in asked.items()}
    given.pop("blocked", None)
    values, signs = given.pop("values", True), given.pop("signs", False)
    dtype, relu = given.pop("dtype", torch.float32), given.pop("relu", False)
    return Outputs(
        like.new_empty(shape if values else (0,), dtype=dtype),
        like.new_empty((*shape[:-1], words_for(shape[-1])) if signs else (0,), dtype=torch.int32),
        relu=1 if relu else None,
        **given,
    )


def finish(
    dots: Tensor, outputs: Outputs, input_scale: Tensor | None = None, rows_per_scale: int = 1
) -> None:
    """The epilogue of ``dots`` in memory, int32 or fp32, where a product's kernel cannot write whole words.

    ``input_scale``: fp32, one for every ``rows_per_scale`` rows.
    """
    width = dots.shape[-1]
    rows = dots.numel() // width
    with on_device_of(dots):
        finish_kernel[grid_of(triton.cdiv(rows, 32), triton.cdiv(width, 64))](
            dots, outputs.asked(), input_scale, rows_per_scale, rows, width,
            BLOCK_M=32, BLOCK_N=64, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
