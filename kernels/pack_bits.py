"""Sign bits of a float tensor, with or without the straight-through mask, and back; and a mask applied.

Maths: bit 1 where ``x < 0`` (so +0.0, -0.0 and NaN are 0), mask bit 1 where ``|x| <= 1``; 32 elements along
the packed axis make an int32 word, tails are 0, every group of the axis starts on a word of its own.

Cost per element: reads 4 bytes (2 for bf16 and fp16) once for both results, writes 1/8 byte for each;
about 4 operations. Memory is the limit. Unpacking reads 1/8 byte and writes the element; applying a mask
reads 1/8 byte and reads and writes the element.

How: a tensor is seen as ``[outer, length, inner]`` with ``length`` packed. ``inner == 1`` (linear layers,
channels-last images): a block of ``[words, 32]`` elements, contiguous in memory, is reduced across lanes.
``inner > 1`` (NCHW along C): 32 rows of ``inner`` are read one after another, each by neighbouring threads,
and shifted into the word in registers. Other strides, and ``inner`` below 32 (the taps of a 3x3 weight), are
copied to rows first.

Limits: fp32, bf16, fp16; fewer than 2**31 - 65536 words in the result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bits import pack_lanes, to_float32, unpack_lanes
from .geometry import words_for
from .grid import check_index, grid_of, program_of
from .operands import FLOATS, check_floats, check_words
from .tuning import PACK_TILE, on_device_of


@triton.jit
def _rows_of_words(n_words, length, words_per_row, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """This program's words ``[BLOCK]``, their elements' offsets and which of them exist ``[BLOCK, 32]``.

    Rows of ``length`` contiguous elements; ``WHOLE``: the rows are whole words, so all are one long row.
    """
    block = tl.arange(0, BLOCK)
    lanes = tl.arange(0, 32)
    first = tl.program_id(0) * BLOCK
    word = first + block
    live = (word < n_words)[:, None]
    if WHOLE:
        elements = first.to(tl.int64) * 32 + (block[:, None] * 32 + lanes[None, :])
    else:
        column = (word % words_per_row).to(tl.int64) * 32  # a row may be longer than 2**31
        live = live & (column[:, None] + lanes[None, :] < length)
        elements = ((word // words_per_row).to(tl.int64) * length + column)[:, None] + lanes[None, :]
    return word, elements, live


@triton.jit(do_not_specialize=["n_words"])
def pack_rows_kernel(
    x, signs, mask, n_words, length, words_per_row,
    HAS_MASK: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sign words, and mask words, of contiguous rows."""
    word, elements, live = _rows_of_words(n_words, length, words_per_row, WHOLE, BLOCK)
    value = to_float32(tl.load(x + elements, mask=live, other=0.0))
    tl.store(signs + word, pack_lanes(value < 0), mask=word < n_words)
    if HAS_MASK:
        tl.store(mask + word, pack_lanes((tl.abs(value) <= 1) & live), mask=word < n_words)


