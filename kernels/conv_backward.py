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

Limits: those of ``geometry.py``; fewer than 2**31 - 65536 pixels, input words and outputs; a block of rows is
one group's, which leaves most of it empty where groups are narrow. ``tuning.BACKWARD`` says whether this file
or torch's library runs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .binary_conv2d import geometry_of_call
from .geometry import Arguments, Geometry
from .gradient_product import PartialSums, add_product, launch_options, store_gradient
from .grid import check_index, grid_of, program_of
from .operands import check_floats, check_mask, check_words
from .tuning import GradientTile, family, gradient_tile, on_device_of


@triton.jit(do_not_specialize=["pixels"])
def conv_grad_input_kernel(
    gradient, words, mask, out, pixels, geometry, PARTS: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_INNER: tl.constexpr, BLOCK_WORDS: tl.constexpr,
):  # fmt: skip
    """Program (block of input pixels, block of a group's words, group); a turn is some outputs of one tap."""
    g = geometry
    block, word_block, group = program_of(tl.cdiv(pixels, BLOCK_ROWS), tl.cdiv(g.words, BLOCK_WORDS))
    pixel = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first_word = word_block * BLOCK_WORDS
    live = pixel < pixels
    y = pixel // g.image[1] % g.image[0] + g.padding[0]
    x = pixel % g.image[1] + g.padding[1]
    image = pixel // (g.image[1] * g.image[0])
    word = first_word + tl.arange(0, BLOCK_WORDS)
    words += (group * g.outputs).to(tl.int64) * (g.taps * g.words) + word[None, :]
    gradient += group * g.outputs
    turns = (g.outputs + BLOCK_INNER - 1) // BLOCK_INNER  # per tap
    sums = tl.zeros((BLOCK_ROWS, 32 * BLOCK_WORDS), tl.float32)
    for step in range(g.taps * turns):
        tap = step // turns
        n = step % turns * BLOCK_INNER + tl.arange(0, BLOCK_INNER)
        tap_y = y - tap // g.kernel[1] * g.dilation[0]
        tap_x = x - tap % g.kernel[1] * g.dilation[1]
        out_y = tap_y // g.stride[0]
        out_x = tap_x // g.stride[1]
        inside = live & (tap_y >= 0) & (out_y * g.stride[0] == tap_y) & (out_y < g.out[0])
        inside = inside & (tap_x >= 0) & (out_x * g.stride[1] == tap_x) & (out_x < g.out[1])
        at = ((image * g.out[0] + out_y) * g.out[1] + out_x).to(tl.int64) * g.all_outputs
        n_live = n < g.outputs
        tile = tl.load(
            gradient + at[:, None] + n[None, :], mask=inside[:, None] & n_live[None, :], other=0.0
        )  # fmt: skip
        some = tl.load(
            words + (n.to(tl.int64) * g.taps + tap)[:, None] * g.words,
            mask=n_live[:, None] & (word < g.words)[None, :], other=0,
        )  # fmt: skip
        sums = add_product(sums, tile, some, PARTS, WIDEN, BLOCK_INNER, BLOCK_WORDS)
    row = pixel.to(tl.int64) * g.groups + group
    store_gradient(
        sums, out, row * g.channels, mask, row * g.words, live, first_word, g.channels,
        BLOCK_ROWS, BLOCK_WORDS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["pixels", "split_turns"])
