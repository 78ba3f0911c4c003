"""Triton's gradients of the binary linear layer and convolution against the specification and float64.

Integer gradients make every sum exact in whatever order, so they are compared bit for bit.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bop2nd_fast import backends, reference
from bop2nd_fast.kernels.geometry import output_size
from bop2nd_fast.ops.binary_conv2d import _backward as conv_specification
from bop2nd_fast.ops.binary_linear import _backward as linear_specification
from tests.triton_device import DEVICE, runnable

if reason := runnable():
    pytest.skip(reason, allow_module_level=True)
from bop2nd_fast.kernels import conv_backward, gradient_product, linear_backward, tuning
from bop2nd_fast.kernels.tuning import GradientTile

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
TILES = {"small": GradientTile(32, 1, 32, 4), "two words": GradientTile(16, 2, 64, 4), "the table's": None}
# rows, outputs, features: around words and the small tiles' rows and turns
SIZES = [(1, 1, 1), (33, 31, 64), (31, 33, 65)]
# Each line: image (N, C, H, W), outputs, kernel, stride, padding, dilation, groups. All values differ.
IMAGES = {
    "3x3, odd channels": ((2, 3, 5, 4), 5, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "1x1, tail and seam": ((1, 65, 5, 7), 33, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "strides and dilation": ((1, 40, 9, 11), 8, (3, 2), (2, 3), (2, 1), (1, 2), 1),
    "groups": ((1, 70, 3, 5), 6, (1, 3), (1, 2), (1, 2), (1, 1), 2),
    "padding wider than the image": ((1, 33, 2, 3), 4, (2, 3), (1, 1), (3, 2), (1, 1), 1),
}

PADDED = ("groups", "3x3, odd channels")


def integers(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(-3, 4, shape, device=DEVICE).to(dtype)


def same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype and a.shape == e.shape and a.stride() == e.stride() and torch.equal(a, e)


def linear_operands(rows: int, outputs: int, features: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sign and mask words of an input, and weight words."""
    signs, mask = reference.pack_bits_ste(torch.randn(rows, features, device=DEVICE))
    return signs, mask, reference.pack_bits(torch.randn(outputs, features, device=DEVICE))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tile", TILES)
def test_linear(tile: str, dtype: torch.dtype) -> None:
    for rows, outputs, features in SIZES:
        signs, mask, w = linear_operands(rows, outputs, features)
        arguments = (integers(rows, outputs, dtype=dtype), signs, mask, w, features, True, True)
        actual = linear_backward.binary_linear_backward(*arguments, tile=TILES[tile])
        same(actual, linear_specification(*arguments))


def test_linear_shapes_and_strides() -> None:
    signs, mask, w = (t.unflatten(0, (2, -1)) if t.shape[0] == 6 else t for t in linear_operands(6, 9, 70))
    for gradient in (integers(9, 3, 2, dtype=torch.float32).permute(2, 1, 0), torch.ones(()).expand(2, 3, 9)):
        for needed in ((True, True), (True, False), (False, True)):
            bits = mask if needed[1] else mask.new_empty(0)
            arguments = (gradient.to(DEVICE), signs, bits, w, 70, *needed)
            same(linear_backward.binary_linear_backward(*arguments), linear_specification(*arguments))
    signs, mask, w = linear_operands(0, 9, 70)
    arguments = (torch.empty(0, 9, device=DEVICE), signs, mask, w, 70, True, True)
    same(linear_backward.binary_linear_backward(*arguments), linear_specification(*arguments))


def test_linear_in_partial_sums() -> None:
    signs, _, w = linear_operands(2049, 3, 40)
    gradient = integers(2049, 3, dtype=torch.float16)
    assert tuning.gradient_splits(3 * 2, 2049) == 2
    none = signs.new_empty(0)
    _, actual = linear_backward.binary_linear_backward(gradient, signs, none, w, 40, False, True)
    assert torch.equal(actual, gradient.float().T @ reference.unpack_bits(signs, 40))


def relative_error(actual: Tensor, exact: Tensor, scale: Tensor) -> float:
    return float(((actual.double() - exact).abs() / scale).max())


@pytest.mark.parametrize(("dtype", "precision", "bound"), [
    # 50 terms: an fp32 sum of n exact products is within n * 2**-24 of their magnitudes' sum
    (torch.float32, "ieee", 50 * 2**-24),
    (torch.float32, "tf32", 50 * 2**-24 + 2**-15),
    (torch.bfloat16, "ieee", 50 * 2**-24 + 2**-8),  # the result is stored in bf16
    (torch.float16, "ieee", 50 * 2**-24 + 2**-11),
])  # fmt: skip
def test_random_gradients_against_float64(
    dtype: torch.dtype, precision: str, bound: float, request: pytest.FixtureRequest
) -> None:
    matmul = torch.backends.cuda.matmul
    request.addfinalizer(partial(setattr, matmul, "fp32_precision", matmul.fp32_precision))
    matmul.fp32_precision = precision
    signs, _, w = linear_operands(50, 50, 70)
    gradient = torch.randn(50, 50, device=DEVICE).to(dtype)
    none = signs.new_empty(0)
    grad_input, grad_weight = linear_backward.binary_linear_backward(gradient, signs, none, w, 70, True, True)
    g = gradient.double()
    s, x = (reference.unpack_bits(t, 70, dtype=torch.float64) for t in (w, signs))
    assert relative_error(grad_input, g @ s, g.abs().sum(1, keepdim=True)) < bound
    sums = bound if dtype == torch.float32 else 50 * 2**-24  # the weight's gradient stays in fp32
    assert relative_error(grad_weight, g.T @ x, g.abs().sum(0)[:, None]) < sums
    if precision == "tf32":  # two parts were used, not three
        assert relative_error(grad_input, g @ s, g.abs().sum(1, keepdim=True)) > 2**-24


