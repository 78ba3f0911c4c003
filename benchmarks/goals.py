"""Goals: a figure computed from the results, an aim, and whether it is met. Suites declare theirs with these.

A formula takes one record (:func:`over`, :func:`share`, :func:`memory_over`) and gives None where something
that it needs has no number; :func:`mean` makes a figure of a whole run from it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from .tables import significant

Record: TypeAlias = Mapping[str, Any]
Formula: TypeAlias = Callable[[Record], "float | None"]
Figure: TypeAlias = Callable[[Sequence[Record]], "float | None"]


@dataclass(frozen=True)
class Goal:
    """``value`` computes the figure from all records, None if something it needs has no number.

    ``aim``: at least that much; at most with ``at_most``; None: only to know.
    """

    name: str
    aim: float | None
    value: Figure
    unit: str = "x"
    at_most: bool = False

    def text(self, value: float | None) -> str:
        """A figure with its unit; a dash without one."""
        separator = "" if self.unit in ("x", "") else " "
        return "-" if value is None else f"{significant(value)}{separator}{self.unit}"

    def aimed(self) -> str:
        """The aim in words."""
        return "to know" if self.aim is None else f"{'≤' if self.at_most else '≥'} {self.text(self.aim)}"

    def verdict(self, records: Sequence[Record]) -> str:
        """``met``, ``missed``, ``known`` where nothing is aimed at, ``open`` without a figure."""
        value = self.value(records)
        if value is None or self.aim is None:
            return "open" if value is None else "known"
        return "met" if (value <= self.aim if self.at_most else value >= self.aim) else "missed"

    def line(self, records: Sequence[Record]) -> str:
        """The goal in one line for a terminal."""
        figure = self.text(self.value(records))
        return f"{self.verdict(records):7} {self.name} {figure} (aim {self.aimed()})"


def contender(record: Record, name: str) -> dict[str, Any] | None:
    """A measured contender of a record by name; None if it is not there or has no number."""
    return next((e for e in record["contenders"] if e["name"] == name and "seconds" in e), None)


def best(record: Record, names: Sequence[str]) -> float | None:
    """Time of the fastest of ``names`` over ours, by paired rounds; None if none of them has a number."""
    found = [e["ratio"]["median"] for n in names if (e := contender(record, n)) and "ratio" in e]
    return min(found) if found else None


def geometric_mean(values: Sequence[float | None]) -> float | None:
    """None without values or if one is missing."""
    known = [v for v in values if v is not None]
    return statistics.geometric_mean(known) if known and len(known) == len(values) else None


def mean(suite: str, formula: Formula, *, tag: str = "", start: str = "", scale: float = 1.0) -> Figure:
    """``scale`` times the geometric mean of a formula over a suite's cases, of those that have the tag and
    whose name begins so."""

    def value(records: Sequence[Record]) -> float | None:
        chosen = [r for r in records if r["suite"] == suite and r["case"].startswith(start)]
        found = geometric_mean([formula(r) for r in chosen if not tag or tag in r["tags"]])
        return None if found is None else scale * found

    return value


def goal(suite: str, name: str, aim: float | None, formula: Formula, unit: str = "x", **more: Any) -> Goal:
    """A goal on the :func:`mean` of a formula (``tag``, ``start``, ``scale`` and ``at_most`` in ``more``)."""
    at_most, scale = more.pop("at_most", False), more.pop("scale", 100.0 if unit == "%" else 1.0)
    return Goal(name, aim, mean(suite, formula, scale=scale, **more), unit, at_most)


def over(*theirs: str, ours: str | None = None) -> Formula:
    """How often ours (or the contender ``ours``) fits into the fastest of theirs."""

    def value(record: Record) -> float | None:
        time, own = best(record, theirs), 1.0 if ours is None else best(record, (ours,))
        return None if time is None or own is None else time / own

    return value


def faster(variant: str) -> Formula:
    """How much faster than ours a variant of it is."""
    return lambda record: None if (time := best(record, (variant,))) is None else 1 / time


def rate(name: str) -> Formula:
    """The rate of a contender, in the case's unit."""
    return lambda record: entry["rate"] if (entry := contender(record, name)) else None


def share(name: str, bound: str) -> Formula:
    """The rate of a contender over that of what bounds it."""

    def value(record: Record) -> float | None:
        own, limit = rate(name)(record), rate(bound)(record)
        return None if own is None or limit is None else own / limit

    return value


def of_bound(name: str, bound: str) -> Formula:
    """The share of its bound that a contender reaches; of older results by medians."""

    def value(record: Record) -> float | None:
        reached = (contender(record, name) or {}).get("bound")
        return reached["share"] if reached else share(name, bound)(record)

    return value


def memory_over(theirs: str, ours: str, key: str) -> Formula:
    """Bytes of theirs over bytes of ours, of what was measured under ``key``."""

    def value(record: Record) -> float | None:
        their, own = (((contender(record, n) or {}).get("memory") or {}).get(key) for n in (theirs, ours))
        return None if their is None or own is None else float(their / own)

    return value
