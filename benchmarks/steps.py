"""The optimizer's step on test data: the packed operator with its gate, and what one writes without kernels.

The eager steps work on dense fp32 weights of +1 / -1 and on the same four numbers as the operator. They are
not bit-identical to the specification (torch's ``lerp_`` and ``sqrt`` round otherwise); the gate allows for
that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bop2nd_fast import reference

from .gates import close, equal
from .networks import WeightShape
from .registry import GateError, Prepared, Unavailable
from .roofline import State

GAMMA, SIGMA, TAU, EPS = 1e-4, 1e-2, 3e-3, 1e-10  # flips about one weight in a thousand of the test data
WINDOW_ROWS = 8  # of a tensor too large to check as a whole
WHOLE_BELOW = 1 << 22  # weights, on a CPU


def first_rows(state: State) -> State:
    """Copies of the first rows of every tensor, which a step treats as it does all others."""
    weights, grads, m, v = ([t[:WINDOW_ROWS].clone() for t in column] for column in state)
    return weights, grads, m, v


class StepData:
    """What the contenders of one case share: weights of these shapes, all with the same gradients.

    Args:
        normal: gives a random tensor of a shape, on the device of the case.
    """

    def __init__(self, shapes: Sequence[WeightShape], normal: Callable[..., Tensor]) -> None:
        self.shapes, self.normal = shapes, normal
        self.grads = [normal(*shape) for shape in shapes]
        self.device = self.grads[0].device
        self.hyper = torch.tensor([GAMMA, SIGMA, TAU, TAU * EPS], dtype=torch.float64).float().to(self.device)
        self._states: dict[tuple[torch.dtype, torch.dtype], State] = {}

    def state(self, grad: torch.dtype, moment: torch.dtype) -> State:
        """Words, gradients and moments; all that step with these dtypes, and their loop, share them."""
        if (grad, moment) not in self._states:
            words = [reference.pack_bits(self.normal(*s)) for s in self.shapes]
            self._states[grad, moment] = (words, [g.to(grad) for g in self.grads], *self._moments(moment))
        return self._states[grad, moment]

    def _moments(self, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
        m = [self.normal(*s).mul_(1e-3).to(dtype) for s in self.shapes]
        return m, [self.normal(*s).square_().mul_(0.1).add_(0.9).to(dtype) for s in self.shapes]

    def packed(self, step: Callable[..., None], grad: torch.dtype, moment: torch.dtype) -> Prepared:
        """The operator ``step`` on packed weights, with gradients and moments of these dtypes."""
        state = self.state(grad, moment)
        counts = torch.zeros(len(self.shapes), 2, dtype=torch.int64, device=self.device)
        seed = torch.tensor([7, 1], device=self.device) if moment == torch.bfloat16 else None

        def run() -> None:
            step(*state, self.hyper, counts, seed=seed)

        def check() -> str:
            wanted = [(i, w, [c[i][w].clone() for c in state]) for i, w in self.windows(moment)]
            run()
            for i, rows, piece in wanted:
                want_counts = self.specified(piece, i, seed)
                where = f"of tensor {i}, rows {rows.start} to {rows.stop}"
                for what, column, want in zip(("words", "gradients", "m", "v"), state, piece, strict=True):
                    equal(column[i][rows], want, f"{what} {where}")
                if len(piece[0]) == len(state[0][i]):
                    equal(counts[i], want_counts, f"counts {where}")
            compared = sum(piece[1].numel() for _, _, piece in wanted)
            return f"words and moments bit-identical to the reference ({compared} weights compared)"

        return Prepared(check, run)

    def windows(self, moment: torch.dtype) -> Iterator[tuple[int, slice]]:
        """Which rows of which tensor are compared: all, or on a CPU the first, middle and last few of a large
        one. Stochastic rounding depends on the place of an element in its tensor: there only the first rows
        can be checked by themselves."""
        for i, grad in enumerate(self.grads):
            n = len(grad)
            if grad.numel() <= WHOLE_BELOW or self.device.type != "cpu":
                yield i, slice(0, n)
            else:
                for start in [0] if moment == torch.bfloat16 else [0, n // 2, n - WINDOW_ROWS]:
                    yield i, slice(start, start + WINDOW_ROWS)

    def specified(self, piece: Sequence[Tensor], index: int, seed: Tensor | None = None) -> Tensor:
        """The specification's step, in place, on the words, gradients and moments of a tensor that is number
        ``index`` of its list (its random bits depend on it); returns its counts."""
        w, g, m, v = ([*[t.new_empty(0, 0)] * index, t] for t in piece)
        counts = torch.zeros(index + 1, 2, dtype=torch.int64, device=self.device)
        reference.bop_step_(w, g, m, v, self.hyper, counts, seed=seed)
        return counts[index]

    def eager(self, step: Callable[[State], None], what: str) -> Prepared:
        """A step on dense weights; its gate compares the first rows of every tensor with the reference's."""
        weights = [self.normal(*s).sign_().add_(0.5).sign_() for s in self.shapes]
        state = (weights, list(self.grads), *self._moments())

        def check() -> str:
            want = first_rows(state)
            counts = torch.zeros(len(weights), 2, dtype=torch.int64, device=self.device)
            reference.bop_step_(*want, self.hyper, counts)
            try:
                step(state)
            except torch._dynamo.exc.BackendCompilerFailed as error:
                raise Unavailable(f"torch.compile failed: {str(error).splitlines()[0]}") from None
            if sum(w.numel() for w in want[0]) > 1 << 15 and not counts[:, 1].any():
                raise GateError("the test data flips no weight: the comparison would show nothing")
            return check_against(first_rows(state), want, what)

        return Prepared(check, lambda: step(state))

    def compiled(self) -> Prepared:
        """The careful step through the compiler, hyperparameters as constants."""
        return self.eager(torch.compile(careful, fullgraph=True, dynamic=False), "compiled")

    def adam(self) -> Prepared:
        """torch's fused Adam on as many dense weights."""
        params = [torch.nn.Parameter(self.normal(*s)) for s in self.shapes]
        for p, g in zip(params, self.grads, strict=True):
            p.grad = g
        optimizer = torch.optim.Adam(params, lr=1e-4, fused=True)

        def check() -> str:
            before = params[0].detach()[:2].clone()
            optimizer.step()
            moved = before - params[0].detach()[:2]
            close(moved, 1e-4 * self.grads[0][:2].sign(), "Adam's first step")
            return "another algorithm; its first step is lr * sign(gradient), as it should be"

        return Prepared(check, optimizer.step)