def test_large_and_tiny_gradients_keep_their_bits() -> None:
    signs, _, w = linear_operands(1, 1, 32)
    largest = torch.finfo(torch.float32).max
    for value in (largest, -largest, 1e-30, 1.0000001, -3.1415927):
        gradient = torch.full((1, 1), value, device=DEVICE)
        arguments = (gradient, signs, signs.new_empty(0), w, 32, True, True)
        same(linear_backward.binary_linear_backward(*arguments), linear_specification(*arguments))


def conv_arguments(name: str, padding_value: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments of the operator up to ``need_input``."""
    image, outputs, kernel, *geometry, groups = IMAGES[name]
    signs, mask = reference.pack_bits_ste(torch.randn(image, device=DEVICE), 1, groups)
    w = reference.pack_bits(torch.randn(outputs, image[1] // groups, *kernel, device=DEVICE), 1)
    size = [output_size(image[2 + i], kernel[i], *(parameter[i] for parameter in geometry)) for i in (0, 1)]
    gradient = integers(image[0], outputs, *size, dtype=dtype)
    return gradient, signs, mask, w, image[1], *geometry, groups, padding_value


@pytest.mark.parametrize(("name", "padding_value", "tile", "dtype"), [
    *((name, 0, "small", torch.float32) for name in IMAGES),
    *((name, value, "two words", torch.float32) for name in PADDED for value in (1, -1)),
    ("padding wider than the image", -1, "two words", torch.bfloat16),
    ("1x1, tail and seam", 0, "two words", torch.bfloat16),
    ("groups", 0, "two words", torch.float16),
    ("strides and dilation", -1, "the table's", torch.bfloat16),
])  # fmt: skip
def test_convolution(name: str, padding_value: int, tile: str, dtype: torch.dtype) -> None:
    arguments = (*conv_arguments(name, padding_value, dtype), True, True)
    actual = conv_backward.binary_conv2d_backward(*arguments, tile=TILES[tile])
    same(actual, conv_specification(*arguments))


def test_convolution_gradients_that_are_wanted() -> None:
    gradient, signs, mask, *rest = conv_arguments("1x1, tail and seam", 1, torch.float32)
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    for needed in ((True, False), (False, True)):
        arguments = (gradient, signs, mask.new_empty(0), *rest, *needed)
        actual = conv_backward.binary_conv2d_backward(*arguments, tile=TILES["two words"])
        same(actual, conv_specification(*arguments))
    empty = (gradient[:0], signs[:0], mask[:0], *rest, True, True)
    actual, expected = conv_backward.binary_conv2d_backward(*empty), conv_specification(*empty)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_convolution_in_partial_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_product, "gradient_splits", lambda result_words, inner: 3)
    for padding_value in (0, -1):
        arguments = (*conv_arguments("groups", padding_value, torch.float32), False, True)
        actual = conv_backward.binary_conv2d_backward(*arguments, tile=GradientTile(16, 2, 16, 4))
        same(actual, conv_specification(*arguments))


def test_the_tables() -> None:
    assert {tuning.gradient_tile("interpreter", dtype, 65) for dtype in FLOATS} == {
        tuning.GRADIENT_TILES["sm90", size, "wide"] for size in (2, 4)
    }
    assert tuning.gradient_tile("sm80", torch.float32, 64) == tuning.GRADIENT_TILES["sm80", 4, "narrow"]
    assert tuning.gradient_splits(512 * 264, 2**20) == 1  # enough programs without
    assert tuning.gradient_splits(1, 1023) == 1  # too little to sum
    assert tuning.gradient_splits(512 * 9, 65536) == 29
    assert gradient_product.parts_of(torch.bfloat16, "tf32") == 1


@pytest.mark.parametrize("runs", ["triton", "torch"])
def test_the_table_chooses_what_a_backend_runs(runs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = tuning.Choice(runs, "as the test says")
    monkeypatch.setitem(tuning.BACKWARD, "binary_linear_backward", choice)
    signs, mask, w = linear_operands(3, 5, 40)
    arguments = (integers(3, 5, dtype=torch.float32), signs, mask, w, 40, True, False)
    with backends.use("triton"):
        assert f"{runs}, as the test says" in backends.explain("binary_linear_backward", device="cuda")
        before = backends.calls()
        actual = torch.ops.bop2nd.binary_linear_backward(*arguments)
        after = backends.calls()
    assert (after["reference"] > before["reference"]) == (runs == "torch")
    same(actual, linear_specification(*arguments))


def test_wrong_arguments_raise() -> None:
    signs, mask, w = linear_operands(2, 3, 64)
    good = torch.ones(2, 3, device=DEVICE)
    for gradient, features, match in (
        (good.double(), 64, "float64"),
        (good, 65, "do not fit 65 features"),
        (torch.ones(2, 4, device=DEVICE), 64, "do not fit"),
    ):
        with pytest.raises((TypeError, ValueError), match=match):
            linear_backward.binary_linear_backward(gradient, signs, mask, w, features, True, True)
    gradient, *rest = conv_arguments("groups", 0, torch.float32)
    with pytest.raises(TypeError, match="float64"):
        conv_backward.binary_conv2d_backward(gradient.double(), *rest, True, True)
    with pytest.raises(ValueError, match="do not fit"):
        conv_backward.binary_conv2d_backward(gradient[:, :5], *rest, True, True)
    with pytest.raises(ValueError, match="must be 0, 1 or -1"):
        conv_backward.binary_conv2d_backward(gradient, *rest[:-1], 2, True, True)
