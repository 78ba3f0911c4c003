"""Random shapes, strides, paddings and formats against the specification; `make fuzz` searches longer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from bop2nd_fast import reference as ref
from bop2nd_fast.kernels.geometry import output_size
from bop2nd_fast.ops.binary_conv2d import _backward as specified_gradients
from tests.epilogues import epilogues

ops = torch.ops.bop2nd
SHORT = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=5000, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, Any]:
    def pair(low: int, high: int) -> list[int]:
        return [draw(st.integers(low, high)), draw(st.integers(low, high))]

    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 19]))
    depthwise = groups == 19
    case = {
        "seed": draw(st.integers(0, 2**31)),
        "batch": draw(st.integers(0, 3)),
        "per_group": 1 if depthwise else draw(st.integers(1, 80)),
        "outputs": groups if depthwise else groups * draw(st.integers(1, 36)),
        "groups": groups,
        "kernel": pair(1, 5),
        "stride": pair(1, 3),
        "padding": pair(0, 4),
        "dilation": pair(1, 3),
        "size": pair(1, 14),
        "padding_value": draw(st.sampled_from([0, 1, -1])),
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        "last": draw(st.booleans()),
        "view": draw(st.booleans()),
        "clip": draw(st.booleans()),
        "blocked": draw(st.booleans()),
    }
    geometry = zip(
        case["size"], case["kernel"], case["stride"], case["padding"], case["dilation"], strict=True
    )
    assume(all(output_size(*axis) > 0 for axis in geometry))
    return case


def check_convolution(c: dict[str, Any]) -> None:
    torch.manual_seed(c["seed"])
    channels, (height, width) = c["per_group"] * c["groups"], c["size"]
    x = torch.randn(c["batch"], channels, height, width * (2 if c["view"] else 1)).to(c["dtype"])
    x = x.contiguous(memory_format=torch.channels_last) if c["last"] else x
    x = x[..., ::2] if c["view"] else x
    w = ref.pack_bits(torch.randn(c["outputs"], c["per_group"], *c["kernel"]), 1)
    args = (c["stride"], c["padding"], c["dilation"], c["groups"], c["padding_value"])
    blocked = ops.prepack_weight(w, c["groups"]) if c["blocked"] else None
    expected = ref.binary_conv2d(x, w, *args, c["clip"])
    for ours, theirs in zip(ops.binary_conv2d(x, w, *args, c["clip"], blocked), expected, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    dots = ref.binary_conv2d_packed(expected[1], w, channels, *args)[0]
    for asked in epilogues(tuple(dots.shape)):
        ours = ops.binary_conv2d_packed(expected[1], w, channels, *args, **asked, blocked=blocked)
        assert all(map(torch.equal, ours, ref.epilogue(dots, **asked))), sorted(asked)
    grad = torch.randint(-4, 5, expected[0].shape).to(expected[0])  # sums of whole numbers are exact
    saved = (*expected[1:], w, channels, *args, True, True)
    ours, theirs = ops.binary_conv2d_backward(grad, *saved), specified_gradients(grad.float(), *saved)
    assert torch.equal(ours[0], theirs[0].to(c["dtype"])) and torch.equal(ours[1], theirs[1])


def check_signed(c: dict[str, Any], integers: torch.dtype | None) -> None:
    """Real numbers of the case's dtype, or integers, by the signs of the case's convolution."""
    torch.manual_seed(c["seed"])
    channels, (height, width) = c["per_group"] * c["groups"], c["size"]
    shape = (c["batch"], channels, height, width * (2 if c["view"] else 1))
    x = torch.randn(shape).to(c["dtype"]) if integers is None else torch.randint(0, 256, shape).to(integers)
    x = x.contiguous(memory_format=torch.channels_last) if c["last"] else x
    x = x[..., ::2] if c["view"] else x
    w = ref.pack_bits(torch.randn(c["outputs"], c["per_group"], *c["kernel"]), 1)
    args = (c["stride"], c["padding"], c["dilation"], c["groups"])
    blocked = ops.prepack_weight(w, c["groups"]) if c["blocked"] else None
    scaling = {} if integers is None else {"multiplier": 1 + c["seed"] % 3, "zero_point": c["seed"] % 128}
    dots = ref.signed_conv2d(x, w, *args, **scaling)[0]
    for i, asked in enumerate(epilogues(tuple(dots.shape))):
        if ("threshold" in asked and integers is None) or (i + c["seed"]) % 4:
            continue
        both: Any = scaling | asked
        ours = ops.signed_conv2d(x, w, *args, **both, blocked=blocked)
        assert all(map(torch.equal, ours, ref.epilogue(dots, **asked))), sorted(asked)
    rows, w = x.permute(0, 2, 3, 1), ref.pack_bits(torch.randn(c["outputs"], channels))
    both = scaling | {"input_scale": torch.rand(rows.shape[:-1]), "signs": True}
    assert all(map(torch.equal, ops.signed_linear(rows, w, **both), ref.signed_linear(rows, w, **both)))


INTEGERS = st.sampled_from([None, torch.int8, torch.uint8])


@settings(SHORT, max_examples=15)
@given(convolutions(), INTEGERS)
def test_signed_products(case: dict[str, Any], integers: torch.dtype | None) -> None:
    check_signed(case, integers)


@pytest.mark.fuzz
@LONG
@given(convolutions(), INTEGERS)
def test_signed_products_for_long(case: dict[str, Any], integers: torch.dtype | None) -> None:
    check_signed(case, integers)


@SHORT
@given(convolutions())
def test_convolutions(case: dict[str, Any]) -> None:
    check_convolution(case)


@pytest.mark.fuzz
@LONG
@given(convolutions())
def test_convolutions_for_long(case: dict[str, Any]) -> None:
    check_convolution(case)


def check_step(seed: int, lengths: list[int], packed: list[bool], grad: torch.dtype, low: bool) -> None:
    torch.manual_seed(seed)
    moment = torch.bfloat16 if low else torch.float32
    weights, grads, m, v = [], [], [], []
    for length, is_packed in zip(lengths, packed, strict=False):
        w = torch.where(torch.rand(2, length) < 0.5, -1.0, 1.0)
        weights.append(ref.pack_bits(w) if is_packed else w)
        grads.append((torch.randn(2, length) * 1e-3).to(grad))
        m.append((torch.randn(2, length) * 1e-3).to(moment))
        v.append((torch.rand(2, length) * 1e-6).to(moment))
    hyper, results = torch.tensor([0.125, 0.25, 0.75, 1e-5]), []
    for step in (ops.bop_step_, ref.bop_step_):
        copies = [[t.clone() for t in tensors] for tensors in (weights, grads, m, v)]
        counts = torch.full((len(weights), 2), -1)
        step(*copies, hyper, counts, seed=torch.tensor([seed, 3]))
        results.append([*copies[0], *copies[2], *copies[3], counts])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


STEPS = (
    st.integers(0, 2**40),
    st.lists(st.integers(0, 700), min_size=1, max_size=6),
    st.lists(st.booleans(), min_size=6, max_size=6),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.booleans(),
)


@SHORT
@given(*STEPS)
def test_steps(seed: int, lengths: list[int], packed: list[bool], grad: torch.dtype, low: bool) -> None:
    check_step(seed, lengths, packed, grad, low)


@pytest.mark.fuzz
@LONG
@given(*STEPS)
def test_steps_for_long(
    seed: int, lengths: list[int], packed: list[bool], grad: torch.dtype, low: bool
) -> None:
    check_step(seed, lengths, packed, grad, low)
