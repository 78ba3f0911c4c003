"""Signs times real numbers and 8-bit integers: by hand, torch in fp64, every backend, gradients."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bop2nd_fast as bf
from bop2nd_fast import ops as bops
from bop2nd_fast import reference as ref
from tests.epilogues import epilogues, refused_epilogues

ops = torch.ops.bop2nd
signed_linear = importlib.import_module("bop2nd_fast.ops.signed_linear")  # the package has functions so named
signed_conv2d = importlib.import_module("bop2nd_fast.ops.signed_conv2d")
KINDS = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8]


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    if dtype == torch.int8:
        return torch.randint(-128, 128, shape, dtype=dtype)
    return torch.randint(0, 256, shape, dtype=dtype) if dtype == torch.uint8 else torch.randn(shape).to(dtype)


def requests(shape: tuple[int, ...], dtype: torch.dtype) -> list[dict[str, Any]]:
    """Epilogues, those with thresholds for integers only."""
    return [e for e in epilogues(shape) if dtype in (torch.int8, torch.uint8) or "threshold" not in e]


def same(ours: Any, theirs: Any) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0)), (a, b)


# ------------------------------------------------------------------------------------ the specification


def test_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0, -3.0], [0.5, 0.0, 4.0]])
    w = ref.pack_bits(torch.tensor([[1.0, -1.0, 1.0], [-1.0, -1.0, -1.0]]))
    assert ref.signed_linear(x, w)[0].tolist() == [[-4.0, 0.0], [4.5, -4.5]]
    q = torch.tensor([[1, 2, -3]], dtype=torch.int8)
    assert ref.signed_linear(q, w, 2, 1)[0].tolist() == [[1 - 3 - 7, -1 - 3 + 7]]
    pixels = torch.tensor([[[[200, 3]]]], dtype=torch.uint8)
    kernel = ref.pack_bits(torch.tensor([[[[1.0, -1.0, 1.0]]]]), 1)
    # taps left out: 128 - 200 + 3 - 128 with both there, and one of three is outside in either place
    left, right = -(200 - 128) + (3 - 128), (200 - 128) - (3 - 128)
    dots = ref.signed_conv2d(pixels, kernel, [1, 1], [0, 1], [1, 1], 1, 1, 128)[0]
    assert dots.flatten().tolist() == [left, right]


def test_the_order_of_sums_by_hand() -> None:
    big = 2.0**24
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 1], x[0, 4], x[0, 8] = big, 1.0, 1.0, 1.0
    w = ref.pack_bits(torch.ones(1, 32))
    # 2**24 + 1 is lost; group 1 (odd) waits until the end, and 2**24 + 1 is lost; group 2 alike
    assert ref.signed_linear(x, w)[0].item() == big
    x[0, 12] = 1.0  # groups 1 and 3 are both odd: 1 + 1 comes before 2**24
    assert ref.signed_linear(x, w)[0].item() == big + 2


def test_quantize_by_hand() -> None:
    q, scale = ref.quantize_rows(torch.tensor([[127.0, 0.5, 1.5, -127.0], [0.0, 0.0, 0.0, 0.0]]))
    assert q.tolist() == [[127, 0, 2, -127], [0, 0, 0, 0]] and scale.tolist() == [1.0, 0.0]
    q, scale = ref.quantize_rows(torch.tensor([[1.0], [2.0]]), per_row=False)
    assert q.tolist() == [[64], [127]] and scale.shape == (1,)


@pytest.mark.parametrize("dtype", KINDS)
def test_against_torch_in_fp64(dtype: torch.dtype) -> None:
    x, w = numbers(3, 6, 7, 8, dtype=dtype), torch.where(torch.rand(8, 3, 3, 2) < 0.5, -1.0, 1.0).double()
    words, zero = ref.pack_bits(w, 1), 3 if not dtype.is_floating_point else 0
    args = ([2, 1], [1, 2], [1, 1], 2)
    ours = ref.signed_conv2d(x, words, *args, 1, zero)[0].permute(0, 3, 1, 2)
    theirs = F.conv2d(x.double() - zero, w, None, *args)
    assert (ours - theirs).abs().max() < (1e-5 if dtype.is_floating_point else 1e-9)
    rows = x.flatten(1)
    w = torch.where(torch.rand(5, rows.shape[1]) < 0.5, -1.0, 1.0).double()
    ours = ref.signed_linear(rows, ref.pack_bits(w), 1, zero)[0]
    assert (ours - (rows.double() - zero) @ w.T).abs().max() < (1e-4 if dtype.is_floating_point else 1e-9)


# -------------------------------------------------------------------------------------- every backend

LINEAR = [
    (1, 33, 1),
    (2, 64, 70),
    (4, 513, 130),
    (5, 31, 17),
    (40, 100, 40),
    (70, 4, 33),
    (0, 40, 5),
    (3, 0, 5),
]


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), LINEAR)
def test_linear(cpu_backend: str, rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    x, w = numbers(rows, inputs, dtype=dtype), ref.pack_bits(torch.randn(outputs, inputs))
    scaling: Any = {} if dtype.is_floating_point else {"zero_point": 7 if inputs % 2 else 0}
    for blocked in (None, ops.prepack_weight(w)):
        for asked in requests((rows, outputs), dtype):
            same(
                ops.signed_linear(x, w, **scaling, **asked, blocked=blocked),
                ref.signed_linear(x, w, **scaling, **asked),
            )
    scale = torch.rand(rows)
    asked = {"input_scale": scale, "scale": torch.randn(outputs), "high": 5, "signs": True}
    same(ops.signed_linear(x, w, **scaling, **asked), ref.signed_linear(x, w, **scaling, **asked))


def test_not_finite(cpu_backend: str) -> None:
    for rows in (2, 9):
        x, w = torch.randn(rows, 70), ref.pack_bits(torch.randn(20, 70))
        x[0, 3], x[1, 5], x[1, 69] = float("nan"), float("inf"), -float("inf")
        x[-1] = torch.where(torch.rand(70) < 0.5, 1e-42, -0.0)
        for asked in requests((rows, 20), x.dtype):
            same(ops.signed_linear(x, w, **asked), ref.signed_linear(x, w, **asked))


GEOMETRIES = [
    # channels, outputs, kernel, stride, padding, dilation, groups, (height, width)
    (1, 1, (1, 1), (1, 1), (0, 0), (1, 1), 1, (1, 1)),
    (3, 70, (3, 3), (1, 1), (1, 1), (1, 1), 1, (9, 11)),
    (3, 24, (7, 7), (2, 2), (3, 3), (1, 1), 1, (15, 14)),
    (5, 33, (3, 2), (1, 2), (1, 3), (2, 1), 1, (8, 40)),
    (64, 40, (3, 3), (1, 1), (1, 1), (1, 1), 1, (5, 6)),
    (36, 18, (3, 3), (2, 1), (0, 1), (1, 1), 3, (7, 5)),
    (6, 6, (3, 3), (1, 1), (1, 1), (1, 1), 6, (5, 5)),
    (32, 8, (3, 3), (1, 1), (4, 4), (1, 1), 1, (2, 2)),
    (8, 16, (1, 1), (1, 1), (0, 0), (1, 1), 1, (6, 7)),
    (40, 24, (1, 1), (1, 1), (0, 0), (1, 1), 1, (2, 1)),  # few rows, of two images
]


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_convolutions(cpu_backend: str, geometry: tuple[Any, ...], dtype: torch.dtype) -> None:
    channels, outputs, kernel, stride, padding, dilation, groups, size = geometry
    x = numbers(2, channels, *size, dtype=dtype)
    w = ref.pack_bits(torch.randn(outputs, channels // groups, *kernel), 1)
    args: Any = (stride, padding, dilation, groups)
    scaling = (
        {} if dtype.is_floating_point else {"multiplier": 2, "zero_point": 255 if dtype == torch.uint8 else 0}
    )
    plain = ref.signed_conv2d(x, w, *args, **scaling)
    last = x.contiguous(memory_format=torch.channels_last)
    wide = torch.cat([x, x], 3)[..., : size[1]]
    for view in (x, last, wide):
        same(ops.signed_conv2d(view, w, *args, **scaling), plain)
    asked = [e for i, e in enumerate(requests(tuple(plain[0].shape), dtype)) if i % 3 == 0]
    blocked = ops.prepack_weight(w, groups)
    for request in [*asked, {"input_scale": torch.rand(2), "signs": True}]:
        ours = ops.signed_conv2d(x, w, *args, **scaling, **request, blocked=blocked)
        both: Any = {**scaling, **request}
        same(ours, ref.signed_conv2d(x, w, *args, **both))


@pytest.mark.parametrize("dtype", KINDS[:3])
def test_quantize(cpu_backend: str, dtype: torch.dtype) -> None:
    x = torch.cat(
        [torch.randn(4, 77), torch.zeros(1, 77), torch.full((1, 77), 1e-44), torch.randn(2, 77) * 1e30]
    )
    x = x.clamp(-6e4, 6e4).to(dtype)
    for view in (x, x[:, ::2], x[:, :0], x[0], x[:0], x.view(2, 4, 77)):
        for per_row in (True, False):
            same(ops.quantize_rows(view, per_row), ref.quantize_rows(view, per_row))
    x[3, 4] = float("nan")
    with pytest.raises((ValueError, RuntimeError), match="1 of 8 rows"):
        ops.quantize_rows(x)
    with pytest.raises((ValueError, RuntimeError), match="infinite or NaN"):
        ops.quantize_rows(torch.tensor([[1.0, -float("inf")]]), False)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_change_bits(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, w = torch.randn(150, 200), ref.pack_bits(torch.randn(260, 200))
        same(ops.signed_linear(x, w), ref.signed_linear(x, w))
        same(ops.signed_linear(x[:3], w), ref.signed_linear(x[:3], w))
        image, kernel = torch.randn(5, 3, 20, 20), ref.pack_bits(torch.randn(40, 3, 3, 3), 1)
        args = ([1, 1], [1, 1], [1, 1], 1)
        same(ops.signed_conv2d(image, kernel, *args), ref.signed_conv2d(image, kernel, *args))
    finally:
        torch.set_num_threads(before)


def test_what_gpus_without_triton_run_agrees_to_rounding() -> None:
    """On CPU tensors: GPUs without Triton take torch's own product of unpacked weights for real inputs."""
    x, w = torch.randint(-9, 10, (5, 40)).float(), ref.pack_bits(torch.randn(7, 40))
    scale, asked = torch.rand(5), {"shift": torch.randn(7), "signs": True}
    ours = signed_linear.by_torch(x, w, scale, **asked)
    same(ours, ref.signed_linear(x, w, input_scale=scale, **asked))
    image, kernel = torch.randint(-9, 10, (2, 6, 5, 5)).float(), ref.pack_bits(torch.randn(4, 3, 3, 3), 1)
    args: Any = ([1, 2], [1, 1], [1, 1], 2)
    asked["shift"] = torch.randn(4)
    ours = signed_conv2d.by_torch(image, kernel, args, scale[:2], **asked)
    same(ours, ref.signed_conv2d(image, kernel, *args, input_scale=scale[:2], **asked))


