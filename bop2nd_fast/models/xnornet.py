"""XNOR-Net (Rastegari et al., arXiv 1603.05279): AlexNet with binary layers between two real ones."""

from __future__ import annotations

from torch import nn

from .layers import layers_of
from .network import ImageNetwork


class XNORNet(ImageNetwork):
    """Real 11x11/4 convolution, binary 5x5, 3x3, 3x3, 3x3, 6x6, 1x1 convolutions, real classifier.

    As the Bop papers train it: batch norm before every binary convolution, no magnitude scaling of the
    weights (a latent-free weight has no magnitude).

    Args:
        num_classes: outputs.
        in_channels: channels of the input.
        width: channels of the first convolution (96 in the paper); the others scale with it.
        padding_value: what padded taps of the binary convolutions count as: 0, +1 or -1.
        image_size: height and width of the input, at least 57; the sixth convolution covers what is left of
            it (6x6 of 224).
        weights: ``"binary"``, or ``"latent"`` for real-valued weights whose signs multiply (``nn.latent``).

    Shapes: ``[N, in_channels, image_size, image_size] -> [N, num_classes]``.

    Raises:
        ValueError: ``width`` is not a positive multiple of 3 (AlexNet's widths are 8/3, 4, 128/3 of it); an
            image too small for three poolings.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        width: int = 96,
        padding_value: int = 0,
        image_size: int = 224,
        weights: str = "binary",
    ) -> None:
        convolution, _ = layers_of(weights)
        if width < 3 or width % 3:
            raise ValueError(f"width must be a positive multiple of 3, got {width}")
        side = (image_size - 1) // 4 + 1
        for _ in range(3):
            side = (side - 3) // 2 + 1
        if side < 1:
            raise ValueError(f"image_size {image_size} is too small: it must be at least 57")
        middle, wide, dense = width * 8 // 3, width * 4, width * 128 // 3

        def block(inputs: int, outputs: int, kernel: int, padding: int) -> list[nn.Module]:
            conv = convolution(inputs, outputs, kernel, padding=padding, padding_value=padding_value)
            return [nn.BatchNorm2d(inputs), conv]

        def pool() -> nn.Module:
            return nn.MaxPool2d(3, stride=2)

        super().__init__(
            nn.Conv2d(in_channels, width, 11, stride=4, padding=5, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            pool(),
            *block(width, middle, 5, 2),
            pool(),
            *block(middle, wide, 3, 1),
            *block(wide, wide, 3, 1),
            *block(wide, middle, 3, 1),
            pool(),
            *block(middle, dense, side, 0),
            *block(dense, dense, 1, 0),
            nn.BatchNorm2d(dense),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(dense, num_classes),
        )
