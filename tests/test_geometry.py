"""The geometry of a convolution: sizes as torch computes them, and every limit, on either side of it."""

from __future__ import annotations

import ast
import inspect
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bop2nd_fast.kernels import geometry
from bop2nd_fast.kernels.geometry import Arguments, Geometry, pair

SMALL: dict[str, Any] = {
    "image": (8, 64),
    "kernel": (3, 3),
    "channels": 64,
    "outputs": 32,
    "stride": (1, 1),
    "padding": (1, 1),
    "dilation": (1, 1),
    "groups": 2,
    "padding_value": 0,
}


def made(**changes: Any) -> Geometry:
    given = {**SMALL, **changes}
    arguments = Arguments(*(given.pop(name) for name in Arguments._fields))
    return Geometry.of(**given, arguments=arguments)


def test_sizes_are_those_of_torch() -> None:
    rng = random.Random(3)
    seen = 0
    for _ in range(300):
        image, kernel, stride, dilation = (
            (rng.randint(1, 9), rng.randint(1, 9)),
            *((rng.randint(1, 3), rng.randint(1, 3)) for _ in range(3)),
        )
        padding = rng.randint(0, 3), rng.randint(0, 3)
        g = made(image=image, kernel=kernel, stride=stride, padding=padding, dilation=dilation)
        weight = torch.zeros(32, 32, *kernel)
        if min(g.out) < 1:
            with pytest.raises(ValueError, match="smaller than the kernel"):
                g.check()
            continue
        seen += 1
        got = F.conv2d(torch.zeros(1, 64, *image), weight, None, stride, padding, dilation, 2)
        assert g.check(5) is g and got.shape[2:] == g.out
        assert (g.channels, g.words, g.outputs, g.image_words) == (32, 1, 16, 2)
        assert g.pixels(5) == 5 * got.shape[2] * got.shape[3] and g.taps == kernel[0] * kernel[1]
        assert g.arguments == (stride, padding, dilation, 2, 0) == g[:5]
    assert seen > 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stride": (2**62, 4), "kernel": (1, 1)}, "stride must be below"),
        ({"stride": (0, 1)}, "stride must be one or two integers >= 1"),
        ({"padding": (-1, 0)}, "padding must be"),
        ({"padding": ((2**64 - 2) // 3, 1)}, "padding must be below"),
        ({"dilation": (1, 2**31)}, "dilation must be below"),
        ({"dilation": (2**20, 1), "padding": (2**20, 1), "channels": 2048}, "words of the padded input"),
        ({"padding": (2**30, 2**30)}, "padded image's height is 2147483656"),
        ({"padding": (0, 2**30), "channels": 2}, "padded image's width"),
        ({"channels": 0, "outputs": 0, "groups": 2**62}, "groups is 4611686018427387904, allowed"),
        ({"kernel": (0, 3)}, "kernel must be"),
        ({"kernel": (2**10, 2**10), "padding": (2**9, 2**9), "channels": 4096}, "products of one output"),
        ({"padding_value": 2}, "padding_value must be 0, 1 or -1, got 2"),
        ({"dilation": (9, 9)}, "smaller than the kernel"),
        ({"outputs": 2**32}, "outputs is 4294967296"),
        ({"groups": 0}, "groups is 0"),
        ({"channels": 63}, "groups=2 does not divide 63 channels"),
    ],
)  # fmt: skip
def test_what_is_over_a_limit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**changes).check()


def test_the_batch_counts() -> None:
    wide = made(image=(2**15, 2**14), channels=64, padding=(0, 0))
    wide.check(1)
    with pytest.raises(ValueError, match="words of the padded input"):
        wide.check(2)
    many = made(outputs=2**27)
    many.check(1)
    with pytest.raises(ValueError, match=r"products, allowed are less than 2\*\*60"):
        many.check(2**20)
    with pytest.raises(ValueError, match="batch is -1"):
        made().check(-1)
    assert made(channels=0, outputs=0, groups=1).check(0) and made(channels=0).check(0)


def test_the_largest_sizes_are_allowed() -> None:
    assert made(image=(2**31 - 1, 1), kernel=(1, 1), padding=(0, 0), channels=2, groups=1).check()
    with pytest.raises(ValueError, match="words of the padded input"):
        made(image=(2**31 - 1, 1), kernel=(1, 1), padding=(0, 0), channels=33, groups=1).check()
    assert made(stride=(2**31 - 1, 2**31 - 1)).check().out == (1, 1)


def test_pairs() -> None:
    assert pair(3, "stride", 1) == (3, 3) and pair([1, 2], "stride", 1) == (1, 2)
    assert pair(np.int64(3), "stride", 1) == (3, 3) and type(pair(np.int64(3), "stride", 1)[0]) is int
    for wrong in (0, (1, 0), (1,), (1, 2, 3), 1.0, "11", None, True, (1, None)):
        with pytest.raises(ValueError, match="stride must be one or two integers >= 1"):
            pair(wrong, "stride", 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="stride must be below"):
        pair(2**31, "stride", 1)


def test_it_imports_neither_torch_nor_triton() -> None:
    """The runtime without torch, the file reader and the kernels all build on it."""
    imported = {
        name
        for node in ast.walk(ast.parse(inspect.getsource(geometry)))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module])
    }
    assert imported <= {"__future__", "collections.abc", "functools", "operator", "typing"}
