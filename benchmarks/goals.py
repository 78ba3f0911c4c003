"""The goals on a CPU, each as a formula on the results: what is measured, what is aimed at, met or missed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from . import roofline
from .results import contender
from .suites import conv, linear, signed_conv, signed_linear, step, train_step

Records = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Goal:
    """``value`` computes the figure from all records, None if something it needs has no number."""

    name: str
    suite: str
    aim: float
    value: Callable[[Records], float | None]
    unit: str = "x"

    def verdict(self, records: Records) -> str:
        """``met``, ``missed``, or ``open`` where the results hold no figure."""
        value = self.value(records)
        return "open" if value is None else "met" if value >= self.aim else "missed"


# ------------------------------------------------------------------------------------- formulas


def tagged(records: Records, suite: str, tag: str) -> list[dict[str, Any]]:
    return [r for r in records if r["suite"] == suite and tag in r["tags"]]


def named(records: Records, suite: str, start: str) -> list[dict[str, Any]]:
    return [r for r in records if r["suite"] == suite and r["case"].startswith(start)]


def ratio(record: dict[str, Any], *names: str) -> float | None:
    """Time of the fastest of ``names`` over ours, of one case; by paired rounds."""
    found = [e["ratio"]["median"] for n in names if (e := contender(record, n)) and "ratio" in e]
    return min(found) if found else None


def inverse(value: float | None) -> float | None:
    """How much faster a variant is than ours, from its ratio."""
    return None if value is None else 1 / value


def geometric_mean(values: Sequence[float | None]) -> float | None:
    """None without values or if one is missing."""
    known = [v for v in values if v is not None]
    if not known or len(known) != len(values):
        return None
    return math.exp(sum(map(math.log, known)) / len(known))


def _step(start: str, *names: str) -> Callable[[Records], float | None]:
    return lambda records: geometric_mean([ratio(r, *names) for r in named(records, "step", start)])


def _step_bandwidth(start: str) -> Callable[[Records], float | None]:
    """Ours in bytes per second over the read/write loop's, in percent."""

    def value(records: Records) -> float | None:
        shares = [ratio(r, roofline.STREAM) for r in named(records, "step", start)]
        mean = geometric_mean(shares)
        return None if mean is None else 100 * mean

    return value


def _faster(select: Callable[[Records], list[dict[str, Any]]], name: str) -> Callable[..., float | None]:
    return lambda records: geometric_mean([inverse(ratio(r, name)) for r in select(records)])


def _stages(*names: str) -> Callable[[Records], float | None]:
    return lambda records: geometric_mean([ratio(r, *names) for r in tagged(records, "conv", conv.GOAL)])


def _inner_loop(records: Records) -> float | None:
    """Bits in, dots out, one thread, in percent of the register loop's rate."""
    for record in tagged(records, "linear", linear.INNER):
        bits, loop = contender(record, linear.BITS), contender(record, roofline.REGISTER)
        if bits and loop:
            return float(100 * bits["rate"] / loop["rate"])
    return None


def _linear(batch: int) -> Callable[[Records], float | None]:
    def value(records: Records) -> float | None:
        chosen = [r for r in tagged(records, "linear", linear.GOAL) if r["shapes"]["batch"] == batch]
        return geometric_mean([ratio(r, linear.FP32) for r in chosen])

    return value


def _weight_traffic(records: Records) -> float | None:
    """Bytes of the fp32 weight over bytes of the words, from the byte counts of the contenders."""
    found = []
    for record in tagged(records, "linear", linear.GOAL):
        ours, dense = contender(record, linear.PACKED), contender(record, linear.FP32)
        if ours and dense:
            shapes = record["shapes"]
            activations = 4 * shapes["batch"] * (shapes["inputs"] + shapes["outputs"])
            found.append((dense["bytes"] - activations) / (ours["bytes"] - activations))
    return geometric_mean(found)


def _train_memory(key: str) -> Callable[[Records], float | None]:
    def value(records: Records) -> float | None:
        found = []
        for record in named(records, "train_step", ""):
            ours, latent = contender(record, train_step.PACKED), contender(record, train_step.LATENT)
            if ours and latent and key in ours.get("memory", {}) and key in latent.get("memory", {}):
                found.append(latent["memory"][key] / ours["memory"][key])
        return geometric_mean(found)

    return value


def _train(records: Records) -> float | None:
    return geometric_mean([ratio(r, train_step.LATENT) for r in named(records, "train_step", "")])


