"""bop2nd::pack_bits, pack_bits_ste, unpack_bits, apply_mask_ - between floating values and words.

Cost of packing fp32: 4 bytes read and 1/8 byte (with the mask 1/4) written per element, one pass.
The layout is stated in ``reference.py`` and ``binary_tensor.Layout``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends, reference
from ..kernels.geometry import words_for
from .product import REALS, check_extent, check_real, check_shape, check_words

UNPACKED = (*REALS, torch.float64, torch.int8, torch.int16, torch.int32, torch.int64)


def _check_packing(input: Tensor, dim: int, groups: int = 1) -> None:
    check_real(input, "the tensor to pack")
    check_extent(input, "the tensor to pack")
    if not -input.dim() <= dim < input.dim():
        raise ValueError(f"dim {dim} does not exist in a tensor of {input.dim()} axes")
    length = input.shape[dim]
    if type(length) is int and not (0 < groups < 2**31 and length % groups == 0):
        raise ValueError(f"groups={groups} does not divide the packed axis of {length}")


def _check_unpacking(words: Tensor, length: int, dim: int, dtype: torch.dtype) -> None:
    check_words(words, "words")
    check_extent(words, "words")
    if dtype not in UNPACKED:
        raise TypeError(f"dtype must be a real floating or signed integer type, got {dtype}")
    if not -words.dim() <= dim < words.dim():
        raise ValueError(f"dim {dim} does not exist in a tensor of {words.dim()} axes")
    if type(length) is int and length < 0:
        raise ValueError(f"length must be at least 0, got {length}")
    check_shape(words, (*words.shape[:-1], words_for(length)), "words")


def _check_masking(grad: Tensor, mask: Tensor) -> None:
    check_real(grad, "grad")
    check_words(mask, "mask", grad)
    check_extent(grad, "grad")
    if grad.dim() < 1 or not grad.is_contiguous():
        raise ValueError("grad must be contiguous in walk order")
    check_shape(mask, (*grad.shape[:-1], words_for(grad.shape[-1])), "mask")


def _pack_bits(input: Tensor, dim: int = -1) -> Tensor:
    _check_packing(input, dim)
    return reference.pack_bits(input, dim)


def _pack_bits_ste(input: Tensor, dim: int = -1, groups: int = 1) -> tuple[Tensor, Tensor]:
    _check_packing(input, dim, groups)
    return reference.pack_bits_ste(input, dim, groups)


def _unpack_bits(words: Tensor, length: int, dim: int = -1, dtype: torch.dtype = torch.float32) -> Tensor:
    _check_unpacking(words, length, dim, dtype)
    return reference.unpack_bits(words, length, dim, dtype)


def _apply_mask_(grad: Tensor, mask: Tensor) -> None:
    _check_masking(grad, mask)
    reference.apply_mask_(grad, mask)


backends.define("pack_bits(Tensor input, int dim=-1) -> Tensor", _pack_bits)
backends.define("pack_bits_ste(Tensor input, int dim=-1, int groups=1) -> (Tensor, Tensor)", _pack_bits_ste)
backends.define(
    "unpack_bits(Tensor words, int length, int dim=-1, *, ScalarType dtype=float) -> Tensor", _unpack_bits
)
backends.define("apply_mask_(Tensor(a!) grad, Tensor mask) -> ()", _apply_mask_)


@torch.library.register_fake("bop2nd::pack_bits")
def _pack_fake(input: Tensor, dim: int = -1) -> Tensor:
    _check_packing(input, dim)
    rows = input.movedim(dim, -1).shape
    return input.new_empty((*rows[:-1], words_for(rows[-1])), dtype=torch.int32)


@torch.library.register_fake("bop2nd::pack_bits_ste")
def _pack_ste_fake(input: Tensor, dim: int = -1, groups: int = 1) -> tuple[Tensor, Tensor]:
    _check_packing(input, dim, groups)
    rows = input.movedim(dim, -1).shape
    shape = (*rows[:-1], groups * words_for(rows[-1] // groups))
    signs = input.new_empty(shape, dtype=torch.int32)
    return signs, torch.empty_like(signs)


@torch.library.register_fake("bop2nd::unpack_bits")
def _unpack_fake(words: Tensor, length: int, dim: int = -1, dtype: torch.dtype = torch.float32) -> Tensor:
    _check_unpacking(words, length, dim, dtype)
    return words.new_empty((*words.shape[:-1], length), dtype=dtype).movedim(-1, dim)


@torch.library.register_fake("bop2nd::apply_mask_")
def _apply_mask_fake(grad: Tensor, mask: Tensor) -> None:
    _check_masking(grad, mask)


def _unpack_setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: Any, output: Tensor) -> None:
    ctx.dtype = inputs[0].dtype


def _unpack_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """A BinaryTensor's values are linear in themselves: the gradient passes (words themselves have none)."""
    return grad.to(ctx.dtype) if ctx.needs_input_grad[0] else None, None, None


torch.library.register_autograd("bop2nd::unpack_bits", _unpack_backward, setup_context=_unpack_setup)
