"""Networks whose batch norms have been through a war, and the comparison that packed inference is held to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

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


def assert_identical(packed: nn.Module, model: nn.Module, *inputs: Tensor) -> Tensor:
    """Same bits, shape, dtype and strides as the trained model in eval mode, and a varied result."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        expected = model(*inputs)
    model.train(was_training)
    actual = packed(*inputs)
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert actual.stride() == expected.stride()
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
