"""Derivatives of products of signs. Those of derivatives are not defined behind a sign or a rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def gradients_of(
    operator: str, ctx: Any, grad: Tensor | None, *arguments: Any
) -> tuple[Tensor | None, Tensor | None]:
    """Of input and weight, by ``<operator>_backward``, where each is asked for.

    ``ctx`` saved the input's sign words, its mask and the weight; ``arguments`` stand behind these.
    """
    if grad is None:
        return None, None
    refuse_second(operator)
    signs, mask, weight = ctx.saved_tensors
    need_input, need_weight = ctx.needs_input_grad[:2]
    backward = getattr(torch.ops.bop2nd, f"{operator}_backward")
    grad_input, grad_weight = backward(grad, signs, mask, weight, *arguments, need_input, need_weight)
    return grad_input if need_input else None, grad_weight.to(weight.dtype) if need_weight else None


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