def test_the_loop_follows_rows_and_kinds() -> None:
    """``explain`` tells of the loop that ``signed_loop`` names."""

    def loop(x: tuple[int, ...], w: tuple[int, ...], **geometry: Any) -> str | None:
        op = "signed_linear" if len(w) == 2 else "signed_conv2d"
        name = bf.backends.signed_loop(op, (x, w), **geometry)
        assert name is not None
        assert bf.backends.explain(op, x, w, **geometry).endswith(bf.backends.SIGNED_LOOPS[name])
        return name

    with bf.backends.use("scalar"):
        assert loop((4, 64), (9, 64)) == "few rows" and loop((5, 64), (9, 64)) == "sum tables"
        assert loop((5, 64), (9, 64), dtype=torch.int8) == "byte lanes"
        assert loop((1, 3, 2, 2), (8, 3, 3, 3), padding=1) == "sum tables"
        assert loop((1, 3, 1, 4), (8, 3, 1, 1)) == "few rows"
        assert loop((1, 64, 1, 1), (8, 32, 1, 1)) == "sum tables"  # 2 groups
    if "avx512_amx" in bf.backends.INSTRUCTION_SETS and bf.backends.why_not("avx512_amx") is None:
        with bf.backends.use("avx512_amx"):
            assert loop((5, 64), (9, 64), dtype=torch.uint8) == "byte tiles"


