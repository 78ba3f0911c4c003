"""Courses: how a hyperparameter runs over a training, as data. They are relative to the run's length where
the papers' are, have a text form (``linear:0.01:1e-05``), and drive torch's schedulers."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, TypeAlias, get_args

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, StepLR

from .schedules import linear, schedule


@dataclass(frozen=True)
class Constant:
    """The same value at every step."""

    start: float

    def at(self, step: int, steps_per_epoch: int, epochs: int) -> float:
        return self.start

    def scheduler(self, optimizer: Optimizer, name: str, steps_per_epoch: int, epochs: int) -> None:
        return None


@dataclass(frozen=True)
class Linear:
    """From ``start`` to ``end`` in a straight line over all steps of the run."""

    start: float
    end: float

    def at(self, step: int, steps_per_epoch: int, epochs: int) -> float:
        return self.start + (self.end - self.start) * step / (steps_per_epoch * epochs)

    def scheduler(self, optimizer: Optimizer, name: str, steps_per_epoch: int, epochs: int) -> LRScheduler:
        return linear(optimizer, name, self.start, self.end, epochs * steps_per_epoch)


@dataclass(frozen=True)
class Cosine:
    """From ``start`` to ``end`` along half a cosine over all steps of the run."""

    start: float
    end: float = 0.0

    def at(self, step: int, steps_per_epoch: int, epochs: int) -> float:
        share = step / (steps_per_epoch * epochs)
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * share)) / 2

    def scheduler(self, optimizer: Optimizer, name: str, steps_per_epoch: int, epochs: int) -> LRScheduler:
        total = epochs * steps_per_epoch
        return schedule(optimizer, name, CosineAnnealingLR, T_max=total, eta_min=self.end)


@dataclass(frozen=True)
class Staircase:
    """Multiplied by ``factor`` after every ``every`` epochs (a fraction of one is rounded to steps)."""

    start: float
    factor: float = 0.1
    every: float = 100

    def at(self, step: int, steps_per_epoch: int, epochs: int) -> float:
        return float(self.start * self.factor ** (step // self._steps(steps_per_epoch)))

    def scheduler(self, optimizer: Optimizer, name: str, steps_per_epoch: int, epochs: int) -> LRScheduler:
        size = self._steps(steps_per_epoch)
        return schedule(optimizer, name, StepLR, step_size=size, gamma=self.factor)

    def _steps(self, steps_per_epoch: int) -> int:
        return max(1, round(steps_per_epoch * self.every))


Course: TypeAlias = Constant | Linear | Cosine | Staircase
Courses: TypeAlias = dict[str, Course]

KINDS: dict[str, type[Any]] = {kind.__name__.lower(): kind for kind in get_args(Course)}
FORMS = "constant:VALUE, linear:START:END, cosine:START[:END], staircase:START[:FACTOR[:EVERY_EPOCHS]]"


def parse(text: str) -> Course:
    """The course that ``text`` describes; a number alone is constant. :func:`text_of` is the way back.

    Raises:
        ValueError: no such course; the message lists the forms.
    """
    kind, *rest = text.split(":") if ":" in text else ("constant", text)
    try:
        course: Course = KINDS[kind](*map(float, rest))
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"there is no schedule {text!r}; there are {FORMS}") from None
    return course


def text_of(course: Course) -> str:
    """``linear:0.01:1e-05``: floats as Python writes them, so that nothing is lost."""
    kind = next(name for name, made in KINDS.items() if type(course) is made)
    return ":".join([kind, *(repr(float(value)) for value in dataclasses.astuple(course))])


def stretched(course: Course, factor: float) -> Course:
    """The course of a run that takes ``factor`` times as many epochs."""
    if isinstance(course, Staircase):
        return dataclasses.replace(course, every=course.every * factor)
    return course
