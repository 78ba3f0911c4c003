"""The specification against numbers worked by hand, and against torch's own convolution."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from bop2nd_fast import reference as ref
from bop2nd_fast.kernels.outputs import check_outputs
from tests.epilogues import refused_epilogues


def test_pack_bits_by_hand() -> None:
    x = torch.ones(34)
    x[[0, 5, 31, 33]] = -1.0
    words = ref.pack_bits(x)
    assert words.dtype == torch.int32
    assert words.tolist() == [-(2**31) + 2**5 + 2**0, 2**1]


def test_sign_of_zero_and_nan_is_plus_one() -> None:
    x = torch.tensor([0.0, -0.0, math.nan, -math.nan, -1e-45, math.inf, -math.inf])
    assert ref.pack_bits(x).tolist() == [(1 << 4) | (1 << 6)]
    _, mask = ref.pack_bits_ste(x)
    assert mask.tolist() == [0b0010011], "NaN and infinities pass no gradient"


def test_mask_includes_one() -> None:
    above = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)).item()
    x = torch.tensor([1.0, -1.0, above, -above])
    assert ref.pack_bits_ste(x)[1].tolist() == [0b0011]


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 65])
def test_unpack_inverts_pack(dim: int, length: int) -> None:
    shape = [2, 3, 4]
    shape[dim] = length
    x = torch.randn(shape)
    back = ref.unpack_bits(ref.pack_bits(x, dim), length, dim)
    assert torch.equal(back, torch.where(x < 0, -1.0, 1.0))


def test_groups_start_on_words_of_their_own() -> None:
    x = -torch.ones(1, 6)
    signs, mask = ref.pack_bits_ste(x, -1, groups=3)
    assert signs.tolist() == [[3, 3, 3]] and mask.tolist() == [[3, 3, 3]]


def test_step_by_hand() -> None:
    """gamma = 1/2, sigma = 1/4, a = 1, b = 1/8: every number is exact in binary."""
    hyper = torch.tensor([0.5, 0.25, 1.0, 0.125])
    grad = torch.tensor([1.0, -1.0, 1.0, 0.25, 0.0])
    m = torch.tensor([0.5, 0.5, 0.5, 0.0, 0.0])
    v = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0])
    negative = torch.tensor([False, False, True, False, True])
    new_m, new_v, candidates, flips = ref.bop_rule(grad, m, v, negative, hyper)
    assert new_m.tolist() == [0.75, -0.25, 0.75, 0.125, 0.0]
    assert new_v is not None and new_v.tolist() == [0.25, 0.25, 1.0, 0.015625, 0.0]
    # |m| against sqrt(v) + 1/8: 0.75 > 0.625; the sign disagrees twice; 0.125 < 0.25; m = 0 is no -1
    assert candidates.tolist() == [True, False, False, True, False]
    assert flips.tolist() == [True, False, False, False, False]


def test_an_exact_tie_does_not_flip() -> None:
    hyper = torch.tensor([1.0, 1.0, 1.0, 0.0])
    for negative, grad in ((False, 2.0), (True, -2.0)):
        g = torch.tensor([grad])
        zero = torch.zeros(1)
        *_, candidates, flips = ref.bop_rule(g, zero, zero, torch.tensor([negative]), hyper)
        assert candidates.item() and not flips.item(), "|m| = sqrt(v) is not above the threshold"


def test_found_inf_changes_nothing_and_inv_scale_multiplies() -> None:
    hyper, counts = torch.tensor([0.5, 0.5, 0.0, 0.0]), torch.full((1, 2), 77)
    w, m, v = torch.ones(3), torch.zeros(3), torch.zeros(3)
    g = torch.tensor([math.inf, 8.0, -8.0])
    ref.bop_step_([w], [g], [m], [v], hyper, counts, found_inf=torch.ones(1))
    assert w.tolist() == [1, 1, 1] and not m.any() and not v.any() and not counts.any()
    g[0] = 0.0
    ref.bop_step_([w], [g], [m], [v], hyper, counts, inv_scale=torch.tensor(0.25), maximize=True)
    assert m.tolist() == [0.0, -1.0, 1.0] and v.tolist() == [0.0, 2.0, 2.0]
    # maximize negates the gradient; of the +1 weights the one with m = +1 flips; m = 0 has sign +1
    assert w.tolist() == [1.0, 1.0, -1.0] and counts.tolist() == [[2, 1]]


def test_stochastic_rounding_is_unbiased_and_exact_values_stay() -> None:
    x = torch.tensor([1.0, -2.5, 0.0, math.inf, -math.inf]).repeat(100)
    random = ref.rounding_bits(torch.tensor([7, 1]), 0, x.numel()) & 0xFFFF
    assert torch.equal(ref.round_bf16_stochastic(x, random).float(), x)
    assert ref.round_bf16_stochastic(torch.tensor([math.nan]), torch.tensor([65535])).isnan().all()
    third = torch.full((40000,), 1 / 3)
    random = ref.rounding_bits(torch.tensor([7, 1]), 0, third.numel()) & 0xFFFF
    rounded = ref.round_bf16_stochastic(third, random).double()
    ulp = 2.0**-9
    assert set((rounded.unique() - 1 / 3).abs().lt(ulp).tolist()) == {True} and len(rounded.unique()) == 2
    # standard deviation of the mean is below ulp / 2 / sqrt(40000)
    assert abs(rounded.mean().item() - torch.tensor(1 / 3).item()) < 4 * ulp / 2 / 200


def test_rounding_bits_depend_on_every_part_of_the_key() -> None:
    def bits(seed: int, step: int, index: int) -> list[int]:
        return ref.rounding_bits(torch.tensor([seed, step]), index, 64).tolist()

    base = bits(1, 2, 3)
    assert base == bits(1, 2, 3)
    for other in (bits(2, 2, 3), bits(1, 3, 3), bits(1, 2, 4), bits(1 + 2**32, 2, 3)):
        assert sum(a == b for a, b in zip(base, other, strict=True)) <= 1


def test_exact_sqrt_is_correctly_rounded() -> None:
    x = torch.rand(1000)
    for value, root in zip(x.tolist()[:200], ref.exact_sqrt(x).tolist()[:200], strict=True):
        exact = torch.tensor(math.sqrt(value), dtype=torch.float64)
        assert root == exact.float().item()


@pytest.mark.parametrize("value", [0, 1, -1])
@pytest.mark.parametrize("groups", [1, 2])
def test_conv2d_is_torchs_on_unpacked_operands(value: int, groups: int) -> None:
    x = torch.randn(2, 6, 9, 8)
    w = torch.where(torch.rand(4, 6 // groups, 3, 2) < 0.5, -1.0, 1.0)
    args = ([2, 1], [1, 2], [1, 2], groups)
    signs = F.pad(torch.where(x < 0, -1.0, 1.0), (2, 2, 1, 1), value=float(value))
    expected = F.conv2d(signs, w, None, args[0], 0, args[2], groups)
    output, words, mask = ref.binary_conv2d(x, ref.pack_bits(w, 1), *args, value, True)
    assert torch.equal(output, expected) and output.is_contiguous()
    image = x.contiguous(memory_format=torch.channels_last)
    output = ref.binary_conv2d(image, ref.pack_bits(w, 1), *args, value, True)[0]
    assert torch.equal(output, expected) and output.is_contiguous(memory_format=torch.channels_last)
    assert words.shape == mask.shape == (2, 9, 8, groups)
    packed, no_signs = ref.binary_conv2d_packed(words, ref.pack_bits(w, 1), 6, *args, value)
    assert torch.equal(packed.movedim(-1, 1), expected) and no_signs.numel() == 0
    threshold = torch.tensor([-3, 0, 2, 100], dtype=torch.int32)
    asked = {"values": False, "signs": True, "threshold": threshold}
    no_values, bits = ref.binary_conv2d_packed(words, ref.pack_bits(w, 1), 6, *args, value, **asked)
    assert torch.equal(bits, ref.pack_bits(packed - threshold)) and no_values.numel() == 0


def test_linear_by_hand() -> None:
    x = torch.tensor([[0.5, -2.0, 3.0], [-1.0, -1.0, 0.0]])
    w = torch.tensor([[1.0, 1.0, 1.0], [-1.0, 1.0, -1.0]])
    output, signs, mask = ref.binary_linear(x, ref.pack_bits(w), True)
    assert output.tolist() == [[1.0, -3.0], [-1.0, -1.0]]
    assert signs.tolist() == [[0b010], [0b011]] and mask.tolist() == [[0b001], [0b111]]
    threshold = torch.tensor([0, -1], dtype=torch.int32)
    bits = ref.binary_linear_packed(signs, ref.pack_bits(w), 3, signs=True, threshold=threshold)[1]
    assert bits.tolist() == [[0b10], [0b01]]


def test_epilogue_by_hand() -> None:
    dot = torch.tensor([[1.0, -3.0], [5.0, 3.0]])
    scale, shift = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 1.0])
    residual = torch.tensor([[0.0, 1.0], [0.5, -9.0]])
    values, signs = ref.epilogue(dot, signs=True, scale=scale, shift=shift, residual=residual)
    assert values.tolist() == [[0.0, 0.5], [8.5, -6.5]] and signs.tolist() == [[0b00], [0b10]]
    threshold = torch.tensor([2, -3], dtype=torch.int32)
    values, signs = ref.epilogue(dot, signs=True, threshold=threshold, shift=shift)
    assert values.tolist() == [[-1.0, -2.0], [3.0, 4.0]] and signs.tolist() == [[0b01], [0b00]]
    # one third: three roundings of fp32, and bf16 only at the end
    third, one = torch.tensor([1 / 3, 1 / 3]), torch.tensor([1.0, 1.0])
    values, _ = ref.epilogue(dot, scale=third, shift=one, dtype=torch.bfloat16)
    assert torch.equal(values, (dot * third + one).bfloat16())


def test_epilogue_refuses() -> None:
    for asked, message in refused_epilogues((2, 3)):
        with pytest.raises(ValueError, match=message):
            check_outputs(torch.zeros(2, 3), (2, 3), **asked)
    with pytest.raises(TypeError, match="float64"):
        check_outputs(torch.zeros(2, 3), (2, 3), dtype=torch.float64)
    with pytest.raises(TypeError, match="no operand gain"):
        check_outputs(torch.zeros(2, 3), (2, 3), gain=torch.ones(3))
    with pytest.raises(ValueError, match="shift is on meta"):
        check_outputs(torch.zeros(2, 3), (2, 3), shift=torch.ones(3, device="meta"))


# ------------------------------------------------------------------------------------- both gradients


def test_linear_gradients_by_hand() -> None:
    weight = ref.pack_bits(torch.tensor([[1.0, -1, 1], [-1, -1, 1]]))
    _, signs, mask = ref.binary_linear(torch.tensor([[0.5, -2.0, 1.0]]), weight, True)
    grad = torch.tensor([[2.0, 3.0]])
    grad_input, grad_weight = ref.binary_linear_backward(grad, signs, mask, weight, 3)
    assert grad_input.tolist() == [[-1, 0, 5]] and grad_weight.tolist() == [[2, -2, 2], [3, -3, 3]]
    grad_input, _ = ref.binary_linear_backward(grad.bfloat16(), signs, mask[:0], weight, 3)
    assert grad_input.tolist() == [[-1, -5, 5]] and grad_input.dtype == torch.bfloat16


def test_conv_gradients_by_hand() -> None:
    """A row of three pixels with a border of -1 on either side; two taps, +1 and -1."""
    weight = ref.pack_bits(torch.tensor([1.0, -1.0]).view(1, 1, 1, 2), 1)
    x = torch.tensor([1.0, -3.0, 0.5]).view(1, 1, 1, 3)
    how = ([1, 1], [0, 1], [1, 1], 1, -1)
    _, signs, mask = ref.binary_conv2d(x, weight, *how, True)
    grad = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    grad_input, grad_weight = ref.binary_conv2d_backward(grad, signs, mask, weight, 1, *how)
    assert grad_input.flatten().tolist() == [1, 0, 1] and grad_weight.flatten().tolist() == [2, -2]
    grad_input, _ = ref.binary_conv2d_backward(grad, signs, mask[:0], weight, 1, *how)
    assert grad_input.flatten().tolist() == [1, 1, 1]


@pytest.mark.parametrize("clip", [True, False])
def test_gradients_of_every_backend_are_the_specifications(cpu_backend: str, clip: bool) -> None:
    """Small integers, whose sums no order rounds: bit for bit. With strides that leave pixels over."""
    ops = torch.ops.bop2nd
    weight = ops.pack_bits(torch.randn(9, 70))
    _, signs, mask = ops.binary_linear(torch.randn(2, 5, 70), weight, clip)
    grad = torch.randint(-8, 9, (2, 5, 9)).float()
    found = ops.binary_linear_backward(grad, signs, mask, weight, 70, True, True)
    assert all(map(torch.equal, found, ref.binary_linear_backward(grad, signs, mask, weight, 70)))

    for how in (
        ([1, 1], [1, 1], [1, 1], 1, 0),
        ([2, 3], [0, 2], [2, 1], 2, 1),
        ([2, 2], [1, 0], [1, 2], 1, -1),
        ([3, 2], [0, 0], [1, 1], 2, 0),
    ):
        groups = how[3]
        weight = ops.pack_bits(torch.randn(6, 40 // groups, 3, 2), 1)
        out, signs, mask = ops.binary_conv2d(torch.randn(2, 40, 9, 8), weight, *how, clip)
        grad = torch.randint(-8, 9, out.shape).float()
        found = ops.binary_conv2d_backward(grad, signs, mask, weight, 40, *how, True, True)
        assert all(
            map(torch.equal, found, ref.binary_conv2d_backward(grad, signs, mask, weight, 40, *how))
        ), how
