"""Triton's products of real and 8-bit inputs with signs against the specification, every loop in turn.

Real numbers are whole and small where bits are compared: every sum is exact then, in any order.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

import bop2nd_fast as bf
from bop2nd_fast import reference
from tests.epilogues import epilogues, refused_epilogues
from tests.test_fuzz import INTEGERS, LONG, convolutions
from tests.triton_device import DEVICE, runnable, same

if reason := runnable():
    pytest.skip(reason, allow_module_level=True)
from bop2nd_fast.kernels import signed_conv2d, signed_linear
from bop2nd_fast.kernels.quantize_rows import quantize_rows
from bop2nd_fast.kernels.tuning import SIGNED_ROWS, MatmulTile, signed_tile

KINDS = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8]
TILES = {
    "rows": SIGNED_ROWS,
    "from registers": MatmulTile("decode", 16, 32, 2, 4),
    "through shared memory": MatmulTile("decode", 64, 32, 1, 4, weights_in_shared=True),
}


def numbers(*shape: int, dtype: torch.dtype) -> Tensor:
    if dtype in (torch.int8, torch.uint8):
        return torch.randint(0, 256, shape, device=DEVICE).to(dtype)
    return torch.randint(-99, 100, shape, device=DEVICE).to(dtype)


def signs(*shape: int) -> Tensor:
    return reference.pack_bits(torch.randn(shape, device=DEVICE), 1)


def scaling_of(dtype: torch.dtype) -> dict[str, int]:
    if dtype.is_floating_point:
        return {}
    return {"multiplier": 2, "zero_point": 255 if dtype == torch.uint8 else -7}


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("loop", TILES)
def test_linear(loop: str, dtype: torch.dtype) -> None:
    for rows, features, outputs in ((3, 33, 31), (3 if loop == "rows" else 17, 130, 40)):
        x, w = numbers(rows, features, dtype=dtype), signs(outputs, features)
        both: Any = scaling_of(dtype) | {"input_scale": torch.rand(rows, device=DEVICE), "signs": True}
        actual = signed_linear.signed_linear(x, w, tile=TILES[loop], **both)
        assert all(map(same, actual, reference.signed_linear(x, w, **both)))


@pytest.mark.parametrize(("loop", "dtype"), [("rows", torch.float32), ("from registers", torch.int8)])
def test_epilogue(loop: str, dtype: torch.dtype) -> None:
    x, w = numbers(2, 70, dtype=dtype), signs(37, 70)
    for asked in list(epilogues((2, 37), DEVICE))[:: 2 if loop == "rows" else 3]:
        if "threshold" in asked and dtype.is_floating_point:
            continue
        actual = signed_linear.signed_linear(x, w, tile=TILES[loop], **asked)
        assert all(map(same, actual, reference.signed_linear(x, w, **asked))), sorted(asked)


# Image (N, C, H, W), outputs, kernel, stride, padding, dilation, groups.
CONVOLUTIONS = {
    "a first layer": ((2, 3, 4, 5), 33, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "strides and dilation": ((1, 40, 7, 7), 8, (3, 2), (2, 3), (2, 1), (1, 2), 1),
    "bits of two groups in a word": ((1, 70, 3, 4), 6, (2, 3), (1, 2), (1, 2), (1, 1), 2),
    "padding wider than the image": ((1, 33, 2, 3), 4, (3, 3), (1, 1), (3, 2), (1, 1), 1),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, dtype) for name in CONVOLUTIONS for dtype in (torch.float32, torch.uint8)),
     ("a first layer", torch.float16), ("strides and dilation", torch.int8)],
)  # fmt: skip
def test_convolutions(name: str, dtype: torch.dtype) -> None:
    image, outputs, kernel, *how, groups = CONVOLUTIONS[name]
    x, w = numbers(*image, dtype=dtype), signs(outputs, image[1] // groups, *kernel)
    args: Any = (*how, groups)
    both: Any = scaling_of(dtype) | {"input_scale": torch.rand(image[0], device=DEVICE), "signs": True}
    expected = reference.signed_conv2d(x, w, *args, **both)
    views = (x, x.contiguous(memory_format=torch.channels_last), torch.cat([x, x], 3)[..., : image[3]])
    for view in views[1:] if dtype == torch.uint8 else views[:1]:
        assert all(map(same, signed_conv2d.signed_conv2d(view, w, *args, **both), expected))


@pytest.mark.parametrize("rows", [2, 20])
def test_real_sums_are_close_and_not_finite_ones_as_they_are(rows: int) -> None:
    x, w = torch.randn(rows, 300, device=DEVICE), signs(40, 300)
    exact = x.double() @ reference.unpack_bits(w, 300, dtype=torch.float64).T
    error = (signed_linear.signed_linear(x, w)[0] - exact).abs() / x.double().abs().sum(1, keepdim=True)
    assert error.max() < 300 / 16 * 3 * 2**-23
    x[0, 5], x[1, 9], x[1, 7] = float("inf"), float("nan"), -float("inf")
    infinite = signed_linear.signed_linear(x, w)[0]
    assert torch.equal(infinite[:2].nan_to_num(7.0), reference.signed_linear(x[:2], w)[0].nan_to_num(7.0))


def test_int32_sums_beyond_fp32() -> None:
    """Sums above 2**24 stay whole numbers, also on the way to bits that two groups share."""
    x, w, plus = torch.full((1, 1000, 1, 1), 127, dtype=torch.int8, device=DEVICE), signs(4, 500, 1, 1), 2**14
    dots = (plus * 127 - 1) * reference.unpack_bits(w, 500, 1, dtype=torch.float64).sum((1, 2, 3))
    assert dots.abs().max() > 2**24 and not torch.equal(dots.float().double(), dots)
    for limit, expected in ((dots, 0), (dots + 1, 0b1111)):
        asked: Any = {"values": False, "signs": True, "threshold": limit.int()}
        one: Any = ([1, 1], [0, 0], [1, 1])
        words = signed_conv2d.signed_conv2d(x, w, *one, 2, plus, 1, **asked)[1]
        assert words.flatten().tolist() == [expected]
        words = signed_linear.signed_linear(x.flatten(1)[:, :500], w.flatten(1), plus, 1, **asked)[1]
        assert words.flatten().tolist() == [expected]


@pytest.mark.parametrize("dtype", KINDS[:3])
def test_quantize(dtype: torch.dtype) -> None:
    x = torch.cat(
        [torch.randn(3, 77), torch.zeros(1, 77), torch.full((1, 77), 1e-44), torch.randn(1, 77) * 1e30]
    )
    x = x.clamp(-6e4, 6e4).to(dtype).to(DEVICE)
    x[0, :3] = torch.tensor([127.0, 0.5, 1.5]).to(x)
    for view in (x, x[:, ::2], x[:, :0], x[0], x[:0], x.view(2, 3, 77)):
        for per_row in (True, False):
            for a, b in zip(
                quantize_rows(view, per_row), reference.quantize_rows(view, per_row), strict=True
            ):
                assert a.dtype == b.dtype and torch.equal(a, b)
    x[2, 4], x[1, 1] = float("nan"), -float("inf")
    with pytest.raises(ValueError, match="2 of 6 rows have infinite or NaN"):
        quantize_rows(x)


def _trained(backend: str) -> list[Tensor]:
    """Results and gradients of an int8 and a real linear layer and a real convolution, whole numbers."""
    torch.manual_seed(3)
    found: list[Tensor] = []
    layers: list[tuple[torch.nn.Module, tuple[int, ...]]] = [
        (bf.nn.BinaryLinear(40, 8, input_quantizer="int8"), (6, 40)),
        (bf.nn.BinaryLinear(40, 8, input_quantizer=None), (6, 40)),
        (bf.nn.BinaryConv2d(40, 8, 3, input_quantizer=None), (2, 40, 4, 4)),
    ]
    for layer, shape in layers:
        made = layer.to(DEVICE)
        x = torch.randint(-9, 10, shape, device=DEVICE).float()
        x.select(1, 0).fill_(127)  # a row's scale is 1
        x.requires_grad_()
        with bf.backends.use(backend):
            out = made(x)
            (out * torch.randint(-3, 4, out.shape, device=DEVICE)).sum().backward()
        weight = next(made.parameters())
        assert x.grad is not None and weight.grad is not None
        found += [out.detach(), x.grad, weight.grad]
    return found


def test_layers_and_their_gradients_on_the_operators() -> None:
    before = bf.backends.calls()
    ours = _trained("triton")
    after = bf.backends.calls()
    assert after["triton"] - before["triton"] >= 7  # three products, a quantizer, gradients of three inputs
    assert all(map(torch.equal, ours, _trained("reference")))


def test_opcheck() -> None:
    args = numbers(2, 70, dtype=torch.uint8), signs(5, 70), 2, 3
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    with bf.backends.use("triton"):
        torch.library.opcheck(torch.ops.bop2nd.signed_linear.default, args, test_utils=tests)


def test_the_table_knows_every_chip() -> None:
    for chip in ("sm80", "sm90", "sm100", "sm120", "interpreter"):
        tile = signed_tile(chip, 1, 4096, 4096, 128)
        assert (tile.block_m, tile.block_n) == (128, 128)
        assert tile.weights_in_shared == (chip in ("sm90", "interpreter"))
        assert signed_tile(chip, 4, 5, 10, 1).block_n == 32


def test_wrong_arguments_raise() -> None:
    q, w = numbers(2, 40, dtype=torch.int8), signs(3, 40)
    real, kernel = q.float(), w[:, None, None]
    one: Any = ([1, 1], [0, 0], [1, 1], 1)
    for call, message in (
        (lambda: signed_linear.signed_linear(q.double(), w), "input must be float32"),
        (lambda: signed_linear.signed_linear(q[:, :30], signs(3, 70)), "do not fit 30"),
        (lambda: signed_linear.signed_linear(q, w, 1, 128), "zero_point is 128"),
        (lambda: signed_linear.signed_linear(real, w, 1, 1), "belong to int8"),
        (lambda: signed_linear.signed_linear(q, w, input_scale=torch.ones(3, device=DEVICE)), "input_scale"),
        (lambda: signed_conv2d.signed_conv2d(q, kernel, *one), "must be"),
        (lambda: signed_conv2d.signed_conv2d(q[:, :3, None, None], signs(3, 40, 1, 1), *one), "do not hold"),
        (lambda: quantize_rows(q), "must be float32"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()
    for asked, message in refused_epilogues((2, 3), DEVICE):
        with pytest.raises(ValueError, match=message):
            signed_linear.signed_linear(q, w, **asked)


@pytest.mark.fuzz
@LONG
@given(convolutions(), INTEGERS)
def test_convolutions_for_long(case: dict[str, Any], integers: torch.dtype | None) -> None:
    torch.manual_seed(case["seed"])
    shape = (case["batch"], case["per_group"] * case["groups"], *case["size"])
    x, w = (
        numbers(*shape, dtype=integers or case["dtype"]),
        signs(case["outputs"], case["per_group"], *case["kernel"]),
    )
    x = x.contiguous(memory_format=torch.channels_last) if case["last"] else x
    args = (case["stride"], case["padding"], case["dilation"], case["groups"])
    scaling = (
        {} if integers is None else {"multiplier": 1 + case["seed"] % 3, "zero_point": case["seed"] % 128}
    )
    dots = reference.signed_conv2d(x, w, *args, **scaling)[0]
    for asked in list(epilogues(tuple(dots.shape), DEVICE))[case["seed"] % 6 :: 6]:
        if "threshold" not in asked or integers is not None:
            both: Any = scaling | asked
            actual = signed_conv2d.signed_conv2d(x, w, *args, **both)
            assert all(map(same, actual, reference.epilogue(dots, **asked))), sorted(asked)
