"""nn.MaxPool2d: torch's values and gradients, one byte kept per output."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import bop2nd_fast as bf


def images(shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    """Small integers, so that windows have ties, and some NaN and infinities."""
    x = torch.randint(-2, 3, shape).to(dtype)
    x.view(-1)[:: max(1, x.numel() // 7)] = torch.tensor(float("nan"), dtype=dtype)
    x.view(-1)[1 :: max(1, x.numel() // 5)] = torch.tensor(float("-inf"), dtype=dtype)
    return x.contiguous(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "args",
    [(2,), ((2, 3),), ((3, 1), (3, 1)), (1,), (3, 2), (2, 2, 1), (2, 2, 0, 2), (2, 2, 0, 1, False, True)],
    ids=str,
)
def test_as_torch(args: tuple, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    torch.manual_seed(1)
    for shape in ((2, 5, 8, 9), (1, 1, 3, 3), (3, 4, 7, 6)):
        x = images(shape, dtype, memory_format)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        got, want = bf.nn.MaxPool2d(*args)(ours), nn.MaxPool2d(*args)(theirs)
        assert torch.equal(got.isnan(), want.isnan()) and got.stride() == want.stride()
        assert torch.equal(got.nan_to_num(5), want.nan_to_num(5))
        grad = torch.randn_like(want)
        got.backward(grad)
        want.backward(grad)
        assert ours.grad is not None and theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)
        assert ours.grad.is_contiguous(memory_format=memory_format)


def kept(module: nn.Module, x: Tensor) -> int:
    """Bytes saved for the backward pass."""
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        module(x.requires_grad_())
    return sum(sizes)


def test_one_byte_per_output() -> None:
    x = torch.randn(2, 8, 16, 16)
    assert kept(bf.nn.MaxPool2d(2), x) == 2 * 8 * 8 * 8
    assert kept(nn.MaxPool2d(2), x) == 24 * 2 * 8 * 8 * 8


def test_without_a_gradient_and_compiled() -> None:
    x = torch.randn(1, 4, 6, 6)
    pool = bf.nn.MaxPool2d(2)
    with torch.no_grad():
        assert torch.equal(pool(x), nn.MaxPool2d(2)(x))
    compiled = torch.compile(pool, fullgraph=True, backend="aot_eager")
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled(ours).square().sum().backward()
    nn.MaxPool2d(2)(theirs).square().sum().backward()
    assert ours.grad is not None and theirs.grad is not None and torch.equal(ours.grad, theirs.grad)
