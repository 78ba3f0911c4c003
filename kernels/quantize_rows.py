"""Real rows as int8 and one fp32 scale each: ``reference.quantize_rows``, the same bits.

Two kernels, each reading the input once: the largest magnitude of every row, and the rounded quotients. In
between ``scale = largest / 127`` by torch, and whether all is finite, for which the host waits. A magnitude
is compared as an integer, its bits without the sign: infinity and NaN are larger than every number.

Bytes: twice the input, one per element out. Division is the correctly rounded one; halves go to even, because
1.5 * 2**23 is added and subtracted. Limits: fewer than 2**31 - 65536 rows and elements of a row.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bits import to_float32
from .grid import check_index, grid_of, program_of
from .operands import check_floats
from .tuning import on_device_of

BLOCK = 1024
INFINITE = 0x7F800000  # the bits of infinity


@triton.jit
def largest_kernel(x, largest, length, BLOCK: tl.constexpr):
    """Program (row): the bits of the largest magnitude."""
    row = tl.program_id(0)
    x += row.to(tl.int64) * length
    most = tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, length, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        some = to_float32(tl.load(x + at, mask=at < length, other=0.0))
        most = tl.maximum(most, some.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    tl.store(largest + row, tl.max(most, axis=0))


@triton.jit
def quotients_kernel(x, scale, q, length, PER_ROW: tl.constexpr, BLOCK: tl.constexpr):
    """Program (block of a row, row)."""
    block, row, _ = program_of(tl.cdiv(length, BLOCK), 2147483647)
    at = block * BLOCK + tl.arange(0, BLOCK)
    start = row.to(tl.int64) * length
    divisor = tl.load(scale + row if PER_ROW else scale)
    some = to_float32(tl.load(x + start + at, mask=at < length, other=0.0))
    quotient = tl.div_rn(some, tl.where(divisor == 0, 1.0, divisor) + tl.zeros((BLOCK,), tl.float32))
    rounded = (quotient + 12582912.0) - 12582912.0
    rounded = tl.where(divisor == 0, 0.0, tl.minimum(tl.maximum(rounded, -127.0), 127.0))
    tl.store(q + start + at, rounded.to(tl.int8), mask=at < length)


def quantize_rows(input: Tensor, per_row: bool = True) -> tuple[Tensor, Tensor]:
    """As in ``ops/quantize_rows.py``.

    Raises:
        TypeError, ValueError: no floating input, or infinite or NaN elements.
    """
    check_floats(input, "input")
    *shape, length = input.shape
    rows = math.prod(shape)
    check_index(rows, "rows")
    check_index(length, "elements of a row")
    x = input.contiguous()
    q = torch.empty_like(x, dtype=torch.int8)
    largest = x.new_zeros(rows, dtype=torch.int32)
    if x.numel():
        with on_device_of(x):
            largest_kernel[grid_of(rows)](x, largest, length, BLOCK=BLOCK, num_warps=4)
        if bad := int((largest >= INFINITE).sum()):
            raise ValueError(f"{bad} of {rows} rows have infinite or NaN elements")
    most = largest.view(torch.float32)
    if not per_row:
        most = most.amax().view(1) if rows else most.new_zeros(1)
    scale = most / torch.full_like(most, 127)  # GPUs multiply by the reciprocal of a number: other bits
    if x.numel():
        grid = grid_of(triton.cdiv(length, BLOCK), rows)
        with on_device_of(x):
            quotients_kernel[grid](
                x, scale, q, length, PER_ROW=per_row, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False
            )
    return q, scale.view(shape) if per_row else scale
