"""Suite ``linear``: binary linear layers, float in to float out, against fp32, bf16 and int8."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor

import bop2nd_fast as bf
from bop2nd_fast import reference

from .. import int8, roofline
from ..gates import equal, rounded
from ..goals import Goal, Record, contender, mean, of_bound, over
from ..networks import BINARYNET
from ..registry import ALL_THREADS, BASELINE, OURS, VARIANT, Case, Contender, Picture, Prepared, Suite, gated

GOAL, MEMORY_BOUND, INNER = "1024x1024", "4096x4096", "inner loop"

PACKED, BOTH_THREADS, MODULE, BITS = "bop2nd", "bop2nd, all threads", "bf.nn.BinaryLinear", "bop2nd, bits in"
FP32, BF16 = "F.linear fp32", "F.linear bf16"
INT8 = (
    "int8 onednn::qlinear",
    "int8 quantized::linear (x86)",
    "int8 quantized::linear (fbgemm)",
    "int8 torch._int_mm",
)


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
    return [
        Case(
            suite="linear",
            op="binary_linear",
            name=f"{inputs}-{outputs} batch {batch}",
            shapes={"batch": batch, "inputs": inputs, "outputs": outputs},
            unit="GMAC/s",
            contenders=partial(_contenders, batch, inputs, outputs),
            networks=(BINARYNET,) if inputs == 4608 and outputs == 1024 else (),
            tags=tags,
            inference=True,
        )
        for batch, inputs, outputs, tags in rows
    ]


class _Data:
    def __init__(self, batch: int, inputs: int, outputs: int) -> None:
        generator = torch.Generator().manual_seed(1906)
        self.x = torch.empty(batch, inputs).normal_(generator=generator)
        self.weight = bf.pack(torch.empty(outputs, inputs).normal_(generator=generator), dim=1)
        self.expected = reference.binary_linear(self.x, self.weight.words, False)[0]

    @cached_property
    def signs(self) -> Tensor:
        return torch.where(self.x < 0, -1.0, 1.0)

    @cached_property
    def dense(self) -> Tensor:
        return reference.unpack_bits(self.weight.words, self.weight.shape[1])

    def compare(self, output: Tensor) -> str:
        return equal(output, self.expected, "output")


def _contenders(batch: int, inputs: int, outputs: int) -> list[Contender]:
    data = _Data(batch, inputs, outputs)
    macs = batch * inputs * outputs
    activations, n_words = 4 * batch * (inputs + outputs), outputs * -(-inputs // 32)

    def entry(
        name: str, role: str, make: partial[Prepared], weight_bytes: int, threads: int | None = None
    ) -> Contender:
        n_bytes = activations + weight_bytes
        bound = roofline.REGISTER if role != BASELINE and threads is None else None
        return Contender(name, role, make, bytes=n_bytes, operations=macs, bounded_by=bound, threads=threads)

    dense = inputs * outputs
    return [
        entry(PACKED, OURS, partial(_make_ours, data), 4 * n_words),
        entry(BOTH_THREADS, VARIANT, partial(_make_ours, data), 4 * n_words, ALL_THREADS),
        entry(MODULE, VARIANT, partial(_make_module, data), 4 * n_words),
        entry(BITS, VARIANT, partial(_make_bits, data), 4 * n_words),
        entry(FP32, BASELINE, partial(_make_float, data, torch.float32), 4 * dense),
        entry(BF16, BASELINE, partial(_make_float, data, torch.bfloat16), 2 * dense),
        entry(INT8[0], BASELINE, partial(_make_int8, data, int8.onednn_linear), dense),
        *(
            entry(name, BASELINE, partial(_make_int8, data, partial(int8.quantized_linear, engine)), dense)
            for name, engine in zip(INT8[1:3], int8.CONV_ENGINES, strict=True)
        ),
        entry(INT8[3], BASELINE, partial(_make_int_mm, data), dense),
        roofline.register_contender(),
    ]


def _make_ours(data: _Data) -> Prepared:
    words = data.weight.words
    blocked = torch.ops.bop2nd.prepack_weight(words) if bf.backends.wants_blocked() else None

    op = torch.ops.bop2nd.binary_linear
    return gated(lambda: op(data.x, words, False, blocked=blocked)[0], data.compare)


def _make_module(data: _Data) -> Prepared:
    module = bf.nn.BinaryLinear(data.weight.shape[1], data.weight.shape[0])
    module.weight.copy_(data.weight)
    return gated(lambda: module(data.x), data.compare)


def _make_bits(data: _Data) -> Prepared:
    words = data.weight.words
    blocked = torch.ops.bop2nd.prepack_weight(words) if bf.backends.wants_blocked() else None
    x = torch.ops.bop2nd.pack_bits(data.x, -1)
    op, inputs = torch.ops.bop2nd.binary_linear_packed, data.weight.shape[1]
    return gated(lambda: op(x, words, inputs, blocked=blocked)[0], data.compare)


def _make_float(data: _Data, dtype: torch.dtype) -> Prepared:
    x, weight = data.signs.to(dtype), data.dense.to(dtype)

    return gated(lambda: F.linear(x, weight), lambda output: rounded(output, data.expected, dtype))


def _make_int8(data: _Data, build: Callable[..., Prepared]) -> Prepared:
    return build(data.signs, data.dense, data.expected)


def _make_int_mm(data: _Data) -> Prepared:
    return int8.int_mm(data.signs, data.dense.T, data.expected)


def _weight_bytes(record: Record) -> float | None:
    """Bytes of the fp32 weight over bytes of the words, from the byte counts of the contenders."""
    ours, dense, shapes = contender(record, PACKED), contender(record, FP32), record["shapes"]
    if ours is None or dense is None:
        return None
    activations = 4 * shapes["batch"] * (shapes["inputs"] + shapes["outputs"])
    return float((dense["bytes"] - activations) / (ours["bytes"] - activations))


SUITE = Suite(
    cases,
    families={"fp32": (FP32,), "bf16": (BF16,), "int8": INT8},
    goals=(
        Goal(
            "inner loop (bits in, dots out): share of the register loop's rate",
            90,
            mean("linear", of_bound(BITS, roofline.REGISTER), tag=INNER, scale=100),
            "%",
        ),
        *(
            Goal(
                f"linear 1024x1024, batch {n}: against fp32",
                20,
                mean("linear", over(FP32), start=f"1024-1024 batch {n}", tag=GOAL),
            )
            for n in (1, 256)
        ),
        Goal("linear 1024x1024: weight bytes, fp32 over packed", 32, mean("linear", _weight_bytes, tag=GOAL)),
    ),
    pictures=(Picture("linear", "Linear layers: time of others over bop2nd's"),),
    summary=lambda record: GOAL in record["tags"],
)
