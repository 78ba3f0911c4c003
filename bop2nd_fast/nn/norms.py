"""Layer normalisation of images, as the Bop2ndOrder paper compares it with batch norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .quantizers import positive_integer


class LayerNorm2d(nn.LayerNorm):
    """Every pixel's channels to mean 0 and variance 1, then a scale and a shift per channel.

    Keras' ``LayerNormalization()`` of channels-last images, which the paper's networks have: over the
    channels alone, ``eps`` 1e-3. It needs no statistics of a batch, so training and evaluation are the same.

    Shapes: ``[N, channels, H, W]``, unchanged.

    Raises:
        ValueError: ``channels`` is not a positive integer.
        RuntimeError: when called, an input of other channels.
    """

    def __init__(
        self,
        channels: int,
        eps: float = 1e-3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(positive_integer(channels, "channels"), eps=eps, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        last = input.permute(0, 2, 3, 1)
        return F.layer_norm(last, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)
