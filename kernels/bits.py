"""Bits in registers: the device functions that every kernel here shares. No loads, no masks, no pointers.

Words are int32, element ``e`` is bit ``e`` (least significant first), bit 1 means -1. Costs are stated in
32-bit integer instructions on NVIDIA chips, read from the machine code that ``tests/triton_aot.py`` makes.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def to_float32(x):
    """Exact widening. bf16 goes by its bits: the interpreter's own cast changes NaN and denormals."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def pack_lanes(flags):
    """Flags ``[rows, 32]`` -> words ``[rows]``: a shifted sum, which no two lanes can carry into."""
    lanes = tl.arange(0, 32)
    return tl.sum(flags.to(tl.int32) << lanes[None, :], axis=1)


@triton.jit
def unpack_lanes(words):
    """Words ``[rows]`` -> flags ``[rows, 32]`` (true means -1)."""
    lanes = tl.arange(0, 32)
    return ((words[:, None] >> lanes[None, :]) & 1) != 0


@triton.jit
def popcount(words):
    """Set bits of each word. Plain arithmetic, so the interpreter runs it; LLVM makes it ``popc.b32``."""
    v = words.to(tl.uint32, bitcast=True)
    v = v - ((v >> 1) & 0x55555555)
    v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F
    return ((v * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def mix32(x):
    """The integer hash of ``reference.mix32`` on uint32."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)
