"""Operators called directly with sizes of any magnitude: every backend computes as the reference, or refuses.

Numbers are drawn around 0, powers of two, 2**31, 2**62 and below 0, a few of them in a call that is otherwise
sound. Nothing may crash, hang, or take memory for sizes that are refused. `make fuzz` searches longer;
`make sanitize-python` does it under the address and undefined-behaviour sanitizers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bop2nd_fast import backends
from bop2nd_fast.kernels.geometry import Arguments, words_for
from bop2nd_fast.ops.product import conv_geometry, geometry_of

ops = torch.ops.bop2nd
REFUSALS = (ValueError, TypeError, RuntimeError)
MOST = 1 << 21  # elements and products of a call that is worth running
Call = tuple[str, Callable[[], Any], int]  # name, the call, what it costs if it is not refused


class Draw:
    """Small sizes; of the numbers of one call, about one is wild."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.chance = self.random.choice([0.0, 0.05, 0.1, 0.25])

    def wild(self) -> int:
        power = 1 << self.random.choice([*range(34), 40, 47, 53, 60, 61, 62])
        number = self.random.choice([0, -1, 2**31, 2**32 + 1, 2**62, 2**63 - 1, power, power, power])
        number += self.random.choice([0, 0, 1, -1]) if number < 2**62 else 0
        return -number if self.random.random() < 0.1 else number

    def number(self, low: int, high: int) -> int:
        return self.wild() if self.random.random() < self.chance else self.random.randint(low, high)

    def pair(self, low: int, high: int) -> list[int]:
        return [self.number(low, high), self.number(low, high)]

    def flag(self) -> bool:
        return self.random.random() < 0.5

    def tensor(self, shape: list[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Random where it is small, else one element in many places."""
        if self.random.random() < self.chance / 8:
            shape = shape[1:] if self.flag() else [1, *shape]
        if self.random.random() < self.chance / 8:
            dtype = self.random.choice([torch.int32, torch.float64, torch.complex64, torch.int8, torch.bool])
        if math.prod(shape) > 1 << 16 or min(shape, default=1) < 0:
            return torch.zeros(1, dtype=dtype).expand(shape)
        generator = torch.Generator().manual_seed(self.random.randrange(2**31))
        if dtype.is_floating_point:
            return torch.randint(-4, 5, shape, generator=generator).to(dtype)
        return torch.randint(0, 2, shape, generator=generator).to(dtype)

    def words(self, *shape: int, length: int) -> Tensor:
        """Words whose tail bits are 0, in the packed axis of the last size."""
        tensor = self.tensor([*shape, words_for(length) if length >= 0 else 0], torch.int32)
        if (
            tensor.dtype == torch.int32
            and tensor.dim()
            and 0 < tensor.numel() <= 1 << 16
            and 0 < length < 1 << 21
        ):
            values = torch.randn(*tensor.shape[:-1], tensor.shape[-1] * 32)[..., :length]
            tensor = ops.pack_bits(values) if words_for(length) == tensor.shape[-1] else tensor
        return tensor

    def convolution(self) -> tuple[list[Any], dict[str, Any]]:
        groups = self.number(1, 3) if self.flag() else 1
        per_group, outputs = self.number(0, 70), self.number(0, 20)
        sizes = {
            "batch": self.number(0, 2),
            "image": self.pair(1, 8),
            "kernel": self.pair(1, 3),
            "per_group": per_group,
            "channels": self.number(0, 5) if self.random.random() < 0.05 else groups * per_group,
            "outputs": outputs if self.random.random() < 0.05 else groups * outputs,
        }
        if groups > 0 and sizes["channels"] % groups == 0:
            sizes["per_group"] = sizes["channels"] // groups
        how = [self.pair(1, 3), self.pair(0, 3), self.pair(1, 2), groups]
        return [*how, self.random.choice([0, 1, -1]) if self.random.random() > self.chance / 4 else 2], sizes


def cost(batch: int, image: list[int], channels: int, w: Tensor, how: list[Any]) -> int:
    """Elements and products of a convolution, at most; of one that is refused 0."""
    try:
        g = conv_geometry(batch, image, channels, w, Arguments.taken(how)[0])
    except REFUSALS:
        return 0
    padded = math.prod(size + 2 * p for size, p in zip(g.image, g.padding, strict=True))
    pixels, words = g.out[0] * g.out[1], max(1, g.words)
    work = pixels * max(1, g.all_outputs) * g.taps
    return max(1, batch) * (max(padded, math.prod(image)) * g.groups + work) * words * 32


def convolution(d: Draw) -> Call:
    how, s = d.convolution()
    x = d.tensor([s["batch"], s["channels"], *s["image"]], d.random.choice([torch.float32, torch.bfloat16]))
    w = d.words(s["outputs"], *s["kernel"], length=s["per_group"])
    clip = d.flag()
    n, c, *image = x.shape if x.dim() == 4 else (0, 0, 0, 0)
    return "binary_conv2d", lambda: ops.binary_conv2d(x, w, *how, clip), cost(n, image, c, w, how)


def packed_convolution(d: Draw) -> Call:
    how, s = d.convolution()
    w = d.words(s["outputs"], *s["kernel"], length=s["per_group"])
    shape = [s["batch"], *s["image"], how[3]]
    x = d.words(*shape, length=s["per_group"])
    x = x.flatten(-2) if x.dim() == 5 and 0 <= how[3] < 100 else x
    asked = {"values": d.flag(), "signs": d.flag()}
    return (
        "binary_conv2d_packed",
        lambda: ops.binary_conv2d_packed(x, w, s["channels"], *how, **asked),
        cost(*x.shape[:1], list(x.shape[1:3]), s["channels"], w, how) if x.dim() == 4 else 0,
    )


def backward(d: Draw) -> Call:
    how, s = d.convolution()
    w = d.words(s["outputs"], *s["kernel"], length=s["per_group"])
    signs = d.words(s["batch"], *s["image"], how[3], length=s["per_group"])
    signs = signs.flatten(-2) if signs.dim() == 5 and 0 <= how[3] < 100 else signs
    mask = torch.zeros(0, dtype=torch.int32) if d.flag() else signs
    try:
        sizes = (s[n] for n in ("batch", "image", "channels", "outputs", "kernel"))
        g = geometry_of(*sizes, Arguments.taken(how)[0])
        out = list(g.out)
    except REFUSALS:
        out = d.pair(0, 5)
    grad = d.tensor([s["batch"], s["outputs"], *out])
    needs = (d.flag(), d.flag())
    call = lambda: ops.binary_conv2d_backward(grad, signs, mask, w, s["channels"], *how, *needs)  # noqa: E731
    many = cost(*signs.shape[:1], list(signs.shape[1:3]), s["channels"], w, how) if signs.dim() == 4 else 0
    return "binary_conv2d_backward", call, many


def linear(d: Draw) -> Call:
    rows, features, outputs = [d.number(0, 5), d.number(0, 3)], d.number(0, 80), d.number(0, 70)
    other = d.number(0, 80) if d.random.random() < 0.05 else features
    w = d.words(outputs, length=features if words_for(other) == words_for(features) else other)
    many = max(1, math.prod(rows)) * max(1, outputs) * max(32, features)
    flag = d.flag()
    which = d.random.choice(["binary_linear", "binary_linear_packed", "binary_linear_backward"])
    if which == "binary_linear":
        x = d.tensor([*rows, features])
        return which, lambda: ops.binary_linear(x, w, flag), many
    signs = d.words(*rows, length=features)
    if which == "binary_linear_packed":
        return which, lambda: ops.binary_linear_packed(signs, w, features, signs=flag), many
    grad = d.tensor([*rows, outputs])
    mask = torch.zeros(0, dtype=torch.int32) if d.flag() else signs
    return which, lambda: ops.binary_linear_backward(grad, signs, mask, w, features, True, True), many


def packing(d: Draw) -> Call:
    shape = [d.number(0, 5) for _ in range(d.random.randint(0, 3))]
    length, dim, groups = d.number(0, 70), d.number(-3, 2), d.number(1, 3)
    many = abs(math.prod(shape)) * max(32, abs(length))
    which = d.random.choice(["pack_bits", "pack_bits_ste", "unpack_bits", "apply_mask_", "prepack_weight"])
    if which == "unpack_bits":
        words = d.words(*shape, length=length)
        n = length if d.random.random() > 0.1 else d.number(-40, 70)
        dtype = d.random.choice([torch.float32, torch.float16, torch.float64, torch.int8, torch.bool])
        return which, lambda: ops.unpack_bits(words, n, dim, dtype=dtype), many
    if which == "prepack_weight":
        words = d.words(*shape, length=length)
        return which, lambda: ops.prepack_weight(words, groups), many * 16
    x = d.tensor([*shape, length])
    if which == "apply_mask_":
        mask = d.words(*shape, length=length)
        mask = mask.reshape(-1) if d.random.random() < 0.1 and mask.numel() < 1 << 16 else mask

        def masked() -> Tensor:
            grad = x.clone()
            ops.apply_mask_(grad, mask)
            return grad

        return which, masked, many
    if which == "pack_bits":
        return which, lambda: ops.pack_bits(x, dim), many
    return which, lambda: ops.pack_bits_ste(x, dim, groups), many


KINDS = (convolution, packed_convolution, backward, backward, linear, packing)


def outcome(call: Callable[[], Any]) -> list[Tensor] | None:
    """The results, or None where the call is refused."""
    try:
        results = call()
    except REFUSALS:
        return None
    return [results] if isinstance(results, Tensor) else list(results)


def check_sizes(seed: int) -> str:
    """One call on the reference and on an instruction set; returns what it was and whether it was refused."""
    d = Draw(seed)
    try:
        name, call, many = d.random.choice(KINDS)(d)
    except REFUSALS:
        return "no such tensors"  # torch itself refuses them
    if many > MOST:
        return "too large to run"

    sets = [n for n in backends.INSTRUCTION_SETS if backends.why_not(n) is None]
    results = []
    for backend in ("reference", d.random.choice(sets)):
        with backends.use(backend):
            results.append(outcome(call))
    expected, ours = results
    assert (expected is None) == (ours is None), f"seed {seed}: {name} is refused by one of the two only"
    if expected is None or ours is None:
        return f"{name}: refused"
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), f"seed {seed}: {name} differs"
    return name


def check_many(seeds: range) -> None:
    seen = [check_sizes(seed) for seed in seeds]
    ran = {kind for kind in seen if ":" not in kind}
    assert len(ran) > 8 and len(set(seen)) > 16, sorted(set(seen))


def test_sizes() -> None:
    check_many(range(1500))


def test_negative_sizes_are_refused() -> None:
    odd = torch.zeros(1).expand(5, 0, -2)
    for backend in ("reference", "scalar"):
        with backends.use(backend), pytest.raises((ValueError, RuntimeError), match="negative size"):
            ops.pack_bits_ste(odd, -1, 1)


def test_many_outputs_of_no_words() -> None:
    """Once refused by the reference alone: nothing viewed as another dtype."""
    words = torch.zeros(32768, 0, 1, dtype=torch.int32)
    for backend in ("reference", *backends.INSTRUCTION_SETS[:1]):
        with backends.use(backend):
            assert ops.prepack_weight(words, 1).shape == (1, 0)


@pytest.mark.fuzz
def test_sizes_for_long() -> None:
    check_many(range(100_000, 100_000 + 60_000))
