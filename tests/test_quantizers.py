"""Quantizers, RPReLU, 1-d convolutions and "same" padding against numbers worked by hand and dense torch."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bop2nd_fast as bf
from bop2nd_fast.nn import (
    QUANTIZERS,
    ApproxSign,
    BinaryConv1d,
    BinaryConv2d,
    BinaryLinear,
    Quantizer,
    RPReLU,
    RSign,
    SteSign,
    SwishSign,
)

NAN = float("nan")
POINTS = [-3.0, -1.5, -1.0, -0.25, -0.0, 0.0, 0.5, 1.0, 1.5, NAN]
SIGNS = [-1.0, -1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]


def swish(beta: float, x: float) -> float:
    return beta * (2 - beta * x * math.tanh(beta * x / 2)) / (1 + math.cosh(beta * x))


EXPECTED: list[tuple[Quantizer, list[float]]] = [
    (SteSign(), [0, 0, 1, 1, 1, 1, 1, 1, 0, 0]),
    (SteSign(1.5), [0, 1, 1, 1, 1, 1, 1, 1, 1, 0]),
    (SteSign(0.25), [0, 0, 0, 1, 1, 1, 0, 0, 0, 0]),
    (SteSign(None), [1] * 10),
    (ApproxSign(), [0, 0, 0, 1.5, 2, 2, 1, 0, 0, NAN]),
    (SwishSign(), [swish(5, x) for x in POINTS]),
    (SwishSign(2), [swish(2, x) for x in POINTS]),
]


@pytest.mark.parametrize(
    ("quantizer", "derivative"), EXPECTED, ids=lambda v: repr(v) if isinstance(v, nn.Module) else ""
)
def test_values_and_gradients_by_hand(quantizer: Quantizer, derivative: list[float]) -> None:
    x = torch.tensor([POINTS], requires_grad=True)
    y = quantizer(x)
    assert y.tolist() == [SIGNS]
    y.backward(torch.full((1, 10), 3.0))
    wanted = 3 * torch.tensor([derivative], dtype=torch.float32)
    torch.testing.assert_close(x.grad, wanted, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_swish_sign_at_zero_is_its_beta() -> None:
    x = torch.zeros(1, 1, requires_grad=True)
    SwishSign(4)(x).backward()
    assert x.grad is not None and x.grad.item() == 4


@pytest.mark.parametrize(
    ("quantizer", "derivative"), EXPECTED, ids=lambda v: repr(v) if isinstance(v, nn.Module) else ""
)
def test_layers_use_the_quantizers_gradient(quantizer: Quantizer, derivative: list[float]) -> None:
    """A layer of one output: its input's gradient is the weight times the derivative."""
    finite, slopes = torch.tensor(POINTS[:-1]), torch.tensor(derivative[:-1], dtype=torch.float32)
    dense = BinaryLinear(9, 1, input_quantizer=quantizer)
    x = finite[None].clone().requires_grad_()
    dense(x).backward()
    torch.testing.assert_close(x.grad, slopes * dense.weight.unpack().detach(), rtol=1e-5, atol=1e-6)
    conv = BinaryConv2d(1, 1, 1, input_quantizer=quantizer)
    image = finite.view(1, 1, 3, 3).clone().requires_grad_()
    conv(image).sum().backward()
    torch.testing.assert_close(
        image.grad, slopes.view(1, 1, 3, 3) * conv.weight.unpack().detach(), rtol=1e-5, atol=1e-6
    )


