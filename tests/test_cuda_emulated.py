"""The CUDA operators without a GPU: their binding, planning and kernel bodies, run by emulated blocks.

``csrc/register_cuda.cpp`` is compiled with ``tests/cpp/cuda_emulated_launch.cpp`` in place of the launchers
and registered for host tensors in a namespace of its own; what it computes is compared with ``reference.py``,
bit for bit, pretending to be each kind of chip in turn (XOR.POPC, AND.POPC, int8 on decoded bits).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bop2nd_fast import reference as _reference
from tests.cuda_emulated import Emulated, emulated_library
from tests.epilogues import epilogues

reference: Any = _reference  # called with one tuple for its geometry
pytestmark = pytest.mark.timeout(900)  # compiles when its sources changed

CHIPS = (80, 89, 90, 100, 120)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def emulated() -> Emulated:
    return emulated_library()


def _special_values(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    x = (torch.randn(shape) * 1.2).to(dtype)
    special = torch.tensor([0.0, -0.0, float("nan"), 1.0, -1.0, float("inf"), -float("inf")], dtype=dtype)
    flat = x.view(-1)
    at = torch.randperm(flat.numel())[: min(flat.numel() // 3, 7)]
    flat[at] = special[: at.numel()]
    return x


def _words(*shape: int, length: int) -> Tensor:
    return reference.pack_bits(torch.randn(*shape, length))


# ------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        ((1,), -1),
        ((5, 64), 1),
        ((5, 33), -1),
        ((3, 65, 4), 1),
        ((64, 7), 0),
        ((2, 40, 3, 5), 1),
        ((2, 32, 3, 5), 1),
        ((0, 5), 1),
    ],
)
def test_pack_equals_the_reference(
    emulated: Emulated, dtype: torch.dtype, shape: tuple[int, ...], dim: int
) -> None:
    torch.manual_seed(0)
    x = _special_values(shape, dtype)
    before = emulated.calls()
    views = [x, x.flip(0)[: max(1, shape[0] // 2)]]
    if len(shape) == 4:
        views += [x.contiguous(memory_format=torch.channels_last), x[:, :, 1:, ::2], x.transpose(2, 3)]
    for view in views:
        assert torch.equal(emulated.pack_bits(view, dim), reference.pack_bits(view, dim))
        signs, mask = emulated.pack_bits_ste(view, dim)
        expected = reference.pack_bits_ste(view, dim)
        assert torch.equal(signs, expected[0])
        assert torch.equal(mask, expected[1])
    assert emulated.calls() == before + 2 * len(views)


def test_pack_in_groups(emulated: Emulated) -> None:
    torch.manual_seed(1)
    for channels, groups in ((6, 3), (64, 2), (70, 2)):
        for memory in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, channels, 3, 4).contiguous(memory_format=memory)
            for ours, theirs in zip(
                emulated.pack_bits_ste(x, 1, groups), reference.pack_bits_ste(x, 1, groups), strict=True
            ):
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("length", [1, 31, 32, 36, 100])
def test_unpack_equals_the_reference(emulated: Emulated, dtype: torch.dtype, length: int) -> None:
    words = _words(2, 3, 5, length=length)
    for dim in (-1, 1):
        ours = emulated.unpack_bits(words, length, dim, dtype=dtype)
        theirs = reference.unpack_bits(words, length, dim, dtype)
        assert torch.equal(ours, theirs)
        assert ours.stride() == theirs.stride()
        assert ours.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 31, 32, 36, 100])
def test_a_mask_clears_what_the_reference_clears(emulated: Emulated, dtype: torch.dtype, length: int) -> None:
    torch.manual_seed(length)
    storage = _special_values((3 * 5 * length + 1,), dtype)
    mask = _words(3, 5, length=length)
    bits = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}[dtype]
    for start in (0, 1):  # the second view is not aligned to four elements
        ours = storage[start : start + 15 * length].clone() if start == 0 else storage.clone()[1:]
        ours = ours.view(3, 5, length)
        theirs = ours.clone()
        before = emulated.calls()
        emulated.apply_mask_(ours, mask)
        reference.apply_mask_(theirs, mask)
        assert torch.equal(ours.view(bits), theirs.view(bits)), "what stays keeps its bits, NaN included"
        assert emulated.calls() == before + 1
    with pytest.raises(ValueError, match="mask must be"):
        emulated.apply_mask_(torch.zeros(3, length), mask[0, :2])
    with pytest.raises(ValueError, match="contiguous"):
        emulated.apply_mask_(torch.zeros(3, length + 1)[:, :length], mask[0, :3])


# -------------------------------------------------------------------------------------------- linear


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    ("rows", "features", "outputs"),
    [
        ((), 33, 5),
        ((8,), 4096, 70),
        ((2, 9), 100, 33),
        ((130,), 512, 130),
        ((20,), 4100, 40),
        ((0,), 8, 3),
        ((3,), 0, 4),
        ((40,), 96, 1),
    ],
)
def test_linear_equals_the_reference(
    emulated: Emulated, chip: int, rows: tuple[int, ...], features: int, outputs: int
) -> None:
    torch.manual_seed(features)
    emulated.become(chip, 2 if rows == (130,) else 132)
    weight = _words(outputs, length=features) if features else torch.zeros(outputs, 0, dtype=torch.int32)
    x = torch.randn(*rows, features).to(DTYPES[chip % 3])
    for clip in (True, False):
        for ours, theirs in zip(
            emulated.binary_linear(x, weight, clip), reference.binary_linear(x, weight, clip), strict=True
        ):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
    words = reference.pack_bits(x)
    dots = reference.binary_linear_packed(words, weight, features)[0]
    for asked in epilogues(tuple(dots.shape)):
        ours = emulated.binary_linear_packed(words, weight, features, **asked)
        assert all(map(torch.equal, ours, _reference.epilogue(dots, **asked))), sorted(asked)


def test_operands_that_start_inside_a_vector(emulated: Emulated) -> None:
    """Views whose memory is not aligned to 16 bytes are read in smaller pieces, not wrongly."""
    torch.manual_seed(5)
    for chip in CHIPS:
        emulated.become(chip)
        for rows in (4, 40):
            storage, weight_storage = torch.randn(rows * 128 + 3), _words(9, length=128).view(-1)
            weight = torch.cat([torch.zeros(1, dtype=torch.int32), weight_storage])[1:].view(9, 4)
            for start in (1, 2, 3):
                x = storage[start : start + rows * 128].view(rows, 128)
                for ours, theirs in zip(
                    emulated.binary_linear(x, weight, True),
                    reference.binary_linear(x, weight, True),
                    strict=True,
                ):
                    assert torch.equal(ours, theirs)


# --------------------------------------------------------------------------------------- convolution

CONVOLUTIONS = [  # channels, outputs, image, kernel, stride, padding, dilation, groups
    (64, 40, (6, 7), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (128, 70, (5, 5), (3, 3), (2, 2), (1, 1), (1, 1), 1),
    (33, 9, (7, 6), (3, 2), (1, 2), (2, 0), (2, 1), 1),
    (70, 6, (4, 5), (2, 3), (1, 1), (3, 4), (3, 2), 2),
    (6, 12, (5, 4), (3, 3), (1, 1), (1, 1), (1, 1), 6),
    (192, 64, (4, 4), (1, 1), (1, 1), (0, 0), (1, 1), 2),
    (3, 5, (4, 4), (4, 4), (4, 4), (0, 0), (1, 1), 1),
]


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("padding_value", [0, 1, -1])
def test_convolution_equals_the_reference(emulated: Emulated, chip: int, padding_value: int) -> None:
    torch.manual_seed(chip + padding_value)
    emulated.become(chip)
    for i, (channels, outputs, image, kernel, stride, padding, dilation, groups) in enumerate(CONVOLUTIONS):
        weight = _words(outputs, *kernel, length=channels // groups)
        x = torch.randn(2, channels, *image).to(DTYPES[i % 3])
        layout = torch.channels_last if i % 2 else torch.contiguous_format
        x = x.contiguous(memory_format=layout)
        geometry: tuple[Any, ...] = (stride, padding, dilation, groups, padding_value)
        results = emulated.binary_conv2d(x, weight, *geometry, True)
        expected = reference.binary_conv2d(x, weight, *geometry, True)
        for ours, theirs in zip(results, expected, strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
        assert results[0].is_contiguous(memory_format=layout)
        dots = reference.binary_conv2d_packed(results[1], weight, channels, *geometry)[0]
        for asked in epilogues(tuple(dots.shape)):
            ours = emulated.binary_conv2d_packed(results[1], weight, channels, *geometry, **asked)
            assert all(map(torch.equal, ours, _reference.epilogue(dots, **asked))), sorted(asked)


# ---------------------------------------------------------------------------------------------- step


def _parameters(n: int, state: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    shapes = [(3, 64), (5, 33), (1000,), (2, 3, 32), (1,), (300, 7), (9000,), (0, 5)]
    weights, grads, means, squares = [], [], [], []
    for i in range(n):
        shape = shapes[i % len(shapes)]
        grads.append(torch.randn(shape).to(DTYPES[i % 3]))
        means.append((torch.randn(shape) * 0.1).to(state))
        squares.append(torch.rand(shape).to(state))
        sign = torch.where(torch.rand(shape) < 0.5, -1.0, 1.0)
        weights.append(reference.pack_bits(sign) if i % 4 != 2 else sign.to(DTYPES[(i + 1) % 3]))
    return weights, grads, means, squares


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("second", [True, False])
def test_step_equals_the_reference(emulated: Emulated, state: torch.dtype, second: bool) -> None:
    torch.manual_seed(7)
    hyper = torch.tensor([0.21, 0.13, 0.05 if second else 0.0, 0.02])
    seed = torch.tensor([2**40 + 12345, 9])
    for n in (1, 8, 100):  # 100 tensors take three launches
        for maximize, scale, inf in ((False, None, None), (True, 0.37, 0.0), (False, 0.5, 1.0)):
            weights, grads, means, squares = _parameters(n, state)
            options: dict[str, Any] = {
                "inv_scale": None if scale is None else torch.tensor(scale),
                "found_inf": None if inf is None else torch.tensor([inf]),
                "seed": seed,
                "maximize": maximize,
            }
            sides = []
            for step in (emulated.bop_step_, reference.bop_step_):
                copies = [[t.clone() for t in group] for group in (weights, means, squares if second else [])]
                counts = torch.full((n, 2), -5)
                step(copies[0], grads, copies[1], copies[2], hyper, counts, **options)
                sides.append([*copies[0], *copies[1], *copies[2], counts])
            for ours, theirs in zip(*sides, strict=True):
                assert torch.equal(ours, theirs)
            assert inf or int(sides[0][-1][:, 1].sum()) > 0


def test_wrong_operands_raise_and_change_nothing(emulated: Emulated) -> None:
    weights, grads, means, squares = _parameters(2, torch.float32)
    hyper, counts = torch.tensor([0.2, 0.1, 0.0, 0.0]), torch.full((2, 2), -5)
    before = [t.clone() for t in (*weights, *means, *squares)]
    with pytest.raises(ValueError, match="exp_avg must be"):
        emulated.bop_step_(weights, [grads[0], grads[0]], means, squares, hyper, counts)
    with pytest.raises(ValueError, match="need a seed"):
        low = [m.bfloat16() for m in means]
        emulated.bop_step_(weights, grads, low, [s.bfloat16() for s in squares], hyper, counts)
    with pytest.raises(ValueError, match="counts must be"):
        emulated.bop_step_(weights, grads, means, squares, hyper, counts[:1])
    for old, new in zip(before, (*weights, *means, *squares), strict=True):
        assert torch.equal(old, new)
    assert (counts == -5).all()
    with pytest.raises(ValueError, match="do not fit"):
        emulated.binary_linear(torch.randn(4, 65), _words(3, length=64), True)
    with pytest.raises(ValueError, match="smaller than the kernel"):
        emulated.binary_conv2d(
            torch.randn(1, 8, 2, 2), _words(4, 3, 3, length=8), [1, 1], [0, 0], [1, 1], 1, 0, True
        )
    with pytest.raises(ValueError, match="int32 words"):
        emulated.unpack_bits(torch.zeros(3), 32)
