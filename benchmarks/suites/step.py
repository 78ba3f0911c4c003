"""Suite ``step``: Bop2ndOrder's step against eager torch, the compiler and fused Adam.

The weights of ours are packed, everybody else's are dense fp32. Gradients are shared; they do not change
between runs. About one weight in a thousand flips in the first run (in the gate), hardly any later.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import bop2nd_fast as bf
from bop2nd_fast import reference

from .. import eager_step, roofline
from ..eager_step import EPS, GAMMA, SIGMA, TAU, DenseState
from ..gates import equal
from ..goals import Formula, Goal, faster, mean, of_bound, over
from ..networks import BINARYNET, BINARYNET_WEIGHTS, WeightShape, resnet18_weights
from ..registry import (
    BASELINE,
    OURS,
    VARIANT,
    Case,
    Contender,
    GateError,
    Picture,
    Prepared,
    Suite,
)  # fmt: skip

ONE_LARGE: tuple[WeightShape, ...] = ((8192, 8192),)
WINDOW_ROWS = 8  # of a tensor too large to check as a whole
WHOLE_BELOW = 1 << 22

PACKED, BF16 = "bop2nd", "bop2nd, bf16 moments and gradients"
BF16_GRADS, ONE_THREAD = "bop2nd, bf16 gradients", "bop2nd, 1 thread"
OPTIMIZER = "bf.optim.Bop2ndOrder.step()"
CAREFUL, PUBLISHED = "careful eager", "eager as published"
COMPILED, ADAM = "careful eager, torch.compile", "torch.optim.Adam(fused=True)"


def cases(quick: bool) -> list[Case]:
    sets: list[tuple[str, tuple[WeightShape, ...], tuple[str, ...]]] = [
        ("64 M weights in one tensor", ONE_LARGE, ()),
        ("ResNet-18, 22 tensors", resnet18_weights(), ()),
        ("BinaryNet, 9 tensors", BINARYNET_WEIGHTS, (BINARYNET,)),
    ]
    if quick:
        sets = [
            ("256 k weights in one tensor", ((512, 512),), ()),
            ("5 small tensors", ((3, 3, 3, 33), (7, 65), (64, 3, 3, 64), (1, 1), (64, 512)), ()),
        ]
    return [
        Case(
            suite="step",
            op="bop_step_",
            name=name,
            shapes={"tensors": len(shapes), "weights": sum(map(math.prod, shapes))},
            unit="GB/s",
            contenders=partial(_contenders, shapes),
            threads=None,
            networks=networks,
        )
        for name, shapes, networks in sets
    ]


class _Data:
    """What the contenders of one case share; made when first asked for."""

    def __init__(self, shapes: tuple[WeightShape, ...]) -> None:
        self.shapes = shapes
        self.generator = torch.Generator().manual_seed(2104)
        self.grads = [self._normal(s) for s in shapes]
        self._states: dict[tuple[torch.dtype, torch.dtype], roofline.State] = {}
        self.hyper = torch.tensor([GAMMA, SIGMA, TAU, TAU * EPS], dtype=torch.float64).float()

    def _normal(self, shape: WeightShape) -> Tensor:
        return torch.empty(shape).normal_(generator=self.generator)

    def moments(self, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
        m = [self._normal(s).mul_(1e-3).to(dtype) for s in self.shapes]
        return m, [self._normal(s).square_().mul_(0.1).add_(0.9).to(dtype) for s in self.shapes]

    def state(self, grad: torch.dtype, moment: torch.dtype) -> roofline.State:
        """Words, gradients and moments; all that step with these dtypes, and their loop, share them."""
        if (grad, moment) not in self._states:
            words = [torch.ops.bop2nd.pack_bits(self._normal(s), -1) for s in self.shapes]
            grads = [g.to(grad) for g in self.grads]
            self._states[grad, moment] = (words, grads, *self.moments(moment))
        return self._states[grad, moment]

    def dense(self) -> DenseState:
        m, v = self.moments()
        weights = [self._normal(s).sign_().add_(0.5).sign_() for s in self.shapes]
        return DenseState(weights, list(self.grads), m, v)


def _contenders(shapes: tuple[WeightShape, ...]) -> list[Contender]:
    data = _Data(shapes)
    n = sum(map(math.prod, shapes))
    packed_bytes = n * 20 + n // 4

    f32, bf16 = torch.float32, torch.bfloat16
    weights = [math.prod(shape) for shape in shapes]

    def ours(name: str, role: str, bound: str, *dtypes: torch.dtype, threads: int | None = None) -> Contender:
        n_bytes = n * (dtypes[0].itemsize + 4 * dtypes[1].itemsize) + n // 4
        make = partial(_make_ours, data, *dtypes)
        return Contender(name, role, make, bytes=n_bytes, items=n, bounded_by=bound, threads=threads)

    def baseline(name: str, make: Callable[[], Prepared], slow: bool = False) -> Contender:
        return Contender(name, BASELINE, make, bytes=28 * n, items=n, slow=slow)

    def loop(name: str, *dtypes: torch.dtype, threads: int | None = None) -> Contender:
        sizes = (dtypes[0].itemsize, dtypes[1].itemsize)
        return roofline.stream_contender(name, partial(data.state, *dtypes), weights, sizes, threads)

    optimizer = Contender(
        OPTIMIZER, VARIANT, partial(_make_optimizer, data),
        bytes=packed_bytes, items=n, bounded_by=roofline.STREAM,
    )  # fmt: skip
    return [
        ours(PACKED, OURS, roofline.STREAM, f32, f32),
        ours(ONE_THREAD, VARIANT, roofline.STREAM_ONE, f32, f32, threads=1),
        ours(BF16_GRADS, VARIANT, roofline.STREAM_MIXED, bf16, f32),
        ours(BF16, VARIANT, roofline.STREAM_HALF, bf16, bf16),
        optimizer,
        baseline(CAREFUL, partial(_make_eager, data, eager_step.careful, CAREFUL)),
        baseline(PUBLISHED, partial(_make_eager, data, eager_step.as_published, PUBLISHED)),
        baseline(COMPILED, partial(_make_compiled, data), slow=True),
        baseline(ADAM, partial(_make_adam, data)),
        loop(roofline.STREAM, f32, f32),
        loop(roofline.STREAM_ONE, f32, f32, threads=1),
        loop(roofline.STREAM_MIXED, bf16, f32),
        loop(roofline.STREAM_HALF, bf16, bf16),
    ]


# ---------------------------------------------------------------------------------------------- ours


def _make_ours(data: _Data, grad_dtype: torch.dtype, moment_dtype: torch.dtype) -> Prepared:
    words, grads, m, v = data.state(grad_dtype, moment_dtype)
    counts = torch.zeros(len(words), 2, dtype=torch.int64)
    seed = torch.tensor([7, 1]) if moment_dtype == torch.bfloat16 else None

    def run() -> None:
        torch.ops.bop2nd.bop_step_(words, grads, m, v, data.hyper, counts, seed=seed)

    def check() -> str:
        windows = [(i, rows) for i, g in enumerate(grads) for rows in _rows_to_check(g, moment_dtype)]
        before = [[column[i][rows].clone() for column in (words, grads, m, v)] for i, rows in windows]
        run()
        for (i, rows), (w, g, first, second) in zip(windows, before, strict=True):
            want = torch.zeros(1, 2, dtype=torch.int64)
            _reference_step(w, g, first, second, data.hyper, want, seed, i)
            where = f"of tensor {i}, rows {rows.start} to {rows.stop}"
            for what, expected, column in (("words", w, words), ("m", first, m), ("v", second, v)):
                equal(column[i][rows], expected, f"{what} {where}")
            if len(g) == len(grads[i]):
                equal(counts[i : i + 1], want, f"counts {where}")
        checked = sum(g.numel() for _, g, _, _ in before)
        return f"words and moments bit-identical to the reference ({checked} weights compared)"

    return Prepared(check, run)


def _rows_to_check(grad: Tensor, moment_dtype: torch.dtype) -> list[slice]:
    """All rows, or the first, middle and last few of a large tensor. Stochastic rounding depends on the place
    of an element in its tensor: there only the first rows can be checked by themselves."""
    if grad.numel() <= WHOLE_BELOW:
        return [slice(0, grad.shape[0])]
    starts = [0] if moment_dtype == torch.bfloat16 else [0, grad.shape[0] // 2, grad.shape[0] - WINDOW_ROWS]
    return [slice(s, s + WINDOW_ROWS) for s in starts]


def _reference_step(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, hyper: Tensor, counts: Tensor, seed: Tensor | None, index: int
) -> None:
    """The reference on one tensor that was number ``index`` of its list (its random bits depend on it)."""
    empty = [torch.empty(0, 0, dtype=t.dtype) for t in (w, g, m, v)]
    ws, gs, ms, vs = ([*([empty[k]] * index), t] for k, t in enumerate((w, g, m, v)))
    all_counts = torch.zeros(index + 1, 2, dtype=torch.int64)
    reference.bop_step_(ws, gs, ms, vs, hyper, all_counts, seed=seed)
    counts.copy_(all_counts[index:])


def _make_optimizer(data: _Data) -> Prepared:
    params = []
    for shape, grad in zip(data.shapes, data.grads, strict=True):
        p = torch.nn.Parameter(bf.pack(data._normal(shape), dim=-1))
        p.grad = grad
        params.append(p)
    optimizer = bf.optim.Bop2ndOrder(params, gamma=GAMMA, sigma=SIGMA, threshold=TAU, eps=EPS)

    def check() -> str:
        index = min(range(len(params)), key=lambda i: abs(params[i].numel() - WHOLE_BELOW // 4))
        p = params[index]
        rows = slice(0, min(p.shape[0], max(1, WHOLE_BELOW // max(1, p[0].numel()))))
        want = p.words[rows].clone()  # type: ignore[attr-defined]
        m, v = torch.zeros_like(data.grads[index][rows]), torch.zeros_like(data.grads[index][rows])
        _reference_step(
            want, data.grads[index][rows], m, v, data.hyper, torch.zeros(1, 2, dtype=torch.int64), None, 0
        )
        optimizer.step()
        equal(p.words[rows], want, f"words of parameter {index}")  # type: ignore[attr-defined]
        return f"words bit-identical to the reference (parameter {index})"

    return Prepared(check, optimizer.step)


# ----------------------------------------------------------------------------------------- baselines


def _make_eager(data: _Data, step: Callable[[DenseState], None], name: str) -> Prepared:
    return eager_step.prepared(data.dense(), step, name)


def _make_compiled(data: _Data) -> Prepared:
    return _make_eager(data, torch.compile(eager_step.careful, fullgraph=True, dynamic=False), "compiled")


def _make_adam(data: _Data) -> Prepared:
    params = [torch.nn.Parameter(data._normal(s)) for s in data.shapes]
    for p, g in zip(params, data.grads, strict=True):
        p.grad = g
    optimizer = torch.optim.Adam(params, lr=1e-4, fused=True)

    def check() -> str:
        before = params[0].detach()[:2].clone()
        optimizer.step()
        moved = before - params[0].detach()[:2]
        if not torch.allclose(moved, 1e-4 * data.grads[0][:2].sign(), atol=1e-6):
            raise GateError("Adam's first step is not lr * sign(gradient)")
        return "another algorithm; its first step is lr * sign(gradient), as it should be"

    return Prepared(check, optimizer.step)


def _goals(start: str, label: str) -> tuple[Goal, ...]:
    def goal(what: str, aim: float, formula: Formula, unit: str = "x", scale: float = 1.0) -> Goal:
        return Goal(f"step, {label}: {what}", aim, mean("step", formula, start=start, scale=scale), unit)

    return (
        goal("against careful eager under torch.compile", 1.35, over(COMPILED)),
        goal("against torch.optim.Adam(fused=True)", 1.2, over(ADAM)),
        goal("against careful eager", 15, over(CAREFUL)),
        goal("share of the read/write loop's bandwidth", 95, of_bound(PACKED, roofline.STREAM), "%", 100),
        goal("bf16 moments and gradients against fp32", 1.7, faster(BF16)),
    )


SUITE = Suite(
    cases,
    families={
        "careful eager, compiled": (COMPILED,),
        "Adam, fused": (ADAM,),
        "careful eager": (CAREFUL,),
        "eager as published": (PUBLISHED,),
    },
    goals=(*_goals("64 M", "64 M weights in one tensor"), *_goals("ResNet-18", "22 tensors of a ResNet-18")),
    pictures=(Picture("step", "Optimizer step: time of others over bop2nd's"),),
    summary=lambda record: True,
)
