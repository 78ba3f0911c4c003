"""bop2nd::signed_conv2d - convolution of real or 8-bit images with packed signs, and the whole epilogue.

As :mod:`signed_linear`; a sum runs over the taps row by row and, within a tap, over the channels of the group
(``reference.signed_conv2d``). Padded taps are left out, whatever the zero point.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from .. import backends, reference
from ..binary_tensor import BinaryTensor
from ..kernels.geometry import Arguments, Geometry, words_for
from ..kernels.outputs import NAMES, check_outputs
from ..kernels.signed_operands import Scaling, check_scaling
from .derivatives import refuse_second
from .product import (
    REALS,
    check_operands,
    conv_geometry,
    empty_outputs,
    image_arguments,
    image_like,
    records_gradient,
)
from .signed_product import (
    INPUTS,
    OPERAND_NAMES,
    OPERANDS,
    check_input,
    real_input,
    refuse_fused,
    scaled_by,
    scaling_of,
    unpacked,
    wants_gradient,
)

_GEOMETRY = "int[2] stride, int[2] padding, int[2] dilation, int groups"


def _check(
    input: Tensor, weight: Tensor, arguments: Arguments, scaling: Scaling, threshold: Any = None
) -> Geometry:
    check_input(input, weight)
    if input.dim() != 4:
        raise ValueError(f"input must be [N, C, H, W], got {list(input.shape)}")
    batch, channels, *image = input.shape
    geometry = conv_geometry(batch, image, channels, weight, arguments)
    check_scaling(input, geometry, scaling, batch, threshold)
    return geometry


# Below, ``given`` are an operator's operands from the stride on.


def _reference(input: Tensor, weight: Tensor, *given: Any, **outputs: Any) -> tuple[Tensor, Tensor]:
    arguments, behind = Arguments.taken(given, padded=False)
    outputs |= dict(zip(OPERAND_NAMES, behind, strict=False))
    outputs.pop("blocked", None)
    scaling = scaling_of(outputs)
    geometry = _check(input, weight, arguments, scaling, outputs.get("threshold"))
    check_outputs(input, (input.shape[0], *geometry.out, weight.shape[0]), **outputs)
    if input.is_cuda and input.dtype in REALS and input.numel() and weight.numel():
        return by_torch(input, weight, given[:4], scaling[2], **outputs)
    numbers = (*given[:4], *scaling[:2])
    return reference.signed_conv2d(input, weight, *numbers, input_scale=scaling[2], **outputs)


def by_torch(
    input: Tensor, weight: Tensor, arguments: tuple[Any, ...], input_scale: Tensor | None, **outputs: Any
) -> tuple[Tensor, Tensor]:
    """Of real inputs, on GPUs without Triton: torch's convolution by unpacked weights, in its dtype."""
    per_group = input.shape[1] // arguments[3]
    dense = torch.ops.bop2nd.unpack_bits(weight, per_group, 1, dtype=input.dtype)
    dots = F.conv2d(input, dense, None, *arguments).permute(0, 2, 3, 1).float().contiguous()
    if input_scale is not None and input_scale.numel() != 1:
        input_scale = input_scale.view(-1, 1, 1, 1)
    return reference.epilogue(dots, input_scale=input_scale, **outputs)


backends.define(
    f"signed_conv2d(Tensor input, Tensor weight, {_GEOMETRY}, {OPERANDS}) -> (Tensor, Tensor)", _reference
)


@torch.library.register_fake("bop2nd::signed_conv2d")
def _fake(input: Tensor, weight: Tensor, *given: Any, **outputs: Any) -> tuple[Tensor, Tensor]:
    arguments, behind = Arguments.taken(given, padded=False)
    outputs |= dict(zip(OPERAND_NAMES, behind, strict=False))
    geometry = _check(input, weight, arguments, scaling_of(outputs), outputs.get("threshold"))
    return empty_outputs(input, (input.shape[0], *geometry.out, weight.shape[0]), **outputs)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    input, weight, *ctx.geometry = inputs[:6]
    ctx.multiplier, ctx.zero_point, scale, _, *ctx.outputs = inputs[6:]
    ctx.image, ctx.input_dtype = input.shape, input.dtype
    ctx.save_for_backward(input if wants_gradient(ctx, 1) else None, weight, scale)


