"""Suite ``signed_linear``: real and 8-bit rows times signs, against torch's fp32, bf16 and int8."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import bop2nd_fast as bf
from bop2nd_fast import reference

from .. import ggml_adapter, int8, roofline
from ..gates import gated
from ..goals import Goal, goal, over
from ..registry import ALL_THREADS, BASELINE, OURS, VARIANT, Case, Contender, GateError, Prepared, Suite

REAL, EIGHT = "bop2nd, fp32 in", "bop2nd, int8 in"
BOTH_THREADS, QUANTIZED = "bop2nd, fp32 in, all threads", "bop2nd, fp32 in, quantized to int8"
FP32, BF16, INT_MM, ONEDNN = "F.linear fp32", "F.linear bf16", "int8 torch._int_mm", "int8 onednn::qlinear"
GGML = "ggml Q1_0 x Q8_0, fp32 in"
MATRIX, VECTOR = "matrix", "vector"


def cases(quick: bool) -> list[Case]:
    """(rows, inputs, outputs) of each case."""
    rows = [(1, 256, 64), (18, 130, 33)] if quick else [(256, 1024, 1024), (256, 4096, 4096), (1, 4096, 4096)]
    case = partial(Case, "signed_linear", "signed_linear", unit="GMAC/s", inference=True)
    return [
        case(
            f"{inputs}-{outputs}, {n} rows",
            {"rows": n, "inputs": inputs, "outputs": outputs},
            contenders=partial(_contenders, n, inputs, outputs),
            tags=(VECTOR if n == 1 else MATRIX,),
        )
        for n, inputs, outputs in rows
    ]


class _Data:
    def __init__(self, rows: int, inputs: int, outputs: int) -> None:
        generator = torch.Generator().manual_seed(18)
        self.x = torch.randint(-127, 128, (rows, inputs), generator=generator, dtype=torch.int8)
        weight = torch.empty(outputs, inputs).normal_(generator=generator)
        self.words = reference.pack_bits(weight)
        self.dense = reference.unpack_bits(self.words, inputs)
        self.blocked = torch.ops.bop2nd.prepack_weight(self.words) if bf.backends.wants_blocked() else None
        self.expected = (self.x.double() @ self.dense.double().T).float()
        self.compare = partial(_within, 0.0, self.expected)

    def ours(self, dtype: torch.dtype) -> Prepared:
        op, x = torch.ops.bop2nd.signed_linear, self.x.to(dtype)
        return gated(lambda: op(x, self.words, blocked=self.blocked)[0], self.compare)

    def quantized(self) -> Prepared:
        op, x = torch.ops.bop2nd, self.x.float()
        x[:, 0] = 127  # each row's scale is 1: the result stays exact
        want = (x.double() @ self.dense.double().T).float()

        def run() -> Tensor:
            q, scale = op.quantize_rows(x)
            output: Tensor = op.signed_linear(q, self.words, input_scale=scale, blocked=self.blocked)[0]
            return output

        return gated(run, partial(_within, 0.0, want))

    def floats(self, dtype: torch.dtype) -> Prepared:
        x, weight, allowed = self.x.to(dtype), self.dense.to(dtype), 2**-7 * (dtype != torch.float32)
        return gated(lambda: F.linear(x, weight), partial(_within, allowed, self.expected))


def _within(allowed: float, want: Tensor, output: Tensor) -> str:
    """Sums of whole numbers are exact in fp32; ``allowed``: of the largest result."""
    error = float((output.float() - want).abs().max())
    if error > allowed * float(want.abs().max()):
        raise GateError(f"off by {error} from the exact sums")
    return "equal to the exact sums" if allowed == 0 else f"within {allowed:g} of the largest exact sum"


def _contenders(rows: int, inputs: int, outputs: int) -> list[Contender]:
    data, dense, numbers = _Data(rows, inputs, outputs), inputs * outputs, rows * (inputs + outputs)
    real, eight = 4 * numbers + dense // 8, rows * (inputs + 4 * outputs) + dense // 8
    entry, ours = partial(Contender, operations=rows * dense), partial(data.ours, torch.float32)
    onednn = partial(int8.onednn_linear, data.x.float(), data.dense, data.expected, 128)
    return [
        entry(REAL, OURS, ours, real),
        entry(EIGHT, VARIANT, partial(data.ours, torch.int8), eight),
        entry(BOTH_THREADS, VARIANT, ours, real, threads=ALL_THREADS),
        entry(QUANTIZED, VARIANT, data.quantized, real),
        entry(FP32, BASELINE, partial(data.floats, torch.float32), 4 * (numbers + dense)),
        entry(BF16, BASELINE, partial(data.floats, torch.bfloat16), 2 * (numbers + dense)),
        entry(INT_MM, BASELINE, partial(int8.int_mm, data.x, data.dense.T, data.expected), eight + dense),
        entry(ONEDNN, BASELINE, onednn, eight + dense),
        entry(GGML, BASELINE, partial(ggml_adapter.linear, data.x, data.dense), real),
        roofline.traffic_contender(dense // 8, 4 * rows * outputs, threads=1),
    ]


def _goal(what: str, aim: float, tag: str, ours: str, *theirs: str) -> Goal:
    return goal("signed_linear", what, aim, over(*theirs, ours=ours), tag=tag)


SUITE = Suite(
    cases,
    goals=(
        _goal("256 real rows by signs: against fp32", 3, MATRIX, REAL, FP32),
        _goal("256 int8 rows by signs: against fp32", 6, MATRIX, EIGHT, FP32),
        _goal("256 int8 rows by signs: against torch's int8", 1, MATRIX, EIGHT, INT_MM, ONEDNN),
        _goal("256 real rows, quantized, by signs: against ggml's Q1_0", 4, MATRIX, QUANTIZED, GGML),
        _goal("one real row by signs: against fp32", 8, VECTOR, REAL, FP32),
        _goal("one real row by signs: against bf16", 12, VECTOR, REAL, BF16),
        _goal("one int8 row by signs: against bf16", 12, VECTOR, EIGHT, BF16),
    ),
)
