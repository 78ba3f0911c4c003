"""bop2nd::signed_linear - real or 8-bit inputs times packed signs: ``sum_k +-x[k]``, and the whole epilogue.

fp32 (and bf16, fp16, widened to it): a sum in one order (``reference.signed_dots``), the same bits on every
instruction set and number of threads; GPUs sum in an order of their own. int8 and uint8: exact int32 sums of
``multiplier * x - zero_point``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends, reference
from ..binary_tensor import BinaryTensor
from ..kernels.geometry import Geometry, words_for
from ..kernels.outputs import NAMES, check_outputs
from ..kernels.signed_operands import Scaling, check_scaling
from .derivatives import refuse_second
from .product import (
    REALS,
    check_features,
    check_operands,
    empty_outputs,
    linear_geometry,
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


def _check(input: Tensor, weight: Tensor, scaling: Scaling, threshold: Any = None) -> Geometry:
    check_input(input, weight)
    if input.dim() < 1:
        raise ValueError("input needs at least one axis")
    geometry = linear_geometry(input.shape[:-1], input.shape[-1], weight)
    check_scaling(input, geometry, scaling, math.prod(input.shape[:-1]), threshold)
    return geometry


def _reference(input: Tensor, weight: Tensor, *given: Any, **outputs: Any) -> tuple[Tensor, Tensor]:
    outputs |= dict(zip(OPERAND_NAMES, given, strict=False))
    outputs.pop("blocked", None)
    scaling = scaling_of(outputs)
    _check(input, weight, scaling, outputs.get("threshold"))
    check_outputs(input, (*input.shape[:-1], weight.shape[0]), **outputs)
    if input.is_cuda and input.dtype in REALS:
        return by_torch(input, weight, scaling[2], **outputs)
    return reference.signed_linear(input, weight, *scaling[:2], input_scale=scaling[2], **outputs)


def by_torch(
    input: Tensor, weight: Tensor, input_scale: Tensor | None, **outputs: Any
) -> tuple[Tensor, Tensor]:
    """Of real inputs, on GPUs without Triton: torch's product with unpacked weights in the input's dtype."""
    dense = torch.ops.bop2nd.unpack_bits(weight, input.shape[-1], dtype=input.dtype)
    if input_scale is not None and input_scale.numel() != 1:
        input_scale = input_scale.view(*input.shape[:-1], 1)
    return reference.epilogue(F.linear(input, dense).float(), input_scale=input_scale, **outputs)


backends.define(f"signed_linear(Tensor input, Tensor weight, {OPERANDS}) -> (Tensor, Tensor)", _reference)


@torch.library.register_fake("bop2nd::signed_linear")
def _fake(input: Tensor, weight: Tensor, *given: Any, **outputs: Any) -> tuple[Tensor, Tensor]:
    outputs |= dict(zip(OPERAND_NAMES, given, strict=False))
    _check(input, weight, scaling_of(outputs), outputs.get("threshold"))
    return empty_outputs(input, (*input.shape[:-1], weight.shape[0]), **outputs)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    input, weight, ctx.multiplier, ctx.zero_point, scale, _, *ctx.outputs = inputs
    ctx.features = input.shape[-1]
    ctx.save_for_backward(input if wants_gradient(ctx, 1) else None, weight, scale)
    ctx.input_dtype = input.dtype


def _autograd(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    nothing = (None,) * len(NAMES)
    if grad is None:
        return None, None, None, None, None, None, *nothing
    refuse_fused(NAMES, ctx.outputs, "signed_linear")
    input, weight, scale = ctx.saved_tensors
    if wants_gradient(ctx, 4):
        raise RuntimeError("signed_linear has no gradient of input_scale: scale its result")
    scaled = scaled_by(grad, scale, (*grad.shape[:-1], 1))
    grad_input = (
        _times_signs(scaled, weight, ctx.features).to(ctx.input_dtype) if wants_gradient(ctx, 0) else None
    )
    through = None
    if wants_gradient(ctx, 5):
        refuse_second("signed_linear with straight_through")
        through = _times_signs(grad, weight, ctx.features)
    grad_weight = _weight_gradient(ctx, scaled, input)
    grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
    return grad_input, grad_weight, None, None, None, through, *nothing


def _weight_gradient(ctx: Any, grad: Tensor, input: Tensor | None) -> Tensor | None:
    if input is None:
        return None
    x = real_input(input, ctx.multiplier, ctx.zero_point).flatten(0, -2)
    grad = grad.flatten(0, -2)
    kind = grad.dtype if grad.dtype == x.dtype else torch.float32
    return grad.to(kind).T @ x.to(kind)


def _times_signs(grad: Tensor, weight: Tensor, features: int) -> Tensor:
    """``grad @ weight``: the sums of :mod:`binary_linear`'s backward pass, which look at no input here."""
    if torch.is_grad_enabled():  # to be differentiated again, which that operator cannot be
        return grad @ unpacked(weight, features, 1, grad.dtype)
    unseen = grad.new_zeros((*grad.shape[:-1], words_for(features)), dtype=torch.int32)
    result: Tensor = torch.ops.bop2nd.binary_linear_backward(
        grad, unseen, unseen.new_empty(0), weight, features, True, False
    )[0]
    return result


torch.library.register_autograd("bop2nd::signed_linear", _autograd, setup_context=_setup)


def signed_linear(
    input: Tensor,
    weight: BinaryTensor,
    *,
    multiplier: int = 1,
    zero_point: int = 0,
    input_scale: Tensor | None = None,
    straight_through: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``input @ weight.T`` with signs; integers stand for ``multiplier * input - zero_point``.

    Args:
        input: float32, bfloat16, float16, int8 or uint8, ``[..., in_features]``.
        weight: ``[out_features, in_features]`` packed along axis 1.
        multiplier, zero_point: of int8 and uint8: what a number of the input stands for.
        input_scale: float32, one number or one for every row: what the row's sums are multiplied with.
        straight_through: the real tensor that ``input`` was quantized from: it gets the input's gradient.
        dtype: of the result; by default that of a real input, else float32.

    Returns:
        ``[..., out_features]``.

    Raises:
        TypeError, ValueError: operands of other kinds, feature counts that differ, a zero point out of range,
            or so many integers that int32 does not hold every sum; the message has the numbers.
    """
    check_operands(input, weight, 2, *INPUTS)
    check_features(input, weight)
    kind = dtype or (input.dtype if input.dtype in REALS else torch.float32)
    op = torch.ops.bop2nd.signed_linear.default
    scaling = (multiplier, zero_point, input_scale)
    recorded = straight_through is not None and torch.is_grad_enabled()
    if not recorded and not records_gradient(input, weight):
        with torch._C._AutoDispatchBelowAutograd():  # nothing to record
            output: Tensor = op(
                input, weight.memory.words, *scaling, dtype=kind, blocked=weight.memory.blocked()
            )[0]
        return output
    output = op(input, weight, *scaling, straight_through, dtype=kind)[0]
    return output
