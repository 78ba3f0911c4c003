"""Bi-Real-Net-18 (Liu et al., arXiv 1808.00278): a shortcut around every binary convolution."""

from __future__ import annotations

from torch import Tensor, nn

from .layers import layers_of


class _Unit(nn.Module):
    """Binary 3x3 convolution, batch norm, plus the input (pooled and projected where the shape changes)."""

    def __init__(self, inputs: int, outputs: int, stride: int, padding_value: int, weights: str) -> None:
        super().__init__()
        self.conv = layers_of(weights)[0](
            inputs,
            outputs,
            3,
            stride=stride,
            padding=1,
            padding_value=padding_value,
            input_quantizer="approx_sign",
        )
        self.norm = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(stride, ceil_mode=True),
                nn.Conv2d(inputs, outputs, 1, bias=False),
                nn.BatchNorm2d(outputs),
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.shortcut(x)


class BiRealNet18(nn.Sequential):
    """A real 7x7/2 stem, 16 binary 3x3 convolutions in four stages, a real classifier.

    Args:
        num_classes: outputs.
        in_channels: channels of the input.
        width: channels of the first stage (64 in the paper); the stages have 1, 2, 4 and 8 times as many.
        padding_value: what padded taps of the binary convolutions count as: 0, +1 or -1.
        weights: ``"binary"``, or ``"latent"`` for real-valued weights whose signs multiply (``nn.latent``).

    Shapes: ``[N, in_channels, H, W] -> [N, num_classes]``, H and W from 32 up (224 in the paper).
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        width: int = 64,
        padding_value: int = 0,
        weights: str = "binary",
    ) -> None:
        stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(width),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        units, inputs = [], width
        for stage in range(4):
            outputs = width * 2**stage
            for unit in range(4):
                units.append(
                    _Unit(inputs, outputs, 2 if unit == 0 and stage > 0 else 1, padding_value, weights)
                )
                inputs = outputs
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, num_classes))
        super().__init__(stem, *units, head)
