"""convert(exact=False): batch norm, residual addition and the next signs inside the layer's kernel."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bop2nd_fast as bf
from bop2nd_fast.inference.layers import PackedConv2d, PackedLinear
from tests.inference_models import kinds

VARIANCE, EPS = 3.5, 0.5  # 1 / sqrt(4) and products with halves are exact, so rounding cannot differ


def norm(channels: int, rank: int = 2) -> nn.Module:
    """A batch norm whose arithmetic is exact on small integers."""
    module = (nn.BatchNorm2d if rank == 2 else nn.BatchNorm1d)(channels, eps=EPS)
    with torch.no_grad():
        assert module.running_mean is not None and module.running_var is not None
        module.running_mean.copy_(torch.randint(-3, 4, (channels,)))
        module.running_var.fill_(VARIANCE)
        module.weight.copy_(torch.randint(0, 3, (channels,)) - 0.5)
        module.bias.copy_(torch.randint(-3, 4, (channels,)) / 2)
    return module.eval()


class Residual(nn.Module):
    """conv -> norm -> + input, twice; a projection in the second; rows at the end."""

    def __init__(self, groups: int = 1, add: Any = operator.add) -> None:
        super().__init__()
        self.add = add
        self.first = bf.nn.BinaryConv2d(16, 16, 3, padding=1, groups=groups, bias=True)
        self.norm1, self.norm2 = norm(16), norm(40)
        self.second = bf.nn.BinaryConv2d(16, 40, 3, stride=2, padding=1, padding_value=1)
        self.shortcut = nn.Sequential(nn.AvgPool2d(2), bf.nn.BinaryConv2d(16, 40, 1))
        self.third = bf.nn.BinaryConv2d(40, 40, 1, groups=5)
        self.dense = bf.nn.BinaryLinear(40 * 9, 12)
        self.norm3 = norm(12, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.add(self.norm1(self.first(x)), x)
        x = self.add(self.norm2(self.second(x)), self.shortcut(x))
        x = self.third(x) * 0.5
        return self.norm3(self.dense(x.flatten(1)))


def model_and_input(groups: int = 1, add: Any = operator.add) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(groups)
    model = Residual(groups, add).eval()
    with torch.no_grad():
        assert model.first.bias is not None
        model.first.bias.copy_(torch.randint(-2, 3, (16,)))
    return model, torch.randint(-8, 9, (3, 16, 6, 6)) / 4


def emitted(packed: bf.inference.PackedModel) -> list[str]:
    """What the layers with tails emit."""
    products = (la for la in packed.layers.values() if isinstance(la, (PackedConv2d, PackedLinear)))
    return [la.config["emits"] for la in products if "emits" in la.config]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("add", [operator.add, operator.iadd, torch.add])
def test_same_bits_where_no_rounding_is_involved(add: Any, groups: int, tmp_path: Path) -> None:
    model, x = model_and_input(groups, add)
    packed = bf.inference.convert(model, x, exact=False)
    assert emitted(packed) == ["both", "signs", "values"]
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(packed(x), expected)
        more = torch.randint(-8, 9, (5, 16, 6, 6)) / 4
        assert torch.equal(packed(more), model(more)), "another batch size"
    packed.save(tmp_path / "tails.safetensors")
    assert torch.equal(bf.inference.load(tmp_path / "tails.safetensors")(x), expected)


def test_bi_real_net_is_close_and_all_of_it_is_taken() -> None:
    torch.manual_seed(0)
    model = bf.models.BiRealNet18(width=8, num_classes=5)
    x = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
        model(x)
        model.eval()
        packed = bf.inference.convert(model, x[:1], exact=False)
        ours, theirs = packed(x), model(x)
    assert emitted(packed) == ["both"] * 15 + ["values"]
    left = [s.name for s in packed.steps if "norm" in s.name or s.name.endswith("_pack")]
    assert left == ["_1_conv_pack"], "batch norms, additions and packing live in the kernels"
    assert "batch_norm" not in kinds(packed)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-4
    exact = bf.inference.convert(model, x[:1])
    with torch.no_grad():
        assert torch.equal(exact(x), theirs), "exact stays the default, and exact"


class Between(nn.Module):
    def __init__(self, between: Any) -> None:
        super().__init__()
        self.conv, self.between = bf.nn.BinaryConv2d(8, 8, 1), between

    def forward(self, x: Tensor) -> Tensor:
        return self.between(self.conv(x), x)


def test_what_no_tail_can_hold_is_left_to_torch() -> None:
    cases = {
        "squared": (lambda y, x: y * y + x, []),
        "clipped behind the residual": (lambda y, x: nn.functional.hardtanh(y + x), ["values"]),
        "read twice": (lambda y, x: y + y.abs(), []),
        "scaled residual": (lambda y, x: torch.add(y, x, alpha=2), []),
        "of another shape": (lambda y, x: y * 2 + x[:, :1], ["values"]),
        "added to itself": (lambda y, x: y + y, []),
        "overwrites its residual": (lambda y, x: operator.iadd(x * 1, y * 2), ["values"]),
    }
    torch.manual_seed(3)
    x = torch.randn(2, 8, 3, 3)
    for name, (between, expected) in cases.items():
        model = Between(between).eval()
        packed = bf.inference.convert(model, x, exact=False)
        assert emitted(packed) == expected, name
        with torch.no_grad():
            assert torch.allclose(packed(x), model(x), rtol=1e-6, atol=1e-6), name


def test_low_precision_models_have_no_tails() -> None:
    model = nn.Sequential(bf.nn.BinaryConv2d(16, 16, 3), norm(16)).eval().bfloat16()
    x = torch.randn(2, 16, 5, 5).bfloat16()
    packed = bf.inference.convert(model, x, exact=False)
    assert emitted(packed) == []
    with torch.no_grad():
        assert torch.equal(packed(x), model(x))


class Stem(nn.Module):
    """Real convolutions before a binary one; ``reader`` also reads the first, so it keeps its batch norm."""

    def __init__(self, reader: bool = False) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 8, 3, bias=False), norm(8)
        self.second, self.norm2 = nn.Conv2d(8, 8, 2), norm(8)
        self.binary, self.reader = bf.nn.BinaryConv2d(8, 4, 1), reader

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = self.norm2(self.second(self.norm1(y)))
        result = self.binary(z).flatten(1) + z.view(x.shape[0], 2, -1).sum((1, 2))[:, None]
        return result + y.mean() if self.reader else result


@pytest.mark.parametrize("reader", [False, True])
def test_real_convolutions_take_in_batch_norm(reader: bool, tmp_path: Path) -> None:
    torch.manual_seed(5)
    model, x = Stem(reader).eval(), torch.randint(-4, 5, (2, 3, 6, 6)).float()
    with torch.no_grad():
        for conv in (model.first, model.second):
            conv.weight.copy_(torch.randint(-2, 3, conv.weight.shape))  # whole numbers: no rounding
        assert model.second.bias is not None
        model.second.bias.fill_(0.5)
        expected = model(x)
    packed = bf.inference.convert(model, x, exact=False)
    assert [s.name for s in packed.steps if "batch_norm" in str(s.target)] == (["norm1"] if reader else [])
    assert torch.equal(packed(x), expected)
    assert "norm1" in [s.name for s in bf.inference.convert(model, x).steps], (
        "exact models keep every batch norm"
    )
    packed.save(tmp_path / "stem.safetensors")
    loaded = bf.inference.load(tmp_path / "stem.safetensors")
    assert torch.equal(loaded(x), expected)
    assert [(s.name, s.target) for s in loaded.steps] == [(s.name, s.target) for s in packed.steps]


def test_real_images_stay_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing between the input and the first words turns an image around."""
    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.MaxPool2d(2), bf.nn.BinaryConv2d(8, 4, 1)
    ).eval()
    x, seen = torch.randn(2, 3, 8, 8), []
    packed = bf.inference.convert(model, x, exact=False)
    packed.engine = "steps"
    original = torch.ops.bop2nd.pack_bits

    def pack_bits(image: Tensor, *rest: Any) -> Tensor:
        seen.append(image.is_contiguous(memory_format=torch.channels_last))
        return original(image, *rest)

    monkeypatch.setattr(torch.ops.bop2nd, "pack_bits", pack_bits)
    packed(x)
    assert seen == [True]


class Bits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).view(torch.int32) & 1


def test_views_as_another_dtype_stay_views() -> None:
    torch.manual_seed(5)
    model, x = Bits().eval(), torch.randn(2, 3, 6, 6)
    packed = bf.inference.convert(model, x, exact=False)
    assert [s.target for s in packed.steps if s.name == "view"] == ["aten.view.dtype"]
    assert packed(x).dtype == torch.int32