def careful(state: State) -> None:
    """In place, two temporaries per tensor, no branch on values.

    For w = +-1 and a bound >= 0: sign(m) == w and |m| > bound  <=>  m * w > bound.
    """
    for w, g, m, v in zip(*state, strict=True):
        m.lerp_(g, GAMMA)
        v.mul_(1 - SIGMA).addcmul_(g, g, value=SIGMA)
        bound = v.sqrt().mul_(TAU).add_(TAU * EPS)
        flip = torch.mul(m, w).gt_(bound)
        w.addcmul_(w, flip, value=-2)


def as_published(state: State) -> None:
    """The update as optimizer scripts on the web have it: a new tensor for every operation."""
    weights, grads, exp_avgs, exp_avg_sqs = state
    for i, (w, g) in enumerate(zip(weights, grads, strict=True)):
        m = (1 - GAMMA) * exp_avgs[i] + GAMMA * g
        v = (1 - SIGMA) * exp_avg_sqs[i] + SIGMA * torch.pow(g, 2)
        x = m / (torch.sqrt(v) + EPS)
        mask = (torch.abs(x) > TAU) & (torch.sign(x) == torch.sign(w))
        weights[i], exp_avgs[i], exp_avg_sqs[i] = torch.where(mask, -w, w), m, v


def check_against(got: State, want: State, what: str) -> str:
    """Compare an eager step with the specification: moments to 1e-5, weights but for ties in rounding.

    Raises:
        GateError: with what differs and by how much.
    """
    for name, ours, theirs in zip(("exp_avgs", "exp_avg_sqs"), got[2:], want[2:], strict=True):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if not torch.allclose(a, b, rtol=1e-5, atol=1e-9):
                raise GateError(f"{what}: {name}[{i}] is off by {(a - b).abs().max().item():.3g}")
    differ = sum(int((a != b).sum()) for a, b in zip(got[0], want[0], strict=True))
    total = sum(w.numel() for w in want[0])
    if differ > 1e-5 * total:
        raise GateError(f"{what}: {differ} of {total} weights differ from the specification")
    return f"moments within 1e-5, {differ} of {total} weights differ (ties in rounding)"