def _autograd(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    nothing = (None,) * len(NAMES)
    if grad is None:
        return None, None, None, None, None, None, None, None, None, None, *nothing
    refuse_fused(NAMES, ctx.outputs, "signed_conv2d")
    input, weight, scale = ctx.saved_tensors
    if wants_gradient(ctx, 8):
        raise RuntimeError("signed_conv2d has no gradient of input_scale: scale its result")
    grad = grad.permute(0, 3, 1, 2)
    scaled = scaled_by(grad, scale, (-1, 1, 1, 1))
    if wants_gradient(ctx, 9):
        refuse_second("signed_conv2d with straight_through")
    if torch.is_grad_enabled():  # to be differentiated again
        return *_differentiable(ctx, scaled, input, weight), *nothing
    grad_input = _times_signs(ctx, scaled, weight).to(ctx.input_dtype) if wants_gradient(ctx, 0) else None
    through = _times_signs(ctx, grad, weight) if wants_gradient(ctx, 9) else None
    grad_weight = None
    if wants_gradient(ctx, 1):
        x = real_input(input, ctx.multiplier, ctx.zero_point)
        kind = scaled.dtype if scaled.dtype == x.dtype else torch.float32
        grad_weight = _weight_gradient(x.to(kind), scaled.to(kind), weight, ctx.geometry).to(weight.dtype)
    return grad_input, grad_weight, None, None, None, None, None, None, None, through, *nothing


def _differentiable(
    ctx: Any, grad: Tensor, input: Tensor | None, weight: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients by torch's convolution on unpacked weights, which knows its own derivatives."""
    stride, padding, dilation, groups = ctx.geometry
    dense = unpacked(weight, ctx.image[1] // groups, 1, grad.dtype)
    x = grad.new_zeros(ctx.image) if input is None else real_input(input, ctx.multiplier, ctx.zero_point)
    grad_input, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad, x.to(grad.dtype), dense, None, stride, padding, dilation, False, [0, 0], groups,
        [wants_gradient(ctx, 0), wants_gradient(ctx, 1), False],
    )  # fmt: skip
    return grad_input, grad_weight, *(None,) * 8


def _weight_gradient(x: Tensor, grad: Tensor, weight: Tensor, geometry: list[Any]) -> Tensor:
    """torch's, of real images; it does not know sums of nothing."""
    if isinstance(weight, BinaryTensor):
        shape = tuple(weight.shape)
    else:
        outputs, rows, columns, _ = weight.shape
        shape = (outputs, x.shape[1] // geometry[3], rows, columns)
    if not (x.numel() and grad.numel()):
        return grad.new_zeros(shape)
    return conv2d_weight(x, shape, grad, *geometry)


def _times_signs(ctx: Any, grad: Tensor, weight: Tensor) -> Tensor:
    """The input's gradient: the sums of :mod:`binary_conv2d`'s backward pass, which look at no input here."""
    batch, channels, *image = ctx.image
    words = ctx.geometry[3] * words_for(channels // ctx.geometry[3])
    unseen = grad.new_zeros((batch, *image, words), dtype=torch.int32)
    result: Tensor = torch.ops.bop2nd.binary_conv2d_backward(
        grad, unseen, unseen.new_empty(0), weight, channels, *ctx.geometry, 0, True, False
    )[0]
    return result


torch.library.register_autograd("bop2nd::signed_conv2d", _autograd, setup_context=_setup)


def signed_conv2d(
    input: Tensor,
    weight: BinaryTensor,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    multiplier: int = 1,
    zero_point: int = 0,
    input_scale: Tensor | None = None,
    straight_through: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """2-d convolution of real images, or of integers ``multiplier * input - zero_point``, with signs.

    Args:
        input: float32, bfloat16, float16, int8 or uint8, ``[N, C, H, W]``, any memory format.
        weight: ``[O, C / groups, kH, kW]`` packed along axis 1.
        stride, padding, dilation: one or two integers (rows, columns). Padded taps are left out.
        groups: divides C and O.
        multiplier, zero_point, input_scale, straight_through, dtype: as for :func:`signed_linear`; scales
            are one number or one for every image.

    Returns:
        ``[N, O, Ho, Wo]`` in the memory format of ``input``.

    Raises:
        TypeError, ValueError: as :func:`signed_linear`; channel mismatch, or an image smaller than its
            kernel.
    """
    check_operands(input, weight, 4, *INPUTS)
    geometry = image_arguments(input, weight, stride, padding, dilation, groups)
    kind = dtype or (input.dtype if input.dtype in REALS else torch.float32)
    op = torch.ops.bop2nd.signed_conv2d.default
    scaling = (multiplier, zero_point, input_scale)
    recorded = straight_through is not None and torch.is_grad_enabled()
    if not recorded and not records_gradient(input, weight):
        memory = weight.memory
        with torch._C._AutoDispatchBelowAutograd():  # nothing to record
            output: Tensor = op(
                input, memory.words, *geometry, *scaling, dtype=kind, blocked=memory.blocked(groups)
            )[0]
        return image_like(input, output)
    output = op(input, weight, *geometry, *scaling, straight_through, dtype=kind)[0]
    return image_like(input, output)
