"""Networks as users write them: converted in both modes, saved, loaded, against the model on other sizes."""

from __future__ import annotations

import collections
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn

import bop2nd_fast as bf
from bop2nd_fast.inference import convert, load
from bop2nd_fast.nn import BinaryConv1d, BinaryConv2d, BinaryLinear
from tests.inference_models import CALLS, assert_same_bits, kinds, wild_batch_norms


def conv(inputs: int, outputs: int, kernel: int = 3, **rest: Any) -> nn.Sequential:
    rest.setdefault("padding", kernel // 2)
    return nn.Sequential(BinaryConv2d(inputs, outputs, kernel, **rest), nn.BatchNorm2d(outputs))


class UNet(nn.Module):
    """Segmentation: skips, upsampling to the size of the skip, a crop where sizes are odd."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.down1, self.down2, self.up = conv(16, 32), conv(32, 32), conv(64, 16)
        self.transposed = nn.ConvTranspose2d(32, 32, 2, stride=2)
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        a = F.hardtanh(self.down1(x))
        b = self.transposed(self.down2(F.max_pool2d(a, 2)))
        if b.shape[-2:] != a.shape[-2:]:
            b = F.interpolate(b, size=a.shape[-2:], mode="bilinear", align_corners=False)
        return self.head(self.up(torch.cat([a, b], 1)))


class SuperResolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.body, self.tail = nn.Conv2d(1, 16, 3, padding=1), conv(16, 16), conv(16, 4)
        self.up = nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(x)
        y += self.body(y)
        return self.up(self.tail(y)) + F.interpolate(x, scale_factor=2, mode="nearest")


class Attention(nn.Module):
    """A free sequence length, heads split by sizes, a mask made from the length."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.qkv, self.out = BinaryLinear(width, 3 * width), BinaryLinear(width, width, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = (
            y.view(n, t, self.heads, c // self.heads).transpose(1, 2)
            for y in self.qkv(self.norm(x)).chunk(3, dim=-1)
        )
        score = q @ k.transpose(-2, -1) / (c // self.heads) ** 0.5
        score = score.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), float("-inf"))
        return x + self.out((score.softmax(-1) @ v).transpose(1, 2).reshape(n, t, c))


class GatedResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), conv(16, 16), conv(16, 16)
        self.gate = nn.Parameter(torch.randn(16, 1, 1))
        self.shift = nn.Parameter(torch.randn(1, 16, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.sigmoid(self.gate) * self.a(x) + x
        return self.b(x + self.shift) * 0.5 + x


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(conv(8 + 8 * i, 8) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return torch.stack(features).sum(0)


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Sequential(BinaryLinear(16, 24, bias=True), nn.Hardtanh(-3, 3), BinaryLinear(24, 16))
        self.channels = nn.Sequential(BinaryLinear(20, 40), nn.ReLU(), BinaryLinear(40, 20))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        x = x + self.tokens(x.transpose(1, 2)).transpose(1, 2)
        return (x + self.channels(x)).mean(1)


class Recurrent(nn.Module):
    """One layer used again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.binary, self.norm = nn.Linear(12, 12), BinaryLinear(12, 12), nn.BatchNorm1d(12)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + self.norm(self.binary(torch.relu_(self.fc(x))))
        return x


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.down, self.up = conv(8, 16), BinaryLinear(16, 4), nn.Linear(4, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y * torch.sigmoid(self.up(F.relu(self.down(y.mean((2, 3))))))[:, :, None, None]


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(conv(3, 16), nn.AdaptiveAvgPool2d(2), nn.Flatten(), BinaryLinear(64, 8))

    def forward(self, left: Tensor, right: Tensor, *, margin: float = 0.5) -> Tensor:
        return F.pairwise_distance(self.encoder(left), self.encoder(right)) - margin


Outputs = collections.namedtuple("Outputs", "classes boxes")


class Heads(nn.Module):
    """Several heads: a dict, a named tuple and a number of the size."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.classes, self.boxes = conv(3, 16), conv(16, 5, 1), conv(16, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.body(x)
        heads = Outputs(
            self.classes(y).softmax(1), self.boxes(y).permute(0, 2, 3, 1).reshape(x.size(0), -1, 4)
        )
        return {"heads": heads, "n": x.shape[0], "features": [y, None]}


class Separable(nn.Module):
    """Depthwise and pointwise, a shuffle of channels between."""

    def __init__(self) -> None:
        super().__init__()
        self.depth, self.point = conv(32, 32, groups=32), conv(32, 48, 1)
        self.last = conv(48, 8, 3, groups=4, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.point(self.depth(x))
        n, c, h, w = y.shape
        return self.last(y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv, self.out = nn.Embedding(50, 24), BinaryConv1d(24, 16, 3), BinaryLinear(16, 3)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        y = self.conv(self.table(tokens).transpose(1, 2))
        return self.out(y.amax(2) if lengths is None else y.sum(2) / lengths[:, None])


class Series(nn.Module):
    """1-d convolutions: batch norm, clipping and signs between them are thresholds too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = BinaryConv1d(4, 40, 5, padding=2), BinaryConv1d(40, 8, 3, stride=2)
        self.norm = nn.BatchNorm1d(40)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.hardtanh(self.norm(self.a(x)), -3, 5))


class InPlace(nn.Module):
    """Everything in place, under two names, on parts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), conv(16, 16), conv(16, 16)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        shortcut = y
        y = self.a(y)
        y += shortcut
        same = y
        self.relu(same)
        z = self.b(y)
        z.mul_(0.5).add_(same)
        z[:, 0] = 1
        z[:, 1:3] += 2
        shortcut.clamp_(-1, 1)
        return torch.add(z, shortcut, out=z)


class RSignRPReLU(nn.Module):
    """ReActNet's parts as one would write them: an addition before the sign, shifts around a PReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.shifts = nn.ParameterList(nn.Parameter(torch.randn(1, 16, 1, 1)) for _ in range(4))
        self.stem, self.a, self.b = nn.Conv2d(3, 16, 3), conv(16, 16), conv(16, 16)
        self.slope = nn.PReLU(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.a(x + self.shifts[0].expand_as(x)) + x
        y = self.slope(y - self.shifts[1]) + self.shifts[2]
        return self.b(y + self.shifts[3]) + y


class OwnOperators(nn.Module):
    """A module of one's own around the operators, with a scale and a shift before the sign."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(bf.pack(torch.randn(24, 8, 3, 3), 1))
        self.second = nn.Parameter(bf.pack(torch.randn(6, 24, 1, 1), 1))
        self.scale, self.shift = nn.Parameter(torch.rand(24, 1, 1)), nn.Parameter(torch.randn(24, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = bf.ops.binary_conv2d(x, self.weight, padding=1, padding_value=1)
        return bf.ops.binary_conv2d(y * self.scale + self.shift, self.second)


class OddEven(nn.Module):
    """Another way for odd sizes: a packed model refuses what it has not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] % 2:
            x = x[:, :, :-1] * 2
        assert x.dim() == 4 and isinstance(x, Tensor)
        return self.conv(x)


class Windows(nn.Module):
    """Patches: unfold, roll, pad, einsum, a closure, positions from the size."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Conv2d(3, 16, 4, stride=4), BinaryLinear(16, 16)
        self.position = nn.Parameter(torch.randn(1, 16, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(F.pad(x, (0, 0, 0, 0)))
        y = y + F.interpolate(self.position, size=y.shape[2:], mode="bilinear", align_corners=False)
        y = torch.roll(y, (1, 1), (2, 3)).permute(0, 2, 3, 1)

        def mixed(z: Tensor) -> Tensor:
            return torch.einsum("nhwc,nhwd->ncd", z, self.mix(z))

        return mixed(y) / (y.shape[1] * y.shape[2])


def image(n: int, c: int, h: int, w: int) -> Tensor:
    return torch.randn(n, c, h, w, generator=torch.Generator().manual_seed(n + h))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Any, list[Any]]] = {
    "u_net": (UNet, image(2, 3, 16, 16), [image(3, 3, 16, 16), image(1, 3, 32, 24)]),
    "super_resolution": (SuperResolution, image(1, 1, 10, 12), [image(3, 1, 7, 9)]),
    "attention": (Attention, torch.randn(2, 6, 32), [torch.randn(3, 9, 32), torch.randn(1, 4, 32)]),
    "gated_residual": (GatedResidual, image(2, 3, 9, 8), [image(1, 3, 12, 5)]),
    "dense": (Dense, image(2, 8, 6, 6), [image(3, 8, 9, 7)]),
    "mixer": (Mixer, image(2, 20, 4, 4), [image(5, 20, 4, 4)]),
    "recurrent": (Recurrent, torch.randn(2, 12), [torch.randn(5, 12)]),
    "squeeze_excite": (SqueezeExcite, image(2, 8, 6, 6), [image(1, 8, 5, 8)]),
    "siamese": (
        Siamese,
        (image(2, 3, 8, 8), image(2, 3, 8, 9)[..., :8]),
        [(image(3, 3, 8, 8), image(3, 3, 9, 8)[:, :, :8])],
    ),
    "heads": (Heads, image(2, 3, 8, 8), [image(3, 3, 8, 8), image(1, 3, 6, 10)]),
    "separable": (Separable, image(2, 32, 8, 8), [image(1, 32, 9, 11)]),
    "text": (Text, torch.randint(50, (2, 9)), [torch.randint(50, (4, 9)), torch.randint(50, (1, 20))]),
    "series": (Series, torch.randn(2, 4, 20), [torch.randn(3, 4, 33)]),
    "in_place": (InPlace, image(2, 3, 8, 8), [image(1, 3, 8, 8), image(3, 3, 7, 5)]),
    "rsign_rprelu": (RSignRPReLU, image(2, 3, 9, 9), [image(1, 3, 12, 8)]),
    "own_operators": (OwnOperators, image(2, 8, 6, 6), [image(3, 8, 9, 7)]),
    "odd_even": (OddEven, image(2, 3, 8, 8), [image(3, 3, 6, 7)]),
    "windows": (Windows, image(2, 3, 16, 16), [image(1, 3, 16, 16), image(3, 3, 24, 32)]),
}


def outcome(model: nn.Module, given: Any) -> list[Any]:
    args = given if isinstance(given, tuple) else (given,)
    with torch.no_grad():
        return pytree.tree_leaves(model(*(a.clone() for a in args)))


def close(actual: list[Any], expected: list[Any], exact: bool) -> None:
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        if not isinstance(e, Tensor):
            assert a == e
        elif exact:
            assert a.dtype == e.dtype and torch.equal(a, e)
        else:
            assert a.shape == e.shape
            assert float((a - e).norm()) <= 0.05 * float(e.norm()) + 1e-4


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "rounded"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str, exact: bool, tmp_path: Path) -> None:
    make, example, others = NETWORKS[name]
    torch.manual_seed(len(name))
    model = wild_batch_norms(make()).eval() if exact else make().eval()
    packed = convert(model, example, exact=exact)
    packed.save(tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors")
    for given in (example, *others):
        expected = outcome(model, given)
        found = outcome(packed, given)
        close(found, expected, exact)
        for _ in range(CALLS):
            assert_same_bits(outcome(loaded, given), found)


def test_what_folds() -> None:
    """No line of the converter names these: they are operators by then."""
    for name, wanted in {
        "series": ["pack", "packed_conv2d", "packed_conv2d"],
        "own_operators": ["pack", "packed_conv2d", "packed_conv2d"],
    }.items():
        make, example, _ = NETWORKS[name]
        model = make().eval()
        packed = convert(model, example)
        assert [k for k in kinds(packed) if "pack" in k] == wanted, name
        assert (
            packed.layers[next(s.target for s in packed.steps if "conv2d" in kinds_of(packed, s))].threshold
            is not None
        )


def kinds_of(packed: bf.inference.PackedModel, step: Any) -> str:
    return packed.layers[step.target].kind if step.kind == "layer" else ""


def test_sizes_that_lead_elsewhere_are_refused() -> None:
    packed = convert(OddEven().eval(), image(2, 3, 8, 8))
    with pytest.raises(ValueError, match="takes another way than in the conversion"):
        packed(image(2, 3, 7, 8))
