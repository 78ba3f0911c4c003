"""What the lines of a study say: per arm, over its seeds. Tables are made from it."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .records import Line


@dataclass(frozen=True)
class Run:
    """One trial: its lines in the order of its epochs."""

    lines: list[Line]

    @property
    def last(self) -> Line:
        return self.lines[-1]

    @property
    def complete(self) -> bool:
        return bool(self.last["epoch"] == self.last["epochs"])

    @property
    def timed(self) -> bool:
        return all(line["seconds"] is not None for line in self.lines)

    def seconds(self) -> list[float]:
        """Training time at the end of each epoch, summed; of a run that is `timed`."""
        return list(itertools.accumulate(line["seconds"] for line in self.lines))

    def accuracy_at(self, seconds: float) -> float | None:
        """At that time, on straight lines between the epochs' ends; None before the first of them."""
        times, values = self.seconds(), [line["accuracy"] for line in self.lines]
        if seconds < times[0]:
            return None
        for (t0, a0), (t1, a1) in itertools.pairwise(zip(times, values, strict=True)):
            if seconds <= t1:
                return float(a0 + (a1 - a0) * (seconds - t0) / (t1 - t0))
        return float(values[-1])


@dataclass(frozen=True)
class Group:
    """The runs of one arm, one for each seed. Figures are over the complete ones."""

    arm: str
    runs: list[Run]

    @property
    def complete(self) -> list[Run]:
        return [run for run in self.runs if run.complete]

    @property
    def axes(self) -> dict[str, object]:
        return dict(self.runs[0].last["axes"])

    def over(self, value: Callable[[Run], float | None]) -> tuple[float, float] | None:
        """Mean and standard deviation (n - 1; 0 for a single run) of ``value`` over the complete runs."""
        values = [value(run) for run in self.complete]
        numbers = [number for number in values if number is not None]
        return spread(numbers) if numbers and len(numbers) == len(values) else None

    def over_time(self, value: Callable[[Run], float | None]) -> tuple[float, float] | None:
        """As `over`, of the runs whose time is known."""
        return Group(self.arm, [run for run in self.runs if run.timed]).over(value)

    def accuracy(self) -> tuple[float, float] | None:
        return self.over(lambda run: run.last["accuracy"])


def spread(numbers: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (n - 1; 0 for a single number)."""
    return statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else 0.0


def runs_of(lines: Sequence[Line]) -> list[Run]:
    """The trials that finished an epoch, in their order."""
    by_trial: dict[int, list[Line]] = {}
    for line in lines:
        by_trial.setdefault(line["trial"], []).append(line)
    return [Run(sorted(own, key=lambda line: line["epoch"])) for _, own in sorted(by_trial.items())]


def groups_of(lines: Sequence[Line]) -> list[Group]:
    """The arms in the order of their first trials."""
    groups: dict[str, Group] = {}
    for run in runs_of(lines):
        groups.setdefault(run.last["arm"], Group(run.last["arm"], [])).runs.append(run)
    return list(groups.values())


def fair_seconds(groups: Sequence[Group]) -> float | None:
    """The training time of the fastest arm (mean over seeds): what all can do by then is comparable."""
    means = [mean for group in groups if (mean := group.over_time(lambda run: run.seconds()[-1])) is not None]
    return min(mean for mean, _ in means) if means else None


def percent(value: tuple[float, float] | None, several: bool = True) -> str:
    """``65.8 ± 0.4`` in percent; a dash for nothing."""
    if value is None:
        return "–"
    return f"{100 * value[0]:.1f} ± {100 * value[1]:.1f}" if several else f"{100 * value[0]:.1f}"


def number(value: float) -> str:
    """Three significant digits; a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:.3g}"
