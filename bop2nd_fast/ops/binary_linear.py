"""bop2nd::binary_linear - sign(input) times packed weights; and its packed-in form for inference.

``dot = K - 2 * popcount(x XOR w)``, exact in int32, then cast to the input's dtype. Training keeps 2 bits
per activation for the backward pass: its sign, and the straight-through estimator's mask ``|x| <= 1``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import backends, reference
from ..binary_tensor import BinaryTensor
from .derivatives import first_only
from .pack_bits import words_for

INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The backward pass unpacks activations in tiles: of 8 MiB of fp32, which a CPU's caches hold; of 256 MiB on
# GPUs, where a tile costs ten launches and a library wants large problems.
TILE_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}


def _reference(
    input: Tensor, weight: Tensor, ste_clip: bool, blocked: Any = None
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.binary_linear(input, weight, ste_clip)


def _reference_packed(*operands: Any, blocked: Any = None, **outputs: Any) -> tuple[Tensor, Tensor]:
    return reference.binary_linear_packed(*operands, **outputs)


# What a packed product emits: values, sign words or both in one pass; see reference.epilogue.
OUTPUTS = (
    "bool values=True, bool signs=False, Tensor? threshold=None, Tensor? scale=None, Tensor? shift=None, "
    "Tensor? residual=None, ScalarType dtype=float, Tensor? blocked=None"
)


backends.define(
    "binary_linear(Tensor input, Tensor weight, bool ste_clip, Tensor? blocked=None) "
    "-> (Tensor, Tensor, Tensor)",
    _reference,
)
backends.define(
    f"binary_linear_packed(Tensor input, Tensor weight, int in_features, *, {OUTPUTS}) -> (Tensor, Tensor)",
    _reference_packed,
)


@torch.library.register_fake("bop2nd::binary_linear")
def _fake(
    input: Tensor, weight: Tensor, ste_clip: bool, blocked: Any = None
) -> tuple[Tensor, Tensor, Tensor]:
    output = input.new_empty((*input.shape[:-1], weight.shape[0]))
    signs = input.new_empty((*input.shape[:-1], words_for(input.shape[-1])), dtype=torch.int32)
    return output, signs, torch.empty_like(signs) if ste_clip else signs.new_empty(0)


@torch.library.register_fake("bop2nd::binary_linear_packed")
def _packed_fake(input: Tensor, weight: Tensor, in_features: int, **outputs: Any) -> tuple[Tensor, Tensor]:
    return empty_outputs(input, (input.shape[0], weight.shape[0]), **outputs)


def empty_outputs(
    like: Tensor,
    shape: tuple[int, ...],
    *,
    values: bool = True,
    signs: bool = False,
    dtype: torch.dtype = torch.float32,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Memory for the values ``[..., O]`` and their sign words; what is not asked for is empty."""
    words = (*shape[:-1], words_for(shape[-1]))
    return (
        like.new_empty(shape if values else (0,), dtype=dtype),
        like.new_empty(words if signs else (0,), dtype=torch.int32),
    )


# ----------------------------------------------------------------------------------------- backward


def row_tiles(n_rows: int, elements_per_row: int, device: torch.device) -> Iterator[slice]:
    """Slices of rows whose unpacked values fill at most one tile of ``device``, of nearly one size."""
    tile = TILE_ELEMENTS.get(device.type, TILE_ELEMENTS["cpu"])
    n_tiles = -(-n_rows // max(1, tile // max(1, elements_per_row)))
    step = max(1, -(-n_rows // max(1, n_tiles)))  # even tiles: torch's convolutions plan once for each shape
    return (slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step))


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
    n_rows = math.prod(grad_output.shape[:-1])  # no -1 in a shape: there may be no outputs or no words
    grad = grad_output.reshape(n_rows, grad_output.shape[-1])
    signs = signs.reshape(n_rows, signs.shape[-1])
    mask = mask.reshape(signs.shape) if mask.numel() else mask
    grad_input = grad.new_empty((0, in_features))
    if need_input:
        grad_input = grad @ torch.ops.bop2nd.unpack_bits(weight, in_features, dtype=grad.dtype)
        if mask.numel():
            torch.ops.bop2nd.apply_mask_(grad_input, mask)
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
    shape = (*grad_output.shape[:-1], in_features) if need_input else (0, in_features)
    weight_shape = (weight.shape[0] if need_weight else 0, in_features)
    return grad_output.new_empty(shape), grad_output.new_empty(weight_shape, dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.in_features = inputs[0].shape[-1]
    ctx.save_for_backward(output[1], output[2], inputs[1])


def _autograd(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return None, None, None, None
    signs, mask, weight = ctx.saved_tensors
    need_input, need_weight = ctx.needs_input_grad[:2]
    grad_input, grad_weight = torch.ops.bop2nd.binary_linear_backward(
        grad, signs, mask, weight, ctx.in_features, need_input, need_weight
    )
    gradients = (grad_input if need_input else None, grad_weight.to(weight.dtype) if need_weight else None)
    return *first_only("binary_linear", gradients), None, None


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
    check_operands(input, weight, packed_axis=1, n_axes=2)
    if input.dim() < 1 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"input {tuple(input.shape)} does not end in the {weight.shape[1]} features of the weight"
        )
    op = torch.ops.bop2nd.binary_linear.default
    if not records_gradient(input, weight):
        with (
            torch._C._AutoDispatchBelowAutograd()
        ):  # nothing to record: skip autograd's detour through Python
            output: Tensor = op(input, weight.memory.words, False, weight.memory.blocked())[0]
        return output
    output = op(input, weight, ste_clip and input.requires_grad)[0]
    return output


def records_gradient(input: Tensor, weight: BinaryTensor) -> bool:
    """Whether the operator must see the BinaryTensor itself; else its words will do, at half the overhead."""
    wanted = torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)
    return wanted or torch.compiler.is_compiling()


def check_operands(input: Tensor, weight: BinaryTensor, packed_axis: int, n_axes: int) -> None:
    """Raise unless ``weight`` is packed as needed and ``input`` is a floating tensor on its device."""
    if not isinstance(weight, BinaryTensor):
        raise TypeError(f"weight must be a BinaryTensor (see bop2nd_fast.pack), got {type(weight).__name__}")
    if weight.dim() != n_axes or weight.bit_layout.dim != packed_axis:
        raise ValueError(
            f"weight of shape {tuple(weight.shape)} packed along axis {weight.bit_layout.dim}: this operator "
            f"needs {n_axes} axes packed along axis {packed_axis}"
        )
    if input.dtype not in INPUT_DTYPES:
        raise TypeError(f"input must be float32, bfloat16 or float16, got {input.dtype}: use x.float()")
    if input.device != weight.device:
        raise ValueError(f"input is on {input.device}, weight on {weight.device}")
