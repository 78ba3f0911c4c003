"""What is measured: a case is an operator on shapes, with contenders, a correctness gate and a unit.

A suite is a file of ``suites/`` named in ``SUITES`` (CPU) or ``GPU_SUITES``; its ``SUITE`` declares cases,
families, goals and pictures. Runner, report, comparison of commits and tests take them from here. Nothing is
allocated or compiled before ``Case.contenders()`` and ``Contender.make()``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .goals import Goal

SUITES = (
    "step", "conv", "linear", "signed_linear", "signed_conv", "pack", "backward", "train_step", "inference",
    "runtime",
)  # fmt: skip
GPU_SUITES = ("gpu",)

OURS, VARIANT, BASELINE, BOUND = "ours", "variant", "baseline", "bound"
ROLES = (OURS, VARIANT, BASELINE, BOUND)
ALL_THREADS = 0

# unit -> (which count of the contender it divides by time, scale)
UNITS = {"GB/s": ("bytes", 1e9), "GMAC/s": ("operations", 1e9), "1/s": ("items", 1.0)}


class Unavailable(RuntimeError):
    """A contender cannot be had here; the message says what is missing."""


class GateError(AssertionError):
    """A contender computes something else than the specification: it gets no number."""


@dataclass
class Prepared:
    """A contender ready to run.

    Args:
        check: the gate: returns what was compared, raises :class:`GateError`. Runs before any timing.
        run: one run of the work (or ``sample``).
        sample: for contenders that time themselves (another process): runs n times, returns seconds.
        rotate: more runs of the same work, on buffers of their own: warm loops go through all of them, so
            that no cache holds what a run reads.
        memory: measures memory after the timing, in bytes by name.
        close: releases what Python does not.
    """

    check: Callable[[], str]
    run: Callable[[], object] | None = None
    sample: Callable[[int], float] | None = None
    rotate: Sequence[Callable[[], object]] = ()
    memory: Callable[[], dict[str, int]] | None = None
    close: Callable[[], None] | None = None


@dataclass(frozen=True)
class Contender:
    """One way to do the work of a case.

    Args:
        name: as printed.
        role: ``ours`` (exactly one per case, what ratios refer to), ``variant`` (ours, set otherwise),
            ``baseline``, or ``bound`` (a loop that shows a limit of the machine).
        make: builds it; raises :class:`Unavailable`.
        bytes, operations, items: what one run moves, multiply-accumulates, and produces.
        bounded_by: the contender of role ``bound`` whose rate this one cannot exceed.
        needed: what counts against the bound, where that is less (multiply-accumulates without padded taps).
        threads: overrides the case's; ``ALL_THREADS``: as many as torch has.
        slow: left out of ``--quick`` (compilers, other processes).
    """

    name: str
    role: str
    make: Callable[[], Prepared]
    bytes: int | None = None
    operations: int | None = None
    items: int | None = None
    bounded_by: str | None = None
    needed: int | None = None
    threads: int | None = None
    slow: bool = False

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role must be one of {ROLES}, got {self.role!r}")


@dataclass(frozen=True)
class Case:
    """One measurement. ``threads`` is 1 or None (all of torch's); ``networks`` are the shape sets it is in.

    ``contenders`` may be a generator: one that raises between two of them loses the rest of the case only.
    ``inference``: timed under ``torch.inference_mode()``, as somebody who only runs forward would; the rest
    is timed under ``no_grad``, like an optimizer's step. Everything is built and checked outside of it.
    ``device`` "cuda": timed by CUDA events, over rotating buffers.
    """

    suite: str
    op: str
    name: str
    shapes: dict[str, Any]
    unit: str
    contenders: Callable[[], Iterable[Contender]]
    threads: int | None = 1
    networks: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    inference: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"unit must be one of {tuple(UNITS)}, got {self.unit!r}")


@dataclass(frozen=True)
class Picture:
    """A PNG of a suite's results: ``kind`` "speedups" draws bars for the cases that ``chosen`` takes,
    "training" time and memory of the first case."""

    name: str
    title: str
    chosen: Callable[[Mapping[str, Any]], bool] = lambda record: True
    kind: str = "speedups"


@dataclass(frozen=True)
class Suite:
    """What a file of ``suites/`` declares.

    Args:
        cases: all cases, or with ``quick`` tiny ones that show that everything runs.
        families: contenders that compete in one class, by its name; tables and pictures take the fastest of
            each, in this order.
        goals: formulas on the results, with aims.
        pictures: drawn from the results.
        summary: which cases stand in the documents' summary.
    """

    cases: Callable[[bool], list[Case]]
    families: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    goals: tuple[Goal, ...] = ()
    pictures: tuple[Picture, ...] = ()
    summary: Callable[[Mapping[str, Any]], bool] = lambda record: False


def suite(name: str) -> Suite:
    """What the file of a suite declares.

    Raises:
        ValueError: an unknown suite.
    """
    if name not in SUITES + GPU_SUITES:
        raise ValueError(f"unknown suite {name!r}; there are {', '.join(SUITES + GPU_SUITES)}")
    return importlib.import_module(f"benchmarks.suites.{name}").SUITE


def cases(suites: Sequence[str] = SUITES, op: str | None = None, quick: bool = False) -> list[Case]:
    """All cases of the suites, in order; ``op`` keeps one operator's.

    Raises:
        ValueError: an unknown suite, an operator without a case, or two cases of one name.
    """
    found = [case for name in suites for case in suite(name).cases(quick)]
    names = [(c.suite, c.name) for c in found]
    if len(set(names)) != len(names):
        raise ValueError(f"two cases of one name: {sorted({n for n in names if names.count(n) > 1})}")
    ops = sorted({c.op for c in found})
    if op is not None and op not in ops:
        raise ValueError(f"no case of operator {op!r} in these suites; there are {', '.join(ops)}")
    return [c for c in found if op in (None, c.op)]


def all_goals(suites: Sequence[str] = SUITES) -> list[Goal]:
    """The goals of all suites, in order."""
    return [goal for name in suites for goal in suite(name).goals]
