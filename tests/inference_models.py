"""Networks whose batch norms have been through a war, and the comparison that packed inference is held to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import bop2nd_fast as bf


def wild_batch_norms(model: nn.Module, seed: int = 5) -> nn.Module:
    """Statistics and affine parameters of all kinds: negative and zero scales, no variance, far means."""
    generator = torch.Generator().manual_seed(seed)
    for norm in model.modules():
        if not isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)) or norm.running_mean is None:
            continue
        n = norm.num_features
        norm.running_mean.copy_(torch.randn(n, generator=generator) * 4)
        norm.running_var.copy_(torch.rand(n, generator=generator) * 20)
        with torch.no_grad():
            if norm.affine:
                norm.weight.copy_(torch.randn(n, generator=generator))
                norm.bias.copy_(torch.randn(n, generator=generator))
                norm.weight[0] = 0
                norm.weight[1 % n], norm.bias[1 % n] = 0, -0.5
            norm.running_var[2 % n] = 0
            norm.running_mean[3 % n] = 1e4
            norm.running_mean[4 % n] = norm.running_mean[4 % n].round()  # y == bias exactly at an integer
            if norm.affine:
                norm.bias[4 % n] = 0
    return model


def images(model_input: tuple[int, ...], seed: int = 9) -> Tensor:
    return torch.randn(model_input, generator=torch.Generator().manual_seed(seed))


CALLS = 3  # step by step, which says how results lie; in parts of the C++ runtime; on the plan of that call


def assert_same_bits(got: Any, wanted: Any) -> None:
    """Bits, shapes, dtypes and strides of all tensors, all other leaves; one NaN is like the other."""
    for a, b in zip(tree_leaves(got), tree_leaves(wanted), strict=True):
        if not isinstance(b, Tensor):
            assert a == b
            continue
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        x, y = a.detach().contiguous(), b.detach().contiguous()
        if x.dtype == torch.float32:
            assert torch.equal(x.isnan(), y.isnan())
            x, y = (t.masked_fill(t.isnan(), 7.0).view(torch.int32) for t in (x, y))
        assert torch.equal(x, y)


def assert_identical(packed: nn.Module, model: nn.Module, *inputs: Tensor) -> Tensor:
    """Same bits, shape, dtype and strides as the trained model in eval mode, and a varied result."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        expected = model(*inputs)
    model.train(was_training)
    for _ in range(CALLS):
        actual = packed(*inputs)
        assert_same_bits(actual, expected)
        assert torch.equal(actual, expected)
    assert expected.isfinite().all() and expected.unique().numel() > 3, "a constant result proves nothing"
    return actual


def kinds(packed: bf.inference.PackedModel) -> list[str]:
    """What the steps do, in order: kinds of layers, names of operators."""
    found = []
    for step in packed.steps:
        if step.kind == "layer":
            found.append(packed.layers[str(step.target)].kind)
        elif step.kind == "operator":
            found.append(str(step.target).removeprefix("aten.").partition(".")[0])
    return found
