"""What the products of signs with real numbers and 8-bit integers share: operands, limits, gradients.

Every implementation refuses the same operands: C++ by ``csrc/register_signed.h``, Python by what is here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..binary_tensor import BinaryTensor
from ..kernels.outputs import SCHEMA
from ..kernels.signed_operands import INTEGERS, Scaling
from .product import REALS, check_extent, check_words

INPUTS = ((*REALS, *INTEGERS), "float32, bfloat16, float16, int8 or uint8")

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
OPERAND_NAMES = tuple(part.split("=")[0].split()[-1] for part in OPERANDS.split(", "))


def check_input(input: Tensor, weight: Tensor) -> None:
    """Raises TypeError, ValueError unless ``input`` is real, int8 or uint8, with words beside it."""
    dtypes, allowed = INPUTS
    if input.dtype not in dtypes:
        raise TypeError(f"input must be {allowed}, got {input.dtype}")
    check_extent(input, "input")
    check_words(weight, "weight", input)


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
