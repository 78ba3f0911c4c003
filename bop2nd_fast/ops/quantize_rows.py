"""bop2nd::quantize_rows - real rows as int8 and one scale each, halves rounded to even.

``scale = max |x| / 127``, ``q = clamp(round(x / scale), -127, 127)``: symmetric, so that the zero point
of the product that reads them is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends, reference
from .product import check_extent, check_real


def _check(input: Tensor) -> None:
    check_real(input, "input")
    check_extent(input, "input")
    if input.dim() < 1:
        raise ValueError("input needs at least one axis")


def _quantize(input: Tensor, per_row: bool = True) -> tuple[Tensor, Tensor]:
    _check(input)
    return reference.quantize_rows(input, per_row)


backends.define("quantize_rows(Tensor input, bool per_row=True) -> (Tensor, Tensor)", _quantize)


@torch.library.register_fake("bop2nd::quantize_rows")
def _fake(input: Tensor, per_row: bool = True) -> tuple[Tensor, Tensor]:
    _check(input)
    scale = input.new_empty(input.shape[:-1] if per_row else (1,), dtype=torch.float32)
    return input.new_empty(input.shape, dtype=torch.int8), scale


def quantize_rows(input: Tensor, per_row: bool = True) -> tuple[Tensor, Tensor]:
    """int8 numbers and fp32 scales with ``input ~ q * scale``; neither has a gradient.

    Args:
        input: floating, ``[..., K]``.
        per_row: a scale for each row of K elements, ``[...]``; else one for all, ``[1]``.

    Raises:
        TypeError, ValueError: no floating input, or infinite or NaN elements.
    """
    q, scale = torch.ops.bop2nd.quantize_rows(input.detach(), per_row)
    return q, scale