# ------------------------------------------------------------------------------------------ bad input


def test_bad_operands(cpu_backend: str) -> None:
    w = ref.pack_bits(torch.randn(5, 40))
    x, q = torch.randn(2, 40), torch.zeros(2, 40, dtype=torch.int8)
    error = (ValueError, TypeError, RuntimeError)
    for args, kwargs, text in (
        ((x.double(), w), {}, "float32|Double"),
        ((x[:, :30], ref.pack_bits(torch.randn(5, 70))), {}, "do not fit 30"),
        ((q, w), {"zero_point": 128}, "zero_point is 128"),
        ((q, w), {"zero_point": -129}, "zero_point is -129"),
        ((q, w), {"multiplier": 0}, "multiplier is 0"),
        ((x, w), {"zero_point": 1}, "belong to int8"),
        ((x, w), {"signs": True, "threshold": torch.zeros(5, dtype=torch.int32)}, "thresholds belong to"),
        ((q, w), {"input_scale": torch.ones(3)}, "input_scale must be"),
        ((q, w), {"straight_through": x[:1]}, "straight_through must"),
        ((q.expand(2, 40), w), {"multiplier": 65536, "zero_point": 0}, None),
    ):
        if text is None:
            ops.signed_linear(*args, **kwargs)
            continue
        with pytest.raises(error, match=text):
            ops.signed_linear(*args, **kwargs)
    for asked, text in refused_epilogues((2, 5)):
        with pytest.raises(error, match=text):
            ops.signed_linear(q, w, **asked)


