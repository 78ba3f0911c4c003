"""Packed models written by hand, of every layer kind and operator of profile ``bits``: the golden files.

``python -m tests.packed_models`` writes ``tests/data/packed_*``: only when the format changes on purpose.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bop2nd_fast.binary_tensor import BinaryTensor, Layout, pack
from bop2nd_fast.inference.graph import InputSpec, Parameter, Ref, Signature, Step
from bop2nd_fast.inference.layers import (
    Constant,
    FlattenBits,
    Pack,
    PackedConv2d,
    PackedLinear,
    RealConv2d,
    RealLinear,
    Regroup,
)
from bop2nd_fast.inference.packed_model import PackedModel
from bop2nd_fast.inference.pooling import MaxPool, PoolBits
from bop2nd_fast.inference.signed_layers import QuantizeRows, SignedConv2d, SignedLinear

DATA = Path(__file__).parent / "data"


def values(*shape: int, seed: int = 0) -> Tensor:
    """Quarters from -3 to 3, the same on every machine."""
    n = int(np.prod(shape))
    steps = (np.arange(n, dtype=np.int64) * 7919 + seed * 104729) * 2654435761 % 2**32 >> 9
    return torch.from_numpy(((steps % 25 - 12) / 4).astype(np.float32)).reshape(shape)


def bits(*shape: int, seed: int = 0) -> BinaryTensor:
    return pack(values(*shape, seed=seed), dim=1)


def conv(o: int, i: int, k: int, seed: int, **config: Any) -> dict[str, Any]:
    given = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1, "padding_value": 0}
    return {"weight": bits(o, i, k, k, seed=seed), **given, **config}


def thresholds(n: int, seed: int) -> Tensor:
    return (values(n, seed=seed) * 2).to(torch.int32)


POOL = {"kernel_size": [3, 2], "stride": [2, 2], "padding": [1, 0], "dilation": [1, 1], "ceil_mode": True}


def layer(name: str, *args: str) -> Step:
    return Step(name, "layer", name, tuple(map(Ref, args)))


def aten(name: str, target: str, *args: Any, **kwargs: Any) -> Step:
    return Step(name, "operator", f"aten.{target}", args, kwargs)


def output(value: Any) -> Step:
    return Step("output", "output", "", (value,))


def words() -> PackedModel:
    """Words from the first sign to the last dot: every result is exact."""
    layers = {
        "pack": Pack(dim=1, length=5, groups=1),
        "conv1": PackedConv2d(**conv(40, 5, 3, 1, dtype="float32"), threshold=thresholds(40, 2)),
        "pool": PoolBits(torch.tensor([0x5A5A, 0x0F], dtype=torch.int32), **POOL),
        "regroup": Regroup(length=40, groups=2),
        "conv2": PackedConv2d(
            **conv(36, 20, 3, 3, dtype="float32", groups=2, padding_value=-1, stride=[2, 1], dilation=[1, 2]),
            threshold=thresholds(36, 4),
        ),
        "flatten": FlattenBits(),
        "dense1": PackedLinear(
            _pixels(33, 36, 4), threshold=thresholds(33, 6) + 112, dtype="float32", padding_bits=112
        ),
        "dense2": PackedLinear(bits(3, 33, seed=7), bias=values(3, seed=8), dtype="float32"),
    }
    steps = [Step("x", "input"), layer("pack", "x")]
    steps += [layer(b, a) for a, b in zip(list(layers), list(layers)[1:], strict=False)]
    return PackedModel(
        [*steps, output(tuple(map(Ref, layers)))], layers, [InputSpec((2, 5, 6, 7), torch.float32)]
    )


def _pixels(n_out: int, channels: int, pixels: int) -> BinaryTensor:
    """A dense weight over flattened words: the bits behind each pixel's channels are 0."""
    packed = pack(values(n_out * pixels, channels, seed=5), dim=1).words.reshape(n_out, -1)
    return BinaryTensor(packed, Layout((n_out, packed.shape[1] * 32), 1, torch.float32))


