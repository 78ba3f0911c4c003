"""bop2nd::binary_conv2d - convolution of sign(input) with packed weights; and its packed-in form.

``dot = K - 2 * popcount(x XOR w)`` over the taps, exact in int32. Padded taps count as 0 (left out), +1 or
-1. Activations are packed ``[N, H, W, groups * words(C / groups)]``; training keeps those words and the
straight-through estimator's mask, 2 bits per activation, for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .. import backends, reference
from ..binary_tensor import BinaryTensor
from ..kernels import geometry as geometries
from ..kernels.geometry import PADDING_VALUES, Arguments, Geometry
from ..kernels.outputs import SCHEMA, check_outputs
from .derivatives import gradients_of
from .product import (
    check_operands,
    check_real,
    check_saved,
    check_shape,
    check_words,
    conv_geometry,
    empty_outputs,
    image_arguments,
    records_gradient,
    row_tiles,
)


def _geometry(input: Tensor, weight: Tensor, arguments: Arguments) -> Geometry:
    check_real(input, "input")
    check_words(weight, "weight", input)
    if input.dim() != 4:
        raise ValueError(f"input must be [N, C, H, W], got {list(input.shape)}")
    batch, channels, *image = input.shape
    return conv_geometry(batch, image, channels, weight, arguments)


def _packed_geometry(input: Tensor, weight: Tensor, in_channels: int, arguments: Arguments) -> Geometry:
    check_words(input, "input")
    check_words(weight, "weight", input)
    if input.dim() != 4:
        raise ValueError(f"input must be [N, H, W, words], got {list(input.shape)}")
    batch, *image, _ = input.shape
    geometry = conv_geometry(batch, image, in_channels, weight, arguments)
    check_shape(input, (batch, *image, geometry.image_words), "input words")
    return geometry


# Below, ``given`` are an operator's operands from the stride on.


def _reference(input: Tensor, weight: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    _geometry(input, weight, Arguments.taken(given)[0])
    return reference.binary_conv2d(input, weight, *given[:6])


def _reference_packed(
    input: Tensor, weight: Tensor, in_channels: int, *given: Any, blocked: Any = None, **outputs: Any
) -> tuple[Tensor, Tensor]:
    geometry = _packed_geometry(input, weight, in_channels, Arguments.taken(given)[0])
    check_outputs(input, (input.shape[0], *geometry.out, weight.shape[0]), **outputs)
    return reference.binary_conv2d_packed(input, weight, in_channels, *given, **outputs)


backends.define(
    f"binary_conv2d(Tensor input, Tensor weight, {geometries.SCHEMA}, bool ste_clip, Tensor? blocked=None) "
    "-> (Tensor, Tensor, Tensor)",
    _reference,
)
backends.define(
    f"binary_conv2d_packed(Tensor input, Tensor weight, int in_channels, {geometries.SCHEMA}, *, {SCHEMA}) "
    "-> (Tensor, Tensor)",
    _reference_packed,
)


def _empty_image(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Memory for an image in the memory format of another."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=suggest_memory_format(like))


@torch.library.register_fake("bop2nd::binary_conv2d")
def _fake(input: Tensor, weight: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    arguments, (ste_clip, *_) = Arguments.taken(given)
    geometry = _geometry(input, weight, arguments)
    n, _, h, w = input.shape
    output = _empty_image(input, (n, weight.shape[0], *geometry.out))
    signs = input.new_empty((n, h, w, geometry.image_words), dtype=torch.int32)
    return output, signs, torch.empty_like(signs) if ste_clip else signs.new_empty(0)


@torch.library.register_fake("bop2nd::binary_conv2d_packed")
def _packed_fake(
    input: Tensor, weight: Tensor, in_channels: int, *given: Any, **outputs: Any
) -> tuple[Tensor, Tensor]:
    geometry = _packed_geometry(input, weight, in_channels, Arguments.taken(given)[0])
    return empty_outputs(input, (input.shape[0], *geometry.out, weight.shape[0]), **outputs)


# ----------------------------------------------------------------------------------------- backward


def _check_backward(
    grad: Tensor, signs: Tensor, mask: Tensor, weight: Tensor, in_channels: int, arguments: Arguments
) -> None:
    check_words(weight, "weight", grad)
    if signs.dim() != 4:
        raise ValueError(f"signs must be [N, H, W, words], got {list(signs.shape)}")
    batch, *image, _ = signs.shape
    geometry = conv_geometry(batch, image, in_channels, weight, arguments)
    shape = (batch, weight.shape[0], *geometry.out)
    check_saved(grad, shape, signs, mask, (batch, *image, geometry.image_words))


def _backward(
    grad_output: Tensor, signs: Tensor, mask: Tensor, weight: Tensor, in_channels: int, *given: Any
) -> tuple[Tensor, Tensor]:
    """Gradients by torch's convolution on activations unpacked a few images at a time.

    Computed channels-last, so that the weights' gradient, moments and words are walked in one order; the
    input's then has the memory format of ``grad_output``. The weights' is summed in fp32. Rows and columns
    that a stride leaves over at the end are cut off first: oneDNN's 1x1 convolutions read beside their memory
    there (torch 2.13, AVX2; wrong sums, not an error).
    """
    arguments, (need_input, need_weight) = Arguments.taken(given)
    stride, padding, dilation, groups, padding_value = arguments
    _check_backward(grad_output, signs, mask, weight, in_channels, arguments)
    n, h, w, _ = signs.shape
    reach = [
        (grad_output.shape[2 + i] - 1) * stride[i] + dilation[i] * (weight.shape[1 + i] - 1) + 1
        for i in (0, 1)
    ]
    per_group = in_channels // groups
    dtype = grad_output.dtype
    last = torch.channels_last
    dense = torch.ops.bop2nd.unpack_bits(weight, per_group, 1, dtype=dtype)
    grad_input = grad_output.new_empty((0, h, w, in_channels)).permute(0, 3, 1, 2)
    shape = (weight.shape[0] if need_weight else 0, *weight.shape[1:3], per_group)
    grad_weight: Tensor | None = None
    nothing = grad_output.numel() == 0 or weight.numel() == 0 or (h * w == 0 and padding_value == 0)
    if nothing:  # which torch's convolution does not know
        zeros = grad_output.new_zeros((n if need_input else 0, h, w, in_channels)).permute(0, 3, 1, 2)
        zeros = zeros.contiguous(memory_format=suggest_memory_format(grad_output))
        return zeros, grad_output.new_zeros(shape, dtype=torch.float32).permute(0, 3, 1, 2)
    explicit = padding_value != 0  # the library pads with zeros: another value is written out per tile
    for images in row_tiles(n, in_channels * h * w, signs.device):
        x = _unpack_grouped(signs[images], in_channels, groups, dtype)
        if explicit:
            x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]), value=float(padding_value))
        height, width = x.shape[2:]
        if explicit or not any(padding):
            x = x[:, :, : reach[0], : reach[1]]
        grad_x, grad_w, _ = torch.ops.aten.convolution_backward(
            grad_output[images].contiguous(memory_format=last),
            x.contiguous(memory_format=last),
            dense,
            None,
            stride,
            [0, 0] if explicit else padding,
            dilation,
            False,
            [0, 0],
            groups,
            [need_input, need_weight, False],
        )
        if need_weight:
            grad_w = grad_w.float() if grad_weight is None else grad_weight.add_(grad_w)
            grad_weight = grad_w.contiguous(memory_format=last)
        if need_input:
            if x.shape[2:] != (height, width):
                grad_x = F.pad(grad_x, (0, width - x.shape[3], 0, height - x.shape[2]))
            if explicit:
                grad_x = grad_x[:, :, padding[0] : padding[0] + h, padding[1] : padding[1] + w]
            grad_x = grad_x.contiguous(memory_format=last)
            if mask.numel():
                lanes = grad_x.permute(0, 2, 3, 1).unflatten(-1, (groups, per_group))
                torch.ops.bop2nd.apply_mask_(lanes, mask[images].unflatten(-1, (groups, -1)))
            if images.stop - images.start == n:
                grad_input = grad_x
            elif images.start == 0:
                grad_input = grad_x.new_empty((n, h, w, in_channels)).permute(0, 3, 1, 2)
            if grad_input is not grad_x:
                grad_input[images] = grad_x
    if grad_weight is None:
        grad_weight = grad_output.new_zeros(shape, dtype=torch.float32).permute(0, 3, 1, 2)
    return grad_input.contiguous(memory_format=suggest_memory_format(grad_output)), grad_weight


def _unpack_grouped(words: Tensor, channels: int, groups: int, dtype: torch.dtype) -> Tensor:
    """Activation words -> +1 / -1 as NCHW (channels-last strides); groups start on a word of their own."""
    lanes = torch.ops.bop2nd.unpack_bits(words.unflatten(-1, (groups, -1)), channels // groups, dtype=dtype)
    return lanes.flatten(-2).permute(0, 3, 1, 2)


backends.define(
    f"binary_conv2d_backward(Tensor grad_output, Tensor signs, Tensor mask, Tensor weight, int in_channels, "
    f"{geometries.SCHEMA}, bool need_input, bool need_weight) -> (Tensor, Tensor)",
    _backward,
)


@torch.library.register_fake("bop2nd::binary_conv2d_backward")
def _backward_fake(
    grad_output: Tensor, signs: Tensor, mask: Tensor, weight: Tensor, in_channels: int, *given: Any
) -> tuple[Tensor, Tensor]:
    arguments, (need_input, need_weight) = Arguments.taken(given)
    _check_backward(grad_output, signs, mask, weight, in_channels, arguments)
    n, h, w, _ = signs.shape
    grad_input = _empty_image(grad_output, (n if need_input else 0, in_channels, h, w))
    shape = (weight.shape[0] if need_weight else 0, *weight.shape[1:3], in_channels // arguments.groups)
    return grad_input, grad_output.new_empty(shape, dtype=torch.float32).permute(0, 3, 1, 2)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.in_channels = inputs[0].shape[1]
    ctx.geometry = inputs[2:7]
    ctx.save_for_backward(output[1], output[2], inputs[1])


def _autograd(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    return *gradients_of("binary_conv2d", ctx, grad, ctx.in_channels, *ctx.geometry), *(None,) * 7


torch.library.register_autograd("bop2nd::binary_conv2d", _autograd, setup_context=_setup)


# ------------------------------------------------------------------------------- the checked function


def binary_conv2d(
    input: Tensor,
    weight: BinaryTensor,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    padding_value: int = 0,
    ste_clip: bool = True,
) -> Tensor:
    """2-d convolution of ``sign(input)`` with packed weights.

    Args:
        input: floating, ``[N, C, H, W]``; channels-last is the format that kernels read and write.
        weight: ``[O, C / groups, kH, kW]`` packed along axis 1.
        stride, padding, dilation: one or two integers (rows, columns).
        groups: divides C and O.
        padding_value: what a padded tap counts as: 0 (left out), +1 or -1. All three are exact.
        ste_clip: gradient of sign: 1 where ``|x| <= 1`` and 0 elsewhere (True), or 1 everywhere.

    Returns:
        ``[N, O, Ho, Wo]`` in the dtype and memory format of ``input``; so are gradients in those of theirs.

    Raises:
        TypeError, ValueError: operands of other kinds, channel mismatch, unknown padding value, or an
            image smaller than the kernel.
    """
    check_operands(input, weight, 4)
    geometry = image_arguments(input, weight, stride, padding, dilation, groups)
    if padding_value not in PADDING_VALUES:
        raise ValueError(f"padding_value must be 0, 1 or -1, got {padding_value!r}")
    arguments = (*geometry, padding_value)
    op = torch.ops.bop2nd.binary_conv2d.default
    if not records_gradient(input, weight):
        memory = weight.memory
        with torch._C._AutoDispatchBelowAutograd():  # nothing to record
            output: Tensor = op(input, memory.words, *arguments, False, memory.blocked(groups))[0]
        return output
    output = op(input, weight, *arguments, ste_clip and input.requires_grad)[0]
    return output
