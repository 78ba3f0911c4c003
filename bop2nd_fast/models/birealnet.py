"""Bi-Real-Net-18 (Liu et al., arXiv 1808.00278) and what later networks of its shape added to it.

A shortcut goes around every binary convolution. ReActNet (Liu et al., arXiv 2003.03488) learns where signs
change (RSign) and the activation behind the sum (RPReLU); XNOR-Net++ (Bulat and Tzimiropoulos,
arXiv 1909.13863) learns a scale for every output channel.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..nn import ChannelScale, RPReLU, RSign
from .layers import layers_of
from .network import ImageNetwork

SIGNS = ("approx_sign", "rsign")
ACTIVATIONS = ("none", "rprelu")


class _Unit(nn.Module):
    """``activation(norm(scale(convolution of signs)) + shortcut)``; the shortcut pools and projects where the
    shape changes."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        padding_value: int,
        weights: str,
        sign: str,
        activation: str,
        scale: bool,
    ) -> None:
        super().__init__()
        geometry: dict[str, Any] = {"stride": stride, "padding": 1}
        if weights == "real":
            self.conv: nn.Module = nn.Sequential(
                nn.ReLU(), nn.Conv2d(inputs, outputs, 3, bias=False, **geometry)
            )
        else:
            quantizer = RSign(inputs) if sign == "rsign" else sign
            self.conv = layers_of(weights)[0](
                inputs, outputs, 3, padding_value=padding_value, input_quantizer=quantizer, **geometry
            )
        self.scale = ChannelScale(outputs) if scale else nn.Identity()
        self.norm = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(stride, ceil_mode=True),
                nn.Conv2d(inputs, outputs, 1, bias=False),
                nn.BatchNorm2d(outputs),
            )
        self.activation = RPReLU(outputs) if activation == "rprelu" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(self.scale(self.conv(x))) + self.shortcut(x))


class BiRealNet18(ImageNetwork):
    """A real stem, 16 binary 3x3 convolutions in four stages, a real classifier.

    Args:
        num_classes: outputs.
        in_channels: channels of the input.
        width: channels of the first stage (64 in the paper); the stages have 1, 2, 4 and 8 times as many.
        padding_value: what padded taps of the binary convolutions count as: 0, +1 or -1.
        weights: ``"binary"``; ``"latent"`` for real-valued weights whose signs multiply (``nn.latent``);
            ``"real"`` for the real-valued network of the same shape, with ReLU in the place of the signs: a
            teacher for the others.
        cifar: for small images: the stem is a 3x3 convolution of stride 1 without pooling, in place of
            the 7x7 of stride 2 and a max-pool.
        sign: what the convolutions' inputs pass: ``"approx_sign"``, or ``"rsign"`` (:class:`nn.RSign`).
        activation: behind every sum: ``"none"``, or ``"rprelu"`` (:class:`nn.RPReLU`).
        scale: a learned scale per output channel behind every convolution (:class:`nn.ChannelScale`). The
            batch norm behind it takes it out of the function again; what it changes is the training.

    Shapes: ``[N, in_channels, H, W] -> [N, num_classes]``, H and W from 32 up (224 in the paper), with
    ``cifar`` from 8 up.

    Raises:
        ValueError: another value of ``weights``, ``sign`` or ``activation``; real weights with padding other
            than 0.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        width: int = 64,
        padding_value: int = 0,
        weights: str = "binary",
        cifar: bool = False,
        sign: str = "approx_sign",
        activation: str = "none",
        scale: bool = False,
    ) -> None:
        for what, value, allowed in (
            ("weights", weights, ("binary", "latent", "real")),
            ("sign", sign, SIGNS),
            ("activation", activation, ACTIVATIONS),
        ):
            if value not in allowed:
                raise ValueError(f"{what} must be {' or '.join(map(repr, allowed))}, got {value!r}")
        if weights == "real" and padding_value != 0:
            raise ValueError(f"real-valued convolutions pad with 0, got padding_value {padding_value}")
        stem: list[nn.Module] = [nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)]
        if cifar:
            stem = [nn.Conv2d(in_channels, width, 3, padding=1, bias=False)]
        stem.append(nn.BatchNorm2d(width))
        if not cifar:
            stem.append(nn.MaxPool2d(3, stride=2, padding=1))
        units, inputs = [], width
        for stage in range(4):
            outputs = width * 2**stage
            for unit in range(4):
                stride = 2 if unit == 0 and stage > 0 else 1
                units.append(_Unit(inputs, outputs, stride, padding_value, weights, sign, activation, scale))
                inputs = outputs
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, num_classes))
        super().__init__(nn.Sequential(*stem), *units, head)


class ReActNet18(BiRealNet18):
    """ReActNet at the shape of ResNet-18 (arXiv 2003.03488): Bi-Real-Net-18 with RSign and RPReLU.

    Its arguments are Bi-Real-Net-18's, less ``sign`` and ``activation``.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        width: int = 64,
        padding_value: int = 0,
        weights: str = "binary",
        cifar: bool = False,
        scale: bool = False,
    ) -> None:
        super().__init__(
            num_classes, in_channels, width, padding_value, weights, cifar, "rsign", "rprelu", scale
        )
