"""The space that ``bop2nd study search`` samples: every hyperparameter of Bop2ndOrder and where it ends.

Thresholds are in units of ``sqrt(gamma / 2)``, the standard deviation of ``m / sqrt(v)`` under gradients that
are noise: a threshold of 1 there lets about a third of such weights flip, one of 3 hardly any.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..optim.courses import Constant, Course, Linear
from ..recipes import Recipe

BASE = "cifar10_short"


@dataclass(frozen=True)
class Range:
    """From ``low`` to ``high``, sampled on a logarithmic scale."""

    low: float
    high: float


SPACE = {
    "gamma": Range(3e-4, 3e-2),
    "gamma_end": Range(1e-3, 1.0),  # as a share of gamma
    "sigma": Range(1e-4, 1e-1),
    "threshold": Range(0.1, 3.0),  # in units of sqrt(gamma / 2)
    "threshold_end": Range(0.2, 50.0),  # in units of sqrt(gamma / 2) at the end of the run
    "lr": Range(1e-3, 5e-2),
    "lr_end": Range(1e-3, 1.0),  # as a share of lr
}
# Where the search starts: about where cifar10_short is.
FIRST: dict[str, float] = {
    "gamma": 3e-3,
    "gamma_end": 3.3e-3,
    "sigma": 1e-3,
    "threshold": 0.52,
    "threshold_end": 9.0,
    "lr": 0.01,
    "lr_end": 0.01,
}


def courses(point: Mapping[str, float]) -> dict[str, Course]:
    """The schedules at a point of ``SPACE``: linear over the run, sigma constant."""
    gamma, lr = point["gamma"], point["lr"]
    gamma_end = gamma * point["gamma_end"]
    return {
        "gamma": Linear(gamma, gamma_end),
        "sigma": Constant(point["sigma"]),
        "threshold": Linear(
            point["threshold"] * math.sqrt(gamma / 2), point["threshold_end"] * math.sqrt(gamma_end / 2)
        ),
        "lr": Linear(lr, lr * point["lr_end"]),
    }


def recipe_at(base: Recipe, point: Mapping[str, float]) -> Recipe:
    """``base`` with the hyperparameters of a point of ``SPACE``."""
    return base.replace(schedules=courses(point))