def _step_goals(start: str, label: str) -> list[Goal]:
    def goal(what: str, aim: float, value: Callable[[Records], float | None], unit: str = "x") -> Goal:
        return Goal(f"step, {label}: {what}", "step", aim, value, unit)

    return [
        goal("against careful eager under torch.compile", 1.35, _step(start, step.COMPILED)),
        goal("against torch.optim.Adam(fused=True)", 1.2, _step(start, step.ADAM)),
        goal("against careful eager", 15, _step(start, step.CAREFUL)),
        goal("share of the read/write loop's bandwidth", 95, _step_bandwidth(start), "%"),
        goal(
            "bf16 moments and gradients against fp32",
            1.7,
            _faster(lambda records: named(records, "step", start), step.BF16),
        ),
    ]


def _signed(tag: str, ours: str, *against: str) -> Callable[[Records], float | None]:
    """How much faster a contender of ours is than the fastest of others; all are timed against the first."""

    def value(records: Records) -> float | None:
        found = []
        for record in tagged(records, "signed_linear", tag):
            theirs, mine = ratio(record, *against), ratio(record, ours)
            known = theirs is not None and (mine is not None or ours == signed_linear.REAL)
            found.append(theirs / (mine or 1.0) if theirs is not None and known else None)
        return geometric_mean(found)

    return value


def _signed_goals() -> list[Goal]:
    s, suite = signed_linear, "signed_linear"
    torchs = (s.INT_MM, s.ONEDNN)
    first = "first layer of BinaryNet, batch 64, real images"
    return [
        Goal("256 real rows by signs: against fp32", suite, 3, _signed(s.MATRIX, s.REAL, s.FP32)),
        Goal("256 int8 rows by signs: against fp32", suite, 6, _signed(s.MATRIX, s.EIGHT, s.FP32)),
        Goal("256 int8 rows by signs: against torch's int8", suite, 1, _signed(s.MATRIX, s.EIGHT, *torchs)),
        Goal("one real row by signs: against fp32", suite, 8, _signed(s.VECTOR, s.REAL, s.FP32)),
        Goal("one real row by signs: against bf16", suite, 12, _signed(s.VECTOR, s.REAL, s.BF16)),
        Goal("one int8 row by signs: against bf16", suite, 12, _signed(s.VECTOR, s.EIGHT, s.BF16)),
        Goal(
            f"{first}: against fp32",
            "signed_conv",
            1.5,
            lambda records: geometric_mean(
                [ratio(r, signed_conv.FP32) for r in tagged(records, "signed_conv", signed_conv.GOAL)]
            ),
        ),
    ]  # fmt: skip


CONV = "3x3 convolution, 4 stages, batch 1, 1 thread"
GOALS: tuple[Goal, ...] = (
    *_step_goals("64 M", "64 M weights in one tensor"),
    *_step_goals("ResNet-18", "22 tensors of a ResNet-18"),
    *_signed_goals(),
    Goal(f"{CONV}: against fp32", "conv", 20, _stages(*conv.FP32)),
    Goal(f"{CONV}: against bf16", "conv", 9, _stages(*conv.BF16)),
    Goal(f"{CONV}: against int8", "conv", 4.5, _stages(*conv.INT8)),
    Goal(f"{CONV}: against Larq Compute Engine 0.16", "conv", 60, _stages(conv.LARQ)),
    Goal(
        "3x3 convolution, 4 stages, batch 1: 2 threads against 1",
        "conv",
        1.8,
        _faster(lambda records: tagged(records, "conv", conv.GOAL), conv.BOTH_THREADS),
    ),
    Goal("inner loop (bits in, dots out): share of the register loop's rate", "linear", 90, _inner_loop, "%"),
    Goal("linear 1024x1024, batch 1: against fp32", "linear", 20, _linear(1)),
    Goal("linear 1024x1024, batch 256: against fp32", "linear", 20, _linear(256)),
    Goal("linear 1024x1024: weight bytes, fp32 over packed", "linear", 32, _weight_traffic),
    Goal("BinaryNet training step: against latent weights and Adam", "train_step", 1.5, _train),
    Goal(
        "BinaryNet training step: peak of torch's allocator, latent over ours",
        "train_step",
        2,
        _train_memory("allocator_peak"),
    ),
    Goal(
        "BinaryNet training step: growth of the resident set, latent over ours",
        "train_step",
        2,
        _train_memory("rss_growth"),
    ),
)
