"""Linear layer of packed signs with real or 8-bit inputs.

Two kernels. Up to four rows (``tuning.SIGNED_ROWS_LIMIT``): ``signed_rows_kernel``, which reads the weights
once, three or four instructions per product: a shift brings the bit to the sign's place, a three-input
operation applies it, an addition. Bytes: N * K / 8 of weights; instructions are the limit. More rows: tensor
cores, the kernel of ``signed_conv2d.py``, where precision and limits stand.

Sums of few real rows are fp32 additions of the numbers themselves, in a tree over 256 places of K: within
``(K / 256 + 9) * 2**-24 * sum |x|`` of the exact sum. Sums of integers are exact.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bits import popcount, to_float32
from .epilogue import store_tile
from .geometry import Arguments, Geometry, checked_geometry
from .grid import grid_of, program_of
from .operands import check_words
from .outputs import Outputs
from .signed_conv2d import asked_of, convolve, pixels_of_scale
from .signed_operands import Scaling, check_real_or_8_bit
from .tuning import SIGNED_ROWS, SIGNED_ROWS_LIMIT, MatmulTile, on_device_of


@triton.jit(do_not_specialize=["rows", "rows_per_scale"])
def signed_rows_kernel(
    x, w, to, input_scale, rows_per_scale, rows, outputs, n_words, features, multiplier, zero_point,
    OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_WORDS: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Program (block of outputs, row); a place of the sums for each of 32 * ``BLOCK_WORDS`` numbers.

    ``OFFSET``: the zero point is not 0.
    """
    block, row, _ = program_of(tl.cdiv(outputs, BLOCK_N), rows)
    first = block * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    word = tl.arange(0, BLOCK_WORDS)
    lane = tl.arange(0, 32)
    w_at = w + n.to(tl.int64)[:, None] * n_words + word[None, :]
    x_at = x + row.to(tl.int64) * features
    if x.dtype.element_ty.is_floating():
        sums = tl.zeros((BLOCK_N, BLOCK_WORDS, 32), tl.float32)
    else:
        sums = tl.zeros((BLOCK_N, BLOCK_WORDS, 32), tl.int32)
    negative = tl.zeros((BLOCK_N, BLOCK_WORDS), tl.int32)
    for begin in range(0, n_words, BLOCK_WORDS):
        k = (begin + word)[:, None] * 32 + lane[None, :]
        some = tl.load(x_at + k, mask=k < features, other=0)
        words = tl.load(
            w_at + begin, mask=(n < outputs)[:, None] & (begin + word < n_words)[None, :], other=0
        )
        bit = words[:, :, None] << (31 - lane)[None, None, :]
        if x.dtype.element_ty.is_floating():
            bits = to_float32(some).to(tl.int32, bitcast=True)[None, :, :] ^ (bit & -2147483648)
            sums += bits.to(tl.float32, bitcast=True)
        else:
            minus = bit >> 31
            sums += (some.to(tl.int32)[None, :, :] ^ minus) - minus
        if OFFSET:
            negative += popcount(words)
    dot = tl.sum(tl.sum(sums, axis=2), axis=1)
    if not x.dtype.element_ty.is_floating():
        dot *= multiplier
    if OFFSET:
        dot -= zero_point * (features - 2 * tl.sum(negative, axis=1))
    one = row + tl.zeros((1,), tl.int32)
    store_tile(
        dot[None, :], to, one.to(tl.int64), one < rows, first, outputs, outputs, 1, BLOCK_N,
        input_scale, rows_per_scale,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------- launchers


def _few_rows(
    x: Tensor, weight: Tensor, g: Geometry, scaling: Scaling, to: Outputs, tile: MatmulTile
) -> None:
    """Numbers ``[rows, K]`` by words ``[N, W]``."""
    multiplier, zero_point, scale, _ = scaling
    rows, features = x.shape
    with on_device_of(x):
        signed_rows_kernel[grid_of(triton.cdiv(g.outputs, tile.block_n), rows)](
            x.contiguous(), weight.contiguous(), to.asked(), scale, pixels_of_scale(scale, g), rows,
            g.outputs, g.words, features, multiplier, zero_point, OFFSET=zero_point != 0,
            **tile.constants(), **tile.options(),
        )  # fmt: skip


def signed_linear(
    input: Tensor,
    weight: Tensor,
    multiplier: int = 1,
    zero_point: int = 0,
    input_scale: Tensor | None = None,
    straight_through: Tensor | None = None,
    *given: Any,
    tile: MatmulTile | None = None,
    **asked: Any,
) -> tuple[Tensor, Tensor]:
    """``reference.signed_linear``: values ``[..., O]`` and sign words; ``given`` and ``asked`` as in
    ``outputs_for``. ``tile`` overrides the table's."""
    check_real_or_8_bit(input)
    if input.dim() < 1:
        raise ValueError("input needs at least one axis")
    check_words(weight, "weight", 2, input)
    *shape, features = input.shape
    rows, one = math.prod(shape), (1, 1)
    g = checked_geometry(rows, one, one, features, weight.shape[0], Arguments())
    if weight.shape[1] != g.words:
        raise ValueError(f"weight words {list(weight.shape)} do not fit {features} input features")
    scaling = (multiplier, zero_point, input_scale, straight_through)
    outputs, scaling = asked_of(input, (*shape, g.outputs), g, rows, scaling, given, asked)
    x = input.reshape(rows, features)  # no -1: there may be no features
    rows_loop = tile.loop == "rows" if tile else 0 < rows <= SIGNED_ROWS_LIMIT
    if rows_loop and features and g.outputs:
        _few_rows(x, weight, g, scaling, outputs, tile or SIGNED_ROWS)
    else:
        image, words = x.contiguous().view(rows, features, 1, 1), weight[:, None, None]
        convolve(image, words, g, scaling, outputs, torch.backends.cuda.matmul.fp32_precision, tile)
    return outputs.reals, outputs.signs
