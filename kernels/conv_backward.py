"""Gradients of the binary convolution: implicit products of a float gradient with packed signs.

Maths, for stride s, padding p, dilation d and tap t: an input pixel receives ``sum over t and o of G[(y + p -
t d) / s, o] * sign(W)[o, t, c]`` where the division is whole and inside the output, cleared where the
estimator's mask bit is 0; a weight receives ``sum over output pixels of G[y, o] * x[y s - p + t d, c]``, in
fp32, where x outside the image is the padding value 0, +1 or -1. Neither patches nor unpacked signs are
written to memory: programs gather rows of G and words, and decode them (see ``gradient_product.py``).

Cost: 2 * pixels * O * taps * C operations each, on 16-bit tensor cores; the gradient of the input visits
every tap of every input pixel, so with stride s all but 1 / s**2 of its products are with zeros. Bytes: the
gradient once per tap and block of channels (caches hold most of that), 1/8 byte per sign and mask bit, the
result. Deterministic: no atomics, partial sums as in ``linear_backward.py``.

Limits: fewer than 2**31 pixels, input words and outputs; a block of rows is one group's, which leaves most
of it empty where groups are narrow. ``tuning.BACKWARD`` says whether this file or torch's library runs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .binary_conv2d import Geometry
from .gradient_product import PartialSums, add_product, launch_options, store_gradient
from .pack_bits import FLOATS
from .tuning import GradientTile, family, gradient_tile, on_device_of


@triton.jit
def conv_grad_input_kernel(
    gradient, words, mask, out, pixels, group_outputs, outputs, channels, group_words, image_words, groups,
    height, width, out_height, out_width, taps, kernel_width,
    stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x,
    PARTS: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_INNER: tl.constexpr, BLOCK_WORDS: tl.constexpr,
):  # fmt: skip
    """Program (block of input pixels, block of a group's words, group); a turn is some outputs of one tap."""
    pixel = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first_word = tl.program_id(1) * BLOCK_WORDS
    group = tl.program_id(2)
    live = pixel < pixels
    y = pixel // width % height + pad_y
    x = pixel % width + pad_x
    image = pixel // (width * height)
    word = first_word + tl.arange(0, BLOCK_WORDS)
    words += (group * group_outputs).to(tl.int64) * (taps * group_words) + word[None, :]
    gradient += group * group_outputs
    turns = (group_outputs + BLOCK_INNER - 1) // BLOCK_INNER  # per tap
    sums = tl.zeros((BLOCK_ROWS, 32 * BLOCK_WORDS), tl.float32)
    for step in range(taps * turns):
        tap = step // turns
        n = step % turns * BLOCK_INNER + tl.arange(0, BLOCK_INNER)
        tap_y = y - tap // kernel_width * dilation_y
        tap_x = x - tap % kernel_width * dilation_x
        out_y = tap_y // stride_y
        out_x = tap_x // stride_x
        inside = live & (tap_y >= 0) & (out_y * stride_y == tap_y) & (out_y < out_height)
        inside = inside & (tap_x >= 0) & (out_x * stride_x == tap_x) & (out_x < out_width)
        at = ((image * out_height + out_y) * out_width + out_x).to(tl.int64) * outputs
        n_live = n < group_outputs
        tile = tl.load(
            gradient + at[:, None] + n[None, :], mask=inside[:, None] & n_live[None, :], other=0.0
        )  # fmt: skip
        some = tl.load(
            words + (n.to(tl.int64) * taps + tap)[:, None] * group_words,
            mask=n_live[:, None] & (word < group_words)[None, :], other=0,
        )  # fmt: skip
        sums = add_product(sums, tile, some, PARTS, WIDEN, BLOCK_INNER, BLOCK_WORDS)
    row = pixel.to(tl.int64)
    out_at, mask_at = (row * groups + group) * channels, row * image_words + group * group_words
    store_gradient(
        sums, out, out_at, mask, mask_at, live, first_word, channels, BLOCK_ROWS, BLOCK_WORDS,
    )  # fmt: skip


@triton.jit
def conv_grad_weight_kernel(
    gradient, words, out, pixels, group_outputs, outputs, channels, group_words, image_words, groups,
    height, width, out_height, out_width, taps, kernel_width,
    stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x, split_inner,
    PADDING: tl.constexpr, PARTS: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_INNER: tl.constexpr, BLOCK_WORDS: tl.constexpr,
):  # fmt: skip
    """Program (block of a group's outputs, block of words and tap, split and group); turns are pixels."""
    n = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tap = tl.program_id(1) % taps
    first_word = tl.program_id(1) // taps * BLOCK_WORDS
    group = tl.program_id(2) % groups
    split = tl.program_id(2) // groups
    word = first_word + tl.arange(0, BLOCK_WORDS)
    words += group * group_words + word[None, :]
    gradient += group * group_outputs + n[None, :]
    n_live = n < group_outputs
    tap_y = tap // kernel_width * dilation_y - pad_y
    tap_x = tap % kernel_width * dilation_x - pad_x
    first = split * split_inner
    sums = tl.zeros((BLOCK_ROWS, 32 * BLOCK_WORDS), tl.float32)
    for begin in range(first, tl.minimum(first + split_inner, pixels), BLOCK_INNER):
        pixel = begin + tl.arange(0, BLOCK_INNER)
        live = pixel < pixels
        y = pixel // out_width % out_height * stride_y + tap_y
        x = pixel % out_width * stride_x + tap_x
        inside = live & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        at = ((pixel // (out_width * out_height) * height + y) * width + x).to(tl.int64) * image_words
        some = tl.load(words + at[:, None], mask=inside[:, None] & (word < group_words)[None, :], other=0)
        if PADDING == -1:
            some = tl.where(inside[:, None], some, -1)
        counts = inside if PADDING == 0 else live
        tile = tl.load(
            gradient + pixel.to(tl.int64)[:, None] * outputs,
            mask=counts[:, None] & n_live[None, :], other=0.0,
        )  # fmt: skip
        sums = add_product(sums, tl.trans(tile), some, PARTS, WIDEN, BLOCK_INNER, BLOCK_WORDS)
    n += group * group_outputs
    row = n.to(tl.int64) * taps + tap
    out += split.to(tl.int64) * outputs * taps * channels
    store_gradient(
        sums, out, row * channels, None, row, n_live, first_word, channels, BLOCK_ROWS, BLOCK_WORDS
    )  # fmt: skip


# ---------------------------------------------------------------------------------------- launchers


def _sizes(gradient: Tensor, signs: Tensor, weight: Tensor, channels: int, geometry: Geometry) -> list[int]:
    """The sizes that both kernels take, in their order; raises ValueError where operands do not fit."""
    (n, height, width, image_words), (outputs, *kernel, words) = signs.shape, weight.shape
    groups = geometry.groups
    out_size = geometry.out_size((height, width), (kernel[0], kernel[1]))
    fits = words == -(-channels // 32) and image_words == groups * words and outputs % groups == 0
    if not fits or gradient.shape != (n, *out_size, outputs):
        shapes = ", ".join(str(tuple(t.shape)) for t in (gradient, signs, weight))
        raise ValueError(
            f"gradient, sign and weight words {shapes} do not fit {geometry} of {channels} channels"
        )
    if max(signs.numel(), n * out_size[0] * out_size[1], weight.numel()) >= 2**31:
        raise ValueError(f"{tuple(signs.shape)} words, {tuple(weight.shape)}: over the kernel's limits")
    return [
        outputs // groups, outputs, channels, words, image_words, groups, height, width, *out_size,
        kernel[0] * kernel[1], kernel[1], *geometry.stride, *geometry.padding, *geometry.dilation,
    ]  # fmt: skip


def _options(gradient: Tensor, tile: GradientTile) -> dict[str, int]:
    precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]  # made at run time
    return launch_options(gradient, tile, precision)


def _grad_input(
    gradient: Tensor, mask: Tensor | None, weight: Tensor, sizes: list[int], out: Tensor, tile: Any
) -> None:
    """Gradient ``[N, Ho, Wo, O]`` and weight words into ``out`` ``[N, H, W, C]``."""
    pixels = out.shape[:3].numel()
    _, _, _, words, _, groups, *_ = sizes
    tile = tile or gradient_tile(family(out.device), gradient.dtype, pixels)
    grid = (triton.cdiv(pixels, tile.block_rows), triton.cdiv(words, tile.block_words), groups)
    with on_device_of(out):
        conv_grad_input_kernel[grid](
            gradient, weight, mask, out, pixels, *sizes, **_options(gradient, tile)
        )  # fmt: skip


def _grad_weight(
    gradient: Tensor, signs: Tensor, sizes: list[int], padding_value: int, out: Tensor, tile: Any
) -> None:
    """Gradient ``[N, Ho, Wo, O]`` and sign words into ``out`` fp32 ``[O, kH, kW, C / groups]``."""
    pixels, taps = gradient.shape[:3].numel(), out.shape[1] * out.shape[2]
    group_outputs, outputs, _, words, _, groups, *_ = sizes
    tile = tile or gradient_tile(family(out.device), gradient.dtype, group_outputs)
    sums = PartialSums(out, outputs * taps * words, pixels, tile)
    blocks = (triton.cdiv(group_outputs, tile.block_rows), taps * triton.cdiv(words, tile.block_words))
    with on_device_of(out):
        conv_grad_weight_kernel[(*blocks, groups * sums.splits)](
            gradient, signs, sums.memory, pixels, *sizes, sums.split_inner, PADDING=padding_value,
            **_options(gradient, tile),
        )  # fmt: skip
    sums.finish()


def binary_conv2d_backward(
    grad_output: Tensor,
    signs: Tensor,
    mask: Tensor,
    weight: Tensor,
    in_channels: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    padding_value: int,
    need_input: bool,
    need_weight: bool,
    *,
    tile: GradientTile | None = None,
) -> tuple[Tensor, Tensor]:
    """As in ``ops/binary_conv2d.py``: gradients of the input in its dtype and of the weight in fp32.

    ``tile`` overrides the table's.
    """
    if grad_output.dtype not in FLOATS:
        raise ValueError(f"grad_output is {grad_output.dtype}, allowed are {FLOATS}")
    if padding_value not in (0, 1, -1):
        raise ValueError(f"padding_value is {padding_value}, allowed are 0, 1 and -1")
    gradient = grad_output.permute(0, 2, 3, 1).contiguous()
    signs, weight = signs.contiguous(), weight.contiguous()
    geometry = Geometry(stride, padding, dilation, groups, padding_value)
    n, height, width, _ = signs.shape
    outputs, kernel_height, kernel_width, _ = weight.shape
    channels = in_channels // groups
    sizes = _sizes(gradient, signs, weight, channels, geometry)
    grad_input = gradient.new_empty((n if need_input else 0, height, width, in_channels))
    shape = (outputs if need_weight else 0, kernel_height, kernel_width, channels)
    grad_weight = gradient.new_empty(shape, dtype=torch.float32)
    if grad_input.numel():
        _grad_input(gradient, mask.contiguous() if mask.numel() else None, weight, sizes, grad_input, tile)
    if grad_weight.numel():
        _grad_weight(gradient, signs, sizes, padding_value, grad_weight, tile)
    return grad_input.permute(0, 3, 1, 2), grad_weight.permute(0, 3, 1, 2)
