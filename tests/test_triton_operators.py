"""The operators on Triton's launchers, eager and traced by torch.compile, as a training step uses them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bop2nd_fast as bf
from tests.triton_device import DEVICE, runnable

if reason := runnable():
    pytest.skip(reason, allow_module_level=True)


def small_network() -> torch.nn.Module:
    torch.manual_seed(5)
    return torch.nn.Sequential(
        bf.nn.BinaryConv2d(3, 33, 3, padding=1, input_quantizer=None),
        torch.nn.BatchNorm2d(33),
        bf.nn.BinaryConv2d(33, 4, 3, stride=2),
        torch.nn.Flatten(),
        bf.nn.BinaryLinear(16, 5),
    ).to(DEVICE)


def training_step(compiler: str | None, backend: str) -> tuple[list[float], list[Tensor]]:
    """Two steps; losses, and the words afterwards. ``compiler``: forward and loss in one graph, or eager."""
    model = small_network()
    with bf.backends.use(backend):
        binary, _ = bf.optim.split_parameters(model)
        optimizer = bf.optim.Bop2ndOrder(binary, gamma=0.3, sigma=0.2, threshold=0.1)
        x, labels = torch.randn(3, 3, 6, 6, device=DEVICE), torch.tensor([0, 4, 2], device=DEVICE)

        def forward(x: Tensor) -> Tensor:
            return F.cross_entropy(model(x), labels)

        step: Any = torch.compile(forward, backend=compiler, fullgraph=True) if compiler else forward
        losses = []
        for _ in range(2):
            optimizer.zero_grad()
            loss = step(x)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        torch._dynamo.reset()
        return losses, [p.words.clone() for p in binary]


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_a_training_step_as_on_the_reference(compiler: str | None) -> None:
    before = bf.backends.calls()
    losses, words = training_step(compiler, "triton")
    after = bf.backends.calls()
    assert after["triton"] > before["triton"]
    expected_losses, expected = training_step(None, "reference")
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert all(torch.equal(a, e) for a, e in zip(words, expected, strict=True))
    start = [p.words for p in bf.optim.split_parameters(small_network())[0]]
    assert not torch.equal(words[0], start[0])


def test_compiled_step_of_the_operator_has_no_graph_break() -> None:
    from bop2nd_fast import reference

    def step(weight: Tensor, grad: Tensor, m: Tensor, v: Tensor, hyper: Tensor, counts: Tensor) -> Tensor:
        torch.ops.bop2nd.bop_step_([weight], [grad], [m], [v], hyper, counts)
        return counts.sum()

    hyper = torch.tensor([0.3, 0.2, 0.1, 0.05], device=DEVICE)
    grad, v = torch.randn(3, 70, device=DEVICE), torch.rand(3, 70, device=DEVICE)
    weight, m = (
        reference.pack_bits(torch.randn(3, 70, device=DEVICE)),
        0.1 * torch.randn(3, 70, device=DEVICE),
    )
    counts = torch.zeros(1, 2, dtype=torch.int64, device=DEVICE)
    expected = [t.clone() for t in (weight, m, v, counts)]
    reference.bop_step_([expected[0]], [grad], [expected[1]], [expected[2]], hyper, expected[3])
    with bf.backends.use("triton"):
        torch.compile(step, backend="aot_eager", fullgraph=True)(weight, grad, m, v, hyper, counts)
        torch._dynamo.reset()
    assert all(torch.equal(a, e) for a, e in zip((weight, m, v, counts), expected, strict=True))


def _gradients(backend: str, op: str, *operands: Any) -> list[Tensor]:
    """Output and both gradients of an operator, on fresh leaves."""
    with bf.backends.use(backend):
        leaves = [t.detach().clone().requires_grad_() for t in operands[:2]]
        words = bf.pack(leaves[1].detach(), 1)
        weight = torch.nn.Parameter(words)
        out = getattr(bf.ops, op)(leaves[0], weight, *operands[2:])
        out.sum().backward()
        assert leaves[0].grad is not None and weight.grad is not None
        return [out.detach(), leaves[0].grad, weight.grad]


@pytest.mark.parametrize(
    ("rows", "features", "outputs"), [((3,), 0, 5), ((2, 3), 40, 0), ((0,), 40, 5), ((), 0, 2), ((3,), 0, 0)]
)
def test_linear_layers_without_features_outputs_or_rows(
    rows: tuple[int, ...], features: int, outputs: int
) -> None:
    operands = torch.randn(*rows, features, device=DEVICE), torch.randn(outputs, features, device=DEVICE)
    expected = _gradients("reference", "binary_linear", *operands)
    actual = _gradients("triton", "binary_linear", *operands)
    assert all(torch.equal(a, e) and a.shape == e.shape for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize(("batch", "channels", "outputs"), [(2, 0, 3), (2, 5, 0), (0, 5, 3), (1, 0, 0)])
@pytest.mark.parametrize("runs", ["triton", "torch"])
def test_convolutions_without_channels_outputs_or_images(
    batch: int, channels: int, outputs: int, runs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes are those of the reference, and values are zeros."""
    from bop2nd_fast.kernels import tuning

    op = "binary_conv2d_backward"
    monkeypatch.setitem(tuning.BACKWARD, op, dataclasses.replace(tuning.BACKWARD[op], runs=runs))
    x = torch.randn(batch, channels, 4, 4, device=DEVICE)
    w = torch.randn(outputs, channels, 3, 3, device=DEVICE)
    out, grad_x, grad_w = _gradients("triton", "binary_conv2d", x, w, 1, 1)
    assert out.shape == (batch, outputs, 4, 4) and grad_x.shape == x.shape and grad_w.shape == w.shape
    assert not out.any() and not grad_x.any() and not grad_w.any()