def test_ste_sign_keeps_one_bit_and_others_what_they_need() -> None:
    x = torch.randn(64, 1024, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        BinaryLinear(1024, 8, input_quantizer=SteSign())(x)
    assert sum(t.nbytes for t in kept if not isinstance(t, bf.BinaryTensor)) == 2 * 64 * 1024 // 8


def test_rsign_by_hand() -> None:
    rsign = RSign(2)
    with torch.no_grad():
        rsign.bias.copy_(torch.tensor([0.5, -1.0]))
    x = torch.tensor([[[[-0.25, -0.5, 2.0]], [[0.75, 1.0, 0.0]]]], requires_grad=True)  # [1, 2, 1, 3]
    y = rsign(x)  # of 0.25, 0, 2.5 and -0.25, 0, -1
    assert y.flatten().tolist() == [1, 1, 1, -1, 1, -1]
    y.sum().backward()
    assert x.grad is not None and x.grad.flatten().tolist() == [1.5, 2, 0, 1.5, 2, 0]
    assert rsign.bias.grad is not None and rsign.bias.grad.tolist() == [3.5, 3.5]


@pytest.mark.parametrize("estimator", [*QUANTIZERS, SteSign(0.5)])
def test_rsign_in_layers(estimator: Any) -> None:
    for layer, x, shape in (
        (BinaryConv2d(6, 4, 3, input_quantizer=RSign(6, estimator)), torch.randn(2, 6, 5, 5), (6, 1, 1)),
        (BinaryLinear(6, 4, input_quantizer=RSign(6, estimator)), torch.randn(2, 3, 6), (6,)),
    ):
        rsign: Any = layer.input_quantizer
        nn.init.normal_(rsign.bias)
        plain = copy.deepcopy(layer)
        plain.input_quantizer = rsign.estimator
        x.requires_grad_()
        shifted = (x + rsign.bias.view(shape)).detach().requires_grad_()
        assert torch.equal(layer(x), plain(shifted))
        layer(x).square().sum().backward()
        plain(shifted).square().sum().backward()
        assert torch.equal(x.grad, shifted.grad)
        summed = shifted.grad.movedim(1, -1) if len(shape) == 3 else shifted.grad
        torch.testing.assert_close(rsign.bias.grad, summed.reshape(-1, 6).sum(0))
        assert [n for n, _ in layer.named_parameters()] == ["weight", "input_quantizer.bias"]
        copied = copy.deepcopy(layer)
        copied.load_state_dict(layer.state_dict())
        assert torch.equal(copied(x), layer(x))
    binary, real = bf.optim.split_parameters(layer)
    assert [id(p) for p in (*binary, *real)] == [id(layer.weight), id(rsign.bias)]


def test_names_are_shorthand_and_state_stays_as_it_was() -> None:
    for name, kind in (("ste_sign", SteSign), ("approx_sign", ApproxSign), ("swish_sign", SwishSign)):
        layer = BinaryLinear(4, 4, input_quantizer=name)
        assert type(layer.input_quantizer) is kind
        assert list(layer.state_dict()) == ["weight"]
    assert BinaryLinear(4, 4, input_quantizer=None).input_quantizer is None
    assert "SteSign()" in repr(BinaryConv2d(4, 4, 3)) and "SwishSign(beta=2)" in repr(SwishSign(2))
    assert (
        "RSign(" in repr(RSign(3))
        and "ApproxSign()" in repr(RSign(3))
        and repr(SteSign(None)) == "SteSign(clip=None)"
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SteSign(0), "clip"),
        (lambda: SteSign(-1.0), "clip"),
        (lambda: SteSign(NAN), "clip"),
        (lambda: SwishSign(0), "beta"),
        (lambda: SwishSign("5"), "beta"),  # type: ignore[arg-type]
        (lambda: RSign(0), "channels"),
        (lambda: RSign(3, None), "estimator"),  # type: ignore[arg-type]
        (lambda: RSign(3, "tanh"), "tanh"),
        (lambda: RPReLU(-1), "channels"),
        (lambda: BinaryLinear(4, 4, input_quantizer=torch.sign), "Quantizer module"),  # type: ignore[arg-type]
        (lambda: RSign(3)(torch.randn(2, 4, 5, 5)), "3 channels on axis 1"),
        (lambda: RPReLU(3)(torch.randn(2, 4)), "3 channels"),
        (lambda: BinaryConv2d(4, 4, 3, input_quantizer=RSign(5))(torch.randn(1, 4, 5, 5)), "5 channels"),
    ],
)
def test_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_rprelu_by_hand() -> None:
    layer = RPReLU(2)
    assert layer.slope.tolist() == [0.25, 0.25] and not layer.shift.any() and not layer.post_shift.any()
    with torch.no_grad():
        layer.shift.copy_(torch.tensor([1.0, -2.0]))
        layer.slope.copy_(torch.tensor([0.25, -0.5]))
        layer.post_shift.copy_(torch.tensor([0.5, 10.0]))
    x = torch.tensor([[[[-3.0, 1.0]], [[0.0, 5.0]]]], requires_grad=True)
    y = layer(x)  # PReLU of -2, 2 and -2, 3
    assert y.flatten().tolist() == [0.0, 2.5, 11.0, 13.0]
    y.sum().backward()
    assert x.grad is not None and x.grad.flatten().tolist() == [0.25, 1, -0.5, 1]
    grads = [p.grad.tolist() for p in layer.parameters() if p.grad is not None]
    assert grads == [[1.25, 0.5], [-2, -2], [2, 2]]  # shift, slope, post_shift
    assert torch.equal(layer(torch.tensor([[-3.0, 0.0]])), torch.tensor([[0.0, 11.0]]))


