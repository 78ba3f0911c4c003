"""The step's four numbers ``[gamma, sigma, a, b]`` from an optimizer's hyperparameters.

A weight flips where ``|m| > a * sqrt(v) + b``. ``a`` and ``b`` absorb the threshold tau, epsilon and the bias
correction, so that one kernel serves the whole family (arXiv 2104.05124, algorithms 1 and 2, and the
authors' code, which divides by gamma and sigma where the paper has Adam's correction):

=============================================  ========================  ====================
optimizer                                      a                         b
=============================================  ========================  ====================
Bop (no second moment)                         0                         tau
Bop2ndOrder, ``bias_correction="none"``        tau                       tau * eps
``"reference"``: m / gamma, v / sigma          tau * gamma / sqrt(sigma) tau * gamma * eps
``"adam"``: m / c1, v / c2                     tau * c1 / sqrt(c2)       tau * c1 * eps
=============================================  ========================  ====================

with ``c1 = 1 - (1 - gamma)^t`` and ``c2 = 1 - (1 - sigma)^t``. Everything is computed in fp64 and rounded
once to fp32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BIAS_CORRECTIONS = ("none", "reference", "adam")


def bop_hyper(gamma: Tensor, threshold: Tensor, hold: Tensor | None = None) -> Tensor:
    """Bop: fp64 0-dim tensors -> fp32 ``[gamma, 0, 0, tau]``; where ``hold`` is true nothing may flip."""
    zero = torch.zeros_like(gamma)
    return torch.stack([gamma, zero, zero, _held(threshold, hold)]).float()


def bop2nd_hyper(
    gamma: Tensor,
    sigma: Tensor,
    threshold: Tensor,
    eps: Tensor,
    step: Tensor,
    bias_correction: str,
    hold: Tensor | None = None,
) -> Tensor:
    """Bop2ndOrder: fp64 0-dim tensors -> fp32 ``[gamma, sigma, a, b]`` for step number ``step`` (from 1)."""
    if bias_correction == "none":
        a, b = threshold, threshold * eps
    elif bias_correction == "reference":
        a, b = threshold * gamma / sigma.sqrt(), threshold * gamma * eps
    else:  # expm1/log1p keep 1 - (1 - gamma)^t exact where gamma is as small as 1e-9
        c1 = -torch.expm1(step * torch.log1p(-gamma))
        c2 = -torch.expm1(step * torch.log1p(-sigma))
        a, b = threshold * c1 / c2.sqrt(), threshold * c1 * eps
    return torch.stack([gamma, sigma, a, _held(b, hold)]).float()


def _held(b: Tensor, hold: Tensor | None) -> Tensor:
    """No ``|m|`` exceeds an infinite ``b``: the moments move and no weight does."""
    return b if hold is None else torch.where(hold, torch.full_like(b, math.inf), b)
