"""Derivatives of derivatives: not defined behind a sign or a rounding, and refused before any is left out."""

from __future__ import annotations

import torch


def refuse_second(operator: str) -> None:
    """Raise where a backward pass is itself to be differentiated (gradient penalties, Hessians).

    It is called in the backward pass, where gradients are recorded only with ``create_graph=True``. The
    operator does not keep its input, so autograd would find a part of the second derivative, or nothing.

    Raises:
        RuntimeError: gradients are being recorded.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"second derivatives of {operator} are not defined: differentiate binary layers without "
            "create_graph=True"
        )
