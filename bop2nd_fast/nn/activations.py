"""What follows a product of signs: the activation of ReActNet (RPReLU), a scale per channel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .quantizers import per_channel, positive_integer


class RPReLU(nn.Module):
    """``PReLU(x + shift) + post_shift`` with one slope and two shifts per channel (arXiv 2003.03488).

    Slopes start at 0.25, shifts at 0. Shapes: ``[N, C, ...]``, unchanged.

    Raises:
        ValueError: ``channels`` is not a positive integer; when called, an input of other channels.
    """

    def __init__(
        self,
        channels: int,
        slope: float = 0.25,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels = channels = positive_integer(channels, "channels")
        self.shift = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))
        self.slope = nn.Parameter(torch.full((channels,), float(slope), device=device, dtype=dtype))
        self.post_shift = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        y = F.prelu(x + per_channel(self.shift, x, 1), self.slope)
        return y + per_channel(self.post_shift, x, 1)

    def extra_repr(self) -> str:
        return f"{self.channels}"


class ChannelScale(nn.Module):
    """``x * scale`` with one learned scale per channel (XNOR-Net++, arXiv 1909.13863, case 1).

    Scales start at 1. Shapes: ``[N, C, ...]``, unchanged.

    Raises:
        ValueError: ``channels`` is not a positive integer; when called, an input of other channels.
    """

    def __init__(
        self,
        channels: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels = channels = positive_integer(channels, "channels")
        self.scale = nn.Parameter(torch.ones(channels, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x * per_channel(self.scale, x, 1)

    def extra_repr(self) -> str:
        return f"{self.channels}"
