"""Triton's binary convolution against the specification, both inner loops forced in turn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bop2nd_fast import reference
from tests.epilogues import epilogues, refused_epilogues
from tests.triton_device import DEVICE, runnable, same

if reason := runnable():
    pytest.skip(reason, allow_module_level=True)
from bop2nd_fast.kernels import binary_conv2d as kernels
from bop2nd_fast.kernels.tuning import DECODE, POPCOUNT, MatmulTile, conv_tile

TILES = {
    "popcount": MatmulTile("popcount", 32, 32, 1, 4),
    "decode": MatmulTile("decode", 32, 32, 1, 4),
    "decode through shared": MatmulTile("decode", 64, 32, 2, 4, weights_in_shared=True),
}
# Each line: image (N, C, H, W), outputs, kernel, stride, padding, dilation, groups. All values differ.
CASES = {
    "3x3, odd channels": ((2, 3, 5, 7), 5, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "1x1": ((1, 65, 4, 5), 33, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "strides and dilation": ((1, 40, 9, 11), 8, (3, 2), (2, 3), (2, 1), (1, 2), 1),
    "groups": ((1, 70, 5, 6), 6, (2, 3), (1, 2), (1, 2), (1, 1), 2),
    "whole words per group": ((1, 64, 6, 5), 64, (3, 3), (1, 1), (1, 1), (1, 1), 2),
    "padding wider than the image": ((1, 33, 2, 3), 4, (3, 3), (1, 1), (3, 2), (1, 1), 1),
}
PADDED = ("3x3, odd channels", "strides and dilation", "groups")
Case = tuple[tuple[int, ...], int, tuple[int, int], Any, Any, Any, int]


def operands(case: Case) -> tuple[Tensor, Tensor, list[Any]]:
    """Float input, weight words, and the geometry without the padding value."""
    image, outputs, kernel, stride, padding, dilation, groups = case
    generator = torch.Generator().manual_seed(sum(image) + outputs)
    x = torch.randn(image, generator=generator)
    w = torch.randn(outputs, image[1] // groups, *kernel, generator=generator)
    return x.to(DEVICE), reference.pack_bits(w.to(DEVICE), 1), [stride, padding, dilation, groups]


@pytest.mark.parametrize(("loop", "name", "padding_value"), [
    *((loop, name, 0) for loop in TILES for name in CASES),
    *((loop, name, value) for loop in ("popcount", "decode") for name in PADDED for value in (1, -1)),
])  # fmt: skip
def test_packed_dots_and_threshold_bits(loop: str, name: str, padding_value: int) -> None:
    x, w, geometry = operands(CASES[name])
    words, _ = reference.pack_bits_ste(x, 1, geometry[-1])
    arguments = (words, w, x.shape[1], *geometry, padding_value)
    threshold = (torch.arange(w.shape[0], device=DEVICE, dtype=torch.int32) % 9) - 4
    bits = {"values": False, "signs": True, "threshold": threshold}
    for asked in ({}, bits) if padding_value == 0 else ({},):
        actual = kernels.binary_conv2d_packed(*arguments, tile=TILES[loop], **asked)
        expected = reference.binary_conv2d_packed(*arguments, **asked)
        assert all(a.is_contiguous() and torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("name", ["1x1", "groups"])  # sign words by the kernel, and from values in memory
@pytest.mark.parametrize("loop", TILES)
def test_epilogue(loop: str, name: str) -> None:
    x, w, geometry = operands(CASES[name])
    arguments = (reference.pack_bits_ste(x, 1, geometry[-1])[0], w, x.shape[1], *geometry, 0)
    dots = reference.binary_conv2d_packed(*arguments)[0]
    for asked in list(epilogues(tuple(dots.shape), DEVICE))[:: 1 if (loop, name) == ("decode", "1x1") else 5]:
        actual = kernels.binary_conv2d_packed(*arguments, tile=TILES[loop], **asked)
        assert all(map(same, actual, reference.epilogue(dots, **asked))), sorted(asked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ste_clip", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_float_input(dtype: torch.dtype, ste_clip: bool, channels_last: bool) -> None:
    x, w, geometry = operands(CASES["groups"])
    x = x.to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    actual = kernels.binary_conv2d(x, w, *geometry, -1, ste_clip)
    expected = reference.binary_conv2d(x, w, *geometry, -1, ste_clip)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype and a.stride() == e.stride() and torch.equal(a, e)


def test_the_tables_tiles() -> None:
    for image, outputs in (((1, 96, 6, 7), 72), ((2, 64, 5, 5), 64), ((1, 32, 4, 4), 32)):
        x, w, geometry = operands((image, outputs, (3, 3), (1, 1), (1, 1), (1, 1), 1))
        expected = reference.binary_conv2d(x, w, *geometry, 0, True)
        actual = kernels.binary_conv2d(x, w, *geometry, 0, True)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert conv_tile("sm90", 8, 4) is POPCOUNT
    assert conv_tile("sm90", 64, 2).block_words == 2
    assert conv_tile("sm90", 512, 16) == DECODE["sm90", "wide"]
    assert conv_tile("sm100", 512, 16).block_words == 2


def test_wrong_arguments_raise() -> None:
    x, w, geometry = operands(CASES["1x1"])
    words = reference.pack_bits(x, 1)
    with pytest.raises(ValueError, match="do not hold 1 groups of 97 channels"):
        kernels.binary_conv2d_packed(words, w, 97, *geometry, 0)
    with pytest.raises(ValueError, match="must be 0, 1 or -1"):
        kernels.binary_conv2d_packed(words, w, 65, *geometry, 2)
    for arguments, message in (
        (([1, 1], [-2, 0], [1, 1], 1, 0), "padding must be"),
        (([1, 1], [0, 0], [2**31, 1], 1, 0), "dilation must be below"),
        (([1, 1], [2**30, 0], [1, 1], 1, 0), "padded image's height"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.binary_conv2d_packed(words, w, 65, *arguments)
    for asked, message in refused_epilogues((1, 4, 4, 33), DEVICE):
        with pytest.raises(ValueError, match=message):
            kernels.binary_conv2d_packed(words, w, 65, *geometry, 0, **asked)
