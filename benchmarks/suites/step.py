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
from torch import Tensor

import bop2nd_fast as bf

from .. import roofline, steps
from ..gates import equal
from ..goals import Formula, Goal, faster, mean, of_bound, over
from ..networks import BINARYNET, BINARYNET_WEIGHTS, WeightShape, resnet18_weights
from ..registry import BASELINE, OURS, VARIANT, Case, Contender, Picture, Prepared, Suite
from ..steps import EPS, GAMMA, SIGMA, TAU, StepData

PACKED, BF16 = "bop2nd", "bop2nd, bf16 moments and gradients"
BF16_GRADS, ONE_THREAD = "bop2nd, bf16 gradients", "bop2nd, 1 thread"
OPTIMIZER = "bf.optim.Bop2ndOrder.step()"
CAREFUL, PUBLISHED = "careful eager", "eager as published"
COMPILED, ADAM = "careful eager, torch.compile", "torch.optim.Adam(fused=True)"


def cases(quick: bool) -> list[Case]:
    sets: list[tuple[str, tuple[WeightShape, ...], tuple[str, ...]]] = [
        ("64 M weights in one tensor", ((8192, 8192),), ()),
        ("ResNet-18, 22 tensors", resnet18_weights(), ()),
        ("BinaryNet, 9 tensors", BINARYNET_WEIGHTS, (BINARYNET,)),
    ]
    if quick:
        sets = [
            ("256 k weights in one tensor", ((512, 512),), ()),
            ("5 small tensors", ((3, 3, 3, 33), (7, 65), (64, 3, 3, 64), (1, 1), (64, 512)), ()),
        ]
    case = partial(Case, "step", "bop_step_", unit="GB/s", threads=None)
    return [
        case(
            name,
            {"tensors": len(shapes), "weights": sum(map(math.prod, shapes))},
            contenders=partial(_contenders, shapes),
            networks=networks,
        )
        for name, shapes, networks in sets
    ]


def _contenders(shapes: tuple[WeightShape, ...]) -> list[Contender]:
    generator = torch.Generator().manual_seed(2104)

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape).normal_(generator=generator)

    data = StepData(shapes, normal)
    weights = [math.prod(shape) for shape in shapes]
    n = sum(weights)
    f32, bf16 = torch.float32, torch.bfloat16

    def ours(name: str, role: str, bound: str, *dtypes: torch.dtype, threads: int | None = None) -> Contender:
        n_bytes = n * (dtypes[0].itemsize + 4 * dtypes[1].itemsize) + n // 4
        make = partial(data.packed, torch.ops.bop2nd.bop_step_, *dtypes)
        return Contender(name, role, make, n_bytes, items=n, bounded_by=bound, threads=threads)

    def loop(name: str, *dtypes: torch.dtype, threads: int | None = None) -> Contender:
        sizes = (dtypes[0].itemsize, dtypes[1].itemsize)
        return roofline.stream_contender(name, partial(data.state, *dtypes), weights, sizes, threads)

    def baseline(name: str, make: Callable[[], Prepared], slow: bool = False) -> Contender:
        return Contender(name, BASELINE, make, 28 * n, items=n, slow=slow)

    optimizer = partial(_optimizer, data)
    return [
        ours(PACKED, OURS, roofline.STREAM, f32, f32),
        ours(ONE_THREAD, VARIANT, roofline.STREAM_ONE, f32, f32, threads=1),
        ours(BF16_GRADS, VARIANT, roofline.STREAM_MIXED, bf16, f32),
        ours(BF16, VARIANT, roofline.STREAM_HALF, bf16, bf16),
        Contender(OPTIMIZER, VARIANT, optimizer, n * 20 + n // 4, items=n, bounded_by=roofline.STREAM),
        baseline(CAREFUL, partial(data.eager, steps.careful, CAREFUL)),
        baseline(PUBLISHED, partial(data.eager, steps.as_published, PUBLISHED)),
        baseline(COMPILED, data.compiled, slow=True),
        baseline(ADAM, data.adam),
        loop(roofline.STREAM, f32, f32),
        loop(roofline.STREAM_ONE, f32, f32, threads=1),
        loop(roofline.STREAM_MIXED, bf16, f32),
        loop(roofline.STREAM_HALF, bf16, bf16),
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
