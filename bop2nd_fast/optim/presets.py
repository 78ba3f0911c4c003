"""The papers' training runs by name: optimizer, schedules, real-weight optimizer, epochs and batch size.

>>> run = bf.optim.presets.get("cifar10_biased")
>>> optimizer, schedulers = run.build(model, steps_per_epoch=1000)
>>> for step in range(run.epochs * 1000):
...     ...                                   # forward, backward
...     optimizer.step()
...     for scheduler in schedulers:
...         scheduler.step()

Source: arXiv 2104.05124 (Bop2ndOrder; its Bop baseline after arXiv 1906.02107) and the authors' code. What
they call bias-corrected is ``bias_correction="reference"``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, StepLR

from .bop import Bop, Bop2ndOrder
from .mixed import MixedOptimizer
from .schedules import linear, schedule


@dataclass(frozen=True)
class Constant:
    """The same value at every step."""

    start: float

    def at(self, step: int, steps_per_epoch: int, epochs: int) -> float:
        return self.start


@dataclass(frozen=True)
class Linear:
    """From ``start`` to ``end`` in a straight line over all steps of the run."""

    start: float
    end: float

    def at(self, step: int, steps_per_epoch: int, epochs: int) -> float:
        return self.start + (self.end - self.start) * step / (steps_per_epoch * epochs)


@dataclass(frozen=True)
class Staircase:
    """Multiplied by ``factor`` after every ``every`` epochs."""

    start: float
    factor: float = 0.1
    every: int = 100

    def at(self, step: int, steps_per_epoch: int, epochs: int) -> float:
        return float(self.start * self.factor ** (step // (steps_per_epoch * self.every)))


Course: TypeAlias = "Constant | Linear | Staircase"
Courses: TypeAlias = dict[str, Course]


@dataclass(frozen=True)
class Preset:
    """One run of the papers.

    ``courses``: hyperparameter -> its course; ``lr`` is that of Adam on the real weights. ``kernel_l2``: L2
    penalty on the real kernels (weights of two or more axes; not on biases and batch norms).
    """

    name: str
    network: str
    dataset: str
    optimizer: str
    bias_correction: str | None
    epochs: int
    batch_size: int
    courses: Courses = field(default_factory=dict)
    kernel_l2: float = 0.0

    def values(self, step: int, steps_per_epoch: int) -> dict[str, float]:
        """Every hyperparameter after ``step`` steps."""
        return {name: c.at(step, steps_per_epoch, self.epochs) for name, c in self.courses.items()}

    def build(self, model: nn.Module, steps_per_epoch: int) -> tuple[MixedOptimizer, list[LRScheduler]]:
        """The optimizer for ``model`` and the schedulers, each to be stepped after every optimizer step.

        Raises:
            ValueError: the model has no binary or no real parameters; ``steps_per_epoch`` is not positive.
        """
        if steps_per_epoch < 1:
            raise ValueError(f"steps_per_epoch must be at least 1, got {steps_per_epoch}")
        optimizer = MixedOptimizer(model, binary=self._make_binary, real=self._make_real)
        schedulers: list[LRScheduler] = []
        for name, course in self.courses.items():
            if isinstance(course, Linear):
                total = self.epochs * steps_per_epoch
                schedulers.append(linear(optimizer, name, course.start, course.end, total))
            elif isinstance(course, Staircase):
                every = course.every * steps_per_epoch
                schedulers.append(schedule(optimizer, name, StepLR, step_size=every, gamma=course.factor))
        return optimizer, schedulers

    def _make_binary(self, named: list[tuple[str, Tensor]]) -> Bop | Bop2ndOrder:
        start: dict[str, Any] = {name: course.start for name, course in self.courses.items() if name != "lr"}
        if self.optimizer == "Bop":
            return Bop(named, **start)
        return Bop2ndOrder(named, **start, bias_correction=self.bias_correction or "none")

    def _make_real(self, named: list[tuple[str, Tensor]]) -> torch.optim.Adam:
        lr = self.courses["lr"].start
        kernels = [entry for entry in named if entry[1].dim() >= 2]
        if not self.kernel_l2 or not kernels:
            return torch.optim.Adam(named, lr=lr)
        rest = [entry for entry in named if entry[1].dim() < 2]
        # Adam adds weight_decay * w to the gradient; that of the penalty l2 * w^2 is 2 * l2 * w.
        groups: list[dict[str, Any]] = [{"params": kernels, "weight_decay": 2 * self.kernel_l2}]
        return torch.optim.Adam(groups + ([{"params": rest}] if rest else []), lr=lr)


_PAIR = {"biased": "none", "unbiased": "reference"}


def _cifar10(
    name: str, correction: str | None, epochs: int, batch: int, courses: dict[str, Course]
) -> Preset:
    optimizer = "Bop" if correction is None else "Bop2ndOrder"
    return Preset(name, "BinaryNet", "CIFAR-10", optimizer, correction, epochs, batch, courses)


def _imagenet(name: str, network: str, epochs: int, kernel_l2: float) -> Preset:
    courses: Courses = {
        "gamma": Linear(1e-4, 1e-9),
        "sigma": Linear(1e-5, 1e-2),
        "threshold": Linear(1e-8, 1e-5),
        "lr": Linear(2.5e-3, 5e-6),
    }
    return Preset(name, network, "ImageNet", "Bop2ndOrder", "none", epochs, 1024, courses, kernel_l2)


def _presets() -> list[Preset]:
    fixed: Courses = {
        "gamma": Constant(1e-7),
        "sigma": Constant(1e-3),
        "threshold": Constant(1e-6),
        "lr": Constant(0.01),
    }
    result: Courses = {
        "gamma": Linear(1e-2, 1e-5),
        "sigma": Linear(1e-7, 1e-2),
        "threshold": Linear(1e-5, 1e-8),
        "lr": Linear(0.01, 0.001),
    }
    baseline: Courses = {
        "gamma": Staircase(1e-4),
        "threshold": Constant(1e-8),
        "lr": Constant(0.01),
    }
    steps: Courses = {name: Staircase(fixed[name].start) for name in ("gamma", "sigma", "threshold")}
    runs = [
        _cifar10("ablation", "reference", 100, 100, fixed),
        _cifar10("bop_baseline", None, 500, 50, baseline),
    ]
    for version, correction in _PAIR.items():
        runs += [
            _cifar10(f"cifar10_{version}", correction, 500, 50, result),
            _cifar10(f"norm_comparison_{version}", correction, 150, 100, fixed),
            _cifar10(f"schedulers_all_{version}", correction, 350, 50, fixed | steps),
        ]
        for name, course in steps.items():
            runs.append(_cifar10(f"schedulers_{name}_{version}", correction, 350, 50, fixed | {name: course}))
    runs += [
        _imagenet("imagenet_xnornet", "XNOR-Net", 100, 5e-7),
        _imagenet("imagenet_birealnet", "Bi-Real-Net", 150, 0.0),
    ]
    return sorted(runs, key=lambda run: run.name)


_RUNS = {run.name: run for run in _presets()}
NAMES = tuple(_RUNS)


def get(name: str) -> Preset:
    """The preset called ``name``; ``presets.NAMES`` lists them.

    Raises:
        ValueError: there is no preset of that name.
    """
    if name not in _RUNS:
        raise ValueError(f"there is no preset {name!r}; there are {', '.join(NAMES)}")
    return _RUNS[name]
