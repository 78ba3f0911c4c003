"""bop2nd::bop_step_ - one optimizer step on a list of parameters: moments, rule, flips, counts.

Contract (the rule itself is ``reference.bop_rule``; source arXiv 2104.05124):

* ``weights[i]``: int32 words ``[..., W]`` of a packed parameter, or a dense floating tensor of +1 / -1.
* ``grads[i]``, ``exp_avgs[i]``, ``exp_avg_sqs[i]``: contiguous, in walk order: ``[..., L]`` with
  ``W = ceil(L / 32)`` for packed weights, the weight's shape for dense ones. Gradients fp32, bf16 or
  fp16; moments fp32, or bf16 with stochastic rounding from ``seed``. ``exp_avg_sqs`` is empty for Bop.
* ``hyper``: fp32 ``[gamma, sigma, a, b]`` (see ``optim.thresholds``), read on the device.
* ``counts``: int64 ``[n, 2]``, overwritten with (candidates, flips) of each tensor.
* ``inv_scale``, ``found_inf``: one-element fp32 tensors as torch's GradScaler makes them; a non-zero
  ``found_inf`` leaves weights and moments untouched and the counts zero.

Cost: 20.25 bytes per weight with fp32 state and gradients and packed weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends, reference
from ..kernels.geometry import words_for
from .product import check_real, check_shape


def _check(
    weights: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    hyper: Tensor,
    counts: Tensor,
    inv_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    seed: Tensor | None = None,
    maximize: bool = False,
) -> None:
    """Raises TypeError or ValueError unless the operands are as the contract says."""
    n = len(weights)
    if len(grads) != n or len(exp_avgs) != n or len(exp_avg_sqs) not in (0, n):
        raise ValueError("weights, grads and moments must be lists of one length")
    for one, what in ((inv_scale, "inv_scale"), (found_inf, "found_inf")):
        if one is not None and (one.dtype != torch.float32 or one.numel() != 1):
            raise ValueError(f"{what} must be one float32 number, got {one.dtype} {list(one.shape)}")
    lists = ((hyper, [4], torch.float32, "hyper"), (counts, [n, 2], torch.int64, "counts"))
    for tensor, shape, dtype, what in (*lists, (seed, [2], torch.int64, "seed")):
        if tensor is not None and (tensor.dtype != dtype or list(tensor.shape) != shape):
            raise ValueError(f"{what} must be {dtype} {shape}, got {tensor.dtype} {list(tensor.shape)}")
    for i, (weight, grad, exp_avg) in enumerate(zip(weights, grads, exp_avgs, strict=True)):
        check_real(grad, "a gradient")
        for moment in (exp_avg, *exp_avg_sqs[i : i + 1]):
            check_shape(moment, grad.shape, "a moment")
            if moment.dtype not in (torch.float32, torch.bfloat16) or moment.dtype != exp_avg.dtype:
                raise TypeError(f"moments must be float32 or bfloat16, got {moment.dtype}")
            if moment.dtype == torch.bfloat16 and seed is None:
                raise ValueError("bfloat16 moments need a seed")
        if weight.dtype != torch.int32:
            check_real(weight, "a dense weight")
            check_shape(weight, grad.shape, "a dense weight")
        elif grad.numel():
            if grad.dim() < 1:
                raise ValueError("the gradient of a packed weight needs at least one axis")
            check_shape(weight, (*grad.shape[:-1], words_for(grad.shape[-1])), "the words of a weight")


def _bop_step_(*operands: Any, **options: Any) -> None:
    _check(*operands, **options)
    reference.bop_step_(*operands, **options)


backends.define(
    "bop_step_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor hyper, Tensor(d!) counts, *, Tensor? inv_scale=None, Tensor? found_inf=None, Tensor? seed=None, "
    "bool maximize=False) -> ()",
    _bop_step_,
)


@torch.library.register_fake("bop2nd::bop_step_")
def _fake(*operands: Any, **options: Any) -> None:
    _check(*operands, **options)
