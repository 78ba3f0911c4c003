"""What the networks share: images whose channels lie side by side."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ImageNetwork(nn.Sequential):
    """Layers one after the other on channels-last images ``[N, C, H, W]``, the format of the fast kernels.

    Images in another memory format are copied once, at the entrance; every layer keeps the format.
    """

    def forward(self, input: Tensor) -> Tensor:
        result: Tensor = super().forward(input.contiguous(memory_format=torch.channels_last))
        return result