@triton.jit(do_not_specialize=["inner_blocks"])
def pack_columns_kernel(
    x, signs, mask, inner, inner_blocks, length, words_per_group, groups,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (inner block, word of the packed axis, outer): 32 rows of ``inner`` into words."""
    block, word, outer = program_of(inner_blocks, groups * words_per_group)
    outer = outer.to(tl.int64)
    column = block * BLOCK + tl.arange(0, BLOCK)
    group = word // words_per_group
    first = (word % words_per_group).to(tl.int64) * 32
    row = (outer * groups + group) * length + first
    sign_word = tl.zeros((BLOCK,), tl.int32)
    mask_word = tl.zeros((BLOCK,), tl.int32)
    for lane in tl.static_range(32):
        live = (column < inner) & (first + lane < length)
        value = to_float32(tl.load(x + (row + lane) * inner + column, mask=live, other=0.0))
        sign_word |= (value < 0).to(tl.int32) << lane
        if HAS_MASK:
            mask_word |= ((tl.abs(value) <= 1) & live).to(tl.int32) << lane
    to = (outer * inner + column) * (groups * words_per_group) + word
    tl.store(signs + to, sign_word, mask=column < inner)
    if HAS_MASK:
        tl.store(mask + to, mask_word, mask=column < inner)


@triton.jit(do_not_specialize=["n_words"])
def unpack_rows_kernel(words, out, n_words, length, words_per_row, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """Words back to +1 / -1 in the dtype of ``out``."""
    word, elements, live = _rows_of_words(n_words, length, words_per_row, WHOLE, BLOCK)
    negative = unpack_lanes(tl.load(words + word, mask=word < n_words, other=0))
    value = tl.where(negative, -1.0, 1.0).to(out.dtype.element_ty)
    tl.store(out + elements, value, mask=live)


@triton.jit(do_not_specialize=["n_words"])
def apply_mask_kernel(grad, mask, n_words, length, words_per_row, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """Zeros where a mask bit is 0.

    Whole 16-byte accesses are read and written: a store of scattered zeros would be one per element.
    """
    word, elements, live = _rows_of_words(n_words, length, words_per_row, WHOLE, BLOCK)
    keep = unpack_lanes(tl.load(mask + word, mask=word < n_words, other=0))
    value = tl.load(grad + elements, mask=live, other=0.0)
    tl.store(grad + elements, tl.where(keep, value, tl.zeros_like(value)), mask=live)


# ---------------------------------------------------------------------------------------- launchers


def _pack(input: Tensor, dim: int, groups: int, with_mask: bool) -> tuple[Tensor, Tensor | None]:
    check_floats(input, "input")
    if not -input.dim() <= dim < input.dim():
        raise ValueError(f"input {list(input.shape)} has no axis {dim}")
    dim %= input.dim()
    if groups < 1 or input.shape[dim] % groups:
        raise ValueError(f"groups={groups} does not divide {input.shape[dim]} elements along dim {dim}")
    length = input.shape[dim] // groups
    words_per_group = words_for(length)
    outer_shape = [*input.shape[:dim], *input.shape[dim + 1 :]]
    signs = torch.empty(*outer_shape, groups * words_per_group, dtype=torch.int32, device=input.device)
    mask = torch.empty_like(signs) if with_mask else None
    check_index(signs.numel(), "words")
    if signs.numel() == 0:
        return signs, mask
    inner = input.shape[dim + 1 :].numel()
    packed_last = input.movedim(dim, -1)
    in_rows = packed_last.is_contiguous() or not input.is_contiguous() or inner < 32
    with on_device_of(input):
        if in_rows:
            source = packed_last.contiguous()
            grid = grid_of(triton.cdiv(signs.numel(), PACK_TILE.block_words))
            pack_rows_kernel[grid](
                source, signs, mask, signs.numel(), length, words_per_group,
                HAS_MASK=with_mask, WHOLE=length % 32 == 0, BLOCK=PACK_TILE.block_words,
                num_warps=PACK_TILE.num_warps,
            )  # fmt: skip
        else:
            outer = signs.numel() // (inner * groups * words_per_group)
            block = min(PACK_TILE.block_inner, triton.next_power_of_2(inner))
            inner_blocks = triton.cdiv(inner, block)
            pack_columns_kernel[grid_of(inner_blocks, groups * words_per_group, outer)](
                input, signs, mask, inner, inner_blocks, length, words_per_group, groups,
                HAS_MASK=with_mask, BLOCK=block, num_warps=max(1, min(PACK_TILE.num_warps, block // 32)),
            )  # fmt: skip
    return signs, mask


def pack_bits(input: Tensor, dim: int = -1) -> Tensor:
    """``reference.pack_bits``: sign words of ``input`` along ``dim``, packed axis last."""
    return _pack(input, dim, 1, False)[0]


def pack_bits_ste(input: Tensor, dim: int = -1, groups: int = 1) -> tuple[Tensor, Tensor]:
    """``reference.pack_bits_ste``: sign words and mask words, in one pass over ``input``."""
    signs, mask = _pack(input, dim, groups, True)
    assert mask is not None
    return signs, mask


def pack_activation(input: Tensor, dim: int, groups: int, ste_clip: bool) -> tuple[Tensor, Tensor]:
    """Sign words of an activation, and its mask words where the estimator clips (else an empty tensor)."""
    signs, mask = _pack(input, dim, groups, ste_clip)
    return signs, signs.new_empty(0) if mask is None else mask


def unpack_bits(words: Tensor, length: int, dim: int = -1, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """``reference.unpack_bits``: words ``[..., W]`` -> +1 / -1, the packed axis moved back to ``dim``."""
    if dtype not in FLOATS:
        raise TypeError(f"dtype is {dtype}, allowed are {FLOATS}")
    check_words(words, "words", max(1, words.dim()), words)
    words_per_row = words.shape[-1]
    if length < 0 or words_per_row != words_for(length):
        raise ValueError(f"{words_per_row} words do not hold {length} elements")
    check_index(words.numel(), "words")
    out = torch.empty(*words.shape[:-1], length, dtype=dtype, device=words.device)
    if out.numel():
        with on_device_of(words):
            unpack_rows_kernel[(triton.cdiv(words.numel(), PACK_TILE.block_words),)](
                words.contiguous(), out, words.numel(), length, words_per_row,
                WHOLE=length % 32 == 0, BLOCK=PACK_TILE.block_words, num_warps=PACK_TILE.num_warps,
            )  # fmt: skip
    return out.movedim(-1, dim)


def apply_mask_(grad: Tensor, mask: Tensor) -> None:
    """``reference.apply_mask_``: clears elements of a contiguous ``grad`` whose bit in ``mask`` is 0."""
    check_floats(grad, "grad")
    check_words(mask, "mask", grad.dim(), grad)
    if not grad.is_contiguous():
        raise ValueError(f"grad {tuple(grad.shape)} with strides {grad.stride()} is not contiguous")
    length, words_per_row = grad.shape[-1], mask.shape[-1]
    if mask.shape[:-1] != grad.shape[:-1] or words_per_row != words_for(length):
        raise ValueError(f"mask words {tuple(mask.shape)} do not fit a gradient {tuple(grad.shape)}")
    check_index(mask.numel(), "words")
    if grad.numel():
        with on_device_of(grad):
            apply_mask_kernel[(triton.cdiv(mask.numel(), PACK_TILE.block_words),)](
                grad, mask.contiguous(), mask.numel(), length, words_per_row,
                WHOLE=length % 32 == 0, BLOCK=PACK_TILE.block_words, num_warps=PACK_TILE.num_warps,
            )  # fmt: skip
