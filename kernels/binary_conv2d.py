"""Binary convolution on packed channels-last words: implicit matrix product, exact in int32.

Maths: for an output pixel and channel, the sum over taps of ``C - 2 * popcount(x XOR w)`` with C channels per
group; a tap outside the image counts as 0 (left out of the sum), or as C signs +1 or -1. Rows of the
product are output pixels, its inner axis is (tap, word). No image of patches is written: each program
gathers the words of its pixels from the input, which the caches hold (a 3x3 convolution reads each word
nine times, 1/32 of the bytes of a float one).

Inner loops as in ``binary_linear.py``: ``decode`` to int8 for tensor cores, ``popcount`` where a group has
few outputs. Operations: pixels * O * taps * C products. Bytes: N*H*W*C/8 in, 2, 4 or 1/8 per output out.

Limits: those of ``geometry.py``; fewer than 2**31 - 65536 words of input, output pixels and outputs. Bits of
groups whose outputs are not whole words go through int32 dots in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .bits import decode_for_registers, decode_for_shared, popcount
from .epilogue import finish, outputs_for, store_tile
from .geometry import Arguments, Geometry, checked_geometry
from .grid import check_index, grid_of, program_of
from .operands import check_floats, check_words
from .outputs import Outputs
from .pack_bits import pack_activation
from .tuning import MatmulTile, conv_tile, family, on_device_of


@triton.jit
def _place(pixel, g):
    """Of output pixels: first input pixel of their image, and row and column that their window starts at."""
    y = pixel // g.out[1] % g.out[0] * g.stride[0] - g.padding[0]
    x = pixel % g.out[1] * g.stride[1] - g.padding[1]
    return pixel // (g.out[1] * g.out[0]) * (g.image[0] * g.image[1]), y, x


@triton.jit
def _gather(x, base, pixel_y, pixel_x, pixel_live, tap, word, word_live, g, PADDING: tl.constexpr):
    """Words of one tap for a block of pixels ``[BLOCK_M, words]``, and which pixels the image covers."""
    y = pixel_y + tap // g.kernel[1] * g.dilation[0]
    z = pixel_x + tap % g.kernel[1] * g.dilation[1]
    inside = pixel_live & (y >= 0) & (y < g.image[0]) & (z >= 0) & (z < g.image[1])
    at = (base + y * g.image[1] + z) * g.image_words
    words = tl.load(x + at[:, None] + word[None, :], mask=inside[:, None] & word_live[None, :], other=0)
    if PADDING == -1:  # all channels are -1, tail bits stay 0
        tail = g.channels - (g.words - 1) * 32
        last = tl.where(tail == 32, -1, (1 << (tail & 31)) - 1)
        minus = tl.where(word_live, tl.where(word == g.words - 1, last, -1), 0)
        words = tl.where(inside[:, None], words, minus[None, :])
    return words, inside


@triton.jit(do_not_specialize=["pixels"])
def conv_popcount_kernel(
    x, w, to, pixels, geometry,
    PADDING: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_WORDS: tl.constexpr,
    SHARED: tl.constexpr,
):  # fmt: skip
    """Program (block of pixels, block of a group's outputs, group); one word per turn."""
    g = geometry
    pixel_block, block, group = program_of(tl.cdiv(pixels, BLOCK_M), tl.cdiv(g.outputs, BLOCK_N))
    pixel = pixel_block * BLOCK_M + tl.arange(0, BLOCK_M)
    live = pixel < pixels
    base, pixel_y, pixel_x = _place(pixel, g)
    first = block * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    w_at = w + (group * g.outputs + n).to(tl.int64) * (g.taps * g.words)
    x += group * g.words
    one = tl.arange(0, 1)
    different = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    counted = tl.zeros((BLOCK_M,), tl.int32)
    for step in range(g.taps * g.words):
        word = step % g.words + one
        words, inside = _gather(
            x, base, pixel_y, pixel_x, live, step // g.words, word, word < g.words, g, PADDING
        )
        w_words = tl.load(w_at + step, mask=n < g.outputs, other=0)
        unequal = tl.sum(words, axis=1)[:, None] ^ w_words[None, :]
        if PADDING == 0:
            unequal &= tl.where(inside, -1, 0)[:, None]
            counted += inside.to(tl.int32)
        different += popcount(unequal)
    if PADDING == 0:
        total = counted // g.words * g.channels
    else:
        total = tl.zeros((BLOCK_M,), tl.int32) + g.taps * g.channels
    store_tile(
        total[:, None] - 2 * different, to, pixel.to(tl.int64), live,
        first + group * g.outputs, (group + 1) * g.outputs, g.all_outputs, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit(do_not_specialize=["pixels"])
def conv_decode_kernel(
    x, w, to, pixels, geometry,
    PADDING: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_WORDS: tl.constexpr,
    SHARED: tl.constexpr,
):  # fmt: skip
    """Program (block of pixels, block of a group's outputs, group); a turn is some words of one tap."""
    g = geometry
    pixel_block, n_block, group = program_of(tl.cdiv(pixels, BLOCK_M), tl.cdiv(g.outputs, BLOCK_N))
    pixel = pixel_block * BLOCK_M + tl.arange(0, BLOCK_M)
    live = pixel < pixels
    base, pixel_y, pixel_x = _place(pixel, g)
    first = n_block * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    block = tl.arange(0, BLOCK_WORDS)
    w_at = w + (group * g.outputs + n).to(tl.int64)[:, None] * (g.taps * g.words) + block[None, :]
    x += group * g.words
    turns = (g.words + BLOCK_WORDS - 1) // BLOCK_WORDS  # per tap
    dot = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    counted = tl.zeros((BLOCK_M,), tl.int32)
    for step in range(g.taps * turns):
        tap = step // turns
        begin = step % turns * BLOCK_WORDS
        word = begin + block
        words, inside = _gather(x, base, pixel_y, pixel_x, live, tap, word, word < g.words, g, PADDING)
        w_words = tl.load(
            w_at + (tap * g.words + begin), mask=(n < g.outputs)[:, None] & (word < g.words)[None, :], other=0
        )
        keep = tl.where(inside, -1, 0)
        counted += inside.to(tl.int32)
        x_bytes = decode_for_registers(words, keep, BLOCK_M, BLOCK_WORDS, PADDING == 0)
        if SHARED:
            w_bytes = decode_for_shared(w_words, BLOCK_N, BLOCK_WORDS)
        else:
            w_bytes = decode_for_registers(w_words, None, BLOCK_N, BLOCK_WORDS, False)
        dot = tl.dot(x_bytes, tl.trans(w_bytes), dot, out_dtype=tl.int32)
    # In every counted turn the elements past the channels were (+1) * (+1).
    if PADDING != 0:
        counted = tl.zeros((BLOCK_M,), tl.int32) + g.taps * turns
    past_end = counted // turns * (turns * BLOCK_WORDS * 32 - g.channels)
    store_tile(
        dot - past_end[:, None], to, pixel.to(tl.int64), live,
        first + group * g.outputs, (group + 1) * g.outputs, g.all_outputs, BLOCK_M, BLOCK_N,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------- launchers


def geometry_of_call(
    batch: int, image: Sequence[int], weight: Tensor, beside: Tensor, channels: int, arguments: Arguments
) -> Geometry:
    """Geometry of an operator's call, checked.

    ``weight``: words ``[O, kH, kW, words]``; raises ValueError where they do not hold the channels.
    """
    check_words(weight, "weight", 4, beside)
    outputs, kernel_height, kernel_width, words = weight.shape
    g = checked_geometry(batch, tuple(image), (kernel_height, kernel_width), channels, outputs, arguments)
    if words != g.words:
        raise ValueError(f"{words} words of weights do not hold {g.groups} groups of {g.channels} channels")
    return g


def _convolve(
    x: Tensor, weight: Tensor, g: Geometry, batch: int, to: Outputs, tile: MatmulTile | None = None
) -> None:
    """Words ``[N, H, W, groups * words]`` with ``[O, kH, kW, words]`` into outputs ``[N, Ho, Wo, O]``."""
    pixels = g.pixels(batch)
    if x.shape != (batch, *g.image, g.image_words):
        raise ValueError(f"{tuple(x.shape)} words do not hold {batch} images of {g}")
    check_index(x.numel(), "words of input")
    check_index(pixels, "output pixels")
    check_index(g.all_outputs, "outputs")
    if pixels == 0 or g.all_outputs == 0:
        return
    if g.words == 0 or crosses_words(g, to):
        dot = x.new_zeros((batch, *g.out, g.all_outputs))
        if g.words:
            _convolve(x, weight, g, batch, Outputs(dot, x.new_empty(0)), tile)
        finish(dot, to)
        return
    tile = tile or conv_tile(family(x.device), g.outputs, g.words)
    kernel = conv_decode_kernel if tile.loop == "decode" else conv_popcount_kernel
    grid = grid_of(triton.cdiv(pixels, tile.block_m), triton.cdiv(g.outputs, tile.block_n), g.groups)
    padding = g.padding_value if any(g.padding) else 1  # no padded taps: nothing to leave out
    with on_device_of(x):
        kernel[grid](
            x.contiguous(), weight.contiguous(), to.asked(), pixels, g, PADDING=padding,
            **tile.constants(), **tile.options(),
        )  # fmt: skip


def crosses_words(g: Geometry, to: Outputs) -> bool:
    """Whether a sign word holds outputs of two groups: no program could write it."""
    return bool(to.signs.numel()) and g.groups > 1 and g.outputs % 32 != 0


def binary_conv2d(input: Tensor, weight: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``reference.binary_conv2d``: output (in the memory format of the input), sign words, mask words.

    ``given``: the operator's operands from the stride on; so below.
    """
    arguments, (ste_clip, *_) = Arguments.taken(given)
    check_floats(input, "input")
    if input.dim() != 4:
        raise ValueError(f"input must be [N, C, H, W], got {list(input.shape)}")
    n, channels, *image = input.shape
    g = geometry_of_call(n, image, weight, input, channels, arguments)
    signs, mask = pack_activation(input, 1, g.groups, ste_clip)
    out = input.new_empty((n, *g.out, g.all_outputs))
    _convolve(signs, weight, g, n, Outputs(out, signs.new_empty(0)))
    output = out.permute(0, 3, 1, 2).contiguous(memory_format=suggest_memory_format(input))
    return output, signs, mask


def binary_conv2d_packed(
    input: Tensor,
    weight: Tensor,
    in_channels: int,
    *given: Any,
    tile: MatmulTile | None = None,
    **asked: Any,
) -> tuple[Tensor, Tensor]:
    """``reference.binary_conv2d_packed``: values ``[N, Ho, Wo, O]`` and sign words; ``asked`` as in
    ``outputs_for``."""
    check_words(input, "input", 4, input)
    n, height, width, _ = input.shape
    g = geometry_of_call(n, (height, width), weight, input, in_channels, Arguments.taken(given)[0])
    outputs = outputs_for(input, (n, *g.out, g.all_outputs), **asked)
    _convolve(input, weight, g, n, outputs, tile)
    return outputs.reals, outputs.signs
