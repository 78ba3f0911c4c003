"""Packed models whose first layers read real numbers, 8-bit integers, or the bytes of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bop2nd_fast as bf
from bop2nd_fast.inference import ConversionError, PackedModel, convert
from bop2nd_fast.inference.layers import dtype_name
from bop2nd_fast.inference.signed_layers import SignedConv2d, SignedLinear


def settled(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(module.running_mean, std=2)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model.eval()


def network(channels: int = 3, quantizer: Any = None, padding: int = 1, stride: int = 1) -> nn.Module:
    first = bf.nn.BinaryConv2d(channels, 40, 3, stride, padding, bias=True, input_quantizer=quantizer)
    return settled(
        nn.Sequential(
            first, nn.BatchNorm2d(40), nn.Hardtanh(),
            bf.nn.BinaryConv2d(40, 33, 3), nn.MaxPool2d(2), nn.BatchNorm2d(33), nn.Flatten(),
            bf.nn.BinaryLinear(33 * (9 if stride == 1 else 1), 10),
        )
    )  # fmt: skip


def pictures(n: int, channels: int = 3) -> Tensor:
    return torch.randint(0, 256, (n, channels, 8, 8), dtype=torch.uint8)


def kinds(packed: PackedModel) -> list[str]:
    names = [packed.layers[s.target].kind if s.kind == "layer" else s.target for s in packed.steps]
    return [str(name).split(".")[-2] if "." in str(name) else str(name) for name in names if name]


def again(packed: PackedModel, path: Path) -> PackedModel:
    packed.save(path)
    return bf.inference.load(path)


def test_real_inputs_stay_packed(tmp_path: Path) -> None:
    model, x = network(), torch.randn(4, 3, 8, 8)
    packed = convert(model, x)
    assert kinds(packed)[0] == "signed_conv2d" and packed.profile.name == "bits"
    for reader in (packed, again(packed, tmp_path / "model.bop2nd")):
        for inputs in (x, x[:1], torch.randn(7, 3, 8, 8).contiguous(memory_format=torch.channels_last)):
            assert torch.equal(reader(inputs), model(inputs))
    kept = packed.layers[packed.steps[1].target].weight.memory._kept
    assert kept is None or kept[1].dtype == torch.int32, "no unpacked weight is kept"


class Chain(nn.Module):
    """Sums of one number (it or its negative), functions of them, and their signs, channel by channel."""

    def __init__(self, *functions: Any) -> None:
        super().__init__()
        self.first = bf.nn.BinaryConv2d(1, 64, 1, input_quantizer=None)
        self.functions = functions
        self.norm = nn.BatchNorm2d(64)
        self.second = bf.nn.BinaryConv2d(64, 64, 1, groups=64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for function in self.functions:
            x = function(self, x)
        return self.second(x)


def norm(model: Any, x: Tensor) -> Tensor:
    return model.norm(x)


CHAINS: dict[str, tuple[Any, ...]] = {
    "norm": (norm,),
    "scaled": (lambda m, x: 0.25 - x * -1.7, norm, lambda m, x: x.clamp(-0.4, 3) + 0.4),
    "limited": (norm, lambda m, x: nn.functional.hardtanh(x), lambda m, x: x - 0.999),
    "never": (norm, lambda m, x: nn.functional.relu(x), lambda m, x: x / 3),
    "always": (lambda m, x: torch.minimum(x, m.norm.bias[:, None, None]) - m.norm.bias[:, None, None] - 0.5,),
}


@pytest.mark.parametrize("name", CHAINS)
def test_signs_of_real_sums_are_a_threshold(tmp_path: Path, name: str) -> None:
    model = settled(Chain(*CHAINS[name]))
    with torch.no_grad():
        model.norm.weight[:4] = torch.tensor([0.0, 0.0, -1e-30, 1e30])
    packed = convert(model, torch.randn(2, 1, 8, 8))
    assert kinds(packed)[:3] == ["signed_conv2d", "regroup", "packed_conv2d"]
    shift = packed.layers[packed.steps[1].target].sign_shift
    places = torch.cat([shift, -shift, torch.randn(500), torch.logspace(-44, 38, 100), torch.zeros(1)])
    places = places[places.isfinite()]
    up, down = (torch.nextafter(places, torch.tensor(s * torch.inf)) for s in (1, -1))
    x = torch.cat([places, up, down, up.neg(), down.neg()])[:, None, None, None]
    for reader in (packed, again(packed, tmp_path / "model.bop2nd")):
        row = x[:, :, 0, 0].T.reshape(1, 1, 5, -1)
        for inputs in (x, x, row, row):  # the second of a shape runs in C++
            assert torch.equal(reader(inputs), model(inputs))
        assert "1 parts" in reader.explain()


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.norm(x).abs() - 1,
        lambda m, x: 1 / m.norm(x),
        lambda m, x: nn.functional.max_pool2d(x, 2),
        lambda m, x: torch.tanh(x),
        lambda m, x: m.norm(x) + x,
    ],
)
def test_what_real_sums_keep(function: Any) -> None:
    """Not monotone, of several numbers, rounded who knows how, or read twice: real numbers, to the bit."""
    model, x = settled(Chain(function)), torch.randn(2, 1, 8, 8)
    packed = convert(model, x)
    assert "pack" in kinds(packed) and torch.equal(packed(x), model(x))


def test_8_bit_inputs(tmp_path: Path) -> None:
    model, x = network(quantizer="int8"), torch.randn(4, 3, 8, 8)
    packed = convert(model, x)
    assert "quantize_rows" in kinds(packed)
    for reader in (packed, again(packed, tmp_path / "model.bop2nd")):
        for inputs in (x, x[:1]):
            assert torch.equal(reader(inputs), model(inputs))
    dense = settled(nn.Sequential(bf.nn.BinaryLinear(40, 9, input_quantizer=bf.nn.Int8(False))))
    x = torch.randn(5, 40)
    packed = convert(dense, x)
    assert torch.equal(packed(x), dense(x)) and torch.equal(packed(x[:2]), dense(x[:2]))


def fractions(images: Tensor) -> Tensor:
    return (images.float() / 255 - 0.4) / 0.25


@pytest.mark.parametrize(("padding", "stride"), [(1, 1), (0, 2)])
@pytest.mark.parametrize("normalise", [True, fractions])
def test_images_of_bytes(tmp_path: Path, normalise: Any, padding: int, stride: int) -> None:
    model = network(padding=padding, stride=stride)
    if stride == 2:
        model = nn.Sequential(*list(model)[:3], nn.Flatten(), bf.nn.BinaryLinear(40 * 9, 10))
    real = fractions if normalise is not True else lambda b: b.float() / 127.5 - 1
    packed = convert(model, pictures(4), image_bytes=normalise)
    assert packed.inputs[0].dtype == torch.uint8 and kinds(packed)[0] == "signed_conv2d"
    assert "batch_norm" not in kinds(packed) and "pack" not in kinds(packed), "no real number before the end"
    for reader in (packed, again(packed, tmp_path / "model.bop2nd")):
        for n in (1, 50):
            images = pictures(n)
            camera = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
            assert torch.equal(reader(images), model(real(images)))
            assert torch.equal(reader(camera), reader(images))


def test_every_test_image_of_digits_as_bytes() -> None:
    """Pixels of 0 to 16, which the data set gives as ``pixel / 8 - 1``: the same logits, to the bit."""
    real = bf.data.digits().test_images
    pixels = ((real + 1) * 8).to(torch.uint8)
    model = network(channels=1)
    packed = convert(model, pixels[:4], image_bytes=lambda b: b.float() / 8 - 1)
    assert len(pixels) > 400 and torch.equal(packed(pixels), model(real))


class AroundLayers(nn.Module):
    """Layers, and the images besides."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x) + x.flatten(1).mean(1, keepdim=True)


