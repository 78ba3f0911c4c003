"""Binary linear layer: sign words times weight words, exact in int32.

Maths: ``dot = K - 2 * popcount(x XOR w)``, tails of both operands are 0. Three inner loops:

* ``rows`` (few input rows): a program reads a block of weight rows once, 16 bytes per thread, and counts
  bits. Bytes: N * K / 8 weights; memory is the limit.
* ``popcount``: a tile of outputs, one word at a time: xor, popc, add per 32 products. ``popc`` issues at 16
  lanes per clock and SM, so 512 products per clock and SM at best.
* ``decode``: words to +1 / -1 bytes in registers (0.75 instructions per element, see ``bits.py``), then
  int8 tensor cores. On sm_90 a turn of the 128 x 128 tile makes 128**3 products with about 160
  instructions per warp; ``wgmma`` takes x from registers and w from shared memory. On sm_80 and sm_100
  Triton emits ``mma.sync``, about 400 instructions per warp and turn, both operands from registers.

Limits: K < 2**24 (exact in fp32), fewer than 2**31 - 65536 rows and outputs; ``tl.dot`` never sees a 1-bit
operand.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .bits import decode_for_registers, decode_for_shared, popcount
from .epilogue import outputs_for, store_tile
from .geometry import words_for
from .grid import check_index, grid_of, program_of
from .operands import check_words
from .outputs import Outputs
from .pack_bits import pack_activation
from .tuning import MatmulTile, family, linear_tile, on_device_of


@triton.jit(do_not_specialize=["rows"])
def linear_rows_kernel(
    x, w, to, rows, outputs, n_words, features,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_WORDS: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Program (block of outputs, row)."""
    block, row, _ = program_of(tl.cdiv(outputs, BLOCK_N), rows)
    first = block * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    word = tl.arange(0, BLOCK_WORDS)
    w_at = w + n.to(tl.int64)[:, None] * n_words + word[None, :]
    x_at = x + row.to(tl.int64) * n_words + word
    different = tl.zeros((BLOCK_N, BLOCK_WORDS), tl.int32)
    for begin in range(0, n_words, BLOCK_WORDS):
        live = begin + word < n_words
        x_words = tl.load(x_at + begin, mask=live, other=0)
        w_words = tl.load(w_at + begin, mask=(n < outputs)[:, None] & live[None, :], other=0)
        different += popcount(x_words[None, :] ^ w_words)
    dot = features - 2 * tl.sum(different, axis=1)
    store_tile(
        dot[None, :], to,
        row.to(tl.int64) + tl.zeros((1,), tl.int64), row + tl.zeros((1,), tl.int32) < rows,
        first, outputs, outputs, 1, BLOCK_N,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def linear_popcount_kernel(
    x, w, to, rows, outputs, n_words, features,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_WORDS: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Program (block of rows, block of outputs); ``BLOCK_WORDS`` words are unrolled."""
    block, column_block, _ = program_of(tl.cdiv(rows, BLOCK_M), tl.cdiv(outputs, BLOCK_N))
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    first = column_block * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    x_at = x + m.to(tl.int64) * n_words
    w_at = w + n.to(tl.int64) * n_words
    different = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for begin in range(0, n_words, BLOCK_WORDS):
        for i in tl.static_range(BLOCK_WORDS):
            live = begin + i < n_words
            x_words = tl.load(x_at + begin + i, mask=(m < rows) & live, other=0)
            w_words = tl.load(w_at + begin + i, mask=(n < outputs) & live, other=0)
            different += popcount(x_words[:, None] ^ w_words[None, :])
    store_tile(
        features - 2 * different, to,
        m.to(tl.int64), m < rows, first, outputs, outputs, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def linear_decode_kernel(
    x, w, to, rows, outputs, n_words, features,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_WORDS: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Program (block of rows, block of outputs), 32 * ``BLOCK_WORDS`` products per output and turn."""
    block, column_block, _ = program_of(tl.cdiv(rows, BLOCK_M), tl.cdiv(outputs, BLOCK_N))
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    first = column_block * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    word = tl.arange(0, BLOCK_WORDS)
    x_at = x + m.to(tl.int64)[:, None] * n_words + word[None, :]
    w_at = w + n.to(tl.int64)[:, None] * n_words + word[None, :]
    dot = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for begin in range(0, n_words, BLOCK_WORDS):
        live = (begin + word < n_words)[None, :]
        x_words = tl.load(x_at + begin, mask=(m < rows)[:, None] & live, other=0)
        w_words = tl.load(w_at + begin, mask=(n < outputs)[:, None] & live, other=0)
        x_bytes = decode_for_registers(x_words, None, BLOCK_M, BLOCK_WORDS, False)
        if SHARED:
            w_bytes = decode_for_shared(w_words, BLOCK_N, BLOCK_WORDS)
        else:
            w_bytes = decode_for_registers(w_words, None, BLOCK_N, BLOCK_WORDS, False)
        dot = tl.dot(x_bytes, tl.trans(w_bytes), dot, out_dtype=tl.int32)
    # Every element past the end was (+1) * (+1).
    past_end = (n_words + BLOCK_WORDS - 1) // BLOCK_WORDS * BLOCK_WORDS * 32 - features
    store_tile(
        dot - past_end, to,
        m.to(tl.int64), m < rows, first, outputs, outputs, BLOCK_M, BLOCK_N,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------- launchers


def _matmul(
    x: Tensor, weight: Tensor, features: int, outputs: Outputs, tile: MatmulTile | None = None
) -> None:
    """Words ``[rows, W]`` times words ``[N, W]`` into ``outputs``; ``tile`` overrides the table's."""
    (rows, n_words), n = x.shape, weight.shape[0]
    if weight.shape[1] != n_words or n_words != words_for(features):
        raise ValueError(f"{tuple(x.shape)} and {tuple(weight.shape)} words do not hold {features} features")
    check_index(rows, "rows")
    check_index(n, "outputs")
    if features >= 2**24:
        raise ValueError(f"{features} features: fewer than 2**24 are exact in fp32")
    if rows == 0 or n == 0:
        return
    tile = tile or linear_tile(family(x.device), rows, n)
    if tile.loop == "rows":
        kernel, grid = linear_rows_kernel, grid_of(triton.cdiv(n, tile.block_n), rows)
    else:
        kernel = linear_decode_kernel if tile.loop == "decode" else linear_popcount_kernel
        grid = grid_of(triton.cdiv(rows, tile.block_m), triton.cdiv(n, tile.block_n))
    with on_device_of(x):
        kernel[grid](
            x.contiguous(), weight.contiguous(), outputs.asked(), rows, n, n_words, features,
            **tile.constants(), **tile.options(),
        )  # fmt: skip


def binary_linear(
    input: Tensor, weight: Tensor, ste_clip: bool, blocked: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``reference.binary_linear``: output, sign words, mask words. ``blocked`` is the CPU's and unused."""
    check_words(weight, "weight", 2, input)
    signs, mask = pack_activation(input, -1, 1, ste_clip)
    out = input.new_empty((*input.shape[:-1], weight.shape[0]))
    rows = signs.reshape(math.prod(input.shape[:-1]), signs.shape[-1])  # no -1: there may be no words
    _matmul(rows, weight, input.shape[-1], Outputs(out, signs.new_empty(0)))
    return out, signs, mask


def binary_linear_packed(
    input: Tensor, weight: Tensor, in_features: int, *, tile: MatmulTile | None = None, **asked: Any
) -> tuple[Tensor, Tensor]:
    """``reference.binary_linear_packed``: values ``[M, N]``, sign words; ``asked``: see ``outputs_for``."""
    check_words(input, "input", 2, input)
    check_words(weight, "weight", 2, input)
    outputs = outputs_for(input, (input.shape[0], weight.shape[0]), **asked)
    _matmul(input, weight, in_features, outputs, tile)
    return outputs.reals, outputs.signs
