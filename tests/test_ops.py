"""Every operator on every backend of this machine: bit-identical to the specification."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import bop2nd_fast as bf
from bop2nd_fast import reference as ref
from bop2nd_fast.ops.product import TILE_ELEMENTS, row_tiles
from tests.epilogues import epilogues

ops = torch.ops.bop2nd
LENGTHS = [1, 31, 32, 33, 63, 64, 65, 511, 512, 513, 1031]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPECIAL = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1.0, -1.0, 1e-40, -1e-40])


def values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers with every special value sprinkled in."""
    x = torch.randn(shape)
    flat = x.view(-1)
    n = min(len(SPECIAL), flat.numel() // 2)
    flat[torch.randperm(flat.numel())[:n]] = SPECIAL[:n]
    return x.to(dtype)


def assert_same(actual: Any, expected: Any) -> None:
    if isinstance(expected, tuple):
        for a, e in zip(actual, expected, strict=True):
            assert_same(a, e)
        return
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert actual.stride() == expected.stride()
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
def test_pack_and_unpack(cpu_backend: str, length: int, dtype: torch.dtype) -> None:
    x = values(3, length, dtype=dtype)
    assert_same(ops.pack_bits(x), ref.pack_bits(x))
    assert_same(ops.pack_bits_ste(x), ref.pack_bits_ste(x))
    words = ref.pack_bits(x)
    assert_same(ops.unpack_bits(words, length, dtype=dtype), ref.unpack_bits(words, length, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
def test_apply_mask(cpu_backend: str, length: int, dtype: torch.dtype) -> None:
    grad, mask = values(3, length, dtype=dtype), ref.pack_bits(torch.randn(3, length))
    ours, expected = grad.clone(), grad.clone()
    version = ours._version
    ops.apply_mask_(ours, mask)
    ref.apply_mask_(expected, mask)
    assert torch.equal(ours.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))
    assert ours._version > version, "autograd is told of the write"


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (33, 1), (64, 1), (64, 2), (66, 3), (24, 8)])
def test_pack_images(
    cpu_backend: str, channels: int, groups: int, memory_format: torch.memory_format
) -> None:
    for height, width in ((1, 1), (5, 7), (4, 33)):
        x = values(2, channels, height, width).contiguous(memory_format=memory_format)
        assert_same(ops.pack_bits(x, 1), ref.pack_bits(x, 1))
        assert_same(ops.pack_bits_ste(x, 1, groups), ref.pack_bits_ste(x, 1, groups))
        words = ref.pack_bits(x, 1)
        assert_same(ops.unpack_bits(words, channels, 1), ref.unpack_bits(words, channels, 1))


def test_pack_strided_views(cpu_backend: str) -> None:
    x = values(6, 70, 8)
    for view in (x[::2], x[:, ::3], x[..., 1::2], x.transpose(0, 2), x[:, :0], x[:0]):
        for dim in range(3):
            assert_same(ops.pack_bits(view, dim), ref.pack_bits(view, dim))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 33, 1), (3, 64, 17), (65, 513, 40), (0, 40, 5)])
