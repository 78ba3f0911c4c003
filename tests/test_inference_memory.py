"""Models from a file take bounded memory: what asks for more is refused before it runs."""

from __future__ import annotations

import itertools
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from bop2nd_fast.binary_tensor import pack
from bop2nd_fast.inference import PackedModel, load
from bop2nd_fast.inference.graph import InputSpec, Ref, Step
from bop2nd_fast.inference.layers import Pack, PackedConv2d, RealConv2d
from bop2nd_fast.inference.memory import LIMIT, PER_INPUT_BYTE
from bop2nd_fast.inference.signed_layers import SignedConv2d
from tests.packed_models import aten, layer, output

X = InputSpec((1, 4, 6, 6), torch.float32)


def doubled(n: int) -> list[Step]:
    names = ["x", *(f"d{i}" for i in range(n))]
    return [aten(b, "cat.default", [Ref(a), Ref(a)]) for a, b in itertools.pairwise(names)]


def summed(n: int) -> list[Step]:
    """Rows [n, 1] + columns [1, n] from a view that costs nothing."""
    return [
        aten("s", "select.int", Ref("x"), 3, 0), aten("a", "sum.default", Ref("s")),
        aten("rows", "expand.default", Ref("a"), [n, 1]), aten("columns", "expand.default", Ref("a"), [1, n]),
        aten("y", "add.Tensor", Ref("rows"), Ref("columns")),
    ]  # fmt: skip


BOMBS: dict[str, list[Step]] = {
    "doubling": doubled(60),
    "broadcast": summed(2**17),
    "expand": [aten("y", "expand.default", Ref("x"), [2**40, 4, 6, 6])],
    "expand and copy": [aten("a", "expand.default", Ref("x"), [2**24, 4, 6, 6]),
                        aten("y", "clone.default", Ref("a"))],
    "expand and cut": [aten("a", "expand.default", Ref("x"), [2**23, 4, 6, 6]),
                       aten("y", "unbind.int", Ref("a"))],
    "repeat": [aten("y", "repeat.default", Ref("x"), [2**30, 2**20, 1, 1])],
    "pad": [aten("y", "constant_pad_nd.default", Ref("x"), [2**31, 2**31])],
    "interpolate": [aten("y", "upsample_nearest2d.vec", Ref("x"), None, [1e5, 1e5])],
    "interpolate size": [aten("y", "upsample_bilinear2d.vec", Ref("x"), [2**20, 2**20], False, None)],
    "arange": [aten("y", "arange.default", 2**40)],
    "ones": [aten("y", "ones.default", [2**31])],
    "eye": [aten("y", "eye.default", 2**20)],
    "outer": [aten("f", "flatten.using_ints", Ref("x")), aten("r", "repeat.default", Ref("f"), [2**10]),
              aten("y", "outer.default", Ref("r"), Ref("r"))],
    "matmul": [aten("a", "expand.default", Ref("x"), [2**16, 4, 6, 6]),
               aten("r", "reshape.default", Ref("a"), [-1, 1]), aten("t", "t.default", Ref("r")),
               aten("y", "matmul.default", Ref("r"), Ref("t"))],
    "convolution": [aten("y", "conv2d.default", Ref("x"), Ref("w"), None, [1, 1], [2**15, 2**15])],
    "transposed": [aten("y", "conv_transpose2d.input", Ref("x"), Ref("w"), None, [2**15, 2**15])],
    "adaptive": [aten("y", "adaptive_avg_pool2d.default", Ref("x"), [2**20, 2**20])],
    "table": [aten("l", "to.dtype", Ref("x"), torch.int64), aten("a", "abs.default", Ref("l")),
              aten("e", "full.default", [2**30, 4], 0.0),
              aten("y", "embedding.default", Ref("e"), Ref("a"))],
    "sizes": [aten("n", "sym_size.int", Ref("x"), 2),
              Step("m", "operator", "int.mul", (Ref("n"), 2**40)),
              aten("y", "full.default", [Ref("m")], 1.0)],
    "packed convolution": [layer("p", "x"), layer("padded", "p")],
    "real convolution": [layer("real", "x")],
}  # fmt: skip


def model(steps: list[Step]) -> PackedModel:
    geometry = {"stride": [1, 1], "dilation": [1, 1], "groups": 1}
    layers = {
        "p": Pack(dim=1, length=4, groups=1),
        "padded": PackedConv2d(
            pack(torch.ones(8, 4, 1, 1), 1),
            **geometry,
            padding=[2**14, 2**14],
            padding_value=1,
            dtype="float32",
        ),
        "real": RealConv2d(pack(torch.ones(8, 4, 1, 1), 1), **geometry, padding=[2**15, 2**15]),
    }
    last = steps[-1].name
    return PackedModel(
        [Step("x", "input"), *steps, output(Ref(last))], layers, [X], {"w": torch.ones(4, 4, 1, 1)}
    )


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_before_they_go_off(name: str, tmp_path: Path) -> None:
    model(BOMBS[name]).save(tmp_path / "bomb")
    loaded = load(tmp_path / "bomb")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with pytest.raises((ValueError, RuntimeError)):
        loaded(torch.ones(1, 4, 6, 6))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert after - before < 1.5 * LIMIT


def test_zero_points_at_the_edges_of_an_image_are_counted() -> None:
    """Every output pixel sees other taps in the image, so that each has a correction of its own."""
    size = 72
    layer = SignedConv2d(
        pack(torch.ones(1, 1, size, size), 1),
        stride=[1, 1], padding=[size // 2] * 2, dilation=[1, 1], groups=1,
        dtype="float32", input="uint8", zero_point=1,
    )  # fmt: skip
    corrections = 4 * 32 * (size + 1) ** 2  # outputs are filled up to 16, and as many lie behind them
    assert layer.memory(torch.zeros(1, 1, size, size, dtype=torch.uint8)) > corrections


def test_the_limit_is_stated_set_and_lifted(tmp_path: Path) -> None:
    steps = [aten("y", "repeat.default", Ref("x"), [3, 1, 1, 1])]
    built = model(steps)
    built.save(tmp_path / "file")
    loaded, x = load(tmp_path / "file"), torch.ones(1, 4, 6, 6)
    assert built.memory_limit is None and loaded.memory_limit == LIMIT
    assert loaded(x).shape == (3, 4, 6, 6)
    loaded.memory_limit = 100 - PER_INPUT_BYTE * x.nbytes
    with pytest.raises(ValueError, match=r"step 'y' would bring the memory .* may take 100 \(PackedModel"):
        loaded(x)
    loaded.memory_limit = None
    assert loaded(x).shape == (3, 4, 6, 6)


def test_the_first_call_and_later_ones_give_the_same(tmp_path: Path) -> None:
    steps = [aten("m", "mean.dim", Ref("x"), [1], True), aten("y", "sub.Tensor", Ref("x"), Ref("m"), alpha=2)]
    model(steps).save(tmp_path / "file")
    loaded = load(tmp_path / "file")
    for shape in ((1, 4, 6, 6), (2, 4, 3, 5), (1, 4, 6, 6)):
        x: Any = torch.randn(shape)
        assert torch.equal(loaded(x), loaded(x)) and torch.equal(loaded(x), x - 2 * x.mean(1, keepdim=True))
