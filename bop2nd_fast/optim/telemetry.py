"""What plans can tell about their steps: counts, regimes, histograms.

Everything here reads the counters that the step keeps anyway, and synchronises when it is called. ``plans``
are those of the param groups, in their order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index

import torch
from torch import Tensor

from .distributed import local_tensor
from .plan import Plan

# Of the flips that sign(m) alone would make, the share below which the threshold does nothing.
INACTIVE_BELOW = 0.01
# Flips per weight and step below which a layer does not learn: a weight then flips once in a million steps.
FROZEN_BELOW = 1e-6


@dataclass(frozen=True)
class FlipCounts:
    """What the last step did to one parameter.

    ``candidates``: weights whose sign agrees with the first moment's (a flip would go downhill);
    ``flips``: those that flipped; ``blocked``: candidates the threshold held back.
    Of a sharded parameter this process's block is counted.
    ``group``, ``index``: place in ``param_groups``; ``name``: as given with named parameters, else made up.
    """

    group: int
    index: int
    numel: int
    candidates: int
    flips: int
    name: str = ""

    @property
    def blocked(self) -> int:
        return self.candidates - self.flips


@dataclass(frozen=True)
class LayerReport:
    """One layer since the last report: rates per weight and step, regime and what to change.

    Regimes: ``inactive``, ``active``, ``frozen``; ``idle`` where no step was taken; ``not finite`` where
    moments of ``not_finite`` weights are infinite or NaN, which keeps these weights from ever flipping.
    """

    name: str
    numel: int
    steps: int
    candidate_rate: float
    flip_rate: float
    blocked_share: float
    regime: str
    advice: str
    not_finite: int = 0


def read_counts(plans: Sequence[Plan]) -> list[FlipCounts]:
    """The last step's counts of every parameter that took part, in the order of the groups."""
    return [
        FlipCounts(g, i, local_tensor(plan.params[i]).numel(), candidates, flips, plan.name_of(g, i))
        for g, plan in enumerate(plans)
        for i, (candidates, flips) in sorted(plan.last_counts().items())
    ]


class FlipRates:
    """Means of one group's counts over the steps at which they were read; ``names`` of its parameters."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.flips = [0] * len(names)
        self.blocks = [0] * len(names)
        self.weights = [0] * len(names)

    def add(self, telemetry: list[FlipCounts]) -> float:
        """Add one step's counters; returns its flips per weight."""
        for counts in telemetry:
            self.flips[counts.index] += counts.flips
            self.blocks[counts.index] += counts.blocked
            self.weights[counts.index] += counts.numel
        return sum(c.flips for c in telemetry) / max(1, sum(c.numel for c in telemetry))

    def total(self) -> float:
        return sum(self.flips) / max(1, sum(self.weights))

    def blocked(self) -> float:
        return sum(self.blocks) / max(1, sum(self.weights))

    def layers(self) -> dict[str, float]:
        return {n: f / max(1, w) for n, f, w in zip(self.names, self.flips, self.weights, strict=True)}


# ------------------------------------------------------------------------- regimes


def layer_reports(plans: Sequence[Plan]) -> list[LayerReport]:
    """Every parameter's rates since the totals were last cleared; clears them."""
    rows = []
    for g, plan in enumerate(plans):
        totals, taken = (x.tolist() for x in plan.totals())
        plan.clear_totals()
        for i, p in enumerate(plan.params):
            candidates, flips = totals[i]
            name, numel, bad = plan.name_of(g, i), local_tensor(p).numel(), _not_finite(plan, p)
            rows.append(_report_of(name, numel, candidates, flips, taken[i], bad))
    return rows


def joined(first: list[LayerReport], second: list[LayerReport]) -> list[LayerReport]:
    """The report on two spans of steps, one after the other, of the same layers (or none in the first)."""
    if not first:
        return second
    rows = []
    for a, b in zip(first, second, strict=True):
        spans = [(row, row.numel * row.steps) for row in (a, b)]
        candidates = sum(round(row.candidate_rate * n) for row, n in spans)
        flips = sum(round(row.flip_rate * n) for row, n in spans)
        rows.append(_report_of(b.name, b.numel, candidates, flips, a.steps + b.steps, b.not_finite))
    return rows


