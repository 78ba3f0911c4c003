"""Binary convolution on packed channels-last words: implicit matrix product, exact in int32.

Maths: for an output pixel and channel, the sum over taps of ``C - 2 * popcount(x XOR w)`` with C channels per
group; a tap outside the image counts as 0 (left out of the sum), or as C signs +1 or -1. Rows of the
product are output pixels, its inner axis is (tap, word). No image of patches is written: each program
gathers the words of its pixels from the input, which the caches hold (a 3x3 convolution reads each word
nine times, 1/32 of the bytes of a float one).

Inner loops as in ``binary_linear.py``: ``decode`` to int8 for tensor cores, ``popcount`` where a group has
few outputs. Operations: pixels * O * taps * C products. Bytes: N*H*W*C/8 in, 2, 4 or 1/8 per output out.

Limits: fewer than 2**31 words in the input and fewer than 2**31 output pixels; taps * C < 2**24. Bit output
of a group whose outputs are not whole words goes through fp32 dots in memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bits import decode_for_registers, decode_for_shared, popcount
from .epilogue import Outputs, finish_in_torch, outputs_for, store_tile
from .pack_bits import pack_activation
from .tuning import MatmulTile, conv_tile, family, on_device_of


@triton.jit
def _gather(
    x, pixel_base, pixel_y, pixel_x, pixel_live, tap_y, tap_x, word, word_live, last_word,
    height, width, image_words, last_word_mask, PADDING: tl.constexpr,
):  # fmt: skip
    """Words of one tap for a block of pixels ``[BLOCK_M, words]``, and which pixels the image covers."""
    y = pixel_y + tap_y
    z = pixel_x + tap_x
    inside = pixel_live & (y >= 0) & (y < height) & (z >= 0) & (z < width)
    at = (pixel_base + y * width + z) * image_words
    words = tl.load(x + at[:, None] + word[None, :], mask=inside[:, None] & word_live[None, :], other=0)
    if PADDING == -1:  # all channels are -1, tail bits stay 0
        minus = tl.where(word_live, tl.where(last_word, last_word_mask, -1), 0)
        words = tl.where(inside[:, None], words, minus[None, :])
    return words, inside


@triton.jit
def conv_popcount_kernel(
    x, w, values, signs, threshold, scale, shift, residual, pixels, group_outputs, outputs, channels,
    group_words, image_words, last_word_mask, height, width, out_height, out_width, taps, kernel_width,
    stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x,
    PADDING: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_WORDS: tl.constexpr,
    SHARED: tl.constexpr,
):  # fmt: skip
    """Program (block of pixels, block of a group's outputs, group); one word per turn."""
    pixel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    group = tl.program_id(2)
    live = pixel < pixels
    pixel_y = pixel // out_width % out_height * stride_y - pad_y
    pixel_x = pixel % out_width * stride_x - pad_x
    base = pixel // (out_width * out_height) * (height * width)
    first = tl.program_id(1) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    w_at = w + (group * group_outputs + n).to(tl.int64) * (taps * group_words)
    x += group * group_words
    one = tl.arange(0, 1)
    different = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    counted = tl.zeros((BLOCK_M,), tl.int32)
    for step in range(taps * group_words):
        tap = step // group_words
        word = step % group_words + one
        words, inside = _gather(
            x, base, pixel_y, pixel_x, live,
            tap // kernel_width * dilation_y, tap % kernel_width * dilation_x,
            word, word < group_words, word == group_words - 1,
            height, width, image_words, last_word_mask, PADDING,
        )  # fmt: skip
        w_words = tl.load(w_at + step, mask=n < group_outputs, other=0)
        unequal = tl.sum(words, axis=1)[:, None] ^ w_words[None, :]
        if PADDING == 0:
            unequal &= tl.where(inside, -1, 0)[:, None]
            counted += inside.to(tl.int32)
        different += popcount(unequal)
    if PADDING == 0:
        total = counted // group_words * channels
    else:
        total = tl.zeros((BLOCK_M,), tl.int32) + taps * channels
    first += group * group_outputs
    store_tile(
        total[:, None] - 2 * different, values, signs, threshold, scale, shift, residual,
        pixel.to(tl.int64), live, first, (group + 1) * group_outputs, outputs, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def conv_decode_kernel(
    x, w, values, signs, threshold, scale, shift, residual, pixels, group_outputs, outputs, channels,
    group_words, image_words, last_word_mask, height, width, out_height, out_width, taps, kernel_width,
    stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x,
    PADDING: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_WORDS: tl.constexpr,
    SHARED: tl.constexpr,
):  # fmt: skip
    """Program (block of pixels, block of a group's outputs, group); a turn is some words of one tap."""
    pixel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    group = tl.program_id(2)
    live = pixel < pixels
    pixel_y = pixel // out_width % out_height * stride_y - pad_y
    pixel_x = pixel % out_width * stride_x - pad_x
    base = pixel // (out_width * out_height) * (height * width)
    first = tl.program_id(1) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    block = tl.arange(0, BLOCK_WORDS)
    w_at = w + (group * group_outputs + n).to(tl.int64)[:, None] * (taps * group_words) + block[None, :]
    x += group * group_words
    turns = (group_words + BLOCK_WORDS - 1) // BLOCK_WORDS  # per tap
    dot = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    counted = tl.zeros((BLOCK_M,), tl.int32)
    for step in range(taps * turns):
        tap = step // turns
        begin = step % turns * BLOCK_WORDS
        word = begin + block
        words, inside = _gather(
            x, base, pixel_y, pixel_x, live,
            tap // kernel_width * dilation_y, tap % kernel_width * dilation_x,
            word, word < group_words, word == group_words - 1,
            height, width, image_words, last_word_mask, PADDING,
        )  # fmt: skip
        w_words = tl.load(
            w_at + (tap * group_words + begin),
            mask=(n < group_outputs)[:, None] & (word < group_words)[None, :], other=0,
        )  # fmt: skip
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
        counted = tl.zeros((BLOCK_M,), tl.int32) + taps * turns
    past_end = counted // turns * (turns * BLOCK_WORDS * 32 - channels)
    first += group * group_outputs
    store_tile(
        dot - past_end[:, None], values, signs, threshold, scale, shift, residual, pixel.to(tl.int64), live,
        first, (group + 1) * group_outputs, outputs, BLOCK_M, BLOCK_N,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------- launchers


@dataclass(frozen=True)
class Geometry:
    """Stride, padding and dilation as (y, x); groups; the value that padded taps count as."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    padding_value: int

    def out_size(self, image: tuple[int, int], kernel: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the output. Raises ValueError where the kernel does not fit."""
        sizes = [
            (image[i] + 2 * self.padding[i] - self.dilation[i] * (kernel[i] - 1) - 1) // self.stride[i] + 1
            for i in (0, 1)
        ]
        if min(sizes) < 1:
            raise ValueError(f"a kernel {kernel} does not fit into an image {image} with {self}")
        return sizes[0], sizes[1]


def _check(x: Tensor, weight: Tensor, channels: int, geometry: Geometry, pixels: int) -> None:
    groups, words = geometry.groups, -(-channels // 32)
    if x.shape[-1] != groups * words or weight.shape[-1] != words or weight.shape[0] % groups:
        shapes = f"{tuple(x.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"{shapes} words do not hold {groups} groups of {channels} channels")
    if geometry.padding_value not in (0, 1, -1):
        raise ValueError(f"padding_value is {geometry.padding_value}, allowed are 0, 1 and -1")
    if max(x.numel(), pixels) >= 2**31 or channels * weight.shape[1] * weight.shape[2] >= 2**24:
        raise ValueError(f"{tuple(x.shape)} words into {pixels} pixels is over the kernel's limits")


def _convolve(
    x: Tensor,
    weight: Tensor,
    channels: int,
    geometry: Geometry,
    out_shape: tuple[int, ...],
    to: Outputs,
    tile: MatmulTile | None = None,
) -> None:
    """Words ``[N, H, W, groups * words]`` with ``[O, kH, kW, words]`` into outputs ``[N, Ho, Wo, O]``."""
    (_, height, width, image_words), (outputs, kernel_height, kernel_width, words) = x.shape, weight.shape
    pixels = math.prod(out_shape[:3])
    _check(x, weight, channels, geometry, pixels)
    if pixels == 0 or outputs == 0:
        return
    group_outputs = outputs // geometry.groups
    tile = tile or conv_tile(family(x.device), group_outputs, words)
    kernel = conv_decode_kernel if tile.loop == "decode" else conv_popcount_kernel
    grid = (triton.cdiv(pixels, tile.block_m), triton.cdiv(group_outputs, tile.block_n), geometry.groups)
    last_word_mask = -1 if channels % 32 == 0 else (1 << channels % 32) - 1
    padding = geometry.padding_value if any(geometry.padding) else 1  # no padded taps: nothing to leave out
    with on_device_of(x):
        kernel[grid](
            x.contiguous(), weight.contiguous(), *to.pointers(),
            pixels, group_outputs, outputs, channels, words, image_words, last_word_mask,
            height, width, out_shape[1], out_shape[2], kernel_height * kernel_width, kernel_width,
            *geometry.stride, *geometry.padding, *geometry.dilation, PADDING=padding,
            **tile.constants(), **tile.options(),
        )  # fmt: skip


def binary_conv2d(
    input: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    padding_value: int,
    ste_clip: bool,
    blocked: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``reference.binary_conv2d``: output (channels-last strides), sign words, mask words."""
    geometry = Geometry(stride, padding, dilation, groups, padding_value)
    n, channels, height, width = input.shape
    out_size = geometry.out_size((height, width), (weight.shape[1], weight.shape[2]))
    signs, mask = pack_activation(input, 1, groups, ste_clip)
    out = input.new_empty((n, *out_size, weight.shape[0]))
    _convolve(signs, weight, channels // groups, geometry, out.shape, Outputs(out, signs.new_empty(0)))
    return out.permute(0, 3, 1, 2), signs, mask


def binary_conv2d_packed(
    input: Tensor,
    weight: Tensor,
    in_channels: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    padding_value: int,
    *,
    tile: MatmulTile | None = None,
    **asked: Any,
) -> tuple[Tensor, Tensor]:
    """``reference.binary_conv2d_packed``: values ``[N, Ho, Wo, O]`` and sign words; ``asked`` as in
    ``outputs_for``."""
    geometry = Geometry(stride, padding, dilation, groups, padding_value)
    n, height, width, _ = input.shape
    n_outputs, kernel_height, kernel_width, _ = weight.shape
    shape = (n, *geometry.out_size((height, width), (kernel_height, kernel_width)), n_outputs)
    outputs = outputs_for(input, shape, **asked)
    if outputs.signs.numel() == 0 or groups == 1 or n_outputs // groups % 32 == 0:
        _convolve(input, weight, in_channels // groups, geometry, shape, outputs, tile)
    else:
        dot = input.new_empty(shape, dtype=torch.float32)
        only_dots = Outputs(dot, input.new_empty(0))
        _convolve(input, weight, in_channels // groups, geometry, shape, only_dots, tile)
        finish_in_torch(dot, outputs)
    return outputs.values, outputs.signs
