"""The same networks as most people write them: fp32 latent weights, a sign with a straight-through estimator.

:func:`twin` takes one of our models and puts ordinary layers in place of the binary ones, with the same
signs, so that both compute the same function and gradients. One difference remains: ``torch.sign(0)``
is 0, where a bit can only be +1 or -1; :func:`zeros_positive` takes it away for a comparison.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bop2nd_fast.nn import BinaryConv2d, BinaryLinear, MaxPool2d, SteSign


class SignSTE(torch.autograd.Function):
    """sign forward; the gradient passes where ``|x| <= 1``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.sign(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (x.abs() <= 1).to(grad.dtype)


class LatentConv2d(nn.Conv2d):
    """``F.conv2d(sign(x), sign(weight))``; the first layer of a network takes real values."""

    real_input = False

    def forward(self, input: Tensor) -> Tensor:
        x = input if self.real_input else SignSTE.apply(input)
        return F.conv2d(
            x, SignSTE.apply(self.weight), self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class LatentLinear(nn.Linear):
    """``F.linear(sign(x), sign(weight))``."""

    real_input = False

    def forward(self, input: Tensor) -> Tensor:
        x = input if self.real_input else SignSTE.apply(input)
        return F.linear(x, SignSTE.apply(self.weight), self.bias)


class FloatConv2d(LatentConv2d):
    """For inference: weights are stored as +-1 already."""

    def forward(self, input: Tensor) -> Tensor:
        x = input if self.real_input else torch.sign(input)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class FloatLinear(LatentLinear):
    """For inference: weights are stored as +-1 already."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input if self.real_input else torch.sign(input), self.weight, self.bias)


def twin(model: nn.Module, inference: bool = False) -> nn.Module:
    """A copy of ``model`` with ordinary fp32 layers of the same signs in place of the binary ones.

    Args:
        model: one of ``bop2nd_fast.models``, its binary layers padded with 0 and their inputs through
            ``ste_sign`` or, for ``inference``, any quantizer.
        inference: store +-1 instead of latent weights, and put the copy in eval mode.

    Raises:
        ValueError: a layer that has no such counterpart.
    """
    result = copy.deepcopy(model)
    for name, layer in list(result.named_modules()):
        if isinstance(layer, (BinaryConv2d, BinaryLinear)):
            parent = result.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], _counterpart(layer, name, inference))
        elif isinstance(layer, MaxPool2d):
            parent = result.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], nn.MaxPool2d(layer.kernel_size, layer.stride))
    return result.eval() if inference else result


@contextmanager
def zeros_positive(model: nn.Module) -> Iterator[None]:
    """Within it, layers that binarize their input see exact zeros as 1 (the gradient passes unchanged)."""

    def replace(layer: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        return inputs[0] + (inputs[0] == 0)

    layers = [m for m in model.modules() if isinstance(m, (LatentConv2d, LatentLinear)) and not m.real_input]
    handles = [layer.register_forward_pre_hook(replace) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _counterpart(layer: BinaryConv2d | BinaryLinear, name: str, inference: bool) -> nn.Module:
    if not isinstance(layer.input_quantizer, (SteSign, type(None))) and not inference:
        raise ValueError(f"{name}: no counterpart for input quantizer {layer.input_quantizer!r}")
    new: LatentConv2d | LatentLinear
    if isinstance(layer, BinaryConv2d):
        if layer.padding_value != 0:
            raise ValueError(f"{name}: no counterpart for padding value {layer.padding_value}")
        new = (FloatConv2d if inference else LatentConv2d)(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
            bias=layer.bias is not None,
        )
    else:
        new = (FloatLinear if inference else LatentLinear)(
            layer.in_features, layer.out_features, bias=layer.bias is not None
        )
    new.real_input = layer.input_quantizer is None
    with torch.no_grad():
        signs = layer.weight.unpack()
        new.weight.copy_(signs if inference else signs * torch.rand_like(signs).mul_(0.1).add_(0.01))
        if layer.bias is not None and new.bias is not None:
            new.bias.copy_(layer.bias)
    return new
