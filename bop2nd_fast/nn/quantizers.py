"""Input quantizers: what a layer adds before the sign, and the gradient it pretends that sign has.

Every quantizer binarizes by ``sign(x)`` (-1 iff ``x < 0``). They differ in the straight-through estimator
(STE) and in what the backward pass keeps:

* :class:`SteSign`: 1 where ``|x| <= clip``, else 0. With ``clip=1`` the packed operators keep 1 bit of it.
* :class:`ApproxSign` (Bi-Real-Net, arXiv 1808.00278): ``2 - 2 |x|`` where ``|x| <= 1``, else 0. Keeps ``x``.
* :class:`SwishSign` (BNN+, arXiv 1812.11800): ``beta (2 - beta x tanh(beta x / 2)) / (1 + cosh(beta x))``.
  Keeps ``x``.
* :class:`RSign` (ReActNet, arXiv 2003.03488): one of them on ``x + bias``, one learned bias per channel.

Layers take a module, or the name of one with its defaults: ``"ste_sign"``, ``"approx_sign"``,
``"swish_sign"``; and ``"int8"`` (:class:`Int8`), which takes no sign: inputs keep 8 bits.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format

from .. import ops


def _inside(x: Tensor, clip: float) -> Tensor:
    return (x.abs() <= clip).to(x.dtype)


def _triangle(x: Tensor, _: float) -> Tensor:
    return (2 - 2 * x.abs()).clamp_min(0)


def _swish(x: Tensor, beta: float) -> Tensor:
    z = beta * x
    return beta * (2 - z * torch.tanh(z / 2)) / (1 + torch.cosh(z))


_DERIVATIVES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "inside": _inside,
    "triangle": _triangle,
    "swish": _swish,
}


class _Estimated(torch.autograd.Function):
    """Identity whose gradient is multiplied with the named derivative at ``x``."""

    @staticmethod
    def forward(x: Tensor, derivative: str, parameter: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str, float], output: Tensor) -> None:
        x, ctx.derivative, ctx.parameter = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return grad * _DERIVATIVES[ctx.derivative](x, ctx.parameter), None, None


def plus_minus_one(x: Tensor) -> Tensor:
    """``sign(x)`` as +1 / -1 in the dtype of ``x``: -1 iff ``x < 0``.

    torch's sign gives 0 for zeros and NaN, which the half makes positive. Three passes in vectors take 2.4 ms
    where ``torch.where(x < 0, -1, 1)`` takes 18 (3.3 million fp32 elements, one thread with AVX2).
    """
    return x.sign().add_(0.5).sign_()


class _Sign(torch.autograd.Function):
    """+1 or -1; the gradient passes."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return plus_minus_one(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def straight_through_sign(x: Tensor) -> Tensor:
    """``sign(x)`` as +1 / -1, whose gradient passes unchanged."""
    result: Tensor = _Sign.apply(x)
    return result


def _estimated(x: Tensor, derivative: str, parameter: float = 0.0) -> Tensor:
    recorded = torch.is_grad_enabled() and x.requires_grad
    result: Tensor = _Estimated.apply(x, derivative, parameter) if recorded else x
    return result


class Quantizer(nn.Module):
    """What every quantizer is. Called by itself it gives ``sign`` as +1 / -1, with its gradient: for layers
    with binary inputs and real weights. Binary layers call :meth:`surrogate` and take the sign themselves.
    """

    def surrogate(self, x: Tensor, dim: int = 1) -> tuple[Tensor, bool]:
        """A tensor whose sign is the quantized ``x``, with this quantizer's gradient attached.

        Args:
            dim: the axis of the channels.

        Returns:
            The tensor, and whether whoever takes its sign still has to clip the gradient to ``|x| <= 1``.
        """
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        values, clips = self.surrogate(x)
        return straight_through_sign(_estimated(values, "inside", 1.0) if clips else values)


class SteSign(Quantizer):
    """Gradient 1 where ``|x| <= clip``, else 0; with ``clip=None``, 1 everywhere.

    Raises:
        ValueError: ``clip`` is not a positive number.
    """

    def __init__(self, clip: float | None = 1.0) -> None:
        super().__init__()
        self.clip = None if clip is None else _positive_number("clip", clip)

    def surrogate(self, x: Tensor, dim: int = 1) -> tuple[Tensor, bool]:
        clip = self.clip
        if clip == 1:
            return x, True
        return x if clip is None else _estimated(x, "inside", clip), False

    def extra_repr(self) -> str:
        return "" if self.clip == 1 else f"clip={self.clip:g}" if self.clip is not None else "clip=None"


class ApproxSign(Quantizer):
    """Gradient of Bi-Real-Net's piecewise quadratic sign: ``2 - 2 |x|`` where ``|x| <= 1``, else 0."""

    def surrogate(self, x: Tensor, dim: int = 1) -> tuple[Tensor, bool]:
        return _estimated(x, "triangle"), False


