"""One optimizer step of a whole parameter group in one launch: moments, threshold, sign-bit flips, counts.

Maths (``reference.bop_rule``), every operation rounded on its own::

    m <- m + gamma * (g - m)        v <- v + sigma * (g*g - v)
    flip iff  sign(m) == w  and  |m| > a * sqrt(v) + b

Cost per weight, fp32 gradient and state, packed weights: reads 4 + 4 + 4 + 1/8 bytes, writes 4 + 4 bytes
(+ 1/8 where a word changes): 20.25 bytes and about 15 operations, so memory is the limit everywhere.

How: a table holds the addresses of every tensor, a second one the chunks of words that make one program's
work. Both live on the device and are built once per set of addresses; a new set costs one asynchronous
copy of 64 bytes per tensor. Hyperparameters, ``inv_scale``, ``found_inf`` and ``seed`` are read on the
device, the counts start from a device-side zero: nothing waits for the GPU, the launch can be captured.

Limits: one launch per combination of dtypes in the group (one, as a rule). Fewer than 2**31 - 65536 words
per tensor. Rows that are not a whole number of words, and addresses not on 16 bytes, take 4-byte accesses.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bits import mix32, pack_lanes, to_float32, unpack_lanes
from .step_tables import plan
from .tuning import family, on_device_of, step_tile

_TRITON_DTYPE = {
    torch.int32: tl.int32,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit
def bop_rule(g, m, v, negative, gamma, sigma, a, b, HAS_V: tl.constexpr):
    """THE UPDATE RULE, on registers: new moments, candidates, flips. Without ``HAS_V`` no ``v`` is read."""
    m = m + gamma * (g - m)
    bound = b
    if HAS_V:
        v = v + sigma * (g * g - v)
        bound = a * tl.sqrt_rn(v) + b
    candidates = (m < 0) == negative
    return m, v, candidates, candidates & (tl.abs(m) > bound)


@triton.jit
def _rounding_key(seed, tensor_index):
    """The part of ``reference.rounding_bits`` that all elements of a tensor share."""
    user_seed = tl.load(seed)
    key = mix32(user_seed.to(tl.uint32))
    key = mix32(key ^ (user_seed >> 32).to(tl.uint32))
    key = mix32(key ^ tl.load(seed + 1).to(tl.uint32))
    return mix32(key ^ tensor_index.to(tl.uint32))


@triton.jit
def _rounding_bits(key, first, offsets):
    """``reference.rounding_bits`` of the elements ``first`` (int64) + ``offsets`` (int32, >= 0)."""
    first_low = first.to(tl.uint32)
    key_low = key + (first >> 32).to(tl.uint32) * 0x9E3779B9
    low = first_low + offsets.to(tl.uint32)
    return mix32(low ^ tl.where(low < first_low, key_low + 0x9E3779B9, key_low))


@triton.jit
def _round_bf16(x, random16):
    """``reference.round_bf16_stochastic``: add 16 random bits below the cut, truncate."""
    bits = x.to(tl.uint32, bitcast=True)
    special = (bits & 0x7F800000) == 0x7F800000
    is_nan = special & ((bits & 0x007FFFFF) != 0)
    top = tl.where(special, bits, bits + random16) >> 16
    top = tl.where(is_nan, top | 0x40, top)
    return top.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _update(
    weight, grad, exp_avg, exp_avg_sq, words, words_live, first, offsets, live,
    gamma, sigma, a, b, scale, key, MAXIMIZE: tl.constexpr,
):  # fmt: skip
    """Step ``[rows, 32]`` weights at ``first + offsets``; returns candidates + 65536 * flips per weight."""
    PACKED: tl.constexpr = weight.dtype.element_ty == tl.int32
    g = to_float32(tl.load(grad + offsets, mask=live, other=0))
    m = to_float32(tl.load(exp_avg + offsets, mask=live, other=0))
    v = m
    if exp_avg_sq is not None:
        v = to_float32(tl.load(exp_avg_sq + offsets, mask=live, other=0))
    if scale is not None:
        g = g * scale
    if MAXIMIZE:
        g = g * -1.0
    if PACKED:
        word = tl.load(weight + words, mask=words_live, other=0)
        negative = unpack_lanes(word)
    else:
        w = to_float32(tl.load(weight + offsets, mask=live, other=1))
        negative = w < 0
    m, v, candidates, flips = bop_rule(g, m, v, negative, gamma, sigma, a, b, exp_avg_sq is not None)
    candidates = candidates & live
    flips = flips & live
    if exp_avg.dtype.element_ty == tl.bfloat16:
        random = _rounding_bits(key, first, offsets)
        m = _round_bf16(m, random & 0xFFFF)
        if exp_avg_sq is not None:
            v = _round_bf16(v, random >> 16)
    tl.store(exp_avg + offsets, m, mask=live)
    if exp_avg_sq is not None:
        tl.store(exp_avg_sq + offsets, v, mask=live)
    if PACKED:  # flips are rare: only changed words are written
        changed = pack_lanes(flips)
        tl.store(weight + words, word ^ changed, mask=words_live & (changed != 0))
    else:
        tl.store(weight + offsets, (w * -1.0).to(weight.dtype.element_ty), mask=flips)
    return candidates.to(tl.int32) + (flips.to(tl.int32) << 16)


@triton.jit
def bop_step_kernel(
    chunks, table, hyper, counts, inv_scale, found_inf, seed,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, MOMENT: tl.constexpr,
    HAS_V: tl.constexpr, MAXIMIZE: tl.constexpr, BLOCK_WORDS: tl.constexpr,
):  # fmt: skip
    """Program ``p`` steps the words of ``chunks[p]`` = (table row, first, end, whole aligned words?)."""
    chunk = chunks + 4 * tl.program_id(0)
    row = table + 8 * tl.load(chunk)
    begin = tl.load(chunk + 1)
    end = tl.load(chunk + 2)
    linear = tl.load(chunk + 3)
    if found_inf is not None:  # an overflow in the gradients: no work, and zeros are added to the counts
        end = tl.where(tl.load(found_inf) != 0, begin, end)
    weight = tl.load(row).to(tl.pointer_type(WEIGHT))
    grad = tl.load(row + 1).to(tl.pointer_type(GRAD))
    exp_avg = tl.load(row + 2).to(tl.pointer_type(MOMENT))
    exp_avg_sq = None
    if HAS_V:
        exp_avg_sq = tl.load(row + 3).to(tl.pointer_type(MOMENT))
    length = tl.load(row + 4)
    words_per_row = tl.load(row + 5).to(tl.int32)
    tensor_index = tl.load(row + 6)
    gamma = tl.load(hyper)
    sigma = tl.load(hyper + 1)
    a = tl.load(hyper + 2)
    b = tl.load(hyper + 3)
    scale = None
    if inv_scale is not None:
        scale = tl.load(inv_scale).to(tl.float32)
    key = None
    if exp_avg.dtype.element_ty == tl.bfloat16:
        key = _rounding_key(seed, tensor_index)

    block = tl.arange(0, BLOCK_WORDS)
    lanes = tl.arange(0, 32)
    seen = tl.zeros((BLOCK_WORDS, 32), tl.int32)
    for i in range(tl.cdiv(end - begin, BLOCK_WORDS)):
        word = begin + i * BLOCK_WORDS
        words_live = word + block < end
        if linear != 0:  # whole words from 16-byte aligned addresses: the compiler may use 16-byte accesses
            first = word.to(tl.int64) * 32
            offsets = block[:, None] * 32 + lanes[None, :]
            v_block = exp_avg_sq
            if HAS_V:
                v_block = tl.multiple_of(exp_avg_sq, 16) + first
            w_block = tl.multiple_of(weight, 16) + (word if weight.dtype.element_ty == tl.int32 else first)
            seen += _update(
                w_block, tl.multiple_of(grad, 16) + first, tl.multiple_of(exp_avg, 16) + first, v_block,
                block, words_live, first, offsets, words_live[:, None],
                gamma, sigma, a, b, scale, key, MAXIMIZE,
            )  # fmt: skip
        else:
            # 32-bit offsets from the block's first element: they are small, whatever wraps on the way there.
            # A row's last word may hold fewer lanes.
            words = word + block
            row_of_block = word // words_per_row
            column = word % words_per_row
            row_first = row_of_block.to(tl.int64) * length + column.to(tl.int64) * 32
            starts = (words // words_per_row - row_of_block) * length.to(tl.int32)
            starts += (words % words_per_row - column) * 32
            lanes_left = tl.minimum(length - (words % words_per_row).to(tl.int64) * 32, 32).to(tl.int32)
            live = words_live[:, None] & (lanes[None, :] < lanes_left[:, None])
            v_row = exp_avg_sq
            if HAS_V:
                v_row = exp_avg_sq + row_first
            w_row = weight + (word if weight.dtype.element_ty == tl.int32 else row_first)
            seen += _update(
                w_row, grad + row_first, exp_avg + row_first, v_row,
                block, words_live, row_first, starts[:, None] + lanes[None, :], live,
                gamma, sigma, a, b, scale, key, MAXIMIZE,
            )  # fmt: skip
    # Relaxed: nobody reads the counts before the launch has ended, so no program waits for its stores.
    tl.atomic_add(counts + 2 * tensor_index, tl.sum(seen & 0xFFFF).to(tl.int64), sem="relaxed")
    tl.atomic_add(counts + 2 * tensor_index + 1, tl.sum(seen >> 16).to(tl.int64), sem="relaxed")


def bop_step_(
    weights: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    hyper: Tensor,
    counts: Tensor,
    *,
    inv_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    seed: Tensor | None = None,
    maximize: bool = False,
) -> None:
    """``reference.bop_step_`` as one launch per combination of dtypes; all tensors on one device.

    Raises ValueError for what no kernel exists for (see ``step_tables.plan``), or bf16 moments without
    ``seed``; then nothing is changed.
    """
    if not weights:
        return
    if seed is None and any(m.dtype == torch.bfloat16 for m in exp_avgs):
        raise ValueError("bfloat16 moments are rounded stochastically and need `seed`")
    columns = (weights, grads, exp_avgs, exp_avg_sqs) if exp_avg_sqs else (weights, grads, exp_avgs)
    device = weights[0].device
    with on_device_of(weights[0]):
        launches = plan(columns, (hyper, counts, inv_scale, found_inf, seed), device)
        counts.zero_()
        for launch in launches:
            tile = step_tile(family(device), launch.dtypes[0] == torch.int32, launch.dtypes[2])
            weight, grad, moment = (_TRITON_DTYPE[dtype] for dtype in launch.dtypes)
            bop_step_kernel[(launch.chunks.shape[0],)](
                launch.chunks, launch.table, hyper, counts, inv_scale, found_inf, seed,
                WEIGHT=weight, GRAD=grad, MOMENT=moment, HAS_V=bool(exp_avg_sqs), MAXIMIZE=maximize,
                BLOCK_WORDS=tile.block_words, num_warps=tile.num_warps, maxnreg=tile.max_registers,
                enable_fp_fusion=False,
            )  # fmt: skip
