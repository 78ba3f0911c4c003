"""The C++ CPU kernels against the specification, bit for bit, on every instruction set of this machine."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import bop2nd_fast  # noqa: F401  (defines the operators)
from bop2nd_fast import backends, reference
from bop2nd_fast.ops import prepack_weight
from bop2nd_fast.ops.binary_conv2d import _backward as specified_conv_gradients
from bop2nd_fast.ops.binary_linear import _backward as specified_linear_gradients
from tests.epilogues import epilogues, refused_epilogues

_C = pytest.importorskip("bop2nd_fast._C", reason="the package was installed without a C++ compiler")
symbols = ctypes.CDLL(_C.__file__)
symbols.bop2nd_isa_name.restype = ctypes.c_char_p
symbols.bop2nd_isa_requires.restype = ctypes.c_char_p
symbols.bop2nd_isa_calls.restype = ctypes.c_int64
symbols.bop2nd_register_loop.restype = ctypes.c_double
symbols.bop2nd_register_loop.argtypes = [ctypes.c_int, ctypes.c_int64]

IDS = range(symbols.bop2nd_isa_count())
NAMES = {i: symbols.bop2nd_isa_name(i).decode() for i in IDS}
SUPPORTED = [i for i in IDS if symbols.bop2nd_isa_supported(i)]
REALS = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = [1, 3, 31, 32, 33, 63, 64, 65, 100, 511, 512, 513]
ops = torch.ops.bop2nd


@pytest.fixture(params=SUPPORTED, ids=[NAMES[i] for i in SUPPORTED])
def isa(request: pytest.FixtureRequest) -> Iterator[int]:
    """Forces one instruction set, and fails the test unless exactly that one served it."""
    assert symbols.bop2nd_isa_force(request.param) == 0
    before = [symbols.bop2nd_isa_calls(i) for i in IDS]
    with torch.no_grad():
        yield request.param
    after = [symbols.bop2nd_isa_calls(i) for i in IDS]
    assert symbols.bop2nd_isa_force(-1) == 0
    assert [i for i in IDS if after[i] > before[i]] == [request.param]


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random reals with the awkward ones among them: zeros of both signs, NaN, infinities, exactly +-1."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    x = torch.randn(shape, generator=generator)
    special = torch.tensor([0.0, -0.0, float("nan"), -float("nan"), float("inf"), -float("inf"), 1.0, -1.0])
    pick = torch.randint(0, 40, shape, generator=generator)
    x = torch.where(pick < 8, special[pick.clamp(max=7)], x)
    return torch.where(pick == 8, torch.full_like(x, -1e-40), x).to(dtype)


def words_of(*shape: int, seed: int = 1) -> Tensor:
    """Sign words of random rows, packed along the last axis."""
    return reference.pack_bits(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def poison() -> None:
    """Leaves garbage where the next allocations of the usual sizes will probably come to lie."""
    for size in (64, 1024, 16384):
        for _ in range(4):
            torch.full((size,), -123456789, dtype=torch.int32)


# ------------------------------------------------------------------------------------------ dispatch


def test_names_and_requirements() -> None:
    assert tuple(NAMES.values()) == backends.INSTRUCTION_SETS
    assert all(symbols.bop2nd_isa_requires(i) for i in IDS)
    assert symbols.bop2nd_isa_name(99) is None
    assert symbols.bop2nd_isa_active() == SUPPORTED[-1]
    assert 0 in SUPPORTED


def test_impossible_instruction_sets_are_refused() -> None:
    for i in [*(set(IDS) - set(SUPPORTED)), 99, -2]:
        assert symbols.bop2nd_isa_force(i) == -1
        assert symbols.bop2nd_register_loop(i, 1) == 0.0
    assert symbols.bop2nd_isa_active() == SUPPORTED[-1]


def test_loops_are_shared_by_all_threads() -> None:
    assert symbols.bop2nd_openmp() == 1


# ------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("dtype", REALS)
def test_pack_rows_and_columns(isa: int, dtype: torch.dtype) -> None:
    for length in LENGTHS:
        for x, dim in ((values(3, length, dtype=dtype), -1), (values(2, length, 37, dtype=dtype), 1)):
            poison()
            assert torch.equal(ops.pack_bits(x, dim), reference.pack_bits(x, dim))
            for got, want in zip(
                ops.pack_bits_ste(x, dim, 1), reference.pack_bits_ste(x, dim, 1), strict=True
            ):
                assert torch.equal(got, want) and got.is_contiguous()


@pytest.mark.parametrize("dtype", REALS)
def test_pack_images(isa: int, dtype: torch.dtype) -> None:
    for (c, groups), (h, w) in itertools.product(
        [(3, 1), (64, 1), (70, 2), (96, 3), (33, 1)], [(5, 7), (4, 16), (1, 1)]
    ):
        x = values(2, c, h, w, dtype=dtype)
        layouts = (
            x,
            x.to(memory_format=torch.channels_last),
            x.transpose(2, 3),
            values(2, c, h, 2 * w, dtype=dtype)[..., ::2],
            values(4, c, h, w, dtype=dtype)[::2],
        )
        for x in layouts:
            for got, want in zip(
                ops.pack_bits_ste(x, 1, groups), reference.pack_bits_ste(x, 1, groups), strict=True
            ):
                assert torch.equal(got, want)


@pytest.mark.parametrize(
    "shape, dim", [((0, 5), 1), ((5, 0), 1), ((7,), 0), ((2, 3, 4, 5), 0), ((2, 40, 4), -2)]
)
def test_pack_odd_shapes(isa: int, shape: tuple[int, ...], dim: int) -> None:
    x = values(*shape)
    assert torch.equal(ops.pack_bits(x, dim), reference.pack_bits(x, dim))
    if x.numel():
        assert torch.equal(
            ops.pack_bits(x[:1].expand_as(x), dim), reference.pack_bits(x[:1].expand_as(x), dim)
        )


@pytest.mark.parametrize("dtype", [*REALS, torch.float64])
def test_unpack(isa: int, dtype: torch.dtype) -> None:
    for length, dim in itertools.product(LENGTHS, (-1, 0, 1)):
        words = words_of(3, 2, length)
        got, want = (
            ops.unpack_bits(words, length, dim, dtype=dtype),
            reference.unpack_bits(words, length, dim, dtype),
        )
        assert torch.equal(got, want) and got.stride() == want.stride()


# ----------------------------------------------------------------------------------------------- step


def step_case(
    sizes: list[tuple[int, ...]], grad: torch.dtype, state: torch.dtype, second: bool, weight: Any
) -> list:
    lists: list[list[Tensor]] = [[], [], [], []]
    for i, size in enumerate(sizes):
        generator = torch.Generator().manual_seed(i)
        kind = weight[i % len(weight)]
        dense = torch.where(torch.randn(size, generator=generator) < 0, -1.0, 1.0)
        lists[0].append(reference.pack_bits(dense) if kind is None else dense.to(kind))
        lists[1].append(values(*size, dtype=grad, seed=i))
        lists[2].append((torch.randn(size, generator=generator) * 1e-3).to(state))
        if second:
            lists[3].append((torch.rand(size, generator=generator) * 1e-2).to(state))
    return lists


def run_both(lists: list, hyper: Tensor, **options: Any) -> None:
    ours, theirs = ([[t.clone() for t in tensors] for tensors in lists] for _ in range(2))
    counts = [torch.full((len(lists[0]), 2), 77, dtype=torch.int64) for _ in range(2)]
    ops.bop_step_(*ours, hyper, counts[0], **options)
    reference.bop_step_(*theirs, hyper, counts[1], **options)
    assert torch.equal(counts[0], counts[1])
    for got, want in zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True):
        if got.is_floating_point():
            assert torch.equal(got.isnan(), want.isnan())
            got, want = got.nan_to_num(7.0), want.nan_to_num(7.0)
        assert torch.equal(got, want)


SIZES = [
    (0,),
    (1,),
    (3, 31),
    (2, 32),
    (33,),
    (5, 63),
    (2, 3, 64),
    (65,),
    (2, 511),
    (3, 512),
    (513,),
    (2, 1031),
    (0, 4),
]
HYPER = torch.tensor([1e-2, 3e-2, 0.05, 1e-4])


@pytest.mark.parametrize("second", [True, False])
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", REALS)
def test_step(isa: int, grad: torch.dtype, state: torch.dtype, second: bool) -> None:
    seed = torch.tensor([0x123456789A, 17]) if state == torch.bfloat16 else None
    run_both(step_case(SIZES, grad, state, second, [None, *REALS]), HYPER, seed=seed)
    run_both(step_case(SIZES, grad, state, second, [None]), HYPER, seed=seed)


@pytest.mark.parametrize("second", [True, False])
@pytest.mark.parametrize("grad", REALS)
def test_step_bf16_words_without_special_values(isa: int, grad: torch.dtype, second: bool) -> None:
    """Most words of the other tests hold a NaN or an infinity somewhere, which takes another path."""
    lists = step_case([(64, 1024), (9, 1031), (100,)], grad, torch.bfloat16, second, [None])
    for i, g in enumerate(lists[1]):
        g.copy_(torch.randn(g.shape, generator=torch.Generator().manual_seed(i)) * 0.1)
    lists[1][0][5, 77], lists[1][0][6, 500] = float("nan"), float("-inf")
    run_both(lists, HYPER, seed=torch.tensor([0x123456789A, 17]))


def test_step_options(isa: int) -> None:
    lists = step_case(SIZES, torch.float32, torch.float32, True, [None, torch.float32])
    for inf, maximize in itertools.product((None, 0.0, 1.0, float("nan")), (False, True)):
        found = None if inf is None else torch.tensor(inf)
        run_both(lists, HYPER, inv_scale=torch.tensor([0.3]), found_inf=found, maximize=maximize)


def test_step_flips_something_and_leaves_tail_bits_zero(isa: int) -> None:
    lists = step_case([(7, 45)], torch.float32, torch.float32, True, [None])
    counts = torch.zeros(1, 2, dtype=torch.int64)
    before = lists[0][0].clone()
    ops.bop_step_(*lists, HYPER, counts)
    flipped = (reference.unpack_flags(before, 64) != reference.unpack_flags(lists[0][0], 64)).sum((0, 1))
    assert 0 < counts[0, 1] < counts[0, 0] < 7 * 45 and flipped == counts[0, 1]
    assert not reference.unpack_flags(lists[0][0], 64)[:, 45:].any()


def test_step_exact_ties_and_denormals(isa: int) -> None:
    m = torch.tensor([[1e-40, -1e-40, 0.0, -0.0, 2.0, -2.0, 2.0000002, float("nan")] * 5])
    words = words_of(1, 40)
    for b in (2.0, 0.0):
        hyper = torch.tensor([0.0, 0.0, 0.0, b])
        run_both([[words], [torch.zeros_like(m)], [m], [torch.zeros_like(m)]], hyper)


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
def test_step_does_not_depend_on_threads(isa: int, state: torch.dtype) -> None:
    lists = step_case([(37, 4097), (100_003,), (64, 1024)], torch.float32, state, True, [None, torch.float32])
    results = []
    n_threads = torch.get_num_threads()
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        run = [[t.clone() for t in tensors] for tensors in lists]
        counts = torch.zeros(3, 2, dtype=torch.int64)
        ops.bop_step_(*run, HYPER, counts, seed=torch.tensor([5, 6]))
        results.append([*itertools.chain(*run), counts])
    torch.set_num_threads(n_threads)
    for other in results[1:]:
        assert all(
            torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(results[0], other, strict=True)
        )


# ------------------------------------------------------------------------------- linear, convolution


def equal_all(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(g, w) and g.dtype == w.dtype for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", REALS)
def test_linear(isa: int, dtype: torch.dtype) -> None:
    for k, n, m in itertools.product([1, 31, 33, 64, 513], [1, 15, 17, 40], [0, 1, 3, 6]):
        x, w = values(m, k, dtype=dtype), words_of(n, k)
        poison()
        assert equal_all(ops.binary_linear(x, w, m % 2 == 0), reference.binary_linear(x, w, m % 2 == 0))


def test_linear_long_rows_and_more_axes(isa: int) -> None:
    for k in (32 * 15, 32 * 16 * 31 - 1, 32 * 16 * 31, 32 * 16 * 31 + 1, 32 * 16 * 63 + 77):
        x, w = torch.full((3, k), -1.0), reference.pack_bits(torch.ones(17, k))  # every bit differs
        assert equal_all(ops.binary_linear(x, w, False), reference.binary_linear(x, w, False))
    x, w = values(2, 3, 5, 70), words_of(20, 70)
    assert equal_all(ops.binary_linear(x, w, True), reference.binary_linear(x, w, True))
    blocked = ops.prepack_weight(w, 1)
    assert equal_all(ops.binary_linear(x, w, True, blocked), reference.binary_linear(x, w, True))
    assert equal_all(ops.binary_linear(values(70), w, True), reference.binary_linear(values(70), w, True))


def test_linear_packed(isa: int) -> None:
    for k, n, m in itertools.product([5, 64, 700], [1, 16, 17, 32, 33, 48, 65], [1, 4]):
        x, w = words_of(m, k, seed=3), words_of(n, k)
        dots = reference.binary_linear_packed(x, w, k)[0]
        for asked in epilogues((m, n)):
            poison()
            got = ops.binary_linear_packed(x, w, k, **asked)
            assert equal_all(got, reference.epilogue(dots, **asked)), sorted(asked)


def test_packed_outputs_are_checked(isa: int) -> None:
    x, w = words_of(4, 64, seed=3), words_of(17, 64)
    ops.binary_linear_packed(x, w, 64)
    for asked, message in refused_epilogues((4, 17)):
        with pytest.raises(ValueError, match=message):
            ops.binary_linear_packed(x, w, 64, **asked)


# batch, channels, height, width, outputs, kernel, stride, padding, dilation, groups
CONVS = [
    (2, 64, 8, 9, 32, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (1, 3, 5, 5, 16, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (2, 40, 7, 6, 17, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    (1, 70, 9, 9, 20, (5, 5), (1, 2), (2, 2), (1, 1), 2),
    (1, 33, 12, 13, 5, (7, 7), (2, 2), (3, 3), (1, 1), 1),
    (2, 96, 10, 10, 48, (3, 3), (1, 1), (2, 2), (2, 2), 3),
    (1, 64, 2, 3, 16, (5, 5), (1, 1), (2, 2), (1, 1), 1),
    (1, 32, 2, 2, 33, (3, 2), (1, 1), (3, 4), (1, 3), 1),
    (3, 8, 6, 5, 16, (3, 3), (3, 1), (0, 1), (1, 1), 8),
    (2, 37, 6, 7, 37, (3, 3), (1, 2), (1, 1), (1, 1), 37),
    (1, 512, 7, 7, 31, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (0, 32, 4, 4, 16, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (9, 32, 11, 4, 64, (1, 3), (1, 1), (0, 1), (1, 1), 1),
]


def conv_case(case: Any, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, list[Any]]:
    n, c, h, w, o, kernel, stride, padding, dilation, groups = case
    x = values(n, c, h, w, dtype=dtype)
    return x, words_of(o, *kernel, c // groups), [list(stride), list(padding), list(dilation), groups]


@pytest.mark.parametrize("padding_value", [0, 1, -1])
@pytest.mark.parametrize("case", CONVS, ids=str)
def test_conv(isa: int, case: Any, padding_value: int) -> None:
    for dtype in REALS:
        x, w, geometry = conv_case(case, dtype)
        want = reference.binary_conv2d(x, w, *geometry, padding_value, True)
        for layout in (torch.contiguous_format, torch.channels_last):
            poison()
            got = ops.binary_conv2d(
                x.contiguous(memory_format=layout), w, *geometry, padding_value, True, None
            )
            assert equal_all(got, want)
            assert got[0].is_contiguous(memory_format=layout) or x.numel() == 0
    blocked = ops.prepack_weight(w, geometry[-1])
    want = reference.binary_conv2d(x, w, *geometry, padding_value, False)
    assert equal_all(ops.binary_conv2d(x, w, *geometry, padding_value, False, blocked), want)


@pytest.mark.parametrize("padding_value", [0, 1, -1])
@pytest.mark.parametrize("case", CONVS, ids=str)
def test_conv_packed(isa: int, case: Any, padding_value: int) -> None:
    x, w, geometry = conv_case(case)
    channels, groups = x.shape[1], geometry[-1]
    words = reference.pack_bits_ste(x, 1, groups)[0]
    arguments = (words, w, channels, *geometry, padding_value)
    dots = reference.binary_conv2d_packed(*arguments)[0]
    for asked in epilogues(tuple(dots.shape)):
        poison()
        got = ops.binary_conv2d_packed(*arguments, **asked)
        assert equal_all(got, reference.epilogue(dots, **asked)), sorted(asked)
        assert all(t.is_contiguous() for t in got)


def test_conv_does_not_depend_on_threads(isa: int) -> None:
    x, w, geometry = conv_case((3, 128, 20, 21, 72, (3, 3), (1, 1), (1, 1), (1, 1), 1))
    n_threads = torch.get_num_threads()
    results = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        results.append(ops.binary_conv2d(x, w, *geometry, 0, True))
    torch.set_num_threads(n_threads)
    assert equal_all(results[0], results[1]) and equal_all(results[0], results[2])


def whole_gradient(like: Tensor) -> Tensor:
    """Whole numbers, whose sums are exact in any order, of the shape and strides of ``like``."""
    return torch.randint(-4, 5, like.shape, generator=torch.Generator().manual_seed(5)).to(like)


@pytest.mark.parametrize("padding_value", [0, 1, -1])
@pytest.mark.parametrize("case", CONVS, ids=str)
def test_conv_gradients(isa: int, case: Any, padding_value: int) -> None:
    x, w, (*geometry, groups) = conv_case(case)
    out, signs, mask = reference.binary_conv2d(x, w, *geometry, groups, padding_value, True)
    grad = whole_gradient(out)
    for saved in (mask, mask.new_empty(0)):
        rest = (w, x.shape[1], *geometry, groups, padding_value)
        want = specified_conv_gradients(grad, signs, saved, *rest, True, True)
        for dtype in REALS:
            for layout in (torch.contiguous_format, torch.channels_last):
                poison()
                g = grad.to(dtype).contiguous(memory_format=layout)
                got = ops.binary_conv2d_backward(g, signs, saved, *rest, True, True)
                assert equal_all(got, (want[0].to(dtype), want[1]))
                assert got[0].is_contiguous(memory_format=layout) or grad.numel() == 0
                assert got[1].is_contiguous(memory_format=torch.channels_last)
    grad_input, grad_weight = ops.binary_conv2d_backward(grad, signs, mask, *rest, False, False)
    assert grad_input.numel() == grad_weight.numel() == 0


def test_linear_gradients(isa: int) -> None:
    for k, n, m in itertools.product([1, 33, 513], [1, 17, 70], [0, 1, 6, 300]):
        x, w = values(m, k), words_of(n, k)
        out, signs, mask = reference.binary_linear(x, w, True)
        grad = whole_gradient(out)
        want = specified_linear_gradients(grad, signs, mask, w, k, True, True)
        poison()
        assert equal_all(ops.binary_linear_backward(grad, signs, mask, w, k, True, True), want)
    grad = whole_gradient(torch.empty(1, 70)).expand(300, 70)  # as a sum's gradient comes
    want = specified_linear_gradients(grad, signs, mask, w, k, True, True)
    assert equal_all(ops.binary_linear_backward(grad, signs, mask, w, k, True, True), want)


def test_gradients_do_not_depend_on_threads(isa: int) -> None:
    x, w, (*geometry, groups) = conv_case((3, 128, 20, 21, 72, (3, 3), (1, 1), (1, 1), (1, 1), 1))
    out, signs, mask = reference.binary_conv2d(x, w, *geometry, groups, 0, True)
    n_threads, grad, results = torch.get_num_threads(), torch.randn(out.shape), []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        rest = (w, x.shape[1], *geometry, groups, 0)
        results.append(ops.binary_conv2d_backward(grad, signs, mask, *rest, True, True))
    torch.set_num_threads(n_threads)
    assert equal_all(results[0], results[1]) and equal_all(results[0], results[2])


def test_prepack_weight(isa: int) -> None:
    for outputs, groups in [(36, 2), (1, 1), (16, 1), (17, 1), (48, 1), (49, 1), (64, 2), (171, 1), (342, 2)]:
        w = words_of(outputs, 3, 2, 70)
        want = prepack_weight._prepack_weight(w, groups)
        assert want.shape == (groups, -(-outputs // groups // 16) * 16 * 18)
        assert torch.equal(ops.prepack_weight(w, groups), want)
    ops.pack_bits(torch.ones(1), 0)  # re-laying is not served by an instruction set


def test_prepack_weight_of_few_outputs_is_a_transpose(isa: int) -> None:
    w = words_of(11, 70)
    blocked = ops.prepack_weight(w).reshape(3, 16)
    assert torch.equal(blocked[:, :11], w.T) and not blocked[:, 11:].any()
    ops.pack_bits(torch.ones(1), 0)


def test_prepack_weight_of_many_outputs_interleaves_bytes(isa: int) -> None:
    w = words_of(64, 32)
    steps = ops.prepack_weight(w).view(torch.uint8).reshape(4, 64)
    rows = w.view(torch.uint8)  # [64 outputs, 4 parts]
    for output, byte in [(0, 0), (3, 3), (4, 16), (17, 5), (35, 11), (63, 63)]:
        parts = rows[output].tolist()
        paired = [parts[0], parts[0] ^ parts[1], parts[2], parts[2] ^ parts[3]]
        assert steps[:, byte].tolist() == paired
    ops.pack_bits(torch.ones(1), 0)


def test_memory_is_guarded(isa: int) -> None:
    ops.pack_bits(torch.ones(1), 0)
    x = torch.ones(2, 64)
    with pytest.raises(ValueError, match="int32"):
        ops.binary_linear(x, torch.ones(4, 2), False)
    with pytest.raises(ValueError, match="do not fit"):
        ops.binary_linear(x, words_of(4, 96), False)
    with pytest.raises(ValueError, match="does not belong"):
        ops.binary_linear(x, words_of(4, 64), False, words_of(4, 64))
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        ops.pack_bits(x.double(), 0)
    signs, w = words_of(2, 64), words_of(4, 64)
    for grad, mask in ((torch.ones(3, 4), signs), (torch.ones(2, 4), words_of(2, 32))):
        with pytest.raises(ValueError, match=r"(signs|mask).* must be"):
            ops.binary_linear_backward(grad, signs, mask, w, 64, True, True)
    image, kernel = words_of(1, 5, 5, 64), words_of(4, 3, 3, 64)
    with pytest.raises(ValueError, match="grad_output must be"):
        rest = (kernel, 64, [1, 1], [1, 1], [1, 1], 1, 0)
        ops.binary_conv2d_backward(torch.ones(1, 4, 5, 4), image, image, *rest, True, True)
    with pytest.raises(ValueError, match="need a seed"):
        m = torch.zeros(64, dtype=torch.bfloat16)
        ops.bop_step_([words_of(64)], [x[0]], [m], [], HYPER, torch.zeros(1, 2, dtype=torch.int64))
