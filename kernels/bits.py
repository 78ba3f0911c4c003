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


# Decoding to int8 for tensor cores. A word becomes 8 registers of 4 bytes with a shift, an AND and a
# multiply-add each, 0.75 instructions per element: register j holds bits j, j+8, j+16, j+24 as +1 / -1. So
# the 32 elements come out permuted; both operands of a product are permuted alike, and a dot product is a
# sum in any order. Two texts of one function: they differ in which axis the compiler keeps inside a thread.


@triton.jit
def decode_for_registers(words, keep, ROWS: tl.constexpr, WORDS: tl.constexpr, KEEP: tl.constexpr):
    """Words ``[ROWS, WORDS]`` -> int8 ``[ROWS, 32 * WORDS]``, for operands read from registers.

    With ``KEEP`` rows whose ``keep`` is 0 (else -1) become zeros. The bytes are never taken apart: LLVM sees
    that joining the truncations gives the register back.
    """
    t = (words[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 0x01010101
    t = t * 254 + 0x01010101
    if KEEP:
        t = t & keep[:, None, None]
    even = tl.join(t.to(tl.int8), (t >> 16).to(tl.int8))
    odd = tl.join((t >> 8).to(tl.int8), (t >> 24).to(tl.int8))
    return tl.reshape(tl.join(even, odd), (ROWS, 32 * WORDS))


@triton.jit
def decode_for_shared(words, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """The same bytes, a whole word in one thread: 16-byte stores to shared memory, where wgmma reads them."""
    t = tl.join(words, words >> 4)
    t = tl.join(t, t >> 2)
    t = tl.join(t, t >> 1)
    t = (t & 0x01010101) * 254 + 0x01010101
    even = tl.join(t.to(tl.int8), (t >> 16).to(tl.int8))
    odd = tl.join((t >> 8).to(tl.int8), (t >> 24).to(tl.int8))
    return tl.reshape(tl.join(even, odd), (ROWS, 32 * WORDS))


@triton.jit
def decode_in_order(words, ROWS: tl.constexpr, WORDS: tl.constexpr, SHARED: tl.constexpr):
    """Words ``[ROWS, WORDS]`` -> int8 ``[ROWS, 32 * WORDS]`` +1 / -1 in the order of the elements.

    For products with bytes that lie in memory. Four bits become a register with a shift, an AND, a multiply,
    an AND and a multiply-add, 1.25 instructions per element. ``SHARED``: whole words in one thread, as
    ``decode_for_shared`` does.
    """
    if SHARED:
        t = tl.join(words, words >> 16)
        t = tl.join(t, t >> 8)
        t = tl.join(t, t >> 4)
    else:
        t = words[:, :, None] >> (tl.arange(0, 8) * 4)[None, None, :]
    t = ((t & 15) * 0x00204081) & 0x01010101  # bit i of four moves to bit 8 i
    t = t * 254 + 0x01010101
    even = tl.join(t.to(tl.int8), (t >> 16).to(tl.int8))
    odd = tl.join((t >> 8).to(tl.int8), (t >> 24).to(tl.int8))
    return tl.reshape(tl.join(even, odd), (ROWS, 32 * WORDS))


# Decoding to 16-bit floats, for products with gradients and real inputs: 1.0, with the bit as its sign.


@triton.jit
def decode_signs(words, dtype: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Words ``[ROWS, WORDS]`` -> bf16 or fp16 ``[ROWS, 32 * WORDS]`` in the order of the elements.

    A whole word stays in one thread (16-byte stores to shared memory), and two neighbours share a register:
    two shifts and two three-input operations for both, 2 instructions per element.
    """
    t = tl.join(words, words >> 16)
    t = tl.join(t, t >> 8)
    t = tl.join(t, t >> 4)
    t = tl.join(t, t >> 2)
    ones: tl.constexpr = 0x3C003C00 if dtype == tl.float16 else 0x3F803F80
    pair = ((t & 1) << 15) | ((t & 2) << 30) | ones
    both = tl.join(pair.to(tl.int16), (pair >> 16).to(tl.int16))
    return tl.reshape(both, (ROWS, 32 * WORDS)).to(dtype, bitcast=True)
