"""Convolution of real or 8-bit images with packed signs: implicit matrix product, signs made in registers.

Maths: for an output pixel and channel, the sum over taps and channels of ``+-x``; of integers,
``+-(multiplier * x - zero_point)``. A tap outside the image is left out. A linear layer is a convolution of
images of one pixel: ``signed_linear.py`` launches the same kernel.

int8 and uint8: signs become bytes (1.25 instructions per sign, see ``bits.py``) for int8 tensor cores, exact
in int32. uint8 goes in as ``x - 128``; what that and the zero point add is a number of each output, the sum
of its signs over the taps inside the image: a second walk over the weights counts them, where it is not 0.

bf16 and fp16: signs of that dtype (2 instructions each), exact products, fp32 sums. fp32: three bf16 parts,
two where torch may use TF32 (``gradient_product.py``). The sums are the tensor cores' own, and so is their
order, not that of ``reference.signed_dots``: 16 products and the sum so far are aligned to the largest of
them and cut, so errors of about ``K / 16 * 2**-23 * sum |x|`` are to be expected over K products, three times
as much for fp32 (with TF32 ``2**-15 * sum |x|`` more). One GPU gives the same bits in every run.

Operations: pixels * O * taps * 32 * words, channels of a group being filled up to whole words. Bytes: the
input (each element once per tap and block of outputs, which caches hold), 1/8 per weight, the outputs.

Limits: those of ``geometry.py``; fewer than 2**31 - 65536 elements of one image, output pixels and outputs. A
tile is one group's: most of it is empty where groups have few outputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .binary_conv2d import crosses_words, geometry_of_call
from .bits import decode_in_order, decode_signs, popcount
from .epilogue import finish, outputs_for, store_tile
from .geometry import Arguments, Geometry
from .gradient_product import multiply_real, parts_of
from .grid import INDEX_LIMIT, check_index, grid_of, program_of
from .outputs import NAMES, Outputs
from .signed_operands import Scaling, check_real_or_8_bit, check_scaling
from .tuning import MatmulTile, family, on_device_of, signed_tile


class Image(NamedTuple):
    """Elements from one image, row and pixel to the next, and from one channel."""

    image: Any
    row: Any
    pixel: Any
    channel: Any


@triton.jit
def _place(pixel_y, pixel_x, tap, g):
    """Row and column that one tap reads for a block of pixels, and which of them are inside the image."""
    y = pixel_y + tap // g.kernel[1] * g.dilation[0]
    z = pixel_x + tap % g.kernel[1] * g.dilation[1]
    return y, z, (y >= 0) & (y < g.image[0]) & (z >= 0) & (z < g.image[1])


@triton.jit
def _gather(x, base, pixel_y, pixel_x, pixel_live, tap, channel, g, strides):
    """Numbers of one tap for a block of pixels ``[BLOCK_M, channels]``, 0 outside.

    uint8 comes as ``x - 128``, int8.
    """
    y, z, inside = _place(pixel_y, pixel_x, tap, g)
    at = base + (y * strides.row + z * strides.pixel)
    mask = (pixel_live & inside)[:, None] & (channel < g.channels)[None, :]
    at = at[:, None] + (channel * strides.channel)[None, :]
    if x.dtype.element_ty == tl.uint8:
        some = (tl.load(x + at, mask=mask, other=128) ^ 128).to(tl.int8, bitcast=True)
    else:
        some = tl.load(x + at, mask=mask, other=0)
    return some


@triton.jit
def _multiply(
    sums, some, words, PARTS: tl.constexpr, WIDEN: tl.constexpr, SHARED: tl.constexpr,
    ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """``sums`` + ``some`` ``[R, 32 * WORDS]`` times the signs in ``words`` ``[ROWS, WORDS]``, transposed."""
    if some.dtype == tl.int8:
        signs = decode_in_order(words, ROWS, WORDS, SHARED)
        sums = tl.dot(some, tl.trans(signs), sums, out_dtype=tl.int32)
    elif some.dtype == tl.float32:
        signs = decode_signs(words, tl.bfloat16, ROWS, WORDS)
        sums = multiply_real(sums, some, tl.trans(signs), PARTS, WIDEN, True)
    else:
        signs = decode_signs(words, some.dtype, ROWS, WORDS)
        sums = multiply_real(sums, some, tl.trans(signs), PARTS, WIDEN)
    return sums


@triton.jit(do_not_specialize=["pixels", "pixels_per_scale"])
def signed_tile_kernel(
    x, w, to, input_scale, pixels_per_scale, pixels, geometry, strides, multiplier, offset,
    OFFSET: tl.constexpr, PARTS: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_WORDS: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Program (block of pixels, block of a group's outputs, group); a turn is some words of one tap.

    Of integers: ``multiplier`` times the sums, and with ``OFFSET`` ``offset`` times the sums of signs.
    """
    g = geometry
    block, n_block, group = program_of(tl.cdiv(pixels, BLOCK_M), tl.cdiv(g.outputs, BLOCK_N))
    pixel = block * BLOCK_M + tl.arange(0, BLOCK_M)
    live = pixel < pixels
    pixel_y = pixel // g.out[1] % g.out[0] * g.stride[0] - g.padding[0]
    pixel_x = pixel % g.out[1] * g.stride[1] - g.padding[1]
    base = (pixel // (g.out[1] * g.out[0])).to(tl.int64) * strides.image
    first = n_block * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    word = tl.arange(0, BLOCK_WORDS)
    lane = tl.arange(0, 32 * BLOCK_WORDS)
    w_at = w + (group * g.outputs + n).to(tl.int64)[:, None] * (g.taps * g.words) + word[None, :]
    base += group * g.channels * strides.channel
    turns = (g.words + BLOCK_WORDS - 1) // BLOCK_WORDS  # per tap
    if x.dtype.element_ty.is_floating():
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    else:
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for step in range(g.taps * turns):
        tap = step // turns
        begin = step % turns * BLOCK_WORDS
        some = _gather(x, base, pixel_y, pixel_x, live, tap, begin * 32 + lane, g, strides)
        w_words = tl.load(
            w_at + (tap * g.words + begin),
            mask=(n < g.outputs)[:, None] & (begin + word < g.words)[None, :], other=0,
        )  # fmt: skip
        sums = _multiply(sums, some, w_words, PARTS, WIDEN, SHARED, BLOCK_N, BLOCK_WORDS)
    if not x.dtype.element_ty.is_floating():
        sums *= multiplier
    if OFFSET:
        for tap in range(g.taps):
            negative = tl.zeros((BLOCK_N, BLOCK_WORDS), tl.int32)
            for begin in range(0, g.words, BLOCK_WORDS):
                mask = (n < g.outputs)[:, None] & (begin + word < g.words)[None, :]
                negative += popcount(tl.load(w_at + (tap * g.words + begin), mask=mask, other=0))
            more = offset * (g.channels - 2 * tl.sum(negative, axis=1))
            _, _, inside = _place(pixel_y, pixel_x, tap, g)
            sums += tl.where(inside[:, None], more[None, :], 0)
    store_tile(
        sums, to, pixel.to(tl.int64), live,
        first + group * g.outputs, (group + 1) * g.outputs, g.all_outputs, BLOCK_M, BLOCK_N,
        input_scale, pixels_per_scale,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------- launchers


def convolve(
    x: Tensor,
    weight: Tensor,
    g: Geometry,
    scaling: Scaling,
    to: Outputs,
    precision: str,
    tile: MatmulTile | None = None,
) -> None:
    """Numbers ``[N, C, H, W]`` with words ``[O, kH, kW, words]`` into outputs ``[N, Ho, Wo, O]``.

    ``precision``: torch's ``fp32_precision`` for such a product.
    """
    batch = x.shape[0]
    pixels = g.pixels(batch)
    check_index(g.all_channels * g.image[0] * g.image[1], "elements of an image")
    check_index(pixels, "output pixels")
    check_index(g.all_outputs, "outputs")
    if pixels == 0 or g.all_outputs == 0:
        return
    multiplier, zero_point, scale, _ = scaling
    real = x.dtype.is_floating_point
    if g.words == 0 or (to.signs.numel() and crosses_words(g, to)):
        dot = x.new_zeros((batch, *g.out, g.all_outputs), dtype=torch.float32 if real else torch.int32)
        if g.words:
            plain = (multiplier, zero_point, None, None)
            convolve(x, weight, g, plain, Outputs(dot, weight.new_empty(0)), precision, tile)
        finish(dot, to, scale, pixels_of_scale(scale, g))
        return
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    x = x if dense else x.contiguous()
    strides = Image(x.stride(0), x.stride(2), x.stride(3), x.stride(1))
    offset = 128 * multiplier - zero_point if x.dtype == torch.uint8 else -zero_point
    tile = tile or signed_tile(family(x.device), x.element_size(), pixels, g.outputs, g.words)
    grid = grid_of(triton.cdiv(pixels, tile.block_m), triton.cdiv(g.outputs, tile.block_n), g.groups)
    with on_device_of(x):
        signed_tile_kernel[grid](
            x, weight.contiguous(), to.asked(), scale, pixels_of_scale(scale, g), pixels, g, strides,
            multiplier, offset, OFFSET=offset != 0, PARTS=parts_of(x.dtype, precision),
            WIDEN=family(x.device) == "interpreter", **tile.constants(), **tile.options(),
        )  # fmt: skip


def pixels_of_scale(scale: Tensor | None, g: Geometry) -> int:
    """How many output pixels share a scale: an image's, or all."""
    return INDEX_LIMIT if scale is None or scale.numel() == 1 else g.out[0] * g.out[1]


def asked_of(
    input: Tensor,
    shape: tuple[int, ...],
    g: Geometry,
    rows: int,
    scaling: Scaling,
    given: tuple[Any, ...],
    asked: dict[str, Any],
) -> tuple[Outputs, Scaling]:
    """Memory for the outputs ``shape``, and the scaling as kernels take it; both checked.

    ``given`` by position and ``asked`` by name as in ``outputs_for``; ``rows`` as in ``check_scaling``.
    """
    outputs = outputs_for(input, shape, **asked, **dict(zip(NAMES, given, strict=False)))
    check_scaling(input, g, scaling, rows, outputs.threshold)
    multiplier, zero_point, scale, _ = scaling
    return outputs, (multiplier, zero_point, None if scale is None else scale.contiguous(), None)


def signed_conv2d(
    input: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    multiplier: int = 1,
    zero_point: int = 0,
    input_scale: Tensor | None = None,
    straight_through: Tensor | None = None,
    *given: Any,
    tile: MatmulTile | None = None,
    **asked: Any,
) -> tuple[Tensor, Tensor]:
    """``reference.signed_conv2d``: values ``[N, Ho, Wo, O]`` and sign words; ``given`` and ``asked`` as in
    ``outputs_for``. ``tile`` overrides the table's."""
    check_real_or_8_bit(input)
    if input.dim() != 4:
        raise ValueError(f"input must be [N, C, H, W], got {list(input.shape)}")
    batch, channels, *image = input.shape
    arguments, _ = Arguments.taken((stride, padding, dilation, groups), padded=False)
    g = geometry_of_call(batch, image, weight, input, channels, arguments)
    scaling = (multiplier, zero_point, input_scale, straight_through)
    outputs, scaling = asked_of(input, (batch, *g.out, g.all_outputs), g, batch, scaling, given, asked)
    precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]  # made at run time
    convolve(input, weight, g, scaling, outputs, precision, tile)
    return outputs.reals, outputs.signs
