"""bop2nd::binary_linear - sign(input) times packed weights; and its packed-in form for inference.

``dot = K - 2 * popcount(x XOR w)``, exact in int32, then cast to the input's dtype. Training keeps 2 bits
per activation for the backward pass: its sign, and the straight-through estimator's mask ``|x| <= 1``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import backends, reference
from ..binary_tensor import BinaryTensor
from ..kernels.geometry import DOT_LIMIT, INT32_LIMIT, Geometry, words_for
from ..kernels.outputs import SCHEMA, check_outputs
from .derivatives import gradients_of
from .product import (
    check_extent,
    check_features,
    check_operands,
    check_real,
    check_saved,
    check_shape,
    check_words,
    empty_outputs,
    geometry_of,
    linear_geometry,
    records_gradient,
    row_tiles,
)


def _geometry(input: Tensor, weight: Tensor) -> Geometry:
    check_real(input, "input")
    check_extent(input, "input")
    check_words(weight, "weight", input)
    if input.dim() < 1:
        raise ValueError("input needs at least one axis")
    return linear_geometry(input.shape[:-1], input.shape[-1], weight)


def _packed_geometry(input: Tensor, weight: Tensor, in_features: int) -> Geometry:
    check_words(input, "input")
    check_extent(input, "input")
    check_words(weight, "weight", input)
    if input.dim() < 1:
        raise ValueError("input needs at least one axis")
    check_shape(input, (*input.shape[:-1], words_for(in_features)), "input words")
    return linear_geometry(input.shape[:-1], in_features, weight)


def _reference(
    input: Tensor, weight: Tensor, ste_clip: bool, blocked: Any = None
) -> tuple[Tensor, Tensor, Tensor]:
    _geometry(input, weight)
    return reference.binary_linear(input, weight, ste_clip)


def _reference_packed(
    input: Tensor, weight: Tensor, in_features: int, blocked: Any = None, **outputs: Any
) -> tuple[Tensor, Tensor]:
    _packed_geometry(input, weight, in_features)
    check_outputs(input, (*input.shape[:-1], weight.shape[0]), **outputs)
    return reference.binary_linear_packed(input, weight, in_features, **outputs)


backends.define(
    "binary_linear(Tensor input, Tensor weight, bool ste_clip, Tensor? blocked=None) "
    "-> (Tensor, Tensor, Tensor)",
    _reference,
)
backends.define(
    f"binary_linear_packed(Tensor input, Tensor weight, int in_features, *, {SCHEMA}) -> (Tensor, Tensor)",
    _reference_packed,
)


@torch.library.register_fake("bop2nd::binary_linear")
def _fake(
    input: Tensor, weight: Tensor, ste_clip: bool, blocked: Any = None
) -> tuple[Tensor, Tensor, Tensor]:
    _geometry(input, weight)
    output = input.new_empty((*input.shape[:-1], weight.shape[0]))
    signs = input.new_empty((*input.shape[:-1], words_for(input.shape[-1])), dtype=torch.int32)
    return output, signs, torch.empty_like(signs) if ste_clip else signs.new_empty(0)


@torch.library.register_fake("bop2nd::binary_linear_packed")
def _packed_fake(input: Tensor, weight: Tensor, in_features: int, **outputs: Any) -> tuple[Tensor, Tensor]:
    _packed_geometry(input, weight, in_features)
    return empty_outputs(input, (*input.shape[:-1], weight.shape[0]), **outputs)


# ----------------------------------------------------------------------------------------- backward


def _check_backward(grad: Tensor, signs: Tensor, mask: Tensor, weight: Tensor, in_features: int) -> None:
    if grad.dim() < 1:
        raise ValueError("grad_output needs at least one axis")
    check_words(weight, "weight", grad)
    check_extent(signs, "signs")
    geometry = linear_geometry(grad.shape[:-1], in_features, weight)
    rows = grad.shape[:-1]
    check_saved(grad, (*rows, geometry.outputs), signs, mask, (*rows, geometry.words))


def _backward(
    grad_output: Tensor,
    signs: Tensor,
    mask: Tensor,
    weight: Tensor,
    in_features: int,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients by torch's matrix product on operands unpacked tile by tile; weight gradient in fp32.

    One after the other, so that the unpacked weight is gone before the weight's gradient, as large, is made.
    """
    _check_backward(grad_output, signs, mask, weight, in_features)
    rows = math.prod(grad_output.shape[:-1])
    grad, signs = grad_output.reshape(rows, grad_output.shape[-1]), signs.reshape(rows, signs.shape[-1])
    grad_input = grad.new_empty((0, in_features))
    if need_input:
        grad_input = grad @ torch.ops.bop2nd.unpack_bits(weight, in_features, dtype=grad.dtype)
        if mask.numel():
            torch.ops.bop2nd.apply_mask_(grad_input, mask.reshape(signs.shape))
        grad_input = grad_input.view(*grad_output.shape[:-1], in_features)
    grad_weight = grad.new_empty((weight.shape[0] if need_weight else 0, in_features), dtype=torch.float32)
    if need_weight:
        _sum_products(grad, signs, in_features, grad_weight)
    return grad_input, grad_weight