def conv_grad_weight_kernel(
    gradient, words, out, pixels, split_turns, geometry,
    PADDING: tl.constexpr, PARTS: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_INNER: tl.constexpr, BLOCK_WORDS: tl.constexpr,
):  # fmt: skip
    """Program (block of a group's outputs, block of words and tap, group and split); turns are pixels."""
    g = geometry
    block, word_block, rest = program_of(
        tl.cdiv(g.outputs, BLOCK_ROWS), g.taps * tl.cdiv(g.words, BLOCK_WORDS)
    )  # fmt: skip
    n = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tap = word_block % g.taps
    first_word = word_block // g.taps * BLOCK_WORDS
    group = rest % g.groups
    split = rest // g.groups
    word = first_word + tl.arange(0, BLOCK_WORDS)
    words += group * g.words + word[None, :]
    gradient += group * g.outputs + n[None, :]
    n_live = n < g.outputs
    tap_y = tap // g.kernel[1] * g.dilation[0] - g.padding[0]
    tap_x = tap % g.kernel[1] * g.dilation[1] - g.padding[1]
    first = split * split_turns * BLOCK_INNER
    sums = tl.zeros((BLOCK_ROWS, 32 * BLOCK_WORDS), tl.float32)
    for begin in range(first, tl.minimum(first + split_turns * BLOCK_INNER, pixels), BLOCK_INNER):
        pixel = begin + tl.arange(0, BLOCK_INNER)
        live = pixel < pixels
        y = pixel // g.out[1] % g.out[0] * g.stride[0] + tap_y
        x = pixel % g.out[1] * g.stride[1] + tap_x
        inside = live & (y >= 0) & (y < g.image[0]) & (x >= 0) & (x < g.image[1])
        at = (pixel // (g.out[1] * g.out[0]) * g.image[0] + y) * g.image[1] + x
        at = at.to(tl.int64) * g.image_words
        some = tl.load(words + at[:, None], mask=inside[:, None] & (word < g.words)[None, :], other=0)
        if PADDING == -1:
            some = tl.where(inside[:, None], some, -1)
        counts = inside if PADDING == 0 else live
        tile = tl.load(
            gradient + pixel.to(tl.int64)[:, None] * g.all_outputs,
            mask=counts[:, None] & n_live[None, :], other=0.0,
        )  # fmt: skip
        sums = add_product(sums, tl.trans(tile), some, PARTS, WIDEN, BLOCK_INNER, BLOCK_WORDS)
    n += group * g.outputs
    row = n.to(tl.int64) * g.taps + tap
    out += split.to(tl.int64) * g.all_outputs * g.taps * g.channels
    store_gradient(
        sums, out, row * g.channels, None, row, n_live, first_word, g.channels, BLOCK_ROWS, BLOCK_WORDS
    )  # fmt: skip


# ---------------------------------------------------------------------------------------- launchers


def _check(gradient: Tensor, signs: Tensor, g: Geometry, batch: int) -> None:
    """Raises ValueError where operands do not fit the geometry, or are over the kernels' limits."""
    fits = signs.shape == (batch, *g.image, g.image_words)
    if not fits or gradient.shape != (batch, *g.out, g.all_outputs):
        shapes = ", ".join(str(tuple(t.shape)) for t in (gradient, signs))
        raise ValueError(f"gradient and sign words {shapes} do not fit {g}")
    for count, what in (
        (signs.numel(), "words of input"),
        (batch * g.image[0] * g.image[1], "pixels"),
        (g.pixels(batch), "output pixels"),
        (g.all_outputs, "outputs"),
        (g.taps * g.words, "words of an output's weights"),
    ):
        check_index(count, what)


def _options(gradient: Tensor, tile: GradientTile) -> dict[str, int]:
    precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]  # made at run time
    return launch_options(gradient, tile, precision)


def _grad_input(
    gradient: Tensor, mask: Tensor | None, weight: Tensor, g: Geometry, out: Tensor, tile: Any
) -> None:
    """Gradient ``[N, Ho, Wo, O]`` and weight words into ``out`` ``[N, H, W, C]``."""
    pixels = out.shape[:3].numel()
    tile = tile or gradient_tile(family(out.device), gradient.dtype, pixels)
    grid = grid_of(triton.cdiv(pixels, tile.block_rows), triton.cdiv(g.words, tile.block_words), g.groups)
    with on_device_of(out):
        conv_grad_input_kernel[grid](gradient, weight, mask, out, pixels, g, **_options(gradient, tile))


def _grad_weight(gradient: Tensor, signs: Tensor, g: Geometry, out: Tensor, tile: Any) -> None:
    """Gradient ``[N, Ho, Wo, O]`` and sign words into ``out`` fp32 ``[O, kH, kW, C / groups]``."""
    pixels = gradient.shape[:3].numel()
    tile = tile or gradient_tile(family(out.device), gradient.dtype, g.outputs)
    sums = PartialSums(out, g.all_outputs * g.taps * g.words, pixels, tile)
    word_blocks = g.taps * triton.cdiv(g.words, tile.block_words)
    grid = grid_of(triton.cdiv(g.outputs, tile.block_rows), word_blocks, g.groups * sums.splits)
    with on_device_of(out):
        conv_grad_weight_kernel[grid](
            gradient, signs, sums.memory, pixels, sums.split_turns, g, PADDING=g.padding_value,
            **_options(gradient, tile),
        )  # fmt: skip
    sums.finish()


def binary_conv2d_backward(
    grad_output: Tensor,
    signs: Tensor,
    mask: Tensor,
    weight: Tensor,
    in_channels: int,
    *given: Any,
    tile: GradientTile | None = None,
) -> tuple[Tensor, Tensor]:
    """As in ``ops/binary_conv2d.py``: gradients of the input in its dtype and of the weight in fp32.

    ``tile`` overrides the table's.
    """
    arguments, (need_input, need_weight) = Arguments.taken(given)
    check_floats(grad_output, "grad_output", 4)
    check_words(signs, "signs", 4, grad_output)
    check_mask(mask, signs.shape, grad_output)
    gradient = grad_output.permute(0, 2, 3, 1).contiguous()
    signs, weight = signs.contiguous(), weight.contiguous()
    n, height, width, _ = signs.shape
    g = geometry_of_call(n, (height, width), weight, grad_output, in_channels, arguments)
    _check(gradient, signs, g, n)
    grad_input = gradient.new_empty((n if need_input else 0, height, width, in_channels))
    shape = (g.all_outputs if need_weight else 0, *g.kernel, g.channels)
    grad_weight = gradient.new_empty(shape, dtype=torch.float32)
    if grad_input.numel():
        _grad_input(gradient, mask.contiguous() if mask.numel() else None, weight, g, grad_input, tile)
    if grad_weight.numel():
        _grad_weight(gradient, signs, g, grad_weight, tile)
    layout = suggest_memory_format(grad_output)
    grad_input = grad_input.permute(0, 3, 1, 2).contiguous(memory_format=layout)
    return grad_input, grad_weight.permute(0, 3, 1, 2)
