"""Suite ``step``: Bop2ndOrder's step against eager torch, the compiler and fused Adam.

The weights of ours are packed, everybody else's are dense fp32. Gradients are shared; they do not change
between runs. About one weight in a thousand flips in the first run (in the gate), hardly any later.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import bop2nd_fast as bf

from .. import roofline, steps
from ..gates import equal
from ..goals import Formula, Goal, faster, goal, of_bound, over
from ..networks import BINARYNET, BINARYNET_WEIGHTS, WeightShape, resnet18_weights
from ..registry import BASELINE, OURS, VARIANT, Case, Contender, Picture, Prepared, Suite
from ..steps import EPS, GAMMA, SIGMA, TAU, StepData

PACKED, BF16 = "bop2nd", "bop2nd, bf16 moments and gradients"
BF16_GRADS, ONE_THREAD = "bop2nd, bf16 gradients", "bop2nd, 1 thread"
OPTIMIZER = "bf.optim.Bop2ndOrder.step()"
CAREFUL, PUBLISHED = "careful eager", "eager as published"
COMPILED, ADAM = "careful eager, torch.compile", "torch.optim.Adam(fused=True)"


def cases(quick: bool) -> list[Case]:
    sets: dict[str, tuple[WeightShape, ...]] = {
        "64 M weights in one tensor": ((8192, 8192),),
        "ResNet-18, 22 tensors": resnet18_weights(),
        "BinaryNet, 9 tensors": BINARYNET_WEIGHTS,
    }
    if quick:
        small = ((3, 3, 3, 33), (7, 65), (64, 3, 3, 64), (1, 1), (64, 512))
        sets = {"256 k weights in one tensor": ((512, 512),), "5 small tensors": small}
    case = partial(Case, "step", "bop_step_", unit="GB/s", threads=None)
    return [
        case(
            name,
            {"tensors": len(shapes), "weights": sum(map(math.prod, shapes))},
            contenders=partial(_contenders, shapes),
            networks=(BINARYNET,) if shapes is BINARYNET_WEIGHTS else (),
        )
        for name, shapes in sets.items()
    ]


def _contenders(shapes: tuple[WeightShape, ...]) -> list[Contender]:
    generator = torch.Generator().manual_seed(2104)
    data = StepData(shapes, lambda *shape: torch.empty(shape).normal_(generator=generator))
    weights = [math.prod(shape) for shape in shapes]
    n = sum(weights)
    f32, bf16 = torch.float32, torch.bfloat16

    def ours(
        name: str, role: str, loop: str, grad: torch.dtype, moment: torch.dtype, threads: int | None = None
    ) -> tuple[Contender, Contender]:
        """The operator with these dtypes, and the loop that bounds it."""
        sizes, n_bytes = (grad.itemsize, moment.itemsize), n * (grad.itemsize + 4 * moment.itemsize) + n // 4
        make = partial(data.packed, torch.ops.bop2nd.bop_step_, grad, moment)
        step = Contender(name, role, make, n_bytes, items=n, bounded_by=loop, threads=threads)
        state = partial(data.state, grad, moment)
        return step, roofline.stream_contender(loop, state, weights, sizes, threads)

    def baseline(name: str, make: Callable[[], Prepared], slow: bool = False) -> Contender:
        return Contender(name, BASELINE, make, 28 * n, items=n, slow=slow)

    optimizer = partial(_optimizer, data)
    packed = [
        ours(PACKED, OURS, roofline.STREAM, f32, f32),
        ours(ONE_THREAD, VARIANT, roofline.STREAM_ONE, f32, f32, threads=1),
        ours(BF16_GRADS, VARIANT, roofline.STREAM_MIXED, bf16, f32),
        ours(BF16, VARIANT, roofline.STREAM_HALF, bf16, bf16),
    ]
    return [
        *(step for step, _ in packed),
        Contender(OPTIMIZER, VARIANT, optimizer, n * 20 + n // 4, items=n, bounded_by=roofline.STREAM),
        baseline(CAREFUL, partial(data.eager, steps.careful, CAREFUL)),
        baseline(PUBLISHED, partial(data.eager, steps.as_published, PUBLISHED)),
        baseline(COMPILED, data.compiled, slow=True),
        baseline(ADAM, data.adam),
        *(loop for _, loop in packed),
    ]


def _optimizer(data: StepData) -> Prepared:
    params: list[Any] = [torch.nn.Parameter(bf.pack(data.normal(*s), dim=-1)) for s in data.shapes]
    for p, grad in zip(params, data.grads, strict=True):
        p.grad = grad
    optimizer = bf.optim.Bop2ndOrder(params, gamma=GAMMA, sigma=SIGMA, threshold=TAU, eps=EPS)

    def check() -> str:
        wanted = []
        for i, rows in data.windows(torch.float32):
            grad = data.grads[i][rows]
            piece = [params[i].words[rows].clone(), grad, torch.zeros_like(grad), torch.zeros_like(grad)]
            wanted.append((i, rows, piece))
        optimizer.step()
        for i, rows, piece in wanted:
            data.specified(piece, i)
            equal(
                params[i].words[rows], piece[0], f"words of parameter {i}, rows {rows.start} to {rows.stop}"
            )
        return "words bit-identical to the reference"

    return Prepared(check, optimizer.step)


def _goals(start: str, label: str) -> tuple[Goal, ...]:
    rows: tuple[tuple[str, float, Formula, str], ...] = (
        ("against careful eager under torch.compile", 1.35, over(COMPILED), "x"),
        ("against torch.optim.Adam(fused=True)", 1.2, over(ADAM), "x"),
        ("against careful eager", 15, over(CAREFUL), "x"),
        ("share of the read/write loop's bandwidth", 95, of_bound(PACKED, roofline.STREAM), "%"),
        ("bf16 moments and gradients against fp32", 1.7, faster(BF16), "x"),
    )
    return tuple(
        goal("step", f"step, {label}: {what}", aim, formula, unit, start=start)
        for what, aim, formula, unit in rows
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
