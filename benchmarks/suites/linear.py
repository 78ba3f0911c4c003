"""Suite ``linear``: binary linear layers, float in to float out, against fp32, bf16 and int8."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor

import bop2nd_fast as bf
from bop2nd_fast import reference

from .. import bnn_lab_adapter, int8, roofline
from ..gates import equal, gated, rounded
from ..goals import Formula, Goal, Record, contender, goal, of_bound, over
from ..networks import BINARYNET
from ..registry import ALL_THREADS, BASELINE, OURS, VARIANT, Case, Contender, Picture, Prepared, Suite

GOAL, MEMORY_BOUND, INNER = "1024x1024", "4096x4096", "inner loop"

IN_LOOP = "inner loop (bits in, dots out): share of the register loop's rate"
PACKED, BOTH_THREADS, MODULE, BITS = "bop2nd", "bop2nd, all threads", "bf.nn.BinaryLinear", "bop2nd, bits in"
FP32, BF16 = "F.linear fp32", "F.linear bf16"
QLINEAR = ("int8 onednn::qlinear", "int8 quantized::linear (x86)", "int8 quantized::linear (fbgemm)")
INT_MM, BNN_LAB = "int8 torch._int_mm", "bnn-lab, bits in"


def cases(quick: bool) -> list[Case]:
    """(batch, inputs, outputs) of each case; 144 words a row keep the inner loop busy in the last one."""
    if quick:
        rows = [(1, 256, 64, (GOAL,)), (18, 130, 33, ())]
    else:
        rows = [
            *((b, 1024, 1024, (GOAL,)) for b in (1, 256)),
            *((b, 4096, 4096, (MEMORY_BOUND,)) for b in (1, 256)),
            (50, 4608, 1024, ()),
            (256, 4608, 512, (INNER,)),
        ]
    case = partial(Case, "linear", "binary_linear", unit="GMAC/s", inference=True)
    return [
        case(
            f"{inputs}-{outputs} batch {batch}",
            {"batch": batch, "inputs": inputs, "outputs": outputs},
            contenders=partial(_contenders, batch, inputs, outputs),
            networks=(BINARYNET,) if inputs == 4608 and outputs == 1024 else (),
            tags=tags,
        )
        for batch, inputs, outputs, tags in rows
    ]


class _Operands:
    """Input, weight and the exact result of a layer; its contenders."""

    def __init__(self, batch: int, inputs: int, outputs: int) -> None:
        generator = torch.Generator().manual_seed(1906)
        self.x = torch.empty(batch, inputs).normal_(generator=generator)
        self.weight = bf.pack(torch.empty(outputs, inputs).normal_(generator=generator), dim=1)
        words = self.weight.words
        self.blocked = torch.ops.bop2nd.prepack_weight(words) if bf.backends.wants_blocked() else None
        self.expected = reference.binary_linear(self.x, words, False)[0]
        self.compare = partial(equal, want=self.expected, what="output")

    @cached_property
    def signs(self) -> Tensor:
        return torch.where(self.x < 0, -1.0, 1.0)

    @cached_property
    def dense(self) -> Tensor:
        return reference.unpack_bits(self.weight.words, self.weight.shape[1])

    def ours(self) -> Prepared:
        op, x, words, blocked = torch.ops.bop2nd.binary_linear, self.x, self.weight.words, self.blocked
        return gated(lambda: op(x, words, False, blocked=blocked)[0], self.compare)

    def module(self) -> Prepared:
        module = bf.nn.BinaryLinear(self.weight.shape[1], self.weight.shape[0])
        module.weight.copy_(self.weight)
        return gated(lambda: module(self.x), self.compare)

    def from_bits(self) -> Prepared:
        op, words, blocked = torch.ops.bop2nd.binary_linear_packed, self.weight.words, self.blocked
        x, inputs = torch.ops.bop2nd.pack_bits(self.x, -1), self.weight.shape[1]
        return gated(lambda: op(x, words, inputs, blocked=blocked)[0], self.compare)

    def floats(self, dtype: torch.dtype) -> Prepared:
        x, weight = self.signs.to(dtype), self.dense.to(dtype)
        return gated(lambda: F.linear(x, weight), partial(rounded, want=self.expected, dtype=dtype))

    def int8(self, build: int8.Build) -> Prepared:
        return build(self.signs, self.dense, self.expected)

    def int_mm(self) -> Prepared:
        return int8.int_mm(self.signs, self.dense.T, self.expected)

    def bnn_lab(self) -> Prepared:
        return bnn_lab_adapter.linear(self.signs, self.dense, self.compare)


def _contenders(batch: int, inputs: int, outputs: int) -> list[Contender]:
    it = _Operands(batch, inputs, outputs)
    dense, activations = inputs * outputs, 4 * batch * (inputs + outputs)
    packed = activations + 4 * outputs * -(-inputs // 32)
    entry = partial(Contender, operations=batch * dense)
    ours = partial(entry, bytes=packed, bounded_by=roofline.REGISTER)
    baselines: list[tuple[str, Callable[[], Prepared], int]] = [
        (FP32, partial(it.floats, torch.float32), 4),
        (BF16, partial(it.floats, torch.bfloat16), 2),
        *((name, partial(it.int8, build), 1) for name, build in zip(QLINEAR, int8.LINEARS, strict=True)),
        (INT_MM, it.int_mm, 1),
    ]
    return [
        ours(PACKED, OURS, it.ours),
        entry(BOTH_THREADS, VARIANT, it.ours, packed, threads=ALL_THREADS),
        ours(MODULE, VARIANT, it.module),
        ours(BITS, VARIANT, it.from_bits),
        *(entry(name, BASELINE, make, activations + size * dense) for name, make, size in baselines),
        entry(BNN_LAB, BASELINE, it.bnn_lab, packed),
        roofline.register_contender(),
    ]


def _weight_bytes(record: Record) -> float | None:
    """Bytes of the fp32 weight over bytes of the words, from the byte counts of the contenders."""
    ours, dense, shapes = contender(record, PACKED), contender(record, FP32), record["shapes"]
    if ours is None or dense is None:
        return None
    activations = 4 * shapes["batch"] * (shapes["inputs"] + shapes["outputs"])
    return float((dense["bytes"] - activations) / (ours["bytes"] - activations))


def _goal(what: str, aim: float, formula: Formula, start: str = "") -> Goal:
    return goal("linear", f"linear 1024x1024{what}", aim, formula, tag=GOAL, start=start)


SUITE = Suite(
    cases,
    families={"fp32": (FP32,), "bf16": (BF16,), "int8": (*QLINEAR, INT_MM)},
    goals=(
        goal("linear", IN_LOOP, 90, of_bound(BITS, roofline.REGISTER), "%", tag=INNER),
        *(_goal(f", batch {n}: against fp32", 20, over(FP32), f"1024-1024 batch {n}") for n in (1, 256)),
        _goal(": weight bytes, fp32 over packed", 32, _weight_bytes),
    ),
    pictures=(Picture("linear", "Linear layers: time of others over bop2nd's"),),
    summary=lambda record: GOAL in record["tags"],
)
