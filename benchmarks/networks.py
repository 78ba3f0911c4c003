"""Shape sets: BinaryNet, XNOR-Net, Bi-Real-Net-18 and a ResNet-18, as the Bop papers use them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from bop2nd_fast.kernels.geometry import Arguments, Geometry

BINARYNET, XNORNET, BIREALNET = "BinaryNet", "XNOR-Net", "Bi-Real-Net-18"


@dataclass(frozen=True)
class ConvShape:
    """A square convolution: batch, input channels and side, output channels, kernel."""

    batch: int
    channels: int
    side: int
    outputs: int
    kernel: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1

    @property
    def arguments(self) -> tuple[Any, Any, Any, int, int]:
        """Stride, padding, dilation, groups and padding value, as operators take them."""
        return (self.stride,) * 2, (self.padding,) * 2, (self.dilation,) * 2, self.groups, 0

    @property
    def input_size(self) -> tuple[int, ...]:
        return self.batch, self.channels, self.side, self.side

    @property
    def weight_size(self) -> tuple[int, ...]:
        return self.outputs, self.channels // self.groups, self.kernel, self.kernel

    @property
    def geometry(self) -> Geometry:
        sizes = (self.side, self.side), (self.kernel, self.kernel), self.channels, self.outputs
        return Geometry.of(*sizes, Arguments._make(self.arguments))

    @property
    def macs(self) -> int:
        """Multiply-accumulates, padded taps included, as everybody counts them."""
        g = self.geometry
        return g.pixels(self.batch) * g.all_outputs * g.taps * g.channels

    @property
    def needed_macs(self) -> int:
        """Those whose tap lies in the image."""
        first = [o * self.stride - self.padding for o in range(self.geometry.out[0])]
        taps = sum(0 <= i + k * self.dilation < self.side for i in first for k in range(self.kernel)) ** 2
        return self.batch * taps * self.outputs * self.channels // self.groups

    @property
    def weight_words(self) -> int:
        return self.outputs * self.geometry.taps * self.geometry.words

    @property
    def traffic(self) -> int:
        """Bytes of input and output in fp32 and of the packed weight."""
        values = self.batch * self.channels * self.side**2 + self.geometry.pixels(self.batch) * self.outputs
        return 4 * (values + self.weight_words)

    @property
    def name(self) -> str:
        text = f"{self.kernel}x{self.kernel} {self.channels}-{self.outputs}ch {self.side}x{self.side}"
        text += f" /{self.stride}" if self.stride > 1 else ""
        text += f" d{self.dilation}" if self.dilation > 1 else ""
        text += f" g{self.groups}" if self.groups > 1 else ""
        return f"{text} batch {self.batch}"

    def with_batch(self, batch: int) -> ConvShape:
        return replace(self, batch=batch)


# The four shapes of the goals: the stride-1 convolutions of a ResNet-18's stages.
STAGES = tuple(ConvShape(1, c, s, c, 3, padding=1) for c, s in ((64, 56), (128, 28), (256, 14), (512, 7)))

CONVOLUTIONS: dict[str, tuple[ConvShape, ...]] = {
    BINARYNET: tuple(
        ConvShape(1, c, s, o, 3, padding=1)
        for c, s, o in ((128, 30, 128), (128, 15, 256), (256, 15, 256), (256, 7, 512), (512, 7, 512))
    ),
    XNORNET: (
        ConvShape(1, 96, 27, 256, 5, padding=2),
        ConvShape(1, 256, 13, 384, 3, padding=1),
        ConvShape(1, 384, 13, 384, 3, padding=1),
        ConvShape(1, 384, 13, 256, 3, padding=1),
        ConvShape(1, 256, 6, 4096, 6),
        ConvShape(1, 4096, 1, 4096, 1),
    ),
    BIREALNET: (
        *STAGES,
        *(ConvShape(1, c, s, 2 * c, 3, stride=2, padding=1) for c, s in ((64, 56), (128, 28), (256, 14))),
    ),
}

# Kernel sizes, groups and dilation that no network above has.
OTHERS = (
    ConvShape(1, 256, 14, 256, 1),
    ConvShape(1, 128, 28, 128, 5, padding=2),
    ConvShape(1, 64, 28, 64, 7, padding=3),
    ConvShape(1, 128, 28, 128, 3, padding=2, dilation=2),
    ConvShape(1, 256, 14, 256, 3, padding=1, groups=4),
    ConvShape(1, 48, 28, 80, 3, padding=1),
)


def networks_with(shape: ConvShape) -> tuple[str, ...]:
    """The networks that contain this convolution, at whatever batch size."""
    return tuple(name for name, shapes in CONVOLUTIONS.items() if shape.with_batch(1) in shapes)


# Weights as the step walks them: convolutions [O, kH, kW, I], linear layers [O, I].
WeightShape = tuple[int, ...]
BINARYNET_WEIGHTS: tuple[WeightShape, ...] = (
    (128, 3, 3, 3),
    *((s.outputs, 3, 3, s.channels) for s in CONVOLUTIONS[BINARYNET]),
    *((1024, 4608), (1024, 1024), (10, 1024)),
)


def resnet18_weights() -> tuple[WeightShape, ...]:
    """The 22 convolutions of a ResNet-18 whose stem is three 3x3 (11.2 M weights)."""
    shapes: list[WeightShape] = [(32, 3, 3, 3), (32, 3, 3, 32), (64, 3, 3, 32)]
    channels = 64
    for width in (64, 128, 256, 512):
        shapes.append((width, 3, 3, channels))
        shapes += [(width, 3, 3, width)] * 3
        if width != channels:
            shapes.append((width, 1, 1, channels))
        channels = width
    return tuple(shapes)
