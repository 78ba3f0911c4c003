"""Derivatives of derivatives: not defined for products of signs, and said so where they would be dropped."""

from __future__ import annotations

import torch
from torch import Tensor


def first_only(operator: str, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """``gradients`` of ``operator`` as its backward returns them.

    With ``create_graph=True`` (gradient penalties, meta-learning) they require grad, and differentiating them
    raises ``RuntimeError`` instead of leaving out this operator's part.
    """
    if not torch.is_grad_enabled():
        return gradients
    given = [g.detach().requires_grad_() for g in gradients if g is not None]
    message = f"second derivatives of {operator} are not defined: use detached inputs or real layers"
    raising = iter(torch._C._functions.DelayedError(message.encode(), len(given))(*given))
    return tuple(None if g is None else next(raising) for g in gradients)
