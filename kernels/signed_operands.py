"""What products of signs with real and 8-bit inputs may be given: their scaling and its limits. No Triton.

The same limits as in ``csrc/register_signed.h``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .geometry import INT32_LIMIT, Geometry
from .operands import FLOATS

INTEGERS = {torch.int8: (-128, 127), torch.uint8: (0, 255)}  # and the range of each
MULTIPLIER_LIMIT = 2**16

Scaling = tuple[int, int, Tensor | None, Tensor | None]  # multiplier, zero point, scales, straight through


def check_scaling(
    input: Tensor,
    geometry: Geometry,
    scaling: Scaling,
    rows: int,
    threshold: Tensor | None,
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


def check_real_or_8_bit(input: Tensor) -> None:
    """Raises TypeError unless the input is float32, bfloat16, float16, int8 or uint8."""
    if input.dtype not in (*FLOATS, *INTEGERS) or input.layout != torch.strided:
        raise TypeError(
            f"input must be float32, bfloat16, float16, int8 or uint8, got {input.dtype} ({input.layout})"
        )
