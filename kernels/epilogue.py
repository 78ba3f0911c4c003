"""What happens to a tile of exact integer dot products before it is stored.

With everything that may be given, in fp32, each operation rounded on its own (``reference.epilogue``)::

    value = act(clamp(dot, low, high) * scale[n] + shift[n] + residual[m, n]) + post_shift[n]
    bit   = dot < threshold[n]    or without thresholds    value + sign_shift[n] < 0        (1 means -1)

``act``: none, ReLU, or PReLU with ``slope[n]``. Values are cast at the end, sign words hold 32 neighbouring
outputs (a batch norm and a sign fold into the threshold). Either or both in one pass: values are the larger
part of a layer's memory traffic, 2 or 4 bytes per output against 1/8 for bits.

An operand more is a field of :class:`Outputs`, its line in :func:`store_tile` and one in ``outputs_for``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bits import to_float32
from .geometry import words_for
from .grid import grid_of, program_of
from .operands import FLOATS
from .tuning import on_device_of


class Outputs(NamedTuple):
    """What a product stores, and what that is made of; kernels take the tuple, with None for what is absent.

    ``reals``: values in their dtype; ``signs``: their sign words. Empty tensors: not asked for. ``low``,
    ``high``: integers; ``relu``: 1 or None, either way known to the compiler.
    """

    reals: Any
    signs: Any
    threshold: Any = None
    scale: Any = None
    shift: Any = None
    residual: Any = None
    low: Any = None
    high: Any = None
    relu: Any = None
    slope: Any = None
    post_shift: Any = None
    sign_shift: Any = None

    def asked(self) -> Outputs:
        """This tuple with None in the place of empty results."""
        reals, signs, *others = self
        return Outputs(reals if reals.numel() else None, signs if signs.numel() else None, *others)


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
    clamped = dot
    if to.low is not None:
        clamped = tl.maximum(clamped, to.low)
    if to.high is not None:
        clamped = tl.minimum(clamped, to.high)
    value = clamped.to(tl.float32)
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
def finish_kernel(dots, to, rows, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Program (block of rows, block of columns): the epilogue of fp32 ``dots`` ``[rows, width]``."""
    block, column_block, _ = program_of(tl.cdiv(rows, BLOCK_M), tl.cdiv(width, BLOCK_N))
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    first = column_block * BLOCK_N
    column = first + tl.arange(0, BLOCK_N)
    live = (row < rows)[:, None] & (column < width)[None, :]
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    dot = tl.load(dots + at, mask=live, other=0.0).to(tl.int32)
    store_tile(dot, to, row.to(tl.int64), row < rows, first, width, width, BLOCK_M, BLOCK_N)


# ---------------------------------------------------------------------------------------- launchers


def outputs_for(
    like: Tensor,
    shape: tuple[int, ...],
    values: bool = True,
    signs: bool = False,
    threshold: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    low: int | None = None,
    high: int | None = None,
    relu: bool = False,
    slope: Tensor | None = None,
    post_shift: Tensor | None = None,
    sign_shift: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    blocked: Tensor | None = None,
) -> Outputs:
    """Memory for the outputs ``shape`` of a packed product; ``blocked`` is the CPU's and unused.

    Raises:
        TypeError, ValueError: nothing asked for, what belongs to signs without them, two activations, bounds
            out of order or beyond 2**24, or operands of another shape, dtype or device.
    """
    n = shape[-1]
    if dtype not in FLOATS:
        raise TypeError(f"dtype is {dtype}, allowed are {FLOATS}")
    if not (values or signs) or (threshold is not None and not signs):
        raise ValueError(f"values={values}, signs={signs}: one is needed, and thresholds belong to signs")
    least, most = -(2**24) if low is None else low, 2**24 if high is None else high
    if not -(2**24) <= least <= most <= 2**24:
        raise ValueError(f"low {least} and high {most} must be in this order and within 2**24")
    if relu and slope is not None:
        raise ValueError("relu and slope: one activation")
    if sign_shift is not None and (not signs or threshold is not None):
        raise ValueError("sign_shift belongs to signs without thresholds")
    for name, tensor, kind in (
        ("threshold", threshold, torch.int32),
        ("scale", scale, torch.float32),
        ("shift", shift, torch.float32),
        ("residual", residual, dtype),
        ("slope", slope, torch.float32),
        ("post_shift", post_shift, torch.float32),
        ("sign_shift", sign_shift, torch.float32),
    ):
        if tensor is None:
            continue
        wanted = shape if name == "residual" else (n,)
        if tensor.shape != wanted or tensor.dtype != kind:
            raise ValueError(f"{name} must be {kind} {list(wanted)}, got {tensor.dtype} {list(tensor.shape)}")
        if tensor.device != like.device:
            raise ValueError(f"{name} is on {tensor.device}, the first operand on {like.device}")
    return Outputs(
        like.new_empty(shape if values else 0, dtype=dtype),
        like.new_empty((*shape[:-1], words_for(n)) if signs else 0, dtype=torch.int32),
        _contiguous(threshold), _contiguous(scale), _contiguous(shift), _contiguous(residual),
        low, high, 1 if relu else None,
        _contiguous(slope), _contiguous(post_shift), _contiguous(sign_shift),
    )  # fmt: skip


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def finish(dots: Tensor, outputs: Outputs) -> None:
    """The epilogue of fp32 ``dots`` in memory, where a product's kernel cannot write whole sign words."""
    width = dots.shape[-1]
    rows = dots.numel() // width
    with on_device_of(dots):
        finish_kernel[grid_of(triton.cdiv(rows, 32), triton.cdiv(width, 64))](
            dots, outputs.asked(), rows, width, BLOCK_M=32, BLOCK_N=64, num_warps=4, enable_fp_fusion=False
        )
