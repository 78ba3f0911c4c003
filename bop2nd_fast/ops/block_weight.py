"""bop2nd::block_weight - weight words re-laid for the CPU kernels: 16 outputs side by side.

``[O, ..., W]`` words become ``[groups, ceil(O/groups/16), K, 16]`` with ``K`` the words of one output;
missing outputs of the last block are 0. A cache, never a file format: see ``BinaryTensor.blocked_words``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends

OUTPUTS_PER_BLOCK = 16


def _block_weight(weight: Tensor, groups: int = 1) -> Tensor:
    rows = weight.reshape(groups, weight.shape[0] // groups, -1)
    n_blocks = -(-rows.shape[1] // OUTPUTS_PER_BLOCK)
    rows = F.pad(rows, (0, 0, 0, n_blocks * OUTPUTS_PER_BLOCK - rows.shape[1]))
    return rows.unflatten(1, (n_blocks, OUTPUTS_PER_BLOCK)).transpose(2, 3).contiguous()


backends.define("block_weight(Tensor weight, int groups=1) -> Tensor", _block_weight)


@torch.library.register_fake("bop2nd::block_weight")
def _fake(weight: Tensor, groups: int = 1) -> Tensor:
    n_blocks = -(-(weight.shape[0] // groups) // OUTPUTS_PER_BLOCK)
    n_words = weight[0].numel()
    return weight.new_empty((groups, n_blocks, n_words, OUTPUTS_PER_BLOCK))
