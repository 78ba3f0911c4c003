"""The papers' networks: layer shapes as published, gradients everywhere, bad sizes refused."""

from __future__ import annotations

import pytest
import torch

from bop2nd_fast.models import BinaryNet, BiRealNet18, XNORNet
from bop2nd_fast.nn import BinaryConv2d, BinaryLinear
from bop2nd_fast.optim import split_parameters


def binary_shapes(model: torch.nn.Module) -> list[tuple[int, ...]]:
    layers = (m for m in model.modules() if isinstance(m, (BinaryConv2d, BinaryLinear)))
    return [tuple(layer.weight.shape) for layer in layers]


def test_binarynet_as_published() -> None:
    model = BinaryNet()
    convolutions = [(128, 3), (128, 128), (256, 128), (256, 256), (512, 256), (512, 512)]
    dense = [(1024, 512 * 9), (1024, 1024), (10, 1024)]
    assert binary_shapes(model) == [(o, i, 3, 3) for o, i in convolutions] + dense
    binary, real = split_parameters(model)
    assert len(binary) == 9 and all(p.dim() == 1 for p in real) and len(real) == 9, "beta only, no scale"
    assert model.conv1.input_quantizer is None and model.conv1.padding == (0, 0)


def test_bi_real_net_as_published() -> None:
    model = BiRealNet18()
    shapes = binary_shapes(model)
    assert len(shapes) == 16 and {s[2:] for s in shapes} == {(3, 3)}
    assert [s[0] for s in shapes] == [64] * 4 + [128] * 4 + [256] * 4 + [512] * 4
    binary, _ = split_parameters(model)
    assert sum(p.numel() for p in binary) == 10_985_472


def test_xnornet_as_published() -> None:
    shapes = [(256, 96, 5, 5), (384, 256, 3, 3), (384, 384, 3, 3), (256, 384, 3, 3)]
    assert binary_shapes(XNORNet()) == [*shapes, (4096, 256, 6, 6), (4096, 4096, 1, 1)]


@pytest.mark.parametrize(
    ("model", "size"),
    [
        (BinaryNet(width=8, image_size=18, in_channels=2, num_classes=3), (2, 2, 18, 18)),
        (BinaryNet(width=8, image_size=8, first_padding=1, padding_value=1, num_classes=3), (2, 3, 8, 8)),
        (BiRealNet18(3, width=4), (2, 3, 40, 40)),
        (XNORNet(3, width=3), (2, 3, 224, 224)),
    ],
    ids=["binarynet", "binarynet 8x8", "bi-real-net", "xnornet"],
)
def test_shapes_and_gradients(model: torch.nn.Module, size: tuple[int, ...]) -> None:
    out = model(torch.randn(size))
    assert out.shape == (size[0], 3)
    out.square().sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and p.grad.isfinite().all(), name


def test_bad_sizes() -> None:
    with pytest.raises(ValueError, match="too small"):
        BinaryNet(image_size=8)
    with pytest.raises(ValueError, match="multiple of 3"):
        XNORNet(width=4)
