"""Layers with latent weights: real-valued weights whose signs multiply, trained by any optimizer of torch.

What most binarized networks are trained with (Courbariaux et al., arXiv 1602.02830), and what the latent-free
optimizers are compared with. The gradient of a sign passes to its latent weight unchanged
(straight-through); the weights are kept in [-1, 1] (``optim.LatentAdam`` clips them after every step), within
which the clipped estimator passes everything too.

Values are those of :class:`BinaryConv2d` and :class:`BinaryLinear` with the same signs. While gradients are
recorded, torch multiplies +1 / -1 in floating point; without, the signs are packed and the binary layers' own
operators run, so that ``inference.convert`` sees a product of signs.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..binary_tensor import pack
from .layers import BinaryConv2d, BinaryLinear
from .quantizers import Quantizer, plus_minus_one, straight_through_sign

_bop2nd = torch.ops.bop2nd  # on words: a tensor subclass cannot be made while torch.export looks

# The next number above 1: hardtanh's gradient passes between its limits, and these let +-1 in.
_BEYOND = {
    dtype: 1 + torch.finfo(dtype).eps
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
}


class _ClippedSign(torch.autograd.Function):
    """+1 or -1; the gradient passes where ``|x| <= 1`` (and at NaN), in one pass over memory."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return plus_minus_one(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(grad, x, -_BEYOND[x.dtype], _BEYOND[x.dtype])


def _signs(chosen: Quantizer, input: Tensor, dim: int) -> Tensor:
    values, clips = chosen.surrogate(input, dim)
    result: Tensor = _ClippedSign.apply(values) if clips else straight_through_sign(values)
    return result


def _records_gradient(input: Tensor, weight: Tensor) -> bool:
    return torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)


def _glorot(*shape: int, device: torch.device | str | None, dtype: torch.dtype | None) -> Any:
    """A latent weight as Larq and its zoo draw them: normal, variance ``2 / (fan_in + fan_out)``."""
    weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
    nn.init.xavier_normal_(weight)
    return weight


class LatentLinear(BinaryLinear):
    """:class:`BinaryLinear` on the signs of a real-valued weight ``[out_features, in_features]``."""

    weight: Any
    _new_weight = staticmethod(_glorot)

    def forward(self, input: Tensor) -> Tensor:
        chosen: Any = self._modules["input_quantizer"]
        if _records_gradient(input, self.weight):
            x = input if chosen is None else _signs(chosen, input, -1)
            return F.linear(x, straight_through_sign(self.weight), self.bias)
        words = _bop2nd.pack_bits(self.weight, 1)
        if chosen is None:
            output = _bop2nd.signed_linear(input, words, dtype=input.dtype)[0]
        else:
            output = _bop2nd.binary_linear(chosen.surrogate(input, -1)[0], words, False)[0]
        return output if self.bias is None else output + self.bias


class LatentConv2d(BinaryConv2d):
    """:class:`BinaryConv2d` on the signs of a real-valued weight ``[O, I / groups, kH, kW]``."""

    weight: Any
    _new_weight = staticmethod(_glorot)

    def forward(self, input: Tensor) -> Tensor:
        chosen: Any = self._modules["input_quantizer"]
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        if _records_gradient(input, self.weight):
            return self._recorded(input, geometry)
        words = _bop2nd.pack_bits(self.weight, 1)
        if chosen is None:
            output = _bop2nd.signed_conv2d(input, words, *geometry, dtype=input.dtype)[0].permute(0, 3, 1, 2)
        else:
            x = chosen.surrogate(input, 1)[0]
            output = _bop2nd.binary_conv2d(x, words, *geometry, self.padding_value, False)[0]
        return output if self.bias is None else output + self.bias[:, None, None]

    def _recorded(self, input: Tensor, geometry: tuple[Any, ...]) -> Tensor:
        x = input if self.input_quantizer is None else _signs(self.input_quantizer, input, 1)
        weight = straight_through_sign(self.weight)
        if self.padding_value == 0:
            return F.conv2d(x, weight, self.bias, *geometry)
        rows, columns = self.padding
        x = F.pad(x, (columns, columns, rows, rows), value=float(self.padding_value))
        return F.conv2d(x, weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


def latent_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The latent weights of a model's layers, by the names of ``model.named_parameters()``."""
    layers = (m for m in model.modules() if isinstance(m, (LatentConv2d, LatentLinear)))
    ids = {id(layer.weight) for layer in layers}
    return {name: p for name, p in model.named_parameters() if id(p) in ids}


def binarized(model: nn.Module) -> nn.Module:
    """A copy of a model with :class:`BinaryConv2d` and :class:`BinaryLinear` in place of its latent layers.

    Signs, names and everything else are the model's own, so ``state_dict`` keys stay; the copy computes the
    same function and can be trained on without latent weights.

    Raises:
        ValueError: the model has no latent layers.
    """
    result = copy.deepcopy(model)
    layers = [m for m in result.modules() if isinstance(m, (LatentConv2d, LatentLinear))]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layers with latent weights")
    packed: dict[int, nn.Parameter] = {}  # layers may share a weight
    for layer in layers:
        latent = layer.weight
        if id(latent) not in packed:
            packed[id(latent)] = nn.Parameter(pack(latent, 1), requires_grad=latent.requires_grad)
        kind: Any = BinaryConv2d if isinstance(layer, LatentConv2d) else BinaryLinear
        layer.__class__ = kind
        layer.weight = packed[id(latent)]
    return result
