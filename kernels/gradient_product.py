"""What the backward kernels share: a gradient tile times decoded signs on tensor cores, and the store.

Maths: ``sums[r, k] += sum over c of gradient[r, c] * s[c, k]`` in fp32, with s = +1 / -1 decoded from words
in registers, 2 instructions per element. bf16 and fp16 gradients are multiplied as they are. An fp32 gradient
is cut into bf16 parts of 8 significant bits: three hold all 24. +1 and -1 are exact in bf16, so every product
is exact and only the fp32 sums round. Tensor cores do so in their own way: 16 products and the sum so far are
aligned to the largest of them and cut, not rounded to nearest. That is K / 16 errors of up to 2**-23 of the
partial sum, all towards 0, where the errors of a chain of fp32 additions partly cancel: sums over many pixels
may be looser than those, and ``PartialSums`` keeps them short. Three bf16 products are at the price of 1.5 in
TF32; Triton's "tf32x3" takes three of those: it also splits the signs, whose remainder is 0.

Where torch may use TF32 (11 bits), two parts do: 16 bits, relative error of a factor below 2**-15, at TF32's
price. Parts are cut, not rounded: none overflows. An infinite gradient gives NaN (inf - inf in the remainder)
where one product would give inf or NaN; both are caught by the check of a scaled step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bits import decode_signs, to_float32, unpack_lanes
from .tuning import GradientTile, family, gradient_splits


@triton.jit
def _cut(x, INFINITE: tl.constexpr):
    """The upper 16 bits of fp32 values as bf16, and what is left, exactly; of infinities 0 or NaN."""
    bits = x.to(tl.uint32, bitcast=True)
    upper = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    widened = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    rest = x - widened
    if INFINITE:
        rest = tl.where(x == widened, 0.0, rest)
    return upper, rest


@triton.jit
def _dot(a, b, sums, WIDEN: tl.constexpr):
    if WIDEN:  # the interpreter multiplies the bits of bf16 as integers
        return tl.dot(to_float32(a), to_float32(b), sums, input_precision="ieee")
    return tl.dot(a, b, sums)


@triton.jit
def multiply_real(
    sums, real, signs, PARTS: tl.constexpr, WIDEN: tl.constexpr, INFINITE: tl.constexpr = False
):  # fmt: skip
    """``sums`` + ``real`` ``[R, K]`` times decoded signs ``[K, N]``: of fp32 numbers bf16, else their dtype.

    ``INFINITE``: infinite numbers are multiplied as such.
    """
    if real.dtype == tl.float32:
        for i in tl.static_range(PARTS):
            part, real = _cut(real, INFINITE and i == 0)
            sums = _dot(part, signs, sums, WIDEN)
    else:
        sums = _dot(real, signs, sums, WIDEN)
    return sums


@triton.jit
def add_product(
    sums, gradient, words, PARTS: tl.constexpr, WIDEN: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr
):
    """``sums`` + ``gradient`` ``[R, ROWS]`` times the signs in ``words`` ``[ROWS, WORDS]``."""
    if gradient.dtype == tl.float32:
        signs = decode_signs(words, tl.bfloat16, ROWS, WORDS)
    else:
        signs = decode_signs(words, gradient.dtype, ROWS, WORDS)
    return multiply_real(sums, gradient, signs, PARTS, WIDEN)


@triton.jit
def store_gradient(
    sums, out, out_at, mask, mask_at, row_live, first_word, columns,
    ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Store ``sums`` ``[ROWS, 32 * WORDS]``, columns from ``32 * first_word`` on and below ``columns``.

    ``out_at`` and ``mask_at`` (int64 ``[ROWS]``): where column 0 and its mask word are. Mask bit 0: stores 0.
    """
    column = first_word * 32 + tl.arange(0, 32 * WORDS)
    if mask is not None:
        word = first_word + tl.arange(0, WORDS)
        live = row_live[:, None] & (word * 32 < columns)[None, :]
        bits = tl.load(mask + mask_at[:, None] + word[None, :], mask=live, other=0)
        keep = unpack_lanes(tl.reshape(bits, (ROWS * WORDS,)))
        sums = tl.where(tl.reshape(keep, (ROWS, 32 * WORDS)), sums, 0.0)
    live = row_live[:, None] & (column < columns)[None, :]
    tl.store(out + out_at[:, None] + column[None, :], sums.to(out.dtype.element_ty), mask=live)


# ---------------------------------------------------------------------------------------- launchers


def parts_of(dtype: torch.dtype, precision: str) -> int:
    """bf16 parts of a gradient, where ``precision`` is torch's ``fp32_precision`` for such a product."""
    return 1 if dtype != torch.float32 else 2 if precision == "tf32" else 3


def launch_options(gradient: Tensor, tile: GradientTile, precision: str) -> dict[str, int]:
    """Compile-time values and options that both kinds of product take."""
    return {
        "PARTS": parts_of(gradient.dtype, precision), "WIDEN": family(gradient.device) == "interpreter",
        **tile.constants(), **tile.options(),
    }  # fmt: skip


class PartialSums:
    """A gradient of a weight, summed over ``inner`` rows in splits: ``memory`` ``[splits, *out.shape]``.

    ``split_turns`` turns of the tile belong to a split.
    """

    def __init__(self, out: Tensor, result_words: int, inner: int, tile: GradientTile) -> None:
        self.splits = gradient_splits(result_words, inner)
        self.split_turns = triton.cdiv(triton.cdiv(inner, self.splits), tile.block_inner)
        self.memory = out[None] if self.splits == 1 else out.new_empty(self.splits, *out.shape)
        self._out = out

    def finish(self) -> None:
        """Add the splits, always in one order."""
        if self.splits > 1:
            torch.sum(self.memory, 0, out=self._out)