def residual() -> PackedModel:
    """Real values beside words: residuals, every operator of profile ``bits``, keywords, a dict."""
    tail = {"scale": values(8, seed=11).abs() + 0.25, "shift": values(8, seed=12), "dtype": "float32"}
    behind = {name: values(8, seed=50 + i) for i, name in enumerate(("slope", "post_shift", "sign_shift"))}
    layers = {
        "stem": RealConv2d(**conv(8, 3, 3, 10), bias=values(8, seed=13)),
        "max": MaxPool(**POOL),
        "signs": Pack(dim=1, length=8, groups=2),
        "both": PackedConv2d(**conv(8, 4, 3, 14, groups=2, padding_value=1), **tail, **behind, emits="both"),
        "last": PackedConv2d(
            **conv(8, 8, 1, 15, padding=[0, 0]), **tail, emits="values", low=-3, high=5, relu=True
        ),
        "bits": PackedConv2d(**conv(8, 8, 1, 15, padding=[0, 0]), **tail, emits="signs"),
        "plain": PackedConv2d(**conv(4, 8, 1, 16, padding=[0, 0], dtype="float32"), bias=values(4, seed=17)),
        "rows": Pack(dim=-1, length=12, groups=1),
        "row": PackedLinear(
            bits(12, 12, seed=18), emits="both", scale=values(12, seed=19), shift=values(12, seed=20),
            dtype="float32",
        ),
        "after": PackedLinear(bits(5, 12, seed=21), dtype="float32"),
        "real": RealLinear(bits(2, 12, seed=22), bias=values(2, seed=23)),
        "held": Constant(values(1, 4, 1, 1, seed=24)),
    }  # fmt: skip
    constants = {
        "slope": values(8, seed=25), "mean": values(8, seed=26), "var": values(8, seed=27).abs() + 0.5,
        "gain": values(8, seed=28), "beta": values(8, seed=29), "kernel": values(8, 2, 3, 3, seed=30),
        "matrix": values(4, 12, seed=31),
    }  # fmt: skip
    steps = [
        Step("x", "input"), layer("stem", "x"),
        aten(
            "norm", "batch_norm.default", Ref("stem"), *map(Ref, ("gain", "beta", "mean", "var")), False, 0.1,
            1e-5, True,
        ),
        aten("prelu", "prelu.default", Ref("norm"), Ref("slope")), layer("max", "prelu"),
        layer("signs", "max"), layer("both", "signs", "max"),
        Step("image", "operator", "getitem", (Ref("both"), 0)),
        Step("image_signs", "operator", "getitem", (Ref("both"), 1)),
        Step("last", "layer", "last", (Ref("image_signs"),), {"residual": Ref("image")}),
        layer("bits", "image_signs", "last"), layer("plain", "bits"), layer("held"),
        aten("conv", "conv2d.default", Ref("last"), Ref("kernel"), None, [1, 1], [1, 1], [1, 1], 4),
        aten("pooled", "avg_pool2d.default", Ref("conv"), [3, 3], [1, 1], [1, 1], False, False),
        aten("leaky", "leaky_relu.default", Ref("pooled"), 0.25),
        aten("clip", "hardtanh.default", Ref("leaky"), -6, 6.5),
        aten("sum", "add.Tensor", Ref("clip"), Ref("last"), alpha=0.5),
        aten("clamped", "clamp.default", Ref("sum"), None, 20),
        aten("small", "adaptive_avg_pool2d.default", Ref("clamped"), [1, 3]),
        aten("order", "permute.default", Ref("small"), [0, 2, 3, 1]),
        aten("dense", "contiguous.default", Ref("order")), aten("n", "sym_size.int", Ref("x"), 0),
        Step("twice", "operator", "int.mul", (Ref("n"), 2)),
        aten("view", "view.default", Ref("dense"), [Ref("twice"), -1]), layer("rows", "view"),
        layer("row", "rows"), Step("value", "operator", "getitem", (Ref("row"), 0)),
        Step("sign", "operator", "getitem", (Ref("row"), 1)), layer("after", "sign"),
        layer("real", "value"), aten("linear", "linear.default", Ref("value"), Ref("matrix")),
        aten("soft", "softmax.int", Ref("linear"), 1), aten("log", "log_softmax.int", Ref("linear"), -1),
        aten("half", "mul.Tensor", Ref("plain"), 0.5),
        aten("grown", "expand_as.default", Ref("held"), Ref("half")),
        aten("once", "sub.Tensor", Ref("half"), Ref("grown")), aten("third", "div.Tensor", Ref("once"), 3.0),
        aten("same", "expand.default", Ref("third"), [-1, 4, -1, -1]),
        aten("shifted", "sub.Tensor", Ref("same"), Ref("held")),
        aten("positive", "relu.default", Ref("shifted")),
        aten("flat", "flatten.using_ints", Ref("positive"), 2), aten("neg", "neg.default", Ref("flat")),
        aten("mean_", "mean.dim", Ref("neg"), [2], True),
        aten("again", "reshape.default", Ref("mean_"), [Ref("n"), 4]),
        aten("joined", "cat.default", [Ref("after"), Ref("real")], 1),
        output({
            "joined": Ref("joined"), "pair": (Ref("soft"), [Ref("log")]), "again": Ref("again"),
            "n": Ref("n"), "none": None,
        }),
    ]  # fmt: skip
    signature = Signature(
        (Parameter("image", "any"), Parameter("scale", "keyword", 1.5), Parameter("mask", "keyword", None)),
        {"image": Ref("x"), "scale": 1.5, "mask": None},
    )
    spec = InputSpec((2, 3, 6, 7), torch.float32, (True, False, False, False))
    return PackedModel(steps, layers, [spec], constants, signature)


