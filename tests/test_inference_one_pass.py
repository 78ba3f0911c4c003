"""ReActNet and QuickNet in one pass a layer: what lies behind a product, recognised by what it does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bop2nd_fast.inference import ConversionError, PackedModel, convert, load
from bop2nd_fast.inference.layers import PackedConv2d
from bop2nd_fast.nn import BinaryConv2d, BinaryLinear, RPReLU, RSign

BEHIND = ("slope", "post_shift", "sign_shift")


class Unit(nn.Module):
    """RPReLU(BN(conv(RSign(x))) + shortcut(x))."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = BinaryConv2d(inputs, outputs, 3, stride, 1, input_quantizer=RSign(inputs))
        self.norm, self.act = nn.BatchNorm2d(outputs), RPReLU(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1:
            self.shortcut = nn.Sequential(nn.AvgPool2d(stride), nn.Conv2d(inputs, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)) + self.shortcut(x))


class ByHand(nn.Module):
    """The same unit from torch's own words: shifts are parameters, the activation is ``F.prelu``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = BinaryConv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.shifts = nn.Parameter(torch.randn(3, channels, 1, 1) / 4)
        self.slope = nn.Parameter(torch.rand(channels) - 0.2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x + self.shifts[0])) + x
        return nn.functional.prelu(y + self.shifts[1], self.slope) + self.shifts[2]


class Quick(nn.Module):
    """x + BN(relu(conv(sign(x))))."""

    def __init__(self, channels: int, activation: nn.Module) -> None:
        super().__init__()
        self.conv = BinaryConv2d(channels, channels, 3, padding=1, padding_value=1)
        self.activation, self.norm = activation, nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.activation(self.conv(x))) + x


def random(model: nn.Module) -> nn.Module:
    """With statistics and parameters that all differ."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
            if isinstance(module, (nn.BatchNorm2d, RSign, RPReLU)):
                for parameter in module.parameters():
                    parameter.normal_(0.3, 0.3, generator=generator)
    return model.eval()


def products(packed: PackedModel) -> list[PackedConv2d]:
    return [layer for layer in packed.layers.values() if isinstance(layer, PackedConv2d)]


def close(packed: PackedModel, model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        expected = model(x)
    # a sign that rounding turns moves a value by much: few of them
    off = (packed(x) - expected).abs() > 1e-3 * expected.abs().amax()
    assert float(off.float().mean()) < 0.02


def checked(model: nn.Module, x: Tensor, tmp_path: Any, profile: str = "bits") -> PackedModel:
    """Converted in both ways, compared, saved and loaded."""
    with torch.no_grad():
        assert torch.equal(convert(model, x)(x), model(x))
    packed = convert(model, x, exact=False)
    close(packed, model, x)
    close(packed, model, torch.randn(3, *x.shape[1:]))
    assert packed.profile.name == profile
    packed.save(tmp_path / "m.safetensors")
    assert torch.equal(load(tmp_path / "m.safetensors")(x), packed(x))
    return packed


@pytest.mark.parametrize("unit", [Unit, ByHand])
def test_a_reactnet_is_one_pass_a_layer(unit: Any, tmp_path: Any) -> None:
    torch.manual_seed(0)
    units = [unit(16, 16), unit(16, 16), Unit(16, 32, 2)] if unit is Unit else [ByHand(16) for _ in range(3)]
    model = random(nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *units))
    packed = checked(model, torch.randn(2, 3, 12, 12), tmp_path)
    first, second, last = products(packed)
    for layer in (first, second):
        assert layer.config["emits"] == "both" and all(getattr(layer, name) is not None for name in BEHIND)
    assert last.config["emits"] == "values" and last.sign_shift is None and last.slope is not None
    kinds = [str(s.target) for s in packed.steps if s.kind == "operator"]
    assert not [k for k in kinds if "prelu" in k or "batch_norm" in k] and kinds.count("aten.add.Tensor") == 1