@pytest.mark.parametrize("quantizer", ["ste_sign", None])
@pytest.mark.parametrize(
    "geometry", [{}, {"stride": 2, "padding": 3, "dilation": 2, "groups": 3}, {"padding": "same"}]
)
def test_conv1d_is_torchs_of_signs(quantizer: str | None, geometry: dict[str, Any]) -> None:
    for padding_value in (0, 1, -1) if quantizer else (0,):
        layer = BinaryConv1d(
            6, 9, 5, bias=True, padding_value=padding_value, input_quantizer=quantizer, **geometry
        )
        nn.init.normal_(layer.bias)
        x = torch.randn(2, 6, 21, requires_grad=True)
        signs = torch.where(x < 0, -1.0, 1.0) if quantizer else x.detach()
        dense = {**geometry, "padding": 0}
        pad = 2 if geometry.get("padding") == "same" else geometry.get("padding", 0)
        wide = F.pad(signs, (pad, pad), value=float(padding_value))
        expected = F.conv1d(wide, layer.weight.unpack().squeeze(2), layer.bias, **dense)
        y = layer(x)
        assert y.shape == expected.shape
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        y.sum().backward()
        assert layer.weight.grad is not None and x.grad is not None
    assert layer.weight.shape == (9, 6 // geometry.get("groups", 1), 1, 5)
    assert "kernel_size=5, " in repr(layer)


def test_conv1d_trains_saves_and_refuses_images() -> None:
    layer = BinaryConv1d(3, 4, 3)
    optimizer = bf.optim.Bop(layer.parameters(), gamma=1.0, threshold=0.0)
    before = layer.weight.unpack().detach()
    layer(torch.randn(2, 3, 9)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(layer.weight.unpack(), before)
    twin = BinaryConv1d(3, 4, 3)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 9)
    assert torch.equal(twin(x), layer(x))
    with pytest.raises(ValueError, match=r"\[N, 3, L\]"):
        layer(torch.randn(2, 3, 9, 9))
    with pytest.raises(ValueError, match="kernel_size"):
        BinaryConv1d(3, 4, 0)


def test_same_padding_keeps_sizes_where_it_is_exact() -> None:
    layer = BinaryConv2d(3, 4, (3, 5), padding="same", dilation=(2, 1))
    assert layer.padding == (2, 2)
    assert layer(torch.randn(1, 3, 7, 8)).shape == (1, 4, 7, 8)
    assert BinaryConv2d(3, 4, 2, dilation=2, padding="same").padding == (1, 1)
    assert BinaryConv2d(3, 4, 3, stride=2, padding="valid").padding == (0, 0)
    for arguments in ({"kernel_size": 2}, {"kernel_size": (3, 4)}, {"kernel_size": 3, "stride": 2}):
        with pytest.raises(ValueError, match="either side"):
            BinaryConv2d(3, 4, padding="same", **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'full'"):
        BinaryConv2d(3, 4, 3, padding="full")


@pytest.mark.parametrize("quantizer", [*QUANTIZERS, SteSign(2.0), RSign(6)])
def test_layers_with_any_quantizer_compile(quantizer: Any) -> None:
    model = nn.Sequential(BinaryConv2d(6, 4, 3, input_quantizer=quantizer), RPReLU(4))
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 6, 7, 7)
    for net in (model, compiled):
        net(x).square().mean().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
