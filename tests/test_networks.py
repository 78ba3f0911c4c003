"""The papers' networks: layer shapes as published, gradients everywhere, bad sizes refused."""

from __future__ import annotations

import inspect

import pytest
import torch

from bop2nd_fast import inference, models
from bop2nd_fast.models import BinaryNet, BiRealNet18, ReActNet18, XNORNet
from bop2nd_fast.nn import BinaryConv2d, BinaryLinear, ChannelScale, RPReLU, RSign
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
        (BiRealNet18(3, width=4, cifar=True, scale=True), (2, 3, 32, 32)),
        (BiRealNet18(3, width=4, cifar=True, weights="real"), (2, 3, 32, 32)),
        (ReActNet18(3, width=4, cifar=True, weights="latent"), (2, 3, 32, 32)),
        (ReActNet18(3, width=4), (2, 3, 64, 64)),
        (XNORNet(3, width=3), (2, 3, 224, 224)),
    ],
    ids=[
        *("binarynet", "binarynet 8x8", "bi-real-net", "bi-real-net of small images", "real teacher"),
        *("latent reactnet of small images", "reactnet", "xnornet"),
    ],
)
def test_shapes_and_gradients(model: torch.nn.Module, size: tuple[int, ...]) -> None:
    out = model(torch.randn(size))
    assert out.shape == (size[0], 3)
    out.square().sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and p.grad.isfinite().all(), name


def test_bi_real_net_of_small_images_keeps_their_size_in_the_first_stage() -> None:
    model = BiRealNet18(10, width=4, cifar=True)
    sides = []
    for unit in list(model)[1:-1]:
        unit.register_forward_hook(lambda _, __, y: sides.append(y.shape[-1]))
    model(torch.randn(1, 3, 32, 32))
    assert sides == [32] * 4 + [16] * 4 + [8] * 4 + [4] * 4


def test_a_reactnet_unit_by_hand() -> None:
    """One pixel, one channel in and out, signs all +1: RPReLU(norm(s * dot) + x), with the sign of x + b."""
    unit = list(ReActNet18(2, in_channels=1, width=1, cifar=True, scale=True))[1].eval()
    assert isinstance(unit.conv.input_quantizer, RSign)
    unit.conv.weight.data = torch.ones(1, 1, 3, 3)
    with torch.no_grad():
        unit.conv.input_quantizer.bias.fill_(-2)  # 1.5 - 2 < 0: its sign is -1
        unit.scale.scale.fill_(3)
        unit.norm.running_var.fill_(1 - unit.norm.eps)
        unit.activation.shift.fill_(0.25)
        unit.activation.slope.fill_(0.5)
        unit.activation.post_shift.fill_(10)
    out = unit(torch.full((1, 1, 1, 1), 1.5))  # -1 * 3 + 1.5 + 0.25 = -1.25, half of it, and 10
    torch.testing.assert_close(out, torch.full((1, 1, 1, 1), 9.375))


def test_a_channel_scale_by_hand() -> None:
    scale = ChannelScale(2)
    x = torch.tensor([[3.0, -4.0]])
    assert torch.equal(scale(x), x)
    with torch.no_grad():
        scale.scale.copy_(torch.tensor([2.0, 0.5]))
    y = scale(x)
    assert torch.equal(y, torch.tensor([[6.0, -2.0]]))
    y.sum().backward()
    assert torch.equal(scale.scale.grad, x[0])
    with pytest.raises(ValueError, match="channels"):
        scale(torch.ones(1, 3))


@pytest.mark.parametrize("weights", ["binary", "latent"])
@pytest.mark.parametrize("exact", [True, False])
def test_a_reactnet_of_small_images_converts(weights: str, exact: bool) -> None:
    torch.manual_seed(3)
    model = ReActNet18(3, width=8, cifar=True, scale=True, weights=weights)
    for module in model.modules():
        if isinstance(module, (RSign, RPReLU, ChannelScale)):
            for p in module.parameters(recurse=False):
                torch.nn.init.uniform_(p, 0.05, 0.3)
    x = torch.randn(4, 3, 16, 16)
    model(x)  # statistics of the batch norms
    packed = inference.convert(model.eval(), x, exact=exact)
    expected, out = model(x), packed(x)
    if exact:
        assert torch.equal(out, expected)
    else:
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("value", ["no", "False", 0, 1, None])
def test_a_switch_is_true_or_false(value: object) -> None:
    with pytest.raises(ValueError, match="cifar is a switch"):
        models.get("birealnet18", num_classes=10, in_channels=3, image_size=32, width=2, cifar=value)


def test_a_reactnet_takes_what_a_birealnet_takes() -> None:
    """Less the two that make it one, in the same order with the same defaults."""
    both = (dict(inspect.signature(net).parameters) for net in (BiRealNet18, ReActNet18))
    original, react = both
    assert [original.pop(own).default for own in ("sign", "activation")] == ["approx_sign", "none"]
    assert list(react.items()) == list(original.items())


def test_bad_sizes() -> None:
    with pytest.raises(ValueError, match="too small"):
        BinaryNet(image_size=8)
    with pytest.raises(ValueError, match="multiple of 3"):
        XNORNet(width=4)
    for change in ({"weights": "ternary"}, {"sign": "tanh"}, {"activation": "relu"}):
        with pytest.raises(ValueError, match="must be"):
            BiRealNet18(**change)
    with pytest.raises(ValueError, match="pad with 0"):
        BiRealNet18(weights="real", padding_value=1)