def _sum_products(grad: Tensor, signs: Tensor, in_features: int, total: Tensor) -> None:
    """``total <- grad.T @ unpacked signs``, tile by tile, without a temporary as large as ``total``."""
    if grad.shape[0] == 0:
        total.zero_()
    for rows in row_tiles(grad.shape[0], in_features, grad.device):
        x = torch.ops.bop2nd.unpack_bits(signs[rows], in_features, dtype=grad.dtype)
        if grad.dtype == total.dtype:
            torch.addmm(total, grad[rows].T, x, beta=min(rows.start, 1), out=total)
        elif rows.start == 0:
            total.copy_(grad[rows].T @ x)
        else:
            total += grad[rows].T @ x


backends.define(
    "binary_linear_backward(Tensor grad_output, Tensor signs, Tensor mask, Tensor weight, int in_features, "
    "bool need_input, bool need_weight) -> (Tensor, Tensor)",
    _backward,
)


@torch.library.register_fake("bop2nd::binary_linear_backward")
def _backward_fake(
    grad_output: Tensor,
    signs: Tensor,
    mask: Tensor,
    weight: Tensor,
    in_features: int,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    _check_backward(grad_output, signs, mask, weight, in_features)
    shape = (*grad_output.shape[:-1], in_features) if need_input else (0, in_features)
    weight_shape = (weight.shape[0] if need_weight else 0, in_features)
    return grad_output.new_empty(shape), grad_output.new_empty(weight_shape, dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.in_features = inputs[0].shape[-1]
    ctx.save_for_backward(output[1], output[2], inputs[1])


def _autograd(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    return *gradients_of("binary_linear", ctx, grad, ctx.in_features), None, None


torch.library.register_autograd("bop2nd::binary_linear", _autograd, setup_context=_setup)


# ------------------------------------------------------------------------------- the checked function


def binary_linear(input: Tensor, weight: BinaryTensor, ste_clip: bool = True) -> Tensor:
    """``sign(input) @ weight.T`` with packed weights.

    Args:
        input: floating, ``[..., in_features]``.
        weight: ``[out_features, in_features]`` packed along axis 1.
        ste_clip: gradient of sign: 1 where ``|x| <= 1`` and 0 elsewhere (True), or 1 everywhere.

    Returns:
        ``[..., out_features]`` in the dtype of ``input``.

    Raises:
        TypeError, ValueError: operands of other kinds, or whose feature counts differ.
    """
    check_operands(input, weight, 2)
    check_features(input, weight)
    recorded = records_gradient(input, weight)
    # Far below every limit, a fifth of a small product's time is not spent on looking at them.
    if recorded or max(weight.numel(), weight.shape[1]) >= DOT_LIMIT or input.numel() >= INT32_LIMIT:
        geometry_of(math.prod(input.shape[:-1]), (1, 1), input.shape[-1], weight.shape[0], (1, 1))
    op = torch.ops.bop2nd.binary_linear.default
    if not recorded:
        with (
            torch._C._AutoDispatchBelowAutograd()
        ):  # nothing to record: skip autograd's detour through Python
            output: Tensor = op(input, weight.memory.words, False, weight.memory.blocked())[0]
        return output
    output = op(input, weight, ste_clip and input.requires_grad)[0]
    return output
