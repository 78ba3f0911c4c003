"""Layers and quantizers against the same network written with dense tensors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bop2nd_fast.nn import QUANTIZERS, BinaryConv2d, BinaryLinear, MaxPool2d


def test_linear_is_a_dense_linear_of_signs() -> None:
    layer = BinaryLinear(70, 9, bias=True)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(4, 2, 70)
    expected = F.linear(torch.where(x < 0, -1.0, 1.0), layer.weight.unpack(), layer.bias)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("padding_value", [0, 1, -1])
def test_conv_is_a_dense_convolution_of_signs(padding_value: int) -> None:
    layer = BinaryConv2d(36, 8, (3, 2), (2, 1), (1, 2), (1, 2), 2, padding_value=padding_value, bias=True)
    x = torch.randn(3, 36, 7, 9)
    signs = F.pad(torch.where(x < 0, -1.0, 1.0), (2, 2, 1, 1), value=float(padding_value))
    expected = F.conv2d(signs, layer.weight.unpack(), layer.bias, (2, 1), 0, (1, 2), 2)
    assert torch.equal(layer(x), expected)


def test_real_inputs_keep_their_values() -> None:
    conv, linear = (
        BinaryConv2d(3, 8, 3, padding=1, input_quantizer=None),
        BinaryLinear(9, 4, input_quantizer=None),
    )
    image, x = torch.randn(2, 3, 6, 6), torch.randn(5, 9)
    assert torch.equal(conv(image), F.conv2d(image, conv.weight.unpack(), None, 1, 1))
    assert torch.equal(linear(x), F.linear(x, linear.weight.unpack()))
    conv(image).sum().backward()
    assert conv.weight.grad is not None and conv.weight.grad.shape == conv.weight.shape


def expected_derivative(name: str, x: float) -> float:
    if name == "ste_sign":
        return float(abs(x) <= 1)
    if name == "approx_sign":
        return max(0.0, 2 - 2 * abs(x))
    z = 5.0 * x
    return 5.0 * (2 - z * math.tanh(z / 2)) / (1 + math.cosh(z))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_straight_through_estimators(name: str) -> None:
    layer = BinaryLinear(7, 1, input_quantizer=name)
    points = [-1.5, -1.0, -0.25, 0.0, 0.5, 1.0, 3.0]
    x = torch.tensor([points], requires_grad=True)
    layer(x).backward()
    weight = layer.weight.unpack().flatten()
    expected = torch.tensor([expected_derivative(name, p) for p in points]) * weight
    assert torch.allclose(x.grad.flatten(), expected, rtol=1e-5, atol=1e-6)


def test_no_gradient_no_mask_and_weights_start_as_fair_coins() -> None:
    layer = BinaryConv2d(64, 64, 3)
    with torch.no_grad():
        layer(torch.randn(1, 64, 5, 5))
    mean = layer.weight.unpack().mean().item()
    assert abs(mean) < 5 / math.sqrt(layer.weight.numel())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BinaryLinear(0, 4), "in_features"),
        (lambda: BinaryLinear(4, 4, input_quantizer="tanh"), "input_quantizer"),
        (lambda: BinaryConv2d(4, 4, 0), "kernel_size"),
        (lambda: BinaryConv2d(4, 4, 3, groups=3), "groups=3"),
        (lambda: BinaryConv2d(4, 4, 3, padding_value=2), "padding_value"),
        (lambda: BinaryConv2d(4, 4, 3, padding_value=1, input_quantizer=None), "padding_value must be 0"),
        (lambda: BinaryConv2d(4, 4, 3, stride=0), "stride"),
    ],
)
def test_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_channel_mismatch() -> None:
    with pytest.raises(ValueError, match="5 channels"):
        BinaryConv2d(4, 4, 3)(torch.randn(1, 5, 6, 6))


def test_repr_tells_the_configuration() -> None:
    assert "padding_value=-1" in repr(BinaryConv2d(4, 4, 3, padding_value=-1))
    assert "input_quantizer=None" in repr(BinaryLinear(4, 4, input_quantizer=None))


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("wanted", ["input", "weight"])
def test_second_derivatives_raise_instead_of_being_left_out(quantizer: str, wanted: str) -> None:
    for layer, x in (
        (BinaryLinear(16, 4, input_quantizer=quantizer), torch.randn(3, 16, requires_grad=True)),
        (BinaryConv2d(4, 4, 3, input_quantizer=quantizer), torch.randn(1, 4, 5, 5, requires_grad=True)),
        (MaxPool2d(2), torch.randn(1, 4, 4, 4, requires_grad=True)),
    ):
        weight = getattr(layer, "weight", x)
        plain = torch.autograd.grad(layer(x).square().sum(), [x, weight])
        first = torch.autograd.grad(layer(x).square().sum(), [x, weight], create_graph=True)
        assert all(map(torch.equal, plain, first))
        with pytest.raises(RuntimeError, match=r"second derivatives|differentiate twice"):
            first[0 if wanted == "input" else 1].pow(2).sum().backward()


def test_sizes_may_be_any_kind_of_integers():
    n = np.int64
    linear = BinaryLinear(n(32), n(4))
    assert (type(linear.in_features), type(linear.out_features)) == (int, int)
    conv = BinaryConv2d(
        n(32), n(8), (n(3), 3), stride=n(1), padding=n(1), dilation=n(1), groups=n(2), padding_value=n(-1)
    )
    plain = BinaryConv2d(32, 8, 3, padding=1, groups=2, padding_value=-1)
    plain.load_state_dict(conv.state_dict())
    x = torch.randn(2, 32, 6, 6)
    assert torch.equal(conv(x), plain(x)) and repr(conv) == repr(plain)
    assert torch.equal(MaxPool2d(n(2))(x.requires_grad_()), MaxPool2d(2)(x))
    for size in (0, n(0), -1, 2.0, "2", True, None):
        with pytest.raises(ValueError, match="in_features must be a positive integer"):
            BinaryLinear(size, 4)
