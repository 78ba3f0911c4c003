"""Input quantizers: sign in the forward pass, a surrogate gradient in the backward pass.

Every quantizer binarizes by ``sign(x)`` (-1 iff ``x < 0``); they differ in the straight-through estimator
(STE), the gradient they pretend sign has:

* ``ste_sign``: 1 where ``|x| <= 1``, else 0. Runs inside the packed operators, which keep 1 bit of it.
* ``approx_sign`` (Bi-Real-Net, arXiv 1808.00278): ``2 - 2 |x|`` where ``|x| <= 1``, else 0. Keeps ``x``.
* ``swish_sign`` (BNN+, arXiv 1812.11800): ``beta (2 - beta x tanh(beta x / 2)) / (1 + cosh(beta x))``,
  beta = 5. Keeps ``x``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SWISH_BETA = 5.0


class _ApproxSurrogate(torch.autograd.Function):
    """Identity whose gradient is that of the piecewise quadratic approximation of sign."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (2 - 2 * x.abs()).clamp_min(0)


class _SwishSurrogate(torch.autograd.Function):
    """Identity whose gradient is that of SignSwish."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        z = SWISH_BETA * x
        return grad * (SWISH_BETA * (2 - z * torch.tanh(z / 2)) / (1 + torch.cosh(z)))


_SURROGATES = {"approx_sign": _ApproxSurrogate, "swish_sign": _SwishSurrogate}
QUANTIZERS = ("ste_sign", *_SURROGATES)


def check_quantizer(name: str | None) -> str | None:
    """Raises ``ValueError`` unless ``name`` is a quantizer or None (real-valued input)."""
    if name is not None and name not in QUANTIZERS:
        raise ValueError(f"input_quantizer must be one of {QUANTIZERS} or None for real inputs, got {name!r}")
    return name


def surrogate(x: Tensor, quantizer: str) -> tuple[Tensor, bool]:
    """``x`` with the quantizer's gradient attached, and whether the operator itself still has to clip."""
    if quantizer == "ste_sign":
        return x, True
    return _SURROGATES[quantizer].apply(x), False