@pytest.mark.parametrize(
    ("activation", "limits"),
    [
        (nn.ReLU(), {"low": 0}),
        (nn.Hardtanh(-7, 9), {"low": -7, "high": 9}),
        (nn.Hardtanh(-1000, 11), {"high": 11}),
    ],
)
def test_a_quicknet_clamps_its_dots(activation: nn.Module, limits: dict[str, int], tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = random(nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), *(Quick(32, activation) for _ in range(2))))
    packed = checked(model, torch.randn(2, 3, 8, 8), tmp_path)
    for layer in products(packed):
        assert {k: v for k, v in layer.config.items() if k in ("low", "high", "relu")} == limits
        assert layer.scale is not None
    assert [layer.config["emits"] for layer in products(packed)] == ["both", "values"]


class Head(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = BinaryConv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.activation, self.after = activation, BinaryConv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.norm(self.conv(x)) + x)
        return self.after(y) + y


@pytest.mark.parametrize(
    ("activation", "taken"),
    [
        (nn.ReLU(), {"relu"}),
        (nn.LeakyReLU(0.25), {"slope"}),
        (nn.PReLU(8), {"slope"}),
        (nn.Hardtanh(0, 2.0**30), set()),  # like a ReLU on all that one would try
        (nn.Hardtanh(-(2.0**30), 2.0**30), set()),
        (nn.ReLU6(), set()),
        (nn.Tanh(), set()),
        (nn.Threshold(0.1, 0.0), set()),
        (nn.Softshrink(1e-9), set()),
    ],
    ids=str,
)
def test_only_relus_and_prelus_are_taken_in(activation: nn.Module, taken: set[str], tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = random(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Head(activation)))
    profile = "torch" if isinstance(activation, (nn.Tanh, nn.Threshold, nn.Softshrink)) else "bits"
    layer = products(checked(model, torch.randn(2, 3, 8, 8), tmp_path, profile))[0]
    found = {"relu"} & layer.config.keys() | {n for n in BEHIND if getattr(layer, n) is not None}
    assert found == taken


def test_padding_bits_and_limits_meet(tmp_path: Any) -> None:
    """After a flattened image the dots of a dense layer hold bits that are no features."""
    torch.manual_seed(0)

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.dense = (
                BinaryConv2d(3, 8, 3),
                nn.BatchNorm2d(8),
                BinaryLinear(8 * 36, 12),
            )
            self.scale = nn.Parameter(torch.rand(12) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.dense(self.norm(self.conv(x)).flatten(1))
            return torch.relu(y) * self.scale - 1

    model, x = random(Dense()), torch.randn(5, 3, 8, 8)
    packed = convert(model, x, exact=False)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), model(x), rtol=1e-4, atol=1e-3)
    (layer,) = [la for la in packed.layers.values() if getattr(la, "kind", "") == "packed_linear"]
    assert layer.config["padding_bits"] > 0 and layer.config["low"] == layer.config["padding_bits"]


@pytest.mark.parametrize("name", BEHIND)
def test_a_wrong_operand_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = PackedConv2d.__init__

    def wrong(self: Any, weight: Any, **given: Any) -> None:
        if given.get(name) is not None:
            given[name] = given[name] + 0.5
        original(self, weight, **given)

    monkeypatch.setattr(PackedConv2d, "__init__", wrong)
    torch.manual_seed(0)
    model = random(nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), Unit(16, 16), Unit(16, 16)))
    with pytest.raises(ConversionError, match="exact=False"):
        convert(model, torch.randn(2, 3, 12, 12), exact=False)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"emits": None, "low": 0}, "belong to a layer with emits"),
        ({"emits": None, "slope": torch.ones(8)}, "belong to a layer with emits"),
        ({"emits": "values", "low": 3, "high": 2}, "low is above high"),
        ({"emits": "values", "low": 2**24 + 1}, "low must be"),
        ({"emits": "values", "relu": True, "slope": torch.ones(8)}, "exclude each other"),
        ({"emits": "values", "relu": False}, "relu must be"),
        ({"emits": "values", "sign_shift": torch.ones(8)}, "emits signs"),
        ({"emits": "both", "post_shift": torch.ones(7)}, "post_shift must be"),
    ],
)
def test_contradictions_are_refused(wrong: dict[str, Any], said: str) -> None:
    from tests.packed_models import conv

    with pytest.raises(ValueError, match=said):
        PackedConv2d(**conv(8, 8, 1, 1, padding=[0, 0], dtype="float32"), **wrong)
