"""What the optimizer can tell about itself: counts, regimes, histograms, loggers.

Everything here reads the counters that the step keeps anyway, and synchronises when it is called.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from .distributed import local_tensor
from .group import HyperGroup
from .plan import Plan, steps_of

if TYPE_CHECKING:
    from .base import BopBase
    from .mixed import MixedOptimizer

    Reporting: TypeAlias = BopBase | MixedOptimizer

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
    """One layer since the last report: rates per weight and step, regime (``inactive``, ``active``,
    ``frozen``, or ``idle`` where no step was taken) and what to change."""

    name: str
    numel: int
    steps: int
    candidate_rate: float
    flip_rate: float
    blocked_share: float
    regime: str
    advice: str


def name_of(plan: Plan, group_index: int, index: int) -> str:
    names = plan.group.get("param_names")
    return str(names[index]) if names else f"group{group_index}.param{index}"


def read_counts(optimizer: BopBase) -> list[FlipCounts]:
    """The last step's counts of every parameter that took part, in the order of the groups."""
    records = []
    for g, plan in enumerate(optimizer._plans):
        steps = steps_of(plan.batches, plan.last.device).tolist()
        counts = {
            id(p): (*row, step) for p, row, step in zip(plan.params, plan.last.tolist(), steps, strict=True)
        }
        for i, p in enumerate(plan.group["params"]):
            if id(p) not in counts or id(p) in plan.missed or counts[id(p)][2] == 0:
                continue
            candidates, flips, _ = counts[id(p)]
            records.append(FlipCounts(g, i, local_tensor(p).numel(), candidates, flips, name_of(plan, g, i)))
    return records


# ------------------------------------------------------------------------- regimes


def layer_reports(optimizer: BopBase) -> list[LayerReport]:
    """Every parameter's rates since the totals were last cleared; clears them."""
    rows = []
    for g, plan in enumerate(optimizer._plans):
        taken = (steps_of(plan.batches, plan.last.device) - plan.since).tolist()
        totals = {id(p): (*row, n) for p, row, n in zip(plan.params, plan.total.tolist(), taken, strict=True)}
        plan.clear_totals()
        for i, p in enumerate(plan.group["params"]):
            candidates, flips, steps = totals.get(id(p), (0, 0, 0))
            rows.append(_judge(name_of(plan, g, i), local_tensor(p).numel(), candidates, flips, steps))
    return rows


def _judge(name: str, numel: int, candidates: int, flips: int, steps: int) -> LayerReport:
    chances = max(1, numel * steps)
    blocked = (candidates - flips) / max(1, candidates)
    if steps == 0:
        regime, advice = "idle", "no step was taken: does the layer get a gradient?"
    elif flips / chances < FROZEN_BELOW and candidates:
        regime, advice = "frozen", "hardly a weight flips: lower the threshold, or raise gamma"
    elif blocked < INACTIVE_BELOW:
        regime = "inactive"
        advice = "the threshold does nothing: raise it to flip less, or steer by gamma alone"
    else:
        regime, advice = "active", ""
    return LayerReport(name, numel, steps, candidates / chances, flips / chances, blocked, regime, advice)


def print_report(rows: list[LayerReport]) -> None:
    """A table on standard output (with rich if installed), then what to change, once per regime."""
    header = ("layer", "weights", "flips/step", "blocked", "regime")
    cells = [(r.name, f"{r.numel:,}", f"{r.flip_rate:.1e}", f"{r.blocked_share:.1%}", r.regime) for r in rows]
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(row[i]) for row in [header, *cells]) for i in range(len(header))]
        for row in [header, *cells]:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    else:
        table = Table(box=box.SIMPLE_HEAD)
        for i, title in enumerate(header):
            table.add_column(title, no_wrap=i > 0, justify="right" if 0 < i < 4 else "left")
        for row in cells:
            table.add_row(*row)
        Console().print(table)
    for regime, advice in {r.regime: r.advice for r in rows if r.advice}.items():
        print(f"{regime}: {advice}")


# ------------------------------------------------------------------------- the signal


def signal_histograms(optimizer: BopBase, bins: int, limit: float) -> dict[str, Tensor]:
    """Histogram of ``|m| / sqrt(v)`` over ``sqrt(gamma / 2)`` for every parameter that has stepped."""
    if "exp_avg_sq" not in optimizer._moments:
        raise TypeError(f"{type(optimizer).__name__} keeps no second moment to measure its signal by")
    if bins < 1 or not limit > 0:
        raise ValueError(f"bins must be >= 1 and limit > 0, got {bins} and {limit}")
    result = {}
    for g, plan in enumerate(optimizer._plans):
        unit = math.sqrt(float(plan.group["gamma"]) / 2)
        for i, p in enumerate(plan.group["params"]):
            state = optimizer.state.get(p)
            if state:
                v = state["exp_avg_sq"].double().clamp_min(torch.finfo(torch.float64).tiny)
                signal = state["exp_avg"].double().abs() / v.sqrt() / unit
                cell = (signal / limit * bins).clamp(max=bins).long().flatten()
                result[name_of(plan, g, i)] = torch.bincount(cell, minlength=bins + 1).cpu()
    return result


# ------------------------------------------------------------------------- loggers


def _hyperparameters(optimizer: Reporting) -> dict[str, float]:
    """Everything a schedule may drive; of a real optimizer's groups the learning rate."""
    return {
        f"group{g}/{name}": float(group[name])
        for g, group in enumerate(optimizer.param_groups)
        for name in (group.ranges if isinstance(group, HyperGroup) else ("lr",))
        if name in group
    }


class JsonLinesLogger:
    """Append one JSON object per parameter and call to a file.

    >>> log = bf.optim.JsonLinesLogger("flips.jsonl")
    >>> log(optimizer, step)      # {"step": 100, "name": "conv1.weight", "flips": 12, ...}
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __call__(self, optimizer: Reporting, step: int) -> None:
        """Write the last step's counts, stamped ``step``."""
        hyper = _hyperparameters(optimizer)
        with self.path.open("a", encoding="utf-8") as file:
            for counts in optimizer.telemetry():
                values: dict[str, Any] = {"step": step, **asdict(counts), "blocked": counts.blocked}
                prefix = f"group{counts.group}/"
                values |= {k.removeprefix(prefix): v for k, v in hyper.items() if k.startswith(prefix)}
                file.write(json.dumps(values) + "\n")


class TensorBoardLogger:
    """Write flip, candidate and blocked rates and the hyperparameters to a TensorBoard writer.

    >>> log = bf.optim.TensorBoardLogger(torch.utils.tensorboard.SummaryWriter("runs/a"))
    >>> log(optimizer, step)
    """

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def __call__(self, optimizer: Reporting, step: int) -> None:
        """Write the last step's rates, stamped ``step``."""
        for counts in optimizer.telemetry():
            for what in ("flips", "candidates", "blocked"):
                value = getattr(counts, what) / max(1, counts.numel)
                self.writer.add_scalar(f"{what}/{counts.name}", value, step)
        for name, value in _hyperparameters(optimizer).items():
            self.writer.add_scalar(f"hyper/{name}", value, step)