def test_linear(cpu_backend: str, rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    x, w = values(rows, inputs, dtype=dtype), ref.pack_bits(values(outputs, inputs))
    for blocked in (None, ops.prepack_weight(w)):
        assert_same(ops.binary_linear(x, w, True, blocked), ref.binary_linear(x, w, True))
        assert_same(ops.binary_linear(x, w, False, blocked), ref.binary_linear(x, w, False))
        words = ref.pack_bits(x)
        for asked in epilogues((rows, outputs)):
            packed = ops.binary_linear_packed(words, w, inputs, **asked, blocked=blocked)
            assert_same(packed, ref.binary_linear_packed(words, w, inputs, **asked))


GEOMETRIES = [
    # channels, outputs, kernel, stride, padding, dilation, groups, (height, width)
    (1, 1, (1, 1), (1, 1), (0, 0), (1, 1), 1, (1, 1)),
    (33, 17, (3, 3), (1, 1), (1, 1), (1, 1), 1, (5, 9)),
    (64, 64, (3, 3), (1, 1), (1, 1), (1, 1), 1, (14, 14)),
    (96, 40, (3, 3), (2, 2), (1, 1), (1, 1), 1, (9, 8)),
    (64, 16, (1, 1), (2, 1), (0, 0), (1, 1), 1, (7, 7)),
    (32, 24, (5, 5), (1, 2), (2, 1), (1, 1), 1, (8, 11)),
    (40, 20, (7, 7), (2, 2), (3, 3), (1, 1), 1, (12, 10)),
    (64, 32, (3, 3), (1, 1), (2, 2), (2, 2), 1, (9, 9)),
    (64, 32, (3, 2), (1, 1), (1, 2), (2, 1), 2, (6, 7)),
    (66, 33, (3, 3), (1, 1), (1, 1), (1, 1), 3, (6, 5)),
    (16, 16, (3, 3), (1, 1), (1, 1), (1, 1), 16, (5, 5)),
    (32, 8, (3, 3), (1, 1), (4, 4), (1, 1), 1, (2, 2)),
    (512, 40, (3, 3), (1, 1), (1, 1), (1, 1), 1, (5, 4)),
]


@functools.cache
def conv_case(geometry: tuple[Any, ...], padding_value: int) -> dict[str, Any]:
    """Operands of one geometry and what the specification makes of them, once for all backends."""
    channels, outputs, kernel, stride, padding, dilation, groups, size = geometry
    torch.manual_seed(channels * outputs + padding_value)
    x = values(2, channels, *size)
    w = ref.pack_bits(values(outputs, channels // groups, *kernel), 1)
    args = (list(stride), list(padding), list(dilation), groups, padding_value)
    forms = (x, x.contiguous(memory_format=torch.channels_last), x.bfloat16())
    words = ref.pack_bits_ste(x, 1, groups)[0]
    dots = ref.binary_conv2d_packed(words, w, channels, *args)[0]
    return {
        "weight": w,
        "args": args,
        "training": [(form, ref.binary_conv2d(form, w, *args, True)) for form in forms],
        "words": words,
        "packed": [(asked, ref.epilogue(dots, **asked)) for asked in epilogues(tuple(dots.shape))],
    }


@pytest.mark.parametrize("padding_value", [0, 1, -1])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_conv2d(cpu_backend: str, geometry: tuple[Any, ...], padding_value: int) -> None:
    case = conv_case(geometry, padding_value)
    w, args, groups = case["weight"], case["args"], geometry[6]
    for blocked in (None, ops.prepack_weight(w, groups)):
        for form, expected in case["training"]:
            assert_same(ops.binary_conv2d(form, w, *args, True, blocked), expected)
            output, signs, mask = ops.binary_conv2d(form, w, *args, False, blocked)
            assert_same((output, signs), expected[:2])
            assert mask.numel() == 0
        for asked, expected in case["packed"]:
            packed = ops.binary_conv2d_packed(case["words"], w, geometry[0], *args, **asked, blocked=blocked)
            assert_same(packed, expected)


# ------------------------------------------------------------------------------------------ the step


def step_operands(lengths: list[int], packed: list[bool], grad: torch.dtype, moment: torch.dtype) -> Any:
    weights, grads, m, v = [], [], [], []
    for length, is_packed in zip(lengths, packed, strict=True):
        rows = 3
        w = torch.where(torch.rand(rows, length) < 0.5, -1.0, 1.0)
        weights.append(ref.pack_bits(w) if is_packed else w)
        grads.append((values(rows, length) * 1e-3).to(grad))
        m.append((torch.randn(rows, length) * 1e-3).to(moment))
        v.append((torch.rand(rows, length) * 1e-6).to(moment))
    return weights, grads, m, v


@pytest.mark.parametrize("moment", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", DTYPES)
@pytest.mark.parametrize("second_order", [True, False])
def test_step(cpu_backend: str, grad: torch.dtype, moment: torch.dtype, second_order: bool) -> None:
    lengths = [*LENGTHS, 0]
    operands = step_operands(lengths, [i % 3 != 1 for i in range(len(lengths))], grad, moment)
    hyper = torch.tensor([0.125, 0.25, 0.75, 1e-5]) if second_order else torch.tensor([0.3, 0.0, 0.0, 2e-4])
    for options in (
        {},
        {"maximize": True, "inv_scale": torch.tensor(0.37)},
        {"found_inf": torch.zeros(1)},
        {"found_inf": torch.ones(1)},
    ):
        results = []
        for step in (ops.bop_step_, ref.bop_step_):
            w, g, m, v = ([t.clone() for t in tensors] for tensors in operands)
            counts = torch.full((len(lengths), 2), -9)
            for t in range(3):
                seed = torch.tensor([11, t])
                step(w, g, m, v if second_order else [], hyper, counts, seed=seed, **options)
            results.append((*w, *m, *v, counts))
        for ours, expected in zip(*results, strict=True):
            assert torch.equal(ours.nan_to_num(nan=123.0), expected.nan_to_num(nan=123.0))
        flips = results[0][-1][:, 1].sum().item()
        assert flips == 0 if "found_inf" in options and options["found_inf"].item() else flips > 0


def test_step_does_not_depend_on_threads(cpu_backend: str) -> None:
    operands = step_operands([100_003, 17], [True, False], torch.float32, torch.bfloat16)
    hyper, results, before = torch.tensor([0.125, 0.25, 0.75, 1e-5]), [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            w, g, m, v = ([t.clone() for t in tensors] for tensors in operands)
            counts = torch.zeros(2, 2, dtype=torch.int64)
            ops.bop_step_(w, g, m, v, hyper, counts, seed=torch.tensor([11, 5]))
            results.append((*w, *m, *v, counts))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one.nan_to_num(), two.nan_to_num())


# ------------------------------------------------------------------------------------------ gradients


def dense_gradients(x: Tensor, w: Tensor, forward: Any, grad: Tensor, clip: bool) -> tuple[Tensor, Tensor]:
    """Gradients of the same function written with dense tensors in float64."""
    signs = torch.where(x < 0, -1.0, 1.0).double().requires_grad_()
    weight = w.double().requires_grad_()
    forward(signs, weight).backward(grad.double())
    grad_x = signs.grad * (x.abs() <= 1) if clip else signs.grad
    return grad_x, weight.grad


@pytest.mark.parametrize("clip", [True, False])
def test_linear_gradients(cpu_backend: str, clip: bool) -> None:
    x = torch.randn(7, 3, 70, requires_grad=True)
    weight = torch.nn.Parameter(bf.pack(torch.randn(9, 70)))
    out = bf.ops.binary_linear(x, weight, ste_clip=clip)
    grad = torch.randn_like(out)
    out.backward(grad)
    grad_x, grad_w = dense_gradients(
        x.detach(), weight.unpack().detach(), torch.nn.functional.linear, grad, clip
    )
    assert torch.allclose(x.grad.double(), grad_x, rtol=1e-5, atol=1e-5)
    assert torch.allclose(weight.grad.double(), grad_w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("padding_value", [0, 1, -1])
@pytest.mark.parametrize("groups", [1, 2])
def test_conv2d_gradients(cpu_backend: str, groups: int, padding_value: int, clip: bool) -> None:
    x = torch.randn(3, 36, 9, 8, requires_grad=True)
    weight = torch.nn.Parameter(bf.pack(torch.randn(10, 36 // groups, 3, 3), 1))
    geometry = ((2, 1), (1, 2), (1, 2), groups)
    out = bf.ops.binary_conv2d(x, weight, *geometry, padding_value=padding_value, ste_clip=clip)
    grad = torch.randn_like(out)

    def forward(signs: Tensor, w: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(signs, (2, 2, 1, 1), value=float(padding_value))
        return torch.nn.functional.conv2d(padded, w, None, geometry[0], 0, geometry[2], groups)

    out.backward(grad)
    grad_x, grad_w = dense_gradients(x.detach(), weight.unpack().detach(), forward, grad, clip)
    assert torch.allclose(x.grad.double(), grad_x, rtol=1e-5, atol=1e-4)
    assert torch.allclose(weight.grad.double(), grad_w, rtol=1e-5, atol=1e-4)
    assert weight.grad.stride() == weight.stride(), "gradient and words are walked in one order"


@pytest.mark.parametrize("stride", [(3, 1), (1, 3), (2, 2)])
def test_gradients_where_a_stride_leaves_pixels_over(cpu_backend: str, stride: tuple[int, int]) -> None:
    x = torch.randn(2, 4, 16, 18, requires_grad=True)
    weight = torch.nn.Parameter(bf.pack(torch.randn(4, 4, 1, 1), 1))
    for _ in range(20):  # what lies beside the memory differs from call to call
        x.grad = weight.grad = None
        out = bf.ops.binary_conv2d(x, weight, stride)
        grad = torch.randint(-4, 5, out.shape).float()
        out.backward(grad)
        want_x, want_w = dense_gradients(
            x.detach(),
            weight.unpack().detach(),
            lambda signs, w: torch.nn.functional.conv2d(signs, w, stride=stride),
            grad,
            True,
        )
        assert torch.equal(x.grad.double(), want_x) and torch.equal(weight.grad.double(), want_w)


def test_tiles_of_the_backward_pass_are_as_large_as_the_device_wants() -> None:
    """A ResNet-18's first stage at batch 256: a GPU would otherwise get 26 small problems for one layer."""
    cpu, cuda = (list(row_tiles(256, 64 * 56 * 56, torch.device(kind))) for kind in ("cpu", "cuda"))
    assert len(cpu) == 26 and len(cuda) == 1
    for tiles in (cpu, cuda, list(row_tiles(5, 1 << 30, torch.device("cuda")))):
        assert tiles[0].start == 0 and all(a.stop == b.start for a, b in itertools.pairwise(tiles))


def test_gradients_over_several_tiles() -> None:
    rows = TILE_ELEMENTS["cpu"] // 4096 * 2 + 5
    x = torch.randn(rows, 4096, requires_grad=True)
    weight = torch.nn.Parameter(bf.pack(torch.randn(3, 4096)))
    out = bf.ops.binary_linear(x, weight)
    grad = torch.randint(-2, 3, out.shape).float()  # integer sums are exact: tiles cannot change them
    out.backward(grad)
    expected = dense_gradients(x.detach(), weight.unpack().detach(), torch.nn.functional.linear, grad, True)
    assert torch.equal(x.grad.double(), expected[0]) and torch.equal(weight.grad.double(), expected[1])


@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_saved_for_backward_is_two_bits_per_activation(layer: str) -> None:
    if layer == "linear":
        x = torch.randn(64, 1024, requires_grad=True)
        module: torch.nn.Module = bf.nn.BinaryLinear(1024, 32)
    else:
        x = torch.randn(2, 128, 16, 16, requires_grad=True)
        module = bf.nn.BinaryConv2d(128, 32, 3, padding=1)
    saved: list[Tensor] = []

    def remember(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda t: t):
        module(x)
    activations = [t for t in saved if not isinstance(t, bf.BinaryTensor)]
    assert sum(t.nbytes for t in activations) * 8 == 2 * x.numel()


# ------------------------------------------------------------------------------------------ opcheck


NEEDS = ((True, True), (True, False), (False, True))  # gradients of the input, of the weight


def opcheck_cases() -> dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    w = ref.pack_bits(torch.randn(5, 40))
    conv = ref.pack_bits(torch.randn(5, 20, 3, 3), 1)
    x, image = torch.randn(3, 40), torch.randn(2, 20, 6, 6)
    geometry = ([1, 1], [1, 1], [1, 1], 1, 0)
    threshold = torch.zeros(5, dtype=torch.int32)
    weights, grads, m, v = step_operands([40, 7], [True, False], torch.float32, torch.float32)
    hyper, counts = torch.tensor([0.1, 0.1, 0.5, 0.0]), torch.zeros(2, 2, dtype=torch.int64)
    parameter = torch.nn.Parameter(bf.pack(torch.randn(5, 40)))
    grad, image_grad = torch.randn(3, 5), torch.randn(2, 5, 6, 6)
    last = image.contiguous(memory_format=torch.channels_last)
    signs, mask = ref.pack_bits_ste(x)
    image_signs, image_mask = ref.pack_bits_ste(image, 1)
    return {
        "bop_step_": (ops.bop_step_, (weights, grads, m, v, hyper, counts), {}),
        "pack_bits": (ops.pack_bits, (image, 1), {}),
        "pack_bits_ste": (ops.pack_bits_ste, (image, 1, 2), {}),
        "unpack_bits": (ops.unpack_bits, (w, 40), {}),
        "apply_mask_": (ops.apply_mask_, (torch.randn(3, 40), mask), {}),
        "unpack_bits parameter": (ops.unpack_bits, (parameter, 40), {}),
        "prepack_weight": (ops.prepack_weight, (conv, 1), {}),
        "binary_linear": (ops.binary_linear, (x.clone().requires_grad_(), w, True), {}),
        "binary_linear parameter": (ops.binary_linear, (x.clone().requires_grad_(), parameter, True), {}),
        "binary_conv2d": (ops.binary_conv2d, (image.clone().requires_grad_(), conv, *geometry, True), {}),
        "binary_conv2d channels-last": (
            ops.binary_conv2d, (last.clone().requires_grad_(), conv, *geometry, True), {},
        ),
        "binary_linear_packed": (
            ops.binary_linear_packed,
            (ref.pack_bits(x), w, 40),
            {"values": False, "signs": True, "threshold": threshold},
        ),
        "binary_conv2d_packed": (
            ops.binary_conv2d_packed,
            (ref.pack_bits(image, 1), conv, 20, *geometry),
            {"signs": True, "shift": torch.randn(5), "dtype": torch.bfloat16},
        ),
        "quantize_rows": (ops.quantize_rows, (x,), {}),
        "signed_linear": (ops.signed_linear, (x.clone().requires_grad_(), w), {}),
        "signed_linear parameter": (ops.signed_linear, (x.clone().requires_grad_(), parameter), {}),
        "signed_linear int8": (
            ops.signed_linear,
            (ref.quantize_rows(x)[0], w, 2, 3, torch.rand(3), x.clone().requires_grad_()),
            {},
        ),
        "signed_linear fused": (
            ops.signed_linear,
            (x.to(torch.bfloat16), w),
            {"signs": True, "shift": torch.randn(5), "dtype": torch.bfloat16},
        ),
        "signed_conv2d": (ops.signed_conv2d, (image.clone().requires_grad_(), conv, *geometry[:4]), {}),
        "signed_conv2d uint8": (
            ops.signed_conv2d,
            (image.to(torch.uint8), conv, *geometry[:4]),
            {"values": False, "signs": True, "threshold": threshold, "zero_point": 128},
        ),
        **{
            f"binary_linear_backward {needs}": (
                ops.binary_linear_backward, (grad, signs, mask, w, 40, *needs), {},
            )
            for needs in NEEDS
        },
        **{
            f"binary_conv2d_backward {needs} {layout}": (
                ops.binary_conv2d_backward,
                (
                    image_grad.contiguous(memory_format=layout),
                    image_signs, image_mask, conv, 20, *geometry, *needs,
                ),
                {},
            )
            for needs in NEEDS
            for layout in (torch.contiguous_format, torch.channels_last)
        },
    }  # fmt: skip


@pytest.mark.parametrize("name", list(opcheck_cases()))
def test_opcheck(name: str) -> None:
    op, args, kwargs = opcheck_cases()[name]
    tests: tuple[str, ...] = ("test_schema", "test_autograd_registration", "test_faketensor")
    if "parameter" not in name:  # torch's own harness makes no graph over parameters that are subclasses
        tests = (*tests, "test_aot_dispatch_dynamic")
    torch.library.opcheck(op.default, args, kwargs, test_utils=tests)


# ------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: bf.ops.binary_linear(x[:, :39], w), "39.*40 features|40 features"),
        (lambda x, w: bf.ops.binary_linear(x, w.unpack()), "BinaryTensor"),
        (lambda x, w: bf.ops.binary_linear(x.long(), w), "float32"),
        (lambda x, w: bf.ops.binary_linear(x, bf.pack(torch.ones(5, 40), 0)), "axis 0"),
        (lambda x, w: bf.ops.binary_linear(x.to("meta"), w), "meta"),
    ],
)
def test_linear_refuses(call: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call(torch.randn(3, 40), bf.pack(torch.randn(5, 40)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 2}, "channels"),
        ({"groups": 0}, "groups"),
        ({"padding_value": 2}, "padding_value"),
        ({"padding_value": None}, "padding_value"),
        ({"stride": 0}, "stride"),
        ({"stride": (1, 1, 1)}, "stride"),
        ({"padding": -1}, "padding"),
        ({"dilation": 9}, "smaller than the kernel"),
    ],
)
def test_conv2d_refuses(options: dict[str, Any], message: str) -> None:
    x, w = torch.randn(2, 20, 6, 6), bf.pack(torch.randn(5, 20, 3, 3), 1)
    with pytest.raises((TypeError, ValueError), match=message):
        bf.ops.binary_conv2d(x, w, **options)
    with pytest.raises(ValueError, match=r"\[N, C, H, W\]"):
        bf.ops.binary_conv2d(x[0], w)


# ----------------------------------------------------------------------- called directly, sizes and kinds

WORDS = torch.zeros(4, 3, 3, 1, dtype=torch.int32)
HOW = ([1, 1], [1, 1], [1, 1], 1, 0)
SPARSE = torch.eye(8).to_sparse()


def quantized() -> Tensor:
    return torch.quantize_per_tensor(torch.ones(4, 8), 0.1, 0, torch.quint8)


@pytest.mark.filterwarnings("ignore:.*quantize")
@pytest.mark.parametrize(
    "call",
    [
        lambda: ops.pack_bits(quantized(), -1),
        lambda: ops.pack_bits(SPARSE, -1),
        lambda: ops.pack_bits(torch.ones(4, dtype=torch.complex64), -1),
        lambda: ops.pack_bits(torch.tensor(1.0), 0),
        lambda: ops.unpack_bits(quantized(), 8),
        lambda: ops.unpack_bits(WORDS, 5, dtype=torch.quint8),
        lambda: ops.unpack_bits(WORDS, 2**63 - 1),
        lambda: ops.unpack_bits(WORDS, -31),
        lambda: ops.binary_linear(quantized(), WORDS[0, 0], True),
        lambda: ops.binary_linear(torch.ones(4, 8), SPARSE, True),
        lambda: ops.binary_linear(torch.ones(4, 8), WORDS[0, 0].to("meta"), True),
        lambda: ops.binary_linear_packed(WORDS[0, 0], WORDS[0, 0], -5),
        lambda: ops.binary_conv2d(torch.ones(8, 5, 5), WORDS, *HOW, True),
        lambda: ops.binary_conv2d(torch.ones(1, 8, 5, 5), WORDS[0], *HOW, True),
        lambda: ops.binary_conv2d_packed(WORDS, WORDS, 8, *HOW, threshold=SPARSE, signs=True),
        lambda: ops.binary_conv2d_backward(
            torch.ones(4, 1, 5, 5),
            WORDS[:1],
            torch.zeros(0).int(),
            WORDS,
            8,
            *HOW,
            True,
            True,
        ),
        lambda: ops.apply_mask_(torch.ones(4, 64), torch.zeros(8, 1, dtype=torch.int32)),
        lambda: ops.apply_mask_(torch.ones(2, 2, 64), torch.zeros(4, 2, dtype=torch.int32)),
        lambda: ops.prepack_weight(torch.tensor(1, dtype=torch.int32), 1),
        lambda: ops.bop_step_(
            [torch.ones(6)], [torch.ones(2, 3)], [torch.ones(6)], [], torch.ones(4), torch.zeros(1, 2).long()
        ),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_operands_of_other_kinds_are_refused(call: Any, backend: str) -> None:
    if (reason := bf.backends.why_not(backend)) is not None:
        pytest.skip(reason)
    with bf.backends.use(backend), pytest.raises((TypeError, ValueError, RuntimeError)):
        call()


@pytest.mark.parametrize(
    ("channels", "image", "options", "message"),
    [
        (1024, (8, 64), {"padding": (2**20, 1), "dilation": (2**20, 1)}, "words of the padded input"),
        (2**18, (1, 1), {"padding": 2**8, "dilation": 2**8}, "words of the padded input"),
        (32, (4, 4), {"padding": 2**31 - 1}, r"2\*\*31"),
        (32, (4, 4), {"stride": 2**62}, r"2\*\*31"),
        (32, (4, 4), {"groups": 2**62}, "groups"),
    ],
)
def test_sizes_are_bounded(
    channels: int, image: tuple[int, int], options: dict[str, Any], message: str
) -> None:
    x, w = torch.ones(1, channels, *image), bf.pack(torch.ones(16, channels, 3, 3), 1)
    with pytest.raises(ValueError, match=message):
        bf.ops.binary_conv2d(x, w, **options)


def test_layers_are_bounded() -> None:
    with pytest.raises(ValueError, match=r"2\*\*24"):
        bf.nn.BinaryLinear(2**24, 1)
    with pytest.raises(ValueError, match=r"2\*\*31"):
        bf.nn.BinaryConv2d(32, 1, 2, dilation=2**20)
    layer = bf.nn.BinaryConv2d(64, 8, 1, stride=(2**31 - 1, 4))  # as good as the image's size
    x = torch.randn(2, 64, 3, 9, requires_grad=True)
    near = bf.ops.binary_conv2d(x, layer.weight, (3, 4))
    assert torch.equal(layer(x), near)
    (far,) = torch.autograd.grad(layer(x).sum(), x)
    assert torch.equal(far, torch.autograd.grad(near.sum(), x)[0])


def test_far_taps_need_no_memory() -> None:
    """Taps and borders a million pixels away: what they cannot see is neither allocated nor walked."""
    x = torch.randn(1, 32, 3, 5, requires_grad=True)
    w = bf.pack(torch.randn(8, 32, 3, 1), 1)
    out = bf.ops.binary_conv2d(x, w, padding=(2**22, 0), dilation=(2**22, 1))
    middle = bf.ops.binary_conv2d(x, bf.pack(w.unpack()[:, :, 1:2], 1))
    assert torch.equal(out, middle)
    (far,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(far, torch.autograd.grad(middle.sum(), x)[0])
