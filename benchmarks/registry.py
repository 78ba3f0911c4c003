"""What is measured: a case is an operator on shapes, with contenders, a correctness gate and a unit.

Suites (``benchmarks/suites/*.py``) list cases; the runner, the pytest-benchmark cases and the tests all take
them from here. Nothing is allocated or compiled before ``Case.contenders()`` and ``Contender.make()``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

SUITES = (
    "step", "conv", "linear", "signed_linear", "signed_conv", "pack", "backward", "train_step", "inference"
)  # fmt: skip

OURS, VARIANT, BASELINE, BOUND = "ours", "variant", "baseline", "bound"
ROLES = (OURS, VARIANT, BASELINE, BOUND)

# unit -> (which count of the contender it divides by time, scale, label)
UNITS = {"GB/s": ("bytes", 1e9), "GMAC/s": ("operations", 1e9), "1/s": ("items", 1.0)}


class Unavailable(RuntimeError):
    """A contender cannot be had here; the message says what is missing."""


class GateError(AssertionError):
    """A contender computes something else than the specification: it gets no number."""


@dataclass
class Prepared:
    """A contender ready to run.

    Args:
        run: one run of the work (or ``sample``).
        check: the gate: returns what was compared, raises :class:`GateError`. Runs before any timing.
        sample: for contenders that time themselves (another process): runs n times, returns seconds.
        memory: measures memory after the timing, in bytes by name.
        close: releases what Python does not.
    """

    check: Callable[[], str]
    run: Callable[[], object] | None = None
    sample: Callable[[int], float] | None = None
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
        threads: overrides the case's.
        slow: left out of ``--quick`` (compilers, other processes).
    """

    name: str
    role: str
    make: Callable[[], Prepared]
    bytes: int | None = None
    operations: int | None = None
    items: int | None = None
    threads: int | None = None
    note: str = ""
    slow: bool = False

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role must be one of {ROLES}, got {self.role!r}")


@dataclass(frozen=True)
class Case:
    """One measurement. ``threads`` is 1 or None (all of torch's); ``networks`` are the shape sets it is in.

    ``inference``: timed under ``torch.inference_mode()``, as somebody who only runs forward would; the rest
    is timed under ``no_grad``, like an optimizer's step. Everything is built and checked outside of it.
    """

    suite: str
    op: str
    name: str
    shapes: dict[str, Any]
    unit: str
    contenders: Callable[[], Sequence[Contender]]
    threads: int | None = 1
    networks: tuple[str, ...] = ()
    tags: tuple[str, ...] = field(default=())
    inference: bool = False

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"unit must be one of {tuple(UNITS)}, got {self.unit!r}")


def cases(suites: Sequence[str] = SUITES, op: str | None = None, quick: bool = False) -> list[Case]:
    """All cases of the suites, in order; ``op`` keeps one operator's.

    Raises:
        ValueError: an unknown suite, an operator without a case, or two cases of one name.
    """
    unknown = [s for s in suites if s not in SUITES]
    if unknown:
        raise ValueError(f"unknown suite {unknown[0]!r}; there are {', '.join(SUITES)}")
    found = [c for s in suites for c in importlib.import_module(f"benchmarks.suites.{s}").cases(quick)]
    names = [(c.suite, c.name) for c in found]
    if len(set(names)) != len(names):
        raise ValueError(f"two cases of one name: {sorted({n for n in names if names.count(n) > 1})}")
    if op is not None:
        ops = sorted({c.op for c in found})
        if op not in ops:
            raise ValueError(f"no case of operator {op!r} in these suites; there are {', '.join(ops)}")
        found = [c for c in found if c.op == op]
    return found