WORDS = torch.zeros(4, 3, 3, 1, dtype=torch.int32)
LINEAR = torch.zeros(4, 1, dtype=torch.int32)
NO_MASK = torch.zeros(0, dtype=torch.int32)
HOW: Any = ([1, 1], [1, 1], [1, 1], 1, 0)
OPS = torch.ops.bop2nd


@pytest.mark.parametrize(
    "call",
    [
        lambda to: OPS.pack_bits(torch.eye(8).to_sparse(), -1),
        lambda to: OPS.pack_bits(to(torch.ones(4).cfloat()), -1),
        lambda to: OPS.pack_bits(to(torch.tensor(1.0)), 0),
        lambda to: OPS.pack_bits(to(torch.ones(4)), 1),
        lambda to: OPS.unpack_bits(to(torch.ones(4, 1)), 8),
        lambda to: OPS.unpack_bits(to(LINEAR), -31),
        lambda to: OPS.unpack_bits(to(LINEAR), 2**63 - 1),
        lambda to: OPS.apply_mask_(to(torch.ones(4, 64)), to(torch.zeros(8, 1).int())),
        lambda to: OPS.apply_mask_(to(torch.ones(2, 2, 64)), to(torch.zeros(4, 2).int())),
        lambda to: OPS.binary_linear(to(torch.ones(4, 8)), to(LINEAR.long()), True),
        lambda to: OPS.binary_linear(to(torch.ones(4, 8)), to(WORDS), True),
        lambda to: OPS.binary_linear_packed(to(LINEAR.float()), to(LINEAR), 8),
        lambda to: OPS.binary_linear_packed(to(LINEAR), to(LINEAR), -5),
        lambda to: OPS.binary_conv2d(to(torch.ones(8, 5, 5)), to(WORDS), *HOW, True),
        lambda to: OPS.binary_conv2d(to(torch.ones(1, 8, 5, 5)), to(WORDS[0]), *HOW, True),
        lambda to: OPS.binary_conv2d_packed(to(WORDS.float()), to(WORDS), 8, *HOW),
        lambda to: OPS.binary_conv2d_backward(
            to(torch.ones(4, 1, 5, 5)), to(WORDS[:1]), to(NO_MASK), to(WORDS), 8, *HOW, True, True
        ),
        lambda to: OPS.binary_conv2d_backward(
            to(torch.ones(4, 4, 3, 3)), to(WORDS), to(WORDS.view(4, 9, 1, 1)), to(WORDS), 8, *HOW, True, True
        ),
        lambda to: OPS.signed_linear(to(torch.ones(4, 8).double()), to(LINEAR)),
        lambda to: OPS.signed_linear(to(torch.ones(4, 8)), to(WORDS)),
        lambda to: OPS.signed_linear(to(torch.ones(4, 8).char()), to(LINEAR), 1, -129),
        lambda to: OPS.signed_conv2d(to(torch.ones(1, 8, 5)), to(WORDS), *HOW[:4]),
        lambda to: OPS.signed_conv2d(to(torch.ones(1, 8, 5, 5)), to(WORDS.long()), *HOW[:4]),
        lambda to: OPS.quantize_rows(to(torch.tensor([1.0, float("inf")]))),
        lambda to: OPS.binary_linear_backward(
            to(torch.ones(4, 4)), to(LINEAR), to(LINEAR.T.contiguous()), to(LINEAR), 8, True, True
        ),
    ],
)
def test_operands_of_other_kinds_are_refused(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Called directly, past the functions that check for users."""
    from bop2nd_fast.kernels import tuning

    op = "binary_conv2d_backward"
    monkeypatch.setitem(tuning.BACKWARD, op, dataclasses.replace(tuning.BACKWARD[op], runs="triton"))
    refused = (TypeError, ValueError, NotImplementedError, RuntimeError)
    with bf.backends.use("triton"), pytest.raises(refused) as raised:
        call(lambda tensor: tensor.to(DEVICE))
    if raised.type is RuntimeError:  # on CPUs the call came back through C++
        assert "Error: " in str(raised.value)


def test_operands_on_other_devices_are_refused() -> None:
    from bop2nd_fast.kernels import epilogue, operands

    elsewhere = LINEAR.to("meta")
    with pytest.raises(ValueError, match="weight is on meta, the first operand on cpu"):
        operands.check_words(elsewhere, "weight", 2, LINEAR)
    with pytest.raises(ValueError, match="scale is on meta"):
        epilogue.outputs_for(LINEAR, (4, 4), scale=torch.ones(4, device="meta"))
