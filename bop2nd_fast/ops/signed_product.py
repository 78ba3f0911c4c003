"""What the products of signs with real numbers and 8-bit integers share: operands, limits, gradients.

Every implementation refuses the same operands: C++ by ``csrc/register_signed.h``, Python by what is here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..binary_tensor import BinaryTensor
from ..kernels.geometry import INT32_LIMIT, Geometry
from ..kernels.outputs import SCHEMA
from .product import REALS, check_extent, check_words

INTEGERS = {torch.int8: (-128, 127), torch.uint8: (0, 255)}  # and the range of each
INPUTS = ((*REALS, *INTEGERS), "float32, bfloat16, float16, int8 or uint8")
MULTIPLIER_LIMIT = 2**16

# After input and weight (and a convolution's geometry). ``multiplier`` and ``zero_point``: of integers.
OPERANDS = (
    "int multiplier=1, int zero_point=0, Tensor? input_scale=None, Tensor? straight_through=None, " + SCHEMA
)
# What an output's keyword is where nothing is asked of it.
_SWITCHES = {"True": True, "False": False}
OUTPUT_DEFAULTS = {
    name: _SWITCHES.get(default)
    for name, default in (part.split()[-1].split("=") for part in SCHEMA.split(", "))
}
OUTPUT_NAMES = tuple(OUTPUT_DEFAULTS)
OPERAND_NAMES = tuple(part.split("=")[0].split()[-1] for part in OPERANDS.split(", "))


Scaling = tuple[int, int, Tensor | None, Tensor | None]  # multiplier, zero point, scales, straight through


def check_input(input: Tensor, weight: Tensor) -> None:
    """Raises TypeError, ValueError unless ``input`` is real, int8 or uint8, with words beside it."""
    dtypes, allowed = INPUTS
    if input.dtype not in dtypes:
        raise TypeError(f"input must be {allowed}, got {input.dtype}")
    check_extent(input, "input")
    check_words(weight, "weight", input)


def check_scaling(
    input: Tensor,
    geometry: Geometry,
    scaling: Scaling,
    rows: int,
    threshold: Tensor | None = None,
) -> None:
    """``rows``: how many scales the input may have, if not one.

    Raises:
        ValueError: a multiplier or zero point out of range, sums beyond int32, scales of another number or
            dtype, thresholds for real inputs, a straight-through operand of another shape.
    """
    multiplier, zero_point, input_scale, straight_through = scaling
    if input.dtype in INTEGERS:
        low, high = INTEGERS[input.dtype]
        if not 1 <= multiplier <= MULTIPLIER_LIMIT:
            raise ValueError(f"multiplier is {multiplier}, allowed is 1 to 2**16")
        if not multiplier * low <= zero_point <= multiplier * high:
            raise ValueError(
                f"zero_point is {zero_point}, allowed is {multiplier * low} to {multiplier * high} for "
                f"{input.dtype} times {multiplier}"
            )
        products = geometry.taps * geometry.channels
        largest = max(zero_point - multiplier * low, multiplier * high - zero_point)
        if type(products) is int and products * largest >= INT32_LIMIT:
            raise ValueError(
                f"{products} products of up to {largest} exceed int32: their sum may reach "
                f"{products * largest}, allowed is less than 2**31"
            )
    else:
        if multiplier != 1 or zero_point != 0:
            raise ValueError(
                f"multiplier {multiplier} and zero_point {zero_point} belong to int8 and uint8 inputs"
            )
        if threshold is not None:
            raise ValueError("thresholds belong to int8 and uint8 inputs; use shift or sign_shift")
    if input_scale is not None:
        count = input_scale.numel()
        if input_scale.dtype != torch.float32 or (type(count) is int and count not in (1, rows)):
            raise ValueError(
                f"input_scale must be float32 with 1 or {rows} elements, got {input_scale.dtype} "
                f"{list(input_scale.shape)}"
            )
        if input_scale.device != input.device:
            raise ValueError(f"input_scale is on {input_scale.device}, the first operand on {input.device}")
    if straight_through is not None and straight_through.shape != input.shape:
        raise ValueError(
            f"straight_through must have the input's shape {list(input.shape)}, got "
            f"{list(straight_through.shape)}"
        )


def scaling_of(given: dict[str, Any]) -> Scaling:
    """Taken out of the keywords ``given``."""
    return (
        given.pop("multiplier", 1),
        given.pop("zero_point", 0),
        given.pop("input_scale", None),
        given.pop("straight_through", None),
    )


def real_input(input: Tensor, multiplier: int, zero_point: int) -> Tensor:
    """What the signs are multiplied with, for the gradient of the weight."""
    return input if input.dtype in REALS else input.float().mul_(multiplier).sub_(zero_point)


def refuse_fused(names: Sequence[str], values: Sequence[Any], operator: str) -> None:
    """Gradients are defined for values alone: whatever else was asked of the product is an error.

    Raises:
        RuntimeError: outputs other than the defaults.
    """
    for name, value in zip(names, values, strict=True):
        if name in ("dtype", "blocked"):
            continue
        if value is not OUTPUT_DEFAULTS[name]:
            raise RuntimeError(f"{operator} with {name}={value!r} has no gradient: compute it outside")


def wants_gradient(ctx: Any, operand: int) -> bool:
    """torch leaves operands that have their default out, and says nothing of them."""
    return operand < len(ctx.needs_input_grad) and bool(ctx.needs_input_grad[operand])


def unpacked(weight: Tensor, length: int, dim: int, dtype: torch.dtype) -> Tensor:
    """The weight, or its words, as +1 and -1, with its gradient."""
    if isinstance(weight, BinaryTensor):
        return weight.unpack(dtype)
    values: Tensor = torch.ops.bop2nd.unpack_bits(weight, length, dim, dtype=dtype)
    return values


def scaled_by(grad: Tensor, scale: Tensor | None, shape: Sequence[int]) -> Tensor:
    """A gradient times the scales of its rows or images, ``shape``, or one scale for all."""
    if scale is None:
        return grad
    return (grad * (scale.view(shape) if scale.numel() != 1 else scale)).to(grad.dtype)
