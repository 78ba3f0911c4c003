"""Triton's binary linear layer against the specification, every inner loop forced in turn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bop2nd_fast import reference
from tests.epilogues import epilogues, refused_epilogues
from tests.triton_device import DEVICE, runnable, same

if reason := runnable():
    pytest.skip(reason, allow_module_level=True)
from bop2nd_fast.kernels import binary_linear as kernels
from bop2nd_fast.kernels.tuning import DECODE, POPCOUNT, ROWS, MatmulTile, linear_tile

TILES = {
    "rows": ROWS,
    "popcount": POPCOUNT,
    "decode": MatmulTile("decode", 32, 32, 4, 4),
    "decode through shared": MatmulTile("decode", 32, 32, 2, 4, weights_in_shared=True),
}
# rows, outputs, features: around blocks, words and turns
SIZES = [(1, 1, 1), (3, 31, 33), (33, 65, 63), (40, 32, 128), (5, 33, 257)]


def operands(rows: int, outputs: int, features: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + 3 * outputs + 5 * features)
    x = torch.randn(rows, features, generator=generator)
    w = torch.randn(outputs, features, generator=generator)
    return x.to(DEVICE), reference.pack_bits(w.to(DEVICE))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("loop", TILES)
def test_packed_dots_and_threshold_bits(loop: str, size: tuple[int, int, int]) -> None:
    x, w = operands(min(size[0], 5) if loop == "rows" else size[0], *size[1:])
    words = reference.pack_bits(x)
    threshold = (torch.arange(size[1], device=DEVICE, dtype=torch.int32) % 9) - 4
    for asked in ({}, {"values": False, "signs": True, "threshold": threshold}):
        expected = reference.binary_linear_packed(words, w, size[2], **asked)
        actual = kernels.binary_linear_packed(words, w, size[2], tile=TILES[loop], **asked)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("loop", TILES)
def test_epilogue(loop: str) -> None:
    x, w = operands(9, 37, 70)
    words = reference.pack_bits(x)
    dots = reference.binary_linear_packed(words, w, 70)[0]
    for asked in list(epilogues((9, 37), DEVICE))[:: 1 if loop == "popcount" else 3]:
        actual = kernels.binary_linear_packed(words, w, 70, tile=TILES[loop], **asked)
        assert all(map(same, actual, reference.epilogue(dots, **asked))), sorted(asked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ste_clip", [False, True])
def test_float_input(dtype: torch.dtype, ste_clip: bool) -> None:
    x, w = operands(12, 33, 65)
    x = x.to(dtype).view(3, 4, 65)
    actual = kernels.binary_linear(x, w, ste_clip)
    expected = reference.binary_linear(x, w, ste_clip)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype and a.shape == e.shape and torch.equal(a, e)


def test_no_rows_and_long_rows() -> None:
    x, w = operands(0, 33, 65)
    assert kernels.binary_linear(x, w, True)[0].shape == (0, 33)
    x, w = operands(2, 40, 4096 + 17)
    assert torch.equal(kernels.binary_linear(x, w, True)[0], reference.binary_linear(x, w, True)[0])
    x, w = operands(64, 32, 300)  # the table's decode tile
    assert torch.equal(kernels.binary_linear(x, w, False)[0], reference.binary_linear(x, w, False)[0])


def test_the_table_knows_every_chip_and_loop() -> None:
    for chip in ("sm80", "sm90", "sm100", "interpreter"):
        assert linear_tile(chip, 1, 4096) is ROWS
        assert linear_tile(chip, 16, 4096) is POPCOUNT
        assert linear_tile(chip, 4096, 4096).loop == "decode"
    assert [tile.weights_in_shared for (chip, _), tile in DECODE.items() if chip == "sm90"] == [True, True]


def test_wrong_arguments_raise() -> None:
    x, w = operands(2, 3, 64)
    words = reference.pack_bits(x)
    with pytest.raises(ValueError, match="do not hold 65 features"):
        kernels.binary_linear_packed(words, w, 65)
    for asked, message in refused_epilogues((2, 3), DEVICE):
        with pytest.raises(ValueError, match=message):
            kernels.binary_linear_packed(words, w, 64, **asked)
