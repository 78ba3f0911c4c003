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
once to fp32. A rate of 0 leaves its moment as it is; the corrected versions, which divide by it, then flip
nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BIAS_CORRECTIONS = ("none", "reference", "adam")


def bop_hyper(
    knobs: dict[str, Tensor], step: Tensor, bias_correction: str | None, hold: Tensor | None
) -> Tensor:
    """Bop's four numbers; see :func:`bop2nd_hyper`. Its moment is not corrected."""
    gamma, threshold = knobs["gamma"], knobs["threshold"]
    zero = torch.zeros_like(gamma)
    return torch.stack([gamma, zero, zero, _held(threshold, hold)]).float()


def bop2nd_hyper(
    knobs: dict[str, Tensor], step: Tensor, bias_correction: str | None, hold: Tensor | None
) -> Tensor:
    """Bop2ndOrder's fp32 ``[gamma, sigma, a, b]``.

    Args:
        knobs: gamma, sigma, threshold, eps as fp64 0-dim tensors.
        step: the step's number, from 1, in fp64.
        bias_correction: one of ``BIAS_CORRECTIONS``.
        hold: where it is true nothing may flip; None: nowhere.
    """
    gamma, sigma, threshold, eps = (knobs[name] for name in ("gamma", "sigma", "threshold", "eps"))
    if bias_correction == "none":
        a, b = threshold, threshold * eps
    else:
        if bias_correction == "reference":
            c1, c2 = gamma, sigma
        else:  # expm1/log1p keep 1 - (1 - gamma)^t exact where gamma is as small as 1e-9
            c1 = -torch.expm1(step * torch.log1p(-gamma))
            c2 = -torch.expm1(step * torch.log1p(-sigma))
        # With a rate of 0 (in the kernel's fp32) a or b becomes infinite or NaN, which no |m| exceeds.
        a, b = threshold * c1 / c2.sqrt(), threshold * c1 * eps / (gamma.float() > 0)
    return torch.stack([gamma, sigma, a, _held(b, hold)]).float()


def _held(b: Tensor, hold: Tensor | None) -> Tensor:
    """No ``|m|`` exceeds an infinite ``b``: the moments move and no weight does."""
    return b if hold is None else torch.where(hold, torch.full_like(b, math.inf), b)
