"""bop2nd::prepack_weight - weight words re-laid for the CPU kernels: 64, 32 or 16 outputs side by side.

``[O, ..., W]`` words become ``[groups, ceil(O/groups/16) * K * 16]`` with ``K`` the words of one output;
missing outputs of the last block are 0. A cache, never a file format: ``binary_tensor.memory`` keeps it.

The products take it as an operand (``blocked``), because only the caller knows that the words have not been
written since: a kernel that looked it up by their address could be served the words of somebody else, and
telling would cost what small products have not got. Kernels that have no use for it ignore it.

The outputs of a group are cut into blocks of 64, then 32, then 16 (``lane_bits_for`` in
``csrc/cpu/kernels.h``), in which an output has ``L = 512 / outputs`` bits of every 64 bytes. A word takes
``32 / L`` such slices, lowest bits first; unless it is a single slice, the odd ones hold their exclusive or
with the slice before. Output ``16 v + 4 l + i`` of a block lies in lane ``4 v + i`` of the ``l``-th 16 bytes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from .product import check_extent, check_words

_DTYPES = {8: torch.uint8, 16: torch.int16, 32: torch.int32}


def _lay(rows: Tensor, lane_bits: int) -> Tensor:
    """``[groups, outputs, K]``, words of one block, -> ``[groups, K * outputs]``."""
    steps = (
        rows.contiguous().view(_DTYPES[lane_bits]).unflatten(-1, (rows.shape[-1], 32 // lane_bits)).clone()
    )
    if lane_bits < 32:
        steps[..., 1::2] ^= steps[..., ::2]
    steps = steps.unflatten(1, (-1, 4, 4))  # groups, v, l, i, K, steps
    return steps.permute(0, 4, 5, 2, 1, 3).flatten(1).contiguous().view(torch.int32)


def _check(weight: Tensor, groups: int) -> None:
    check_words(weight, "weight")
    check_extent(weight, "weight")
    if weight.dim() < 1 or not 0 < groups < 2**31 or weight.shape[0] % groups:
        raise ValueError(f"groups={groups} does not divide the outputs of weight words {list(weight.shape)}")


def _prepack_weight(weight: Tensor, groups: int = 1) -> Tensor:
    _check(weight, groups)
    if weight.numel() == 0:
        return weight.new_empty((groups, 0))
    rows = weight.reshape(groups, weight.shape[0] // groups, math.prod(weight.shape[1:]))
    rows = F.pad(rows, (0, 0, 0, -rows.shape[1] % 16))
    blocks = []
    while rows.shape[1] > 0:
        lane_bits = 8 if rows.shape[1] > 48 else 16 if rows.shape[1] > 16 else 32
        blocks.append(_lay(rows[:, : 512 // lane_bits], lane_bits))
        rows = rows[:, 512 // lane_bits :]
    return torch.cat(blocks, 1)


backends.define("prepack_weight(Tensor weight, int groups=1) -> Tensor", _prepack_weight)


@torch.library.register_fake("bop2nd::prepack_weight")
def _fake(weight: Tensor, groups: int = 1) -> Tensor:
    _check(weight, groups)
    n_blocks = -(-(weight.shape[0] // groups) // 16)
    return weight.new_empty((groups, n_blocks * math.prod(weight.shape[1:]) * 16))
