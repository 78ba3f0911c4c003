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
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .bop import Bop, Bop2ndOrder
from .courses import Constant, Courses, Linear, Staircase
from .latent import LatentAdam, latent_groups
from .mixed import MixedOptimizer


@dataclass(frozen=True)
class Preset:
    """One run: ``network`` and ``dataset`` are names that ``models.get`` and ``data.get`` know.

    ``optimizer``: ``Bop`` or ``Bop2ndOrder`` for the binary weights, with Adam for the others, or ``Adam``
    for all weights of a network without binary ones. ``bias_correction`` is Bop2ndOrder's, else None.
    ``courses``: hyperparameter -> its course; ``lr`` is Adam's. ``kernel_l2``: L2 penalty on the real kernels
    (weights of two or more axes; not on biases and batch norms).
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

    def build(
        self, model: nn.Module, steps_per_epoch: int, capturable: bool = False
    ) -> tuple[Optimizer, list[LRScheduler]]:
        """The optimizer for ``model`` and the schedulers, each to be stepped after every optimizer step.

        It is a :class:`MixedOptimizer`, or Adam alone where ``optimizer`` says so. ``capturable``: steps may
        be captured in a CUDA graph.

        Raises:
            ValueError: the model has no binary or no real parameters; ``steps_per_epoch`` is not positive.
        """
        if steps_per_epoch < 1:
            raise ValueError(f"steps_per_epoch must be at least 1, got {steps_per_epoch}")
        optimizer: Optimizer
        if self.optimizer == "Adam":
            optimizer = self._make_latent(model, capturable)
        else:
            makers = (partial(make, capturable) for make in (self._make_binary, self._make_real))
            optimizer = MixedOptimizer(model, *makers)
        made = [
            course.scheduler(optimizer, name, steps_per_epoch, self.epochs)
            for name, course in self.courses.items()
        ]
        return optimizer, [scheduler for scheduler in made if scheduler is not None]

    def _make_binary(self, capturable: bool, named: list[tuple[str, Tensor]]) -> Bop | Bop2ndOrder:
        start: dict[str, Any] = {name: course.start for name, course in self.courses.items() if name != "lr"}
        if self.optimizer == "Bop":
            return Bop(named, **start, capturable=capturable)
        correction = self.bias_correction or "none"
        return Bop2ndOrder(named, **start, bias_correction=correction, capturable=capturable)

    def _make_real(self, capturable: bool, named: list[tuple[str, Tensor]]) -> torch.optim.Adam:
        lr = self.courses["lr"].start
        return torch.optim.Adam(self._real_groups(named), lr=lr, fused=True, capturable=capturable)

    def _make_latent(self, model: nn.Module, capturable: bool) -> LatentAdam:
        groups = []
        for group in latent_groups(model):
            groups += [group] if "clip" in group else self._real_groups(group["params"])
        return LatentAdam(groups, lr=self.courses["lr"].start, fused=True, capturable=capturable)

    def _real_groups(self, named: list[tuple[str, Tensor]]) -> list[dict[str, Any]]:
        kernels = [entry for entry in named if entry[1].dim() >= 2]
        if not self.kernel_l2 or not kernels:
            return [{"params": named}]
        rest = [entry for entry in named if entry[1].dim() < 2]
        # Adam adds weight_decay * w to the gradient; that of the penalty l2 * w^2 is 2 * l2 * w.
        groups: list[dict[str, Any]] = [{"params": kernels, "weight_decay": 2 * self.kernel_l2}]
        return groups + ([{"params": rest}] if rest else [])


_PAIR = {"biased": "none", "unbiased": "reference"}


def _cifar10(name: str, correction: str | None, epochs: int, batch: int, courses: Courses) -> Preset:
    optimizer = "Bop" if correction is None else "Bop2ndOrder"
    return Preset(name, "binarynet", "cifar10", optimizer, correction, epochs, batch, courses)


def _imagenet(name: str, network: str, epochs: int, kernel_l2: float) -> Preset:
    courses: Courses = {
        "gamma": Linear(1e-4, 1e-9),
        "sigma": Linear(1e-5, 1e-2),
        "threshold": Linear(1e-8, 1e-5),
        "lr": Linear(2.5e-3, 5e-6),
    }
    return Preset(name, network, "imagenet", "Bop2ndOrder", "none", epochs, 1024, courses, kernel_l2)


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
        _cifar10("cifar10_bop", None, 500, 50, baseline),
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
        _imagenet("imagenet_xnornet", "xnornet", 100, 5e-7),
        _imagenet("imagenet_birealnet", "birealnet18", 150, 0.0),
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
