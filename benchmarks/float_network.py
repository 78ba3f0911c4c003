"""Our networks in floating point, as most people write them: torch's layers, ``torch.sign``, fp32 weights.

For training the latent layers of ``bf.nn`` are that already; :func:`torch_pools` gives them torch's pooling.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from bop2nd_fast.nn import BinaryConv2d, BinaryLinear, MaxPool2d


class Sign(nn.Module):
    """``torch.sign``; with ``zeros_positive`` 0 becomes 1, as a bit has it."""

    zeros_positive = False

    def forward(self, x: Tensor) -> Tensor:
        return torch.sign(x + (x == 0)) if self.zeros_positive else torch.sign(x)


def torch_pools(model: nn.Module) -> nn.Module:
    """The model, with torch's max-pooling in place of ours."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, MaxPool2d):
            model.set_submodule(name, nn.MaxPool2d(layer.kernel_size, layer.stride))
    return model


def floating(model: nn.Module) -> nn.Module:
    """A copy of a packed model in eval mode: convolutions and dense layers of +-1 in fp32, torch's pooling.

    Raises:
        ValueError: a layer with a bias or padded with ones.
    """
    result = torch_pools(copy.deepcopy(model))
    for name, layer in list(result.named_modules()):
        if not isinstance(layer, (BinaryConv2d, BinaryLinear)):
            continue
        if layer.bias is not None or getattr(layer, "padding_value", 0) != 0:
            raise ValueError(f"{name}: only layers without bias, padded with 0, have such a counterpart")
        new: nn.Conv2d | nn.Linear
        if isinstance(layer, BinaryConv2d):
            geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups)
            new = nn.Conv2d(layer.in_channels, layer.out_channels, *geometry, bias=False)
        else:
            new = nn.Linear(layer.in_features, layer.out_features, bias=False)
        with torch.no_grad():
            new.weight.copy_(layer.weight.unpack())
        result.set_submodule(name, new if layer.input_quantizer is None else nn.Sequential(Sign(), new))
    return result.eval()