class SwishSign(Quantizer):
    """Gradient of SignSwish; the larger ``beta``, the nearer to sign.

    Raises:
        ValueError: ``beta`` is not a positive number.
    """

    def __init__(self, beta: float = 5.0) -> None:
        super().__init__()
        self.beta = _positive_number("beta", beta)

    def surrogate(self, x: Tensor, dim: int = 1) -> tuple[Tensor, bool]:
        return _estimated(x, "swish", self.beta), False

    def extra_repr(self) -> str:
        return f"beta={self.beta:g}"


class RSign(Quantizer):
    """``sign(x + bias)`` with one learned bias per channel, which starts at 0; the estimator sees the sum.

    Args:
        channels: of the input: axis 1 of images, the last axis of a dense layer's rows.
        estimator: a quantizer or its name; ReActNet's is Bi-Real-Net's.

    Raises:
        ValueError: ``channels`` is not a positive integer, an unknown estimator; when called, an input of
            other channels.
    """

    def __init__(
        self,
        channels: int,
        estimator: str | Quantizer = "approx_sign",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels = channels = positive_integer(channels, "channels")
        chosen = quantizer(estimator)
        if chosen is None or isinstance(chosen, Int8):
            raise ValueError("an RSign needs an estimator of sign")
        self.estimator = chosen
        self.bias = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))

    def surrogate(self, x: Tensor, dim: int = 1) -> tuple[Tensor, bool]:
        return self.estimator.surrogate(x + per_channel(self.bias, x, dim), dim)

    def extra_repr(self) -> str:
        return f"{self.channels}"


class Int8(Quantizer):
    """Inputs of 8 bits for binary weights: ``x ~ q * scale``, the gradient passes straight through.

    ``scale = max |x| / 127`` and ``q = round(x / scale)``, halves to even (``ops.quantize_rows``). By itself
    it gives ``q * scale``.

    Args:
        per_row: a scale for every row of a dense layer's input and for every image; else one for all.

    Raises:
        ValueError: when called, on infinite or NaN elements.
    """

    def __init__(self, per_row: bool = True) -> None:
        super().__init__()
        self.per_row = bool(per_row)

    def surrogate(self, x: Tensor, dim: int = 1) -> tuple[Tensor, bool]:
        raise ValueError(
            "8-bit inputs are no signs: layers with latent weights take a quantizer of signs or None"
        )

    def quantized(self, x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """int8 of the shape of ``x`` and its scales: of rows (``dim`` -1) or of images (1)."""
        if dim == -1:
            return ops.quantize_rows(x, self.per_row)
        last = suggest_memory_format(x) == torch.channels_last
        image = x.permute(0, 2, 3, 1) if last else x
        q, scale = ops.quantize_rows(image.reshape(x.shape[0], math.prod(x.shape[1:])), self.per_row)
        q = q.view(image.shape)
        return q.permute(0, 3, 1, 2) if last else q, scale

    def forward(self, x: Tensor) -> Tensor:
        q, scale = self.quantized(x, 1 if x.dim() == 4 else -1)
        near = (q.float() * scale.view(*scale.shape, *[1] * (x.dim() - scale.dim()))).to(x.dtype)
        return x + (near - x).detach() if torch.is_grad_enabled() and x.requires_grad else near

    def extra_repr(self) -> str:
        return "" if self.per_row else "per_row=False"


_NAMED: dict[str, type[Quantizer]] = {
    "ste_sign": SteSign,
    "approx_sign": ApproxSign,
    "swish_sign": SwishSign,
    "int8": Int8,
}
QUANTIZERS = tuple(name for name, kind in _NAMED.items() if kind is not Int8)  # of signs


def quantizer(given: str | Quantizer | None) -> Quantizer | None:
    """A quantizer by its name, or as it was given; None for real-valued inputs.

    Raises:
        ValueError: no quantizer of that name, or something that is none.
    """
    if given is None or isinstance(given, Quantizer):
        return given
    if given not in _NAMED:
        raise ValueError(
            f"input_quantizer must be one of {tuple(_NAMED)}, a Quantizer module or None for real inputs, "
            f"got {given!r}"
        )
    return _NAMED[given]()


def per_channel(values: Tensor, x: Tensor, dim: int) -> Tensor:
    """``values`` ``[C]`` shaped to be added to ``x``, whose axis ``dim`` holds the channels.

    Raises:
        ValueError: ``x`` has another number of channels.
    """
    if not -x.dim() <= dim < x.dim() or x.shape[dim] != values.shape[0]:
        raise ValueError(f"input {tuple(x.shape)} does not have {values.shape[0]} channels on axis {dim}")
    shape = [1] * x.dim()
    shape[dim] = -1
    return values.view(shape)


def positive_integer(value: int, name: str) -> int:
    """Any kind of integer (NumPy's too) as Python's; raises ValueError below 1."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or operator.index(value) < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return operator.index(value)


def _positive_number(name: str, value: float) -> float:
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__") or not 0 < float(value) < math.inf:
        raise ValueError(f"{name} must be a positive number, got {value!r}")
    return float(value)
