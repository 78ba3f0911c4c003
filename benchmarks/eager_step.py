"""Bop2ndOrder's step in eager torch: what one writes without kernels, carefully and as scripts publish it.

Both work on dense fp32 weights of +1 / -1 and on the same four numbers as the operator. They are not
bit-identical to the specification (torch's ``lerp_`` and ``sqrt`` round otherwise); the gate allows for that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bop2nd_fast import reference

from .registry import GateError, Prepared, Unavailable

GAMMA, SIGMA, TAU, EPS = 1e-4, 1e-2, 3e-3, 1e-10  # flips about one weight in a thousand of the test data


@dataclass
class DenseState:
    """Weights, gradients and moments of all tensors, as dense fp32."""

    weights: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]

    def first_rows(self) -> DenseState:
        """Copies of the first rows of every tensor, which a step treats as it does all others."""
        columns = (self.weights, self.grads, self.exp_avgs, self.exp_avg_sqs)
        return DenseState(*([t[:8].clone() for t in column] for column in columns))


def careful(state: DenseState) -> None:
    """In place, two temporaries per tensor, no branch on values.

    For w = +-1 and a bound >= 0: sign(m) == w and |m| > bound  <=>  m * w > bound.
    """
    for w, g, m, v in zip(state.weights, state.grads, state.exp_avgs, state.exp_avg_sqs, strict=True):
        m.lerp_(g, GAMMA)
        v.mul_(1 - SIGMA).addcmul_(g, g, value=SIGMA)
        bound = v.sqrt().mul_(TAU).add_(TAU * EPS)
        flip = torch.mul(m, w).gt_(bound)
        w.addcmul_(w, flip, value=-2)


def as_published(state: DenseState) -> None:
    """The update as optimizer scripts on the web have it: a new tensor for every operation."""
    for i, (w, g) in enumerate(zip(state.weights, state.grads, strict=True)):
        m = (1 - GAMMA) * state.exp_avgs[i] + GAMMA * g
        v = (1 - SIGMA) * state.exp_avg_sqs[i] + SIGMA * torch.pow(g, 2)
        x = m / (torch.sqrt(v) + EPS)
        mask = (torch.abs(x) > TAU) & (torch.sign(x) == torch.sign(w))
        state.weights[i] = torch.where(mask, -w, w)
        state.exp_avgs[i], state.exp_avg_sqs[i] = m, v


def check_against(got: DenseState, want: DenseState, what: str) -> str:
    """Compare an eager step with the specification: moments to 1e-5, weights but for ties in rounding.

    Raises:
        GateError: with what differs and by how much.
    """
    differ = 0
    for i in range(len(want.weights)):
        for name in ("exp_avgs", "exp_avg_sqs"):
            a, b = getattr(got, name)[i], getattr(want, name)[i]
            if not torch.allclose(a, b, rtol=1e-5, atol=1e-9):
                raise GateError(f"{what}: {name}[{i}] is off by {(a - b).abs().max().item():.3g}")
        differ += int((got.weights[i] != want.weights[i]).sum())
    total = sum(w.numel() for w in want.weights)
    if differ > 1e-5 * total:
        raise GateError(f"{what}: {differ} of {total} weights differ from the specification")
    return f"moments within 1e-5, {differ} of {total} weights differ (ties in rounding)"


def prepared(state: DenseState, step: Callable[[DenseState], None], what: str) -> Prepared:
    """A step with its gate: the first rows of every tensor against the specification."""

    def check() -> str:
        want = state.first_rows()
        hyper = torch.tensor([GAMMA, SIGMA, TAU, TAU * EPS], dtype=torch.float64).float()
        counts = torch.zeros(len(want.weights), 2, dtype=torch.int64, device=want.weights[0].device)
        moments = (want.exp_avgs, want.exp_avg_sqs)
        reference.bop_step_(want.weights, want.grads, *moments, hyper.to(counts.device), counts)
        try:
            step(state)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            raise Unavailable(f"torch.compile failed: {str(error).splitlines()[0]}") from None
        if sum(w.numel() for w in want.weights) > 1 << 15 and not counts[:, 1].any():
            raise GateError("the test data flips no weight: the comparison would show nothing")
        return check_against(state.first_rows(), want, what)

    return Prepared(check, lambda: step(state))
