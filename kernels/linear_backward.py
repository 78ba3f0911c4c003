"""Gradients of the binary linear layer: products of a float gradient with packed signs.

Maths: ``grad_input[M, K] = G[M, N] @ sign(W)[N, K]``, cleared where the estimator's mask bit is 0;
``grad_weight[N, K] = G.T @ sign(x)[M, K]`` in fp32. Both are one kernel: a gradient, or its transpose, times
packed rows, decoded in registers (see ``gradient_product.py``); no unpacked operand is written to memory.

Cost: 2 * M * N * K operations each on 16-bit tensor cores (fp32 gradients: three times as many). Bytes: the
gradient, 1/8 byte per sign and mask bit, and the result, against 2 or 4 bytes per sign for a dense product.

Deterministic: no atomics. Where a gradient of a weight has few outputs and many rows to sum over, the rows
are split into partial sums, added afterwards in a fixed order that depends on the shapes alone.

Limits: fewer than 2**31 - 65536 rows, outputs and features; fp32, bf16, fp16.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .geometry import words_for
from .gradient_product import PartialSums, add_product, launch_options, store_gradient
from .grid import check_index, grid_of, program_of
from .operands import check_floats, check_mask, check_words
from .tuning import GradientTile, family, gradient_tile, on_device_of


@triton.jit(do_not_specialize=["batch", "split_turns"])
def linear_gradient_kernel(
    gradient, words, mask, out, batch, width, columns, n_words, split_turns,
    TRANSPOSED: tl.constexpr, PARTS: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_INNER: tl.constexpr, BLOCK_WORDS: tl.constexpr,
):  # fmt: skip
    """Program (block of rows, block of words, split): ``out[split]`` = the gradient times words.

    The gradient is ``[batch, width]``; ``TRANSPOSED``: its transpose is multiplied. A split sums
    ``split_turns`` times ``BLOCK_INNER`` of its columns, or of its rows.
    """
    if TRANSPOSED:
        rows = width
        inner = batch
    else:
        rows = batch
        inner = width
    block, word_block, split = program_of(tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(n_words, BLOCK_WORDS))
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first_word = word_block * BLOCK_WORDS
    word = first_word + tl.arange(0, BLOCK_WORDS)
    first = split * split_turns * BLOCK_INNER
    row_live = row < rows
    sums = tl.zeros((BLOCK_ROWS, 32 * BLOCK_WORDS), tl.float32)
    for begin in range(first, tl.minimum(first + split_turns * BLOCK_INNER, inner), BLOCK_INNER):
        c = begin + tl.arange(0, BLOCK_INNER)
        live = c < inner
        at = c.to(tl.int64)
        if TRANSPOSED:
            at_gradient = gradient + at[:, None] * width + row[None, :]
            tile = tl.trans(tl.load(at_gradient, mask=live[:, None] & row_live[None, :], other=0.0))
        else:
            at_gradient = gradient + row.to(tl.int64)[:, None] * width + c[None, :]
            tile = tl.load(at_gradient, mask=row_live[:, None] & live[None, :], other=0.0)
        some = tl.load(
            words + at[:, None] * n_words + word[None, :],
            mask=live[:, None] & (word < n_words)[None, :], other=0,
        )  # fmt: skip
        sums = add_product(sums, tile, some, PARTS, WIDEN, BLOCK_INNER, BLOCK_WORDS)
    row_at = row.to(tl.int64)
    out += split.to(tl.int64) * rows * columns
    store_gradient(
        sums, out, row_at * columns, mask, row_at * n_words, row_live, first_word, columns,
        BLOCK_ROWS, BLOCK_WORDS,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------- launchers


def _grad_input(gradient: Tensor, mask: Tensor | None, weight: Tensor, out: Tensor, tile: Any) -> None:
    """Gradient ``[M, N]`` times weight words ``[N, W]`` into ``out`` ``[M, K]``."""
    (rows, columns), (inner, n_words) = out.shape, weight.shape
    tile = tile or gradient_tile(family(out.device), gradient.dtype, rows)
    grid = grid_of(triton.cdiv(rows, tile.block_rows), triton.cdiv(n_words, tile.block_words))
    with on_device_of(out):
        linear_gradient_kernel[grid](
            gradient, weight, mask, out, rows, inner, columns, n_words,
            triton.cdiv(inner, tile.block_inner), TRANSPOSED=False, **_options(gradient, tile),
        )  # fmt: skip


def _grad_weight(gradient: Tensor, signs: Tensor, out: Tensor, tile: Any) -> None:
    """Transposed gradient ``[M, N]`` times sign words ``[M, W]`` into ``out`` fp32 ``[N, K]``."""
    (rows, columns), (inner, n_words) = out.shape, signs.shape
    tile = tile or gradient_tile(family(out.device), gradient.dtype, rows)
    sums = PartialSums(out, rows * n_words, inner, tile)
    grid = grid_of(triton.cdiv(rows, tile.block_rows), triton.cdiv(n_words, tile.block_words), sums.splits)
    with on_device_of(out):
        linear_gradient_kernel[grid](
            gradient, signs, None, sums.memory, inner, rows, columns, n_words, sums.split_turns,
            TRANSPOSED=True, **_options(gradient, tile),
        )  # fmt: skip
    sums.finish()


def _options(gradient: Tensor, tile: GradientTile) -> dict[str, int]:
    return launch_options(gradient, tile, torch.backends.cuda.matmul.fp32_precision)


def _check(gradient: Tensor, signs: Tensor, weight: Tensor, features: int) -> None:
    words = words_for(features)
    fits = gradient.shape[1] == weight.shape[0] and signs.shape == (gradient.shape[0], words)
    if not fits or weight.shape[1] != words:
        shapes = ", ".join(str(tuple(t.shape)) for t in (gradient, signs, weight))
        raise ValueError(f"gradient, sign and weight words {shapes} do not fit {features} features")
    check_index(gradient.shape[0], "rows")
    check_index(gradient.shape[1], "outputs")
    check_index(words * 32, "features")


def binary_linear_backward(
    grad_output: Tensor,
    signs: Tensor,
    mask: Tensor,
    weight: Tensor,
    in_features: int,
    need_input: bool,
    need_weight: bool,
    *,
    tile: GradientTile | None = None,
) -> tuple[Tensor, Tensor]:
    """As in ``ops/binary_linear.py``: gradients of the input in its dtype and of the weight in fp32.

    ``tile`` overrides the table's.
    """
    check_floats(grad_output, "grad_output")
    check_words(signs, "signs", grad_output.dim(), grad_output)
    check_mask(mask, signs.shape, grad_output)
    check_words(weight, "weight", 2, grad_output)
    n_words = signs.shape[-1]
    n_rows = math.prod(grad_output.shape[:-1])  # no -1 in a shape: there may be no outputs or no words
    gradient = grad_output.reshape(n_rows, grad_output.shape[-1]).contiguous()
    signs, weight = signs.reshape(math.prod(signs.shape[:-1]), n_words).contiguous(), weight.contiguous()
    _check(gradient, signs, weight, in_features)
    rows, outputs = gradient.shape
    grad_input = gradient.new_empty((rows if need_input else 0, in_features))
    weight_shape = (outputs if need_weight else 0, in_features)
    grad_weight = gradient.new_empty(weight_shape, dtype=torch.float32)
    if grad_input.numel():
        _grad_input(gradient, mask.contiguous() if mask.numel() else None, weight, grad_input, tile)
    if grad_weight.numel():
        _grad_weight(gradient, signs, grad_weight, tile)
    shape = (*grad_output.shape[:-1], in_features) if need_input else (0, in_features)
    return grad_input.view(shape), grad_weight
