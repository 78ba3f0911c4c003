"""Random networks of all layers that fusion knows, in random order: packed, saved, loaded, compared."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bop2nd_fast.inference import convert, load
from bop2nd_fast.nn import BinaryConv2d, BinaryLinear, MaxPool2d
from tests.inference_models import images, kinds, wild_batch_norms


def random_between(rng: random.Random, channels: int, images: bool, size: int) -> tuple[list[nn.Module], int]:
    """Layers between two binary ones, and the image size after them."""
    modules: list[nn.Module] = []
    for _ in range(rng.randrange(5)):
        kind = rng.choice(["norm", "norm", "pool", "clip", "relu", "leaky", "prelu", "dropout", "tanh"])
        if kind == "norm":
            affine = rng.random() < 0.8
            modules.append((nn.BatchNorm2d if images else nn.BatchNorm1d)(channels, affine=affine))
        elif kind == "pool" and images and size >= 4:
            kernel = rng.choice((2, 3))
            padding, stride, ceil = rng.choice((0, 1)), rng.choice((1, 2)), rng.random() < 0.5
            modules.append(nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil))
            size = modules[-1](torch.zeros(1, 1, size, size)).shape[-1]
        elif kind == "clip":
            modules.append(nn.Hardtanh(-rng.choice((1, 5)), rng.choice((1, 7)), inplace=rng.random() < 0.5))
        elif kind == "relu":
            modules.append(nn.ReLU(inplace=rng.random() < 0.5))
        elif kind == "leaky":
            modules.append(nn.LeakyReLU(rng.choice((0.1, -0.5))))
        elif kind == "prelu":
            modules.append(nn.PReLU(rng.choice((1, channels)), init=rng.choice((0.25, -0.25))))
        elif kind == "dropout":
            modules.append(nn.Dropout(0.5))
        elif kind == "tanh":
            modules.append(nn.Tanh())
    return modules, size


def random_network(rng: random.Random) -> tuple[nn.Module, tuple[int, ...]]:
    size, channels = rng.randrange(5, 12), rng.choice((1, 3, 8, 33, 64))
    shape = (channels, size, size)
    modules: list[nn.Module] = []
    for i in range(rng.randrange(1, 4)):
        out = rng.choice((4, 24, 32, 40, 72))
        real = i == 0 and rng.random() < 0.3
        groups = rng.choice([g for g in (1, 2, 4) if channels % g == 0])
        conv = BinaryConv2d(
            channels,
            out,
            3,
            stride=rng.choice((1, 1, 2)),
            padding=rng.choice((1, 2)),
            padding_value=0 if real else rng.choice((0, 1, -1)),
            groups=groups,
            bias=rng.random() < 0.3,
            input_quantizer=None if real else rng.choice(("ste_sign", "approx_sign")),
        )
        channels = out
        size = (size + 2 * conv.padding[0] - 3) // conv.stride[0] + 1
        between, size = random_between(rng, channels, True, size)
        modules += [conv, *between]
    modules.append(nn.Flatten())
    features = channels * size * size
    for _ in range(rng.randrange(1, 3)):
        out = rng.choice((7, 32, 65))
        modules.append(BinaryLinear(features, out, bias=rng.random() < 0.3))
        between, _ = random_between(rng, out, False, 0)
        modules += between
        features = out
    model = nn.Sequential(*modules)
    for module in model.modules():
        if isinstance(module, (BinaryConv2d, BinaryLinear)) and module.bias is not None:
            nn.init.normal_(module.bias, std=4)
    return model, shape


def check(seed: int, folder: Path) -> list[str]:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model, shape = random_network(rng)
    wild_batch_norms(model, seed).eval()
    dtype = rng.choice((torch.float32, torch.float32, torch.float32, torch.bfloat16))
    model.to(dtype)
    packed = convert(model, images((rng.choice((1, 2)), *shape), seed).to(dtype))
    packed.save(folder / "model.safetensors")
    loaded = load(folder / "model.safetensors")
    x = images((3, *shape), seed + 1).to(dtype)
    with torch.no_grad():
        expected = model(x)
    for one in (packed, loaded):
        actual = one(x)
        assert actual.dtype == expected.dtype and actual.stride() == expected.stride(), model
        assert torch.equal(actual, expected), model
    return kinds(packed)


class Tangle(nn.Module):
    """Random operations on several live images of one shape: in place, under two names, read again later."""

    def __init__(self, rng: random.Random, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        groups = [g for g in (1, 2, 4) if channels % g == 0]
        self.convs = nn.ModuleList(
            BinaryConv2d(
                channels,
                channels,
                kernel,
                padding=kernel // 2,
                padding_value=rng.choice((0, 1, -1)),
                groups=rng.choice(groups),
                bias=rng.random() < 0.3,
            )
            for kernel in (1, 3, 3)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(3))
        self.slope, self.pool = nn.PReLU(channels), MaxPool2d(3, 1, 1)
        self.shift = nn.Parameter(torch.randn(channels, 1, 1))
        self.plan = [
            (rng.randrange(12), rng.randrange(3), rng.randrange(8)) for _ in range(rng.randrange(3, 12))
        ]

    def forward(self, x: Tensor) -> Tensor:
        live = [self.stem(x)]
        for kind, i, j in self.plan:
            a, b = live[-1], live[j % len(live)]
            if kind <= 2:
                live.append(self.norms[i](self.convs[i](a)))
            elif kind == 3:
                live.append(self.convs[i](a) + b)
            elif kind == 4:
                a += b * 0.5
            elif kind == 5:
                b.clamp_(-3, 3)
            elif kind == 6:
                live.append(self.pool(a))
            elif kind == 7:
                torch.relu_(a)
            elif kind == 8:
                live.append(self.slope(a + self.shift))
            elif kind == 9:
                b[:, :1] = a[:, -1:] * 0.5
            elif kind == 10:
                live.append(a)
                a.mul_(0.75).add_(0.25)
            else:
                live.append(torch.cat([a[:, 1:], b[:, :1]], 1))
        return live[-1] + live[0]


def check_tangle(seed: int, folder: Path) -> list[str]:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    channels, exact = rng.choice((4, 8, 32, 36)), rng.random() < 0.5
    model = Tangle(rng, channels).eval()
    if exact:
        wild_batch_norms(model, seed)
    packed = convert(model, images((rng.choice((1, 2)), 3, 8, 7), seed), exact=exact)
    packed.save(folder / "model.safetensors")
    x = images((3, 3, 6, 9), seed + 1)
    with torch.no_grad():
        expected, actual = model(x), packed(x)
    assert torch.equal(load(folder / "model.safetensors")(x), actual), model.plan
    if exact:
        assert torch.equal(actual, expected), model.plan
    else:
        far = (actual - expected).abs() > 1e-3 * expected.abs().amax()
        assert float(far.float().mean()) < 0.05, model.plan
    return kinds(packed)


@pytest.mark.parametrize("seed", range(12))
def test_random_tangles(seed: int, tmp_path: Path) -> None:
    check_tangle(seed, tmp_path)


@pytest.mark.fuzz
@pytest.mark.timeout(3600)
def test_many_random_tangles(tmp_path: Path) -> None:
    """300 networks that write in place, exactly and with rounding."""
    seen: set[str] = set()
    for seed in range(1000, 1300):
        seen.update(check_tangle(seed, tmp_path))
    assert {"packed_conv2d", "pack", "max_pool", "regroup", "getitem", "slice_scatter"} <= seen


@pytest.mark.parametrize("seed", range(20))
def test_random_networks(seed: int, tmp_path: Path) -> None:
    check(seed, tmp_path)


@pytest.mark.fuzz
@pytest.mark.timeout(1800)
def test_many_random_networks(tmp_path: Path) -> None:
    """300 networks; among them every kind of layer must have occurred."""
    seen: set[str] = set()
    for seed in range(1000, 1300):
        seen.update(check(seed, tmp_path))
    ours = {"packed_conv2d", "packed_linear", "signed_conv2d", "pack", "pool_bits", "regroup", "flatten_bits"}
    assert ours <= seen