def test_bytes_of_flattened_images(tmp_path: Path) -> None:
    images = pictures(5)
    features = images[0].numel()
    rows = bf.nn.BinaryLinear(features, 50, input_quantizer=None)
    model = settled(nn.Sequential(nn.Flatten(), rows, nn.BatchNorm1d(50), bf.nn.BinaryLinear(50, 10)))
    packed = convert(model, images, image_bytes=True)
    assert kinds(packed)[:2] == ["flatten", "signed_linear"]
    for reader in (packed, again(packed, tmp_path / "model.bop2nd")):
        assert torch.equal(reader(images), model(images.float() / 127.5 - 1))


def test_why_images_cannot_be_bytes() -> None:
    images = pictures(2)
    first = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), bf.nn.BinaryConv2d(8, 10, 3))
    scale = torch.tensor([0.2, 0.3, 0.4])[:, None, None]
    for model, example, normalise, text in (
        (network(), images.float(), True, "one uint8"),
        (network(), images, lambda b: b.float() / 255 / scale, "channels are normalised differently"),
        (network(), images, lambda b: (b.float() / 255) ** 2.2, "no increasing affine function"),
        (network(), images, lambda b: b.float() / 255 + 1, "lies outside of 0 to 255"),
        (network(), images, lambda b: b.double(), "gives float32"),
        (network()[:2], images, True, "read as real numbers"),
        (first.eval(), images, True, r"\(aten.conv2d.default\) reads the images as real numbers"),
        (AroundLayers(network()).eval(), images, True, r"mean.dim\) reads the images as real numbers"),
    ):
        with pytest.raises(ConversionError, match=text):
            convert(model, example, image_bytes=normalise)
    with pytest.raises(ConversionError, match="needs exact=True"):
        convert(network(), images, exact=False, image_bytes=True)


def test_layers_refuse_what_they_cannot_hold() -> None:
    weight = bf.pack(torch.randn(4, 40), dim=1)
    config: dict[str, Any] = {"dtype": "float32", "input": "int8"}
    threshold = torch.zeros(4, dtype=torch.int32)
    with pytest.raises(ValueError, match="zero_point must be -128 to 127"):
        SignedLinear(weight, **config, zero_point=128)
    with pytest.raises(ValueError, match="belong to integers"):
        SignedLinear(weight, threshold=threshold, dtype="float32", input="real")
    with pytest.raises(ValueError, match="input must be one of"):
        SignedLinear(weight, dtype="float32", input="int16")
    layer = SignedLinear(weight, **config, threshold=threshold)
    with pytest.raises(ValueError, match="takes int8 inputs"):
        layer(torch.randn(2, 40))
    with pytest.raises(ValueError, match="40 features"):
        layer(torch.zeros(2, 41, dtype=torch.int8))
    kernel = bf.pack(torch.randn(4, 3, 3, 3), dim=1)
    sizes = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1}
    conv = SignedConv2d(kernel, dtype=dtype_name(torch.float32), input="real", **sizes)
    with pytest.raises(ValueError, match="smaller than the kernel"):
        conv(torch.randn(1, 3, 2, 2))
