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

backends.define(
    "bop_step_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor hyper, Tensor(d!) counts, *, Tensor? inv_scale=None, Tensor? found_inf=None, Tensor? seed=None, "
    "bool maximize=False) -> ()",
    reference.bop_step_,
)


@torch.library.register_fake("bop2nd::bop_step_")
def _fake(
    weights: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    hyper: Tensor,
    counts: Tensor,
    **options: Any,
) -> None:
    for weight, grad, exp_avg in zip(weights, grads, exp_avgs, strict=True):
        if grad.shape != exp_avg.shape or weight.shape[:-1] != grad.shape[:-1]:
            raise ValueError(
                f"weight {weight.shape}, gradient {grad.shape}, moment {exp_avg.shape} do not fit"
            )
