"""Layers and quantizers against the same network written with dense tensors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import bop2nd_fast as bf
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
    assert torch.allclose(conv(image), F.conv2d(image, conv.weight.unpack(), None, 1, 1), atol=1e-5)
    assert torch.allclose(linear(x), F.linear(x, linear.weight.unpack()), atol=1e-5)
    conv(image).sum().backward()
    assert conv.weight.grad is not None and conv.weight.grad.shape == conv.weight.shape


def test_real_inputs_keep_no_unpacked_weight() -> None:
    for layer, x in (
        (BinaryLinear(256, 1024, input_quantizer=None), torch.randn(2, 256)),
        (BinaryConv2d(64, 256, 3, input_quantizer=None), torch.randn(1, 64, 3, 3)),
    ):
        with torch.profiler.profile(profile_memory=True) as profile, torch.no_grad():
            layer(x)
        most = max(event.self_cpu_memory_usage for event in profile.key_averages())
        assert most < layer.weight.numel() * 4 / 8, "fp32 weights would take 32 times their words"


def expected_derivative(name: str, x: float) -> float:
    if name == "ste_sign":
        return float(abs(x) <= 1)
    if name == "approx_sign":
        return max(0.0, 2 - 2 * abs(x))
    z = 5.0 * x
    return 5.0 * (2 - z * math.tanh(z / 2)) / (1 + math.cosh(z))


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_inputs_of_8_bits(per_row: bool, memory_format: torch.memory_format) -> None:
    layers = (
        BinaryConv2d(3, 8, 3, padding=1, bias=True, input_quantizer=bf.nn.Int8(per_row)),
        BinaryLinear(9, 4, input_quantizer="int8" if per_row else bf.nn.Int8(False)),
    )
    inputs = (torch.randn(2, 3, 6, 6).contiguous(memory_format=memory_format), torch.randn(5, 7, 9))
    for layer, x in zip(layers, inputs, strict=True):
        near = layer.input_quantizer(x)
        assert 0 < (near - x).abs().max() <= x.abs().max() / 253
        x.requires_grad_()
        dense = layer.weight.unpack().detach().requires_grad_()
        plain = near.detach().requires_grad_()
        theirs = F.conv2d(plain, dense, layer.bias, padding=1) if x.dim() == 4 else F.linear(plain, dense)
        ours = layer(x)
        with torch.no_grad():
            assert torch.equal(layer(x), ours)
        assert torch.allclose(ours, theirs, atol=1e-4)
        grad = torch.randn_like(ours)
        ours.backward(grad)
        theirs.backward(grad)
        assert torch.allclose(x.grad, plain.grad, atol=1e-4)
        assert torch.allclose(layer.weight.grad, dense.grad, atol=1e-3)


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
def test_second_derivatives_raise_instead_of_being_left_out(quantizer: str) -> None:
    layers: tuple[Any, ...] = (
        BinaryLinear(16, 4, input_quantizer=quantizer),
        BinaryConv2d(16, 4, 1, input_quantizer=quantizer),
    )
    for layer, shape in zip(layers, ((3, 16), (2, 16, 3, 3)), strict=True):
        x = torch.randn(shape, requires_grad=True)
        for differentiate in (
            lambda f, x: torch.autograd.grad(f(x), x, create_graph=True, allow_unused=True),
            lambda f, x: f(x).backward(create_graph=True),
            lambda f, x: torch.autograd.functional.hvp(f, x.detach(), torch.ones_like(x)),
            lambda f, x: torch.autograd.functional.hessian(f, x.detach()),
        ):
            with pytest.raises(
                RuntimeError, match=f"second derivatives of binary_{'conv2d' if x.dim() == 4 else 'lin'}"
            ):
                differentiate(lambda x, layer=layer: layer(x).square().sum(), x)
        layer(x).square().sum().backward()
        assert x.grad is not None and layer.weight.grad is not None


def test_second_derivatives_of_max_pooling_and_real_inputs() -> None:
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64, requires_grad=True)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        image = x.detach().contiguous(memory_format=memory_format).requires_grad_()
        assert torch.autograd.gradcheck(MaxPool2d(2), image)
        assert torch.autograd.gradgradcheck(MaxPool2d((2, 3)), image)
    conv = BinaryConv2d(3, 4, 3, input_quantizer=None)
    image = torch.randn(1, 3, 5, 5, requires_grad=True)
    (g,) = torch.autograd.grad(conv(image).square().sum(), image, create_graph=True)
    g.square().sum().backward()
    dense = conv.weight.unpack().detach().requires_grad_()
    (h,) = torch.autograd.grad(F.conv2d(image, dense).square().sum(), image, create_graph=True)
    assert torch.allclose(conv.weight.grad, torch.autograd.grad(h.square().sum(), dense)[0], atol=1e-2)
