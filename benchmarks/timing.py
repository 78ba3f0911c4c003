"""Timers: contenders of one case take turns, so that drift of the machine meets all of them alike.

A *sampler* runs a contender ``n`` times and returns the seconds it took. :func:`measure` calls every sampler
once per round, in an order that rotates from round to round, and reports medians with their 10 % and 90 %
quantiles. Ratios are formed inside a round, between neighbours in time, before their median is taken.
:func:`measure_singles` times one call at a time with other work between the calls, as a network has it.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch

from .registry import Unavailable

T = TypeVar("T")
Sampler = Callable[[int], float]

SETTLE_BELOW_S = 0.05  # shorter calls are repeated once, untimed, before a sample: warm caches and threads


@dataclass(frozen=True)
class Plan:
    """How long to measure: rounds, shortest sample, what one contender may cost in a case; rounds of single
    calls (0: none) and the bytes that the other work between them reads and writes."""

    rounds: int = 15
    min_sample_s: float = 0.004
    max_contender_s: float = 3.0
    min_samples: int = 4
    singles: int = 0
    other_bytes: int = 64 << 20


FULL = Plan(singles=15)
QUICK = Plan(rounds=5, min_sample_s=0.001, max_contender_s=0.5, min_samples=3, singles=3, other_bytes=1 << 20)
GPU = Plan(rounds=15, max_contender_s=1.0, singles=15, other_bytes=512 << 20)


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
    return float(np.quantile(samples, q))


def cpu_sampler(
    run: Callable[[], object], threads: int | None = None, clock: Callable[[], float] = time.perf_counter
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
    turns = itertools.cycle(runs)

    def sample(n: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for run in itertools.islice(turns, n):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    return sample


def captured(run: Callable[[], T], warm_up: int = 3) -> Callable[[], T]:
    """``run`` as a CUDA graph: replays the launches of one call and returns what that call returned.

    Raises:
        Unavailable: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise Unavailable("an interpreter has no CUDA graphs")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay() -> T:
        graph.replay()
        return kept

    return replay


def host_seconds(run: Callable[[], object], n: int = 50) -> float:
    """Median seconds that a call keeps the CPU until it returns, with nothing enqueued before it."""
    samples = []
    for _ in range(n):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        samples.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return quantile(samples, 0.5)


@dataclass
class Series:
    """Seconds per run of one contender, by round; rounds it sat out are missing."""

    repeats: int
    by_round: dict[int, float] = field(default_factory=dict)

    def seconds(self) -> Quantiles:
        return Quantiles.of(list(self.by_round.values()))

    def fastest(self) -> float:
        return min(self.by_round.values())

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
    for r in range(plan.rounds):
        for name in rotated(samplers, r):
            if not takes_part(r, shares[name], plan.rounds):
                continue
            if settle[name]:
                samplers[name](1)
            series[name].by_round[r] = samplers[name](series[name].repeats) / series[name].repeats
    return series


def measure_singles(
    samplers: Mapping[str, Sampler], other: Callable[[], object], warm: Mapping[str, Series], plan: Plan
) -> dict[str, Series]:
    """Time single calls in turns, ``other`` work before each; slow ones as often as half of what a contender
    may cost allows, by their times in ``warm`` loops."""
    series = {name: Series(1) for name in samplers}
    for r in range(plan.singles):
        for name in rotated(samplers, r):
            affordable = int(plan.max_contender_s / 2 / warm[name].seconds().median)
            if takes_part(r, min(plan.singles, max(plan.min_samples, affordable)), plan.singles):
                other()
                series[name].by_round[r] = samplers[name](1)
    return series


def other_work(device: str, n_bytes: int) -> Callable[[], object]:
    """What runs between single calls: reads and writes ``n_bytes``, more than caches hold, and multiplies, so
    that neither operands nor code nor threads are as the last call left them."""
    buffer, square = torch.zeros(n_bytes // 8, device=device), torch.ones(128, 128, device=device)
    return lambda: (buffer.add_(1), square @ square)


def rotated(samplers: Mapping[str, Sampler], round_: int) -> list[str]:
    """The names in the order of a round: another one goes first in each."""
    names = list(samplers)
    first = round_ % len(names) if names else 0
    return names[first:] + names[:first]


def takes_part(round_: int, share: int, rounds: int) -> bool:
    """Whether a contender with ``share`` of ``rounds`` turns has one in this round (they are spread evenly,
    and the last round always is one, so that any two contenders meet)."""
    return (round_ + 1) * share // rounds > round_ * share // rounds
