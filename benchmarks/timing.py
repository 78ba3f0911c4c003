"""Timers: contenders of one case take turns, so that drift of the machine meets all of them alike.

A *sampler* runs a contender ``n`` times and returns the seconds it took. :func:`measure` calls every sampler
once per round, in an order that rotates from round to round, and reports medians with their 10 % and 90 %
quantiles. Ratios are formed inside a round, between neighbours in time, before their median is taken.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

Sampler = Callable[[int], float]
Clock = Callable[[], float]

SETTLE_BELOW_S = 0.05  # shorter calls are repeated once, untimed, before a sample: warm caches and threads


@dataclass(frozen=True)
class Plan:
    """How long to measure: rounds, shortest sample, and what one contender may cost in a case."""

    rounds: int = 15
    min_sample_s: float = 0.004
    max_contender_s: float = 3.0
    min_samples: int = 4


FULL = Plan()
QUICK = Plan(rounds=5, min_sample_s=0.001, max_contender_s=0.5, min_samples=3)


@dataclass(frozen=True)
class Quantiles:
    """Median with the 10 % and 90 % quantiles (linear interpolation) of ``n`` samples."""

    median: float
    p10: float
    p90: float
    n: int

    @staticmethod
    def of(samples: Sequence[float]) -> Quantiles:
        """Raises ``ValueError`` without samples."""
        if not samples:
            raise ValueError("no samples")
        median, p10, p90 = (quantile(samples, q) for q in (0.5, 0.1, 0.9))
        return Quantiles(median, p10, p90, len(samples))

    def to_dict(self) -> dict[str, float]:
        return {"median": self.median, "p10": self.p10, "p90": self.p90, "samples": self.n}


def quantile(samples: Sequence[float], q: float) -> float:
    """The ``q`` quantile by linear interpolation between order statistics."""
    ordered = sorted(samples)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def cpu_sampler(
    run: Callable[[], object], threads: int | None = None, clock: Clock = time.perf_counter
) -> Sampler:
    """A sampler by the wall clock; sets torch's threads first, which is not timed."""

    def sample(n: int) -> float:
        if threads is not None and torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        start = clock()
        for _ in range(n):
            run()
        return clock() - start

    return sample


def cuda_sampler(runs: Sequence[Callable[[], object]]) -> Sampler:
    """A sampler by CUDA events on the current stream.

    ``runs`` do the same work on buffers of their own and are cycled through: give enough of them that the
    second-level cache cannot hold what the last cycle touched.
    """
    if not runs:
        raise ValueError("cuda_sampler needs at least one callable")
    position = 0

    def sample(n: int) -> float:
        nonlocal position
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for i in range(n):
            runs[(position + i) % len(runs)]()
        end.record()
        end.synchronize()
        position += n
        return start.elapsed_time(end) * 1e-3

    return sample


@dataclass
class Series:
    """Seconds per run of one contender, by round; rounds it sat out are missing."""

    repeats: int
    by_round: dict[int, float] = field(default_factory=dict)

    def seconds(self) -> Quantiles:
        return Quantiles.of(list(self.by_round.values()))

    def ratio_to(self, other: Series) -> Quantiles:
        """Quantiles of this / other over the rounds in which both ran."""
        return Quantiles.of([t / other.by_round[r] for r, t in self.by_round.items() if r in other.by_round])


def measure(samplers: Mapping[str, Sampler], plan: Plan = FULL) -> dict[str, Series]:
    """Time all samplers in turns.

    A contender too slow for every round takes part in evenly spread ones, at least ``plan.min_samples``.
    """
    series: dict[str, Series] = {}
    shares: dict[str, int] = {}
    settle: dict[str, bool] = {}
    for name, sample in samplers.items():
        once = sample(1)
        if once < SETTLE_BELOW_S:  # a first call may be slow for reasons of its own
            once = min(once, sample(1), sample(1))
        once = max(once, 1e-9)
        repeats = max(1, math.ceil(plan.min_sample_s / once))
        settle[name] = once < SETTLE_BELOW_S
        series[name] = Series(repeats)
        affordable = int(plan.max_contender_s / (once * (repeats + settle[name])))
        shares[name] = min(plan.rounds, max(plan.min_samples, affordable))
    names = list(samplers)
    for r in range(plan.rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            if not takes_part(r, shares[name], plan.rounds):
                continue
            if settle[name]:
                samplers[name](1)
            series[name].by_round[r] = samplers[name](series[name].repeats) / series[name].repeats
    return series


def takes_part(round_: int, share: int, rounds: int) -> bool:
    """Whether a contender with ``share`` of ``rounds`` turns has one in this round (they are spread evenly,
    and the last round always is one, so that any two contenders meet)."""
    return (round_ + 1) * share // rounds > round_ * share // rounds