def _not_finite(plan: Plan, p: Tensor) -> int:
    """How many weights of ``p`` have a moment that is infinite or NaN."""
    lane = plan.lanes.get(id(p))
    if lane is None:
        return 0
    finite = torch.stack([moment.isfinite() for moment in lane.walked]).all(0)
    return int((~finite).sum())


def _report_of(
    name: str, numel: int, candidates: int, flips: int, steps: int, not_finite: int
) -> LayerReport:
    chances = max(1, numel * steps)
    blocked = (candidates - flips) / max(1, candidates)
    if not_finite:
        regime = "not finite"
        advice = (
            f"moments of {not_finite} weights of {name} are infinite or NaN since a gradient was (or its "
            "square): these weights never flip again. Set such moments to 0, and see 'Gradients that are not "
            "finite' in docs/optimizer.md"
        )
    elif steps == 0:
        regime, advice = "idle", "no step was taken: does the layer get a gradient?"
    elif flips / chances < FROZEN_BELOW and candidates:
        regime, advice = "frozen", "hardly a weight flips: lower the threshold, or raise gamma"
    elif blocked < INACTIVE_BELOW:
        regime = "inactive"
        advice = "the threshold does nothing: raise it to flip less, or steer by gamma alone"
    else:
        regime, advice = "active", ""
    rates = candidates / chances, flips / chances
    return LayerReport(name, numel, steps, *rates, blocked, regime, advice, not_finite)


def print_report(rows: list[LayerReport]) -> None:
    """A table on standard output (with rich if installed), then what to change, once per regime."""
    header = ("layer", "weights", "flips/step", "blocked", "regime")
    cells = [(r.name, f"{r.numel:,}", f"{r.flip_rate:.1e}", f"{r.blocked_share:.1%}", r.regime) for r in rows]
    try:
        from rich import box
        from rich.console import Console, JustifyMethod
        from rich.table import Table
    except ImportError:
        widths = [max(len(row[i]) for row in [header, *cells]) for i in range(len(header))]
        for row in [header, *cells]:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    else:
        console = Console()
        shown = range(len(header)) if console.width >= 60 else (0, 2, 4)  # nothing is cut off
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
        for i in shown:
            justify: JustifyMethod = "right" if 0 < i < 4 else "left"
            table.add_column(header[i], no_wrap=i > 0, overflow="fold", justify=justify)
        for row in cells:
            table.add_row(*(row[i] for i in shown))
        console.print(table)
    for advice, regime in {r.advice: r.regime for r in rows if r.advice}.items():
        print(f"{regime}: {advice}")


# ------------------------------------------------------------------------- the signal


def signal_histograms(plans: Sequence[Plan], bins: int, limit: float) -> dict[str, Tensor]:
    """Histogram of ``|m| / sqrt(v)`` over ``sqrt(gamma / 2)`` for every parameter that has stepped.

    Weights whose moments are not finite are left out (``report`` counts them). With gamma 0 there is no noise
    to measure by: every signal is in the last bin, and a signal of 0 in the first.
    """
    bins = index(bins)
    if bins < 1 or not limit > 0:
        raise ValueError(f"bins must be >= 1 and limit > 0, got {bins} and {limit}")
    result = {}
    for g, plan in enumerate(plans):
        if "exp_avg_sq" not in plan.moments:
            raise TypeError("this optimizer keeps no second moment to measure its signal by")
        unit = max(math.sqrt(float(plan.group["gamma"]) / 2), torch.finfo(torch.float64).tiny)
        for i, p in enumerate(plan.params):
            if (lane := plan.lanes.get(id(p))) is not None:
                m, v = (moment.double().flatten() for moment in lane.walked)
                signal = m.abs() / v.clamp_min(torch.finfo(torch.float64).tiny).sqrt() / unit
                cell = (signal / limit * bins).clamp(max=bins)[m.isfinite() & v.isfinite()].long()
                result[plan.name_of(g, i)] = torch.bincount(cell, minlength=bins + 1).cpu()
    return result
