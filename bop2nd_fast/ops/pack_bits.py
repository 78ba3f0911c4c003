"""bop2nd::pack_bits, pack_bits_ste, unpack_bits, apply_mask_ - between floating values and words.

Cost of packing fp32: 4 bytes read and 1/8 byte (with the mask 1/4) written per element, one pass.
The layout is stated in ``reference.py`` and ``binary_tensor.Layout``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends, reference

backends.define("pack_bits(Tensor input, int dim=-1) -> Tensor", reference.pack_bits)
backends.define(
    "pack_bits_ste(Tensor input, int dim=-1, int groups=1) -> (Tensor, Tensor)", reference.pack_bits_ste
)
backends.define(
    "unpack_bits(Tensor words, int length, int dim=-1, *, ScalarType dtype=float) -> Tensor",
    reference.unpack_bits,
)
backends.define("apply_mask_(Tensor(a!) grad, Tensor mask) -> ()", reference.apply_mask_)


def words_for(length: int) -> int:
    """Words that hold ``length`` bits."""
    return -(-length // reference.WORD_BITS)


@torch.library.register_fake("bop2nd::pack_bits")
def _pack_fake(input: Tensor, dim: int = -1) -> Tensor:
    rows = input.movedim(dim, -1).shape
    return input.new_empty((*rows[:-1], words_for(rows[-1])), dtype=torch.int32)


@torch.library.register_fake("bop2nd::pack_bits_ste")
def _pack_ste_fake(input: Tensor, dim: int = -1, groups: int = 1) -> tuple[Tensor, Tensor]:
    rows = input.movedim(dim, -1).shape
    shape = (*rows[:-1], groups * words_for(rows[-1] // groups))
    signs = input.new_empty(shape, dtype=torch.int32)
    return signs, torch.empty_like(signs)


@torch.library.register_fake("bop2nd::unpack_bits")
def _unpack_fake(words: Tensor, length: int, dim: int = -1, dtype: torch.dtype = torch.float32) -> Tensor:
    return words.new_empty((*words.shape[:-1], length), dtype=dtype).movedim(-1, dim)


@torch.library.register_fake("bop2nd::apply_mask_")
def _apply_mask_fake(grad: Tensor, mask: Tensor) -> None:
    if mask.shape != (*grad.shape[:-1], words_for(grad.shape[-1])):
        raise ValueError(f"mask words {tuple(mask.shape)} do not fit a gradient {tuple(grad.shape)}")


def _unpack_setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: Any, output: Tensor) -> None:
    ctx.dtype = inputs[0].dtype


def _unpack_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """A BinaryTensor's values are linear in themselves: the gradient passes (words themselves have none)."""
    return grad.to(ctx.dtype) if ctx.needs_input_grad[0] else None, None, None


torch.library.register_autograd("bop2nd::unpack_bits", _unpack_backward, setup_context=_unpack_setup)