def test_rows_beyond_int32(cpu_backend: str) -> None:
    long = torch.zeros(1, 8421505, dtype=torch.uint8)
    words = torch.zeros(1, -(-8421505 // 32), dtype=torch.int32)
    with pytest.raises((ValueError, RuntimeError), match="8421505 products of up to 255 exceed int32"):
        ops.signed_linear(long, words)
    ops.quantize_rows(torch.ones(1, 1))


def test_bad_input_of_the_functions() -> None:
    x = torch.randn(2, 5)
    with pytest.raises(ValueError, match="packed along axis 0"):
        bops.signed_linear(x, bf.pack(torch.randn(3, 5), dim=0))
    with pytest.raises(TypeError, match="BinaryTensor"):
        bops.signed_linear(x, torch.randn(3, 5))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not end in the 6 features"):
        bops.signed_linear(x, bf.pack(torch.randn(3, 6)))
    with pytest.raises(TypeError, match="uint8"):
        bops.signed_linear(x.double(), bf.pack(torch.randn(3, 5)))
    image, kernel = torch.randn(1, 4, 5, 5), bf.pack(torch.randn(4, 2, 3, 3), dim=1)
    with pytest.raises(ValueError, match="input has 4 channels"):
        bops.signed_conv2d(image, kernel)
    with pytest.raises(ValueError, match="smaller than the kernel"):
        bops.signed_conv2d(image[..., :2], kernel, groups=2)


# ------------------------------------------------------------------------------------------ gradients


def dense_of(weight: bf.BinaryTensor) -> Tensor:
    return weight.unpack().detach().requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients(dtype: torch.dtype) -> None:
    x = torch.randint(-4, 5, (3, 4, 40)).to(dtype).requires_grad_()
    weight = torch.nn.Parameter(bf.pack(torch.randn(7, 40)))
    dense, plain = dense_of(weight), x.detach().clone().requires_grad_()
    grad = torch.randint(-3, 4, (3, 4, 7)).to(dtype)
    (bops.signed_linear(x, weight) * grad).sum().backward()
    (F.linear(plain, dense.to(dtype)) * grad).sum().backward()
    assert torch.equal(x.grad, plain.grad) and torch.equal(weight.grad, dense.grad)
    x = torch.randint(-4, 5, (2, 6, 7, 8)).to(dtype).requires_grad_()
    weight = torch.nn.Parameter(bf.pack(torch.randn(4, 3, 3, 3), dim=1))
    dense, plain = dense_of(weight), x.detach().clone().requires_grad_()
    args = ((2, 1), (1, 1), (1, 1), 2)
    ours, theirs = bops.signed_conv2d(x, weight, *args), F.conv2d(plain, dense.to(dtype), None, *args)
    assert torch.equal(ours, theirs)
    grad = torch.randint(-3, 4, theirs.shape).to(dtype)
    (ours * grad).sum().backward()
    (theirs * grad).sum().backward()
    assert torch.equal(x.grad, plain.grad) and torch.equal(weight.grad, dense.grad)


def test_second_derivatives() -> None:
    """As for gradient penalties: of real inputs they are torch's, behind a rounding they are refused."""
    shapes = (((3, 4, 40), (7, 40)), ((2, 6, 7, 8), (4, 6, 3, 3)))
    for of, plain_of, (shape, weight_shape) in zip(
        (bops.signed_linear, bops.signed_conv2d), (F.linear, F.conv2d), shapes, strict=True
    ):
        product: Any = of
        x = torch.randint(-4, 5, shape).float().requires_grad_()
        weight = torch.nn.Parameter(bf.pack(torch.randn(weight_shape), dim=1))
        dense, plain = dense_of(weight), x.detach().clone().requires_grad_()
        for out, inputs in ((product(x, weight), (x, weight)), (plain_of(plain, dense), (plain, dense))):
            (first,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
            first.square().sum().backward()
        assert torch.equal(x.grad, plain.grad) and torch.equal(weight.grad, dense.grad)
        q = torch.zeros(shape, dtype=torch.int8)
        out = product(q, weight, straight_through=x)
        with pytest.raises(RuntimeError, match=r"second derivatives of signed_.*straight_through"):
            torch.autograd.grad(out.square().sum(), x, create_graph=True)


def test_gradients_pass_straight_through_int8() -> None:
    x = torch.randn(5, 40, requires_grad=True)
    weight = torch.nn.Parameter(bf.pack(torch.randn(7, 40)))
    q, scale = bops.quantize_rows(x)
    out = bops.signed_linear(q, weight, input_scale=scale, straight_through=x)
    grad = torch.randn(5, 7)
    (out * grad).sum().backward()
    dense = weight.unpack().detach()
    assert torch.allclose(x.grad, grad @ dense, atol=1e-5)
    assert torch.allclose(weight.grad, grad.T @ (q.float() * scale[:, None]), atol=1e-4)
    assert (out - x @ dense.T).abs().max() < 0.5, "8 bits are close"


def test_fused_outputs_have_no_gradient() -> None:
    x = torch.randn(2, 8, requires_grad=True)
    out = ops.signed_linear(x, ref.pack_bits(torch.randn(3, 8)), shift=torch.ones(3))[0]
    with pytest.raises(RuntimeError, match=r"shift.*has no gradient"):
        out.sum().backward()
