"""Triton packing and unpacking against the specification, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bop2nd_fast import reference
from tests.triton_device import DEVICE, runnable

if reason := runnable():
    pytest.skip(reason, allow_module_level=True)
from bop2nd_fast.kernels import pack_bits as kernels

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = (0, 1, 31, 32, 33, 63, 64, 65, 513, 4103)


def values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers with zeros of both signs, +-1, NaN and infinities strewn in."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator)
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, float("nan"), float("inf"), -float("inf"), 1e-40, -1e-40])
    pick = torch.randint(0, 30, shape, generator=generator)
    x = torch.where(pick < 9, special[pick.clamp(max=8)], x)
    return x.to(dtype).to(DEVICE)


def check(x: Tensor, dim: int, groups: int = 1) -> None:
    expected = reference.pack_bits_ste(x, dim, groups)
    actual = kernels.pack_bits_ste(x, dim, groups)
    for a, e in zip(actual, expected, strict=True):
        assert a.is_contiguous() and a.dtype == torch.int32
        assert torch.equal(a, e)
    if groups == 1:
        assert torch.equal(kernels.pack_bits(x, dim), expected[0])


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_length(dtype: torch.dtype) -> None:
    for length in LENGTHS:
        check(values(length, dtype=dtype), 0)
        check(values(3, length, dtype=dtype), -1)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("channels", "groups"), [(3, 1), (33, 1), (64, 1), (64, 2), (40, 2), (99, 3)])
def test_images(dtype: torch.dtype, channels: int, groups: int) -> None:
    x = values(2 if channels == 33 else 1, channels, 5, 7, dtype=dtype)
    check(x, 1, groups)
    check(x.contiguous(memory_format=torch.channels_last), 1, groups)


def test_columns_longer_than_a_block() -> None:
    check(values(1, 33, 23, 25), 1)
    check(values(70, 129), 0)


def test_other_axes_and_strides() -> None:
    x = values(3, 34, 5)
    for dim in (0, 1, 2, -1, -2):
        check(x, dim)
        check(x.transpose(0, 2), dim)
        check(x[1::2, :, ::3], dim)


@pytest.mark.parametrize("dtype", FLOATS)
def test_unpacking(dtype: torch.dtype) -> None:
    for length in LENGTHS:
        words = reference.pack_bits(values(5, length))
        actual = kernels.unpack_bits(words, length, dtype=dtype)
        assert actual.dtype == dtype and torch.equal(
            actual, reference.unpack_bits(words, length, dtype=dtype)
        )
    words = reference.pack_bits(values(2, 40, 3, 5), 1)
    actual = kernels.unpack_bits(words, 40, 1, dtype=dtype)
    expected = reference.unpack_bits(words, 40, 1, dtype=dtype)
    assert torch.equal(actual, expected) and actual.stride() == expected.stride()


@pytest.mark.parametrize("dtype", FLOATS)
def test_applying_a_mask(dtype: torch.dtype) -> None:
    for shape in ((3, 0), *((3, length) for length in LENGTHS[1:-1]), (2, 3, 2, 40)):
        mask = reference.pack_bits_ste(values(*shape).flip(0))[1]
        grad = values(*shape, dtype=dtype)
        expected = grad.clone()
        reference.apply_mask_(expected, mask)
        kernels.apply_mask_(grad, mask)
        assert torch.equal(grad.view(torch.uint8), expected.view(torch.uint8))  # NaN and -0.0 too
    grad = values(6, 40)
    halves, mask = grad.clone(), reference.pack_bits_ste(values(6, 40).flip(0))[1]
    kernels.apply_mask_(halves[2:4], mask[2:4])  # a tile of a larger tensor
    reference.apply_mask_(grad[2:4], mask[2:4])
    assert torch.equal(halves.view(torch.uint8), grad.view(torch.uint8))


def test_wrong_arguments_raise() -> None:
    with pytest.raises(TypeError, match="float64"):
        kernels.pack_bits(values(4).double())
    with pytest.raises(ValueError, match="groups=3 does not divide 4"):
        kernels.pack_bits_ste(values(4), 0, 3)
    with pytest.raises(ValueError, match="1 words do not hold 33"):
        kernels.unpack_bits(torch.zeros(2, 1, dtype=torch.int32, device=DEVICE), 33)
    with pytest.raises(TypeError, match="float64"):
        kernels.unpack_bits(torch.zeros(2, 1, dtype=torch.int32, device=DEVICE), 32, dtype=torch.float64)
    mask = torch.zeros(2, 2, dtype=torch.int32, device=DEVICE)
    for grad, match in (
        (values(2, 33).double(), "float64"),
        (values(33, 2).T, "not contiguous"),
        (values(2, 65), "do not fit"),
        (values(3, 33), "do not fit"),
    ):
        with pytest.raises((TypeError, ValueError), match=match):
            kernels.apply_mask_(grad, mask)