def signed() -> PackedModel:
    """Images of bytes, rows of 8 bits and of real numbers by signs."""
    bytes = {"dtype": "float32", "input": "uint8", "multiplier": 2, "zero_point": 255}
    sizes: dict[str, Any] = {"stride": [2, 1], "dilation": [1, 2]}
    tail = {"scale": values(6, seed=62) / 64, "shift": values(6, seed=63), "emits": "both", "relu": True}
    layers = {
        "bits": SignedConv2d(**conv(36, 3, 3, 60), **bytes, threshold=thresholds(36, 61) * 50),
        "both": SignedConv2d(**{**conv(6, 1, 3, 64, groups=3), **sizes}, **bytes, **tail),
        "rows": QuantizeRows(per_row=True),
        "one": QuantizeRows(per_row=False),
        "eight": SignedLinear(bits(5, 90, seed=65), dtype="float32", input="int8", low=-900, emits="values"),
        "real": SignedLinear(bits(7, 90, seed=66), dtype="float32", input="real", bias=values(7, seed=67)),
    }
    steps = [
        Step("x", "input"), layer("bits", "x"), layer("both", "x"),
        Step("image", "operator", "getitem", (Ref("both"), 0)),
        Step("signs", "operator", "getitem", (Ref("both"), 1)),
        aten("row", "flatten.using_ints", Ref("image"), 1), layer("rows", "row"), layer("one", "row"),
        Step("q", "operator", "getitem", (Ref("rows"), 0)),
        Step("q_scale", "operator", "getitem", (Ref("rows"), 1)), layer("eight", "q", "q_scale"),
        Step("one_q", "operator", "getitem", (Ref("one"), 0)),
        Step("one_scale", "operator", "getitem", (Ref("one"), 1)), layer("real", "row"),
        output((
            Ref("bits"), Ref("image"), Ref("signs"), Ref("q"), Ref("q_scale"), Ref("eight"), Ref("one_q"),
            Ref("one_scale"), Ref("real"),
        )),
    ]  # fmt: skip
    return PackedModel(steps, layers, [InputSpec((2, 3, 6, 7), torch.uint8)])


def of_torch() -> PackedModel:
    """Profile ``torch``: other operators and dtypes, nested arguments, numbers that JSON does not know."""
    steps = [
        Step("ids", "input"), Step("mask", "input"),
        aten("rows", "embedding.default", Ref("table"), Ref("ids")),
        aten("filled", "masked_fill.Scalar", Ref("rows"), Ref("mask"), float("-inf")),
        aten("top", "topk.default", Ref("filled"), 2, 1),
        Step("best", "operator", "getitem", (Ref("top"), 0)),
        Step("at", "operator", "getitem", (Ref("top"), 1)),
        aten("double", "to.dtype", Ref("best"), torch.float64), aten("erf", "erf.default", Ref("double")),
        aten("stack", "stack.default", [Ref("erf"), Ref("erf")], -1),
        aten("last", "clone.default", Ref("stack"), memory_format=torch.contiguous_format),
        output((Ref("last"), Ref("at"))),
    ]  # fmt: skip
    signature = Signature(
        (Parameter("ids", "positional"), Parameter("more", "kwargs")),
        {"ids": Ref("ids"), "more": {"pair": (Ref("mask"), float("inf"), "text")}},
    )
    inputs = [InputSpec((2, 3), torch.int64, (True, False)), InputSpec((2, 3, 4), torch.bool)]
    return PackedModel(steps, {}, inputs, {"table": values(9, 4, seed=33)}, signature)


def calls() -> dict[str, tuple[PackedModel, tuple[Any, ...], dict[str, Any]]]:
    """Every golden model with one call of it."""
    mask = torch.zeros(2, 3, 4, dtype=torch.bool)
    mask[0, 1:, 2] = True
    ids = torch.tensor([[1, 2, 8], [0, 4, 4]])
    return {
        "words": (words(), (values(2, 5, 6, 7, seed=40),), {}),
        "residual": (residual(), (values(2, 3, 6, 7, seed=41),), {"scale": 1.5}),
        "signed": (signed(), ((values(2, 3, 6, 7, seed=68) * 40 + 120).to(torch.uint8),), {}),
        "torch": (of_torch(), (ids,), {"pair": (mask, float("inf"), "text")}),
    }


def leaves(tree: Any) -> list[np.ndarray]:
    """The tensors of a result in order, as arrays."""
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        return [array for inner in tree for array in leaves(inner)]
    return [tree.numpy()] if isinstance(tree, Tensor) else []


if __name__ == "__main__":
    for name, (model, args, kwargs) in calls().items():
        model.save(DATA / f"packed_{name}.safetensors")
        arrays = {str(i): array for i, array in enumerate(leaves(model(*args, **kwargs)))}
        np.savez(DATA / f"packed_{name}.npz", **arrays)
