"""A small trainer for classification: Bop2ndOrder for the binary weights, Adam for the rest.

Reproducible: the model's initial weights, the order of the examples and their augmentation follow from
`Settings.seed`; a run resumed from a checkpoint continues bit for bit as if it had not stopped.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import operator
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checkpoint as checkpoint_files
from .atomic_write import atomic_write
from .data import Batches, Dataset, augment_crop_flip
from .models import BinaryNet
from .optim import Bop2ndOrder, split_parameters
from .optim.telemetry import FlipRates

MODELS: dict[str, Callable[..., nn.Module]] = {"binarynet": BinaryNet}
CHECKPOINT_FORMAT = "bop2nd_fast.checkpoint.1"
_CHECKPOINT_KEYS = {
    *("format", "spec", "dataset", "settings", "history"),
    *("model", "binary_optimizer", "real_optimizer", "generator"),
}


class TrainingError(RuntimeError):
    """Training cannot go on, or a checkpoint cannot be used; the message says why."""


def _plain_numbers(record: Any) -> None:
    """Make NumPy's numbers Python's: a checkpoint and a history hold nothing else."""
    for entry in dataclasses.fields(record):
        value = getattr(record, entry.name)
        if type(entry.default) is int:
            object.__setattr__(record, entry.name, operator.index(value))
        elif type(entry.default) is float:
            object.__setattr__(record, entry.name, float(value))


@dataclass(frozen=True)
class ModelSpec:
    """What a network is built from; stored in checkpoints."""

    name: str = "binarynet"
    width: int = 128
    image_size: int = 32
    in_channels: int = 3
    num_classes: int = 10
    first_padding: int = 0

    def __post_init__(self) -> None:
        _plain_numbers(self)

    @classmethod
    def for_dataset(cls, dataset: Dataset, name: str = "binarynet", width: int = 128) -> ModelSpec:
        """A network for these images; the first layer pads where three poolings need it to."""
        return cls(
            name=name,
            width=width,
            image_size=dataset.image_size,
            in_channels=dataset.in_channels,
            num_classes=len(dataset.classes),
            first_padding=1 if dataset.image_size < 10 else 0,
        )

    def build(self, seed: int) -> nn.Module:
        """The network with initial weights drawn from ``seed``; the global random state is left alone."""
        if self.name not in MODELS:
            raise ValueError(f"there is no model {self.name!r}; there are {', '.join(MODELS)}")
        arguments = {k: v for k, v in dataclasses.asdict(self).items() if k != "name"}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(operator.index(seed))
            return MODELS[self.name](**arguments)


@dataclass(frozen=True)
class Settings:
    """Hyperparameters of a run. ``gamma``, ``sigma``, ``threshold``, ``bias_correction``: see `Bop2ndOrder`.

    ``lr`` is Adam's for the real parameters; ``report_every`` is in steps (reading the counters waits for
    the device).
    """

    epochs: int = 20
    batch_size: int = 50
    gamma: float = 1e-7
    sigma: float = 1e-3
    threshold: float = 1e-6
    bias_correction: str = "none"
    lr: float = 0.01
    seed: int = 0
    augment: bool = False
    report_every: int = 10

    def __post_init__(self) -> None:
        _plain_numbers(self)
        for name in ("epochs", "batch_size", "report_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be at least 1")
        if self.gamma == 0:
            raise ValueError("gamma must be in (0, 1]: with 0 no weight would ever flip")
        if not (math.isfinite(self.lr) and self.lr >= 0):
            raise ValueError(f"lr is {self.lr}, it must be a finite number >= 0")


# Constant hyperparameters that work: (width, settings). Digits: with seeds 0, 1 and 2 better than batches
# of 50 and than a threshold of 3e-2. CIFAR-10: the base run of the ablation in arXiv 2104.05124.
RECIPES = {
    "digits": (
        32,
        Settings(epochs=20, batch_size=32, gamma=1e-3, sigma=1e-2, threshold=2e-2, report_every=1),
    ),
    "cifar10": (
        128,
        Settings(
            epochs=100,
            batch_size=100,
            gamma=1e-7,
            sigma=1e-3,
            threshold=1e-6,
            bias_correction="reference",
            augment=True,
        ),
    ),
}


@dataclass(frozen=True)
class Progress:
    """What happened since the last report: means over these steps, flips of the last of them."""

    epoch: int
    step: int
    n_steps: int
    loss: float
    accuracy: float
    flip_rate: float
    steps_per_second: float


@dataclass(frozen=True)
class Epoch:
    """One line of history. Rates are per weight and step; ``layers`` maps parameter names to flip rates."""

    epoch: int
    loss: float
    train_accuracy: float
    test_accuracy: float
    flip_rate: float
    blocked_rate: float
    seconds: float
    steps_per_second: float
    layers: dict[str, float] = field(default_factory=dict)


class Trainer:
    """Trains ``model`` on ``dataset``.

    Args:
        model: any classifier with binary parameters; it is moved to ``device``.
        dataset: images and labels.
        settings: hyperparameters.
        device: where to train.
        spec: how ``model`` was built; stored in checkpoints so that others can rebuild it.

    Raises:
        ValueError: an impossible setting, or a model without binary parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset,
        settings: Settings,
        device: str | torch.device = "cpu",
        spec: ModelSpec | None = None,
    ) -> None:
        self.model = model.to(device)
        self.dataset, self.settings, self.spec = dataset, settings, spec
        self.device = torch.device(device)
        binary, real = split_parameters(self.model)
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        self.binary_names = [names[id(parameter)] for parameter in binary]
        self.binary_optimizer = Bop2ndOrder(
            binary,
            gamma=settings.gamma,
            sigma=settings.sigma,
            threshold=settings.threshold,
            bias_correction=settings.bias_correction,
        )
        self.real_optimizer = torch.optim.Adam(real, lr=settings.lr) if real else None
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.batches = Batches(
            dataset.train_images.to(device),
            dataset.train_labels.to(device),
            settings.batch_size,
            self.generator,
            augment_crop_flip if settings.augment else None,
        )
        self.test_images = dataset.test_images.to(device)
        self.test_labels = dataset.test_labels.to(device)
        self.history: list[Epoch] = []

    @property
    def n_steps(self) -> int:
        return self.settings.epochs * len(self.batches)

    def run(
        self,
        on_progress: Callable[[Progress], None] | None = None,
        on_epoch: Callable[[Epoch], None] | None = None,
        checkpoint: str | Path | None = None,
    ) -> list[Epoch]:
        """Train the epochs that are left; returns the whole history.

        ``on_progress`` is called every ``report_every`` steps and at the end of an epoch; after every epoch
        ``checkpoint`` is written, then ``on_epoch`` is called.

        Raises:
            TrainingError: the loss is not a finite number.
        """
        for epoch in range(len(self.history) + 1, self.settings.epochs + 1):
            self.history.append(self._epoch(epoch, on_progress))
            if checkpoint is not None:
                self.save(checkpoint)
            if on_epoch is not None:
                on_epoch(self.history[-1])
        return self.history

    def _epoch(self, epoch: int, on_progress: Callable[[Progress], None] | None) -> Epoch:
        self.model.train()
        every, step = self.settings.report_every, (epoch - 1) * len(self.batches)
        epoch_totals = torch.zeros(2, dtype=torch.float64, device=self.device)  # loss, correct
        window_totals = torch.zeros_like(epoch_totals)
        flips = FlipRates(self.binary_names)
        started = window_started = time.perf_counter()
        window_steps = 0
        for index, (images, labels) in enumerate(self.batches, start=1):
            window_totals += self._step(images, labels)
            window_steps += 1
            if window_steps < every and index < len(self.batches):
                continue
            loss, correct = (window_totals / window_steps).tolist()
            if not math.isfinite(loss):
                raise TrainingError(f"the loss became {loss} within the steps up to {step + index}")
            flip_rate = flips.add(self.binary_optimizer.telemetry())
            now = time.perf_counter()
            if on_progress is not None:
                accuracy = correct / self.settings.batch_size
                rate = window_steps / (now - window_started)
                on_progress(Progress(epoch, step + index, self.n_steps, loss, accuracy, flip_rate, rate))
            epoch_totals += window_totals
            window_totals.zero_()
            window_steps, window_started = 0, now
        seconds = time.perf_counter() - started
        loss, correct = (epoch_totals / len(self.batches)).tolist()
        return Epoch(
            epoch=epoch,
            loss=loss,
            train_accuracy=correct / self.settings.batch_size,
            test_accuracy=accuracy_of(self.model, self.test_images, self.test_labels),
            flip_rate=flips.total(),
            blocked_rate=flips.blocked(),
            seconds=seconds,
            steps_per_second=len(self.batches) / seconds,
            layers=flips.layers(),
        )

    def _step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One training step; returns fp64 ``[2]``: loss, number of correct predictions."""
        logits = self.model(images)
        loss = F.cross_entropy(logits, labels)
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        self.binary_optimizer.step()
        if self.real_optimizer is not None:
            self.real_optimizer.step()
        correct = (logits.detach().argmax(1) == labels).sum()
        return torch.stack([loss.detach().double(), correct.double()])

    # ------------------------------------------------------------------------- checkpoints

    def save(self, path: str | Path) -> None:
        """Write a checkpoint; a crash while writing leaves the previous one (see `checkpoint.save`)."""
        state = {
            "format": CHECKPOINT_FORMAT,
            "spec": None if self.spec is None else dataclasses.asdict(self.spec),
            "dataset": self.dataset.name,
            "settings": dataclasses.asdict(self.settings),
            "history": [dataclasses.asdict(epoch) for epoch in self.history],
            "model": self.model.state_dict(),
            "binary_optimizer": self.binary_optimizer.state_dict(),
            "real_optimizer": None if self.real_optimizer is None else self.real_optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }
        checkpoint_files.save(path, state)

    def resume(self, path: str | Path) -> None:
        """Continue from a checkpoint of the same model, data and settings (``epochs`` may grow).

        If the file is damaged or lost, the one before it (``.previous``) is used, with a warning.

        Raises:
            FileNotFoundError: there is no such file.
            TrainingError: the file is no checkpoint, or belongs to another run. Nothing is changed then.
        """
        try:
            state = checkpoint_files.load_latest(path)
            if state is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
            _check_content(path, state)
            self._check_same_run(path, state)
            history = _history_of(path, state)
            members = {
                "model": self.model,
                "binary_optimizer": self.binary_optimizer,
                "real_optimizer": self.real_optimizer,
                "generator": self.generator,
            }
            present = {name: member for name, member in members.items() if member is not None}
            checkpoint_files.restore(present, state, path)
        except checkpoint_files.CheckpointError as error:
            raise TrainingError(str(error)) from error
        self.history = history

    def _check_same_run(self, path: str | Path, state: dict[str, Any]) -> None:
        here = {"dataset": self.dataset.name, **dataclasses.asdict(self.settings)}
        there = {"dataset": state["dataset"], **state["settings"]}
        if self.spec is not None and state["spec"] is not None:
            here |= dataclasses.asdict(self.spec)
            there |= state["spec"]
        free = {"epochs", "report_every"}
        different = [k for k in here if k not in free and here[k] != there.get(k)]
        if different:
            raise TrainingError(
                f"{path} is from another run: "
                + ", ".join(f"{k} was {there.get(k)}, is now {here[k]}" for k in different)
            )


# ----------------------------------------------------------------------------- reading back


def logits_of(model: Callable[[Tensor], Tensor], images: Tensor, batch_size: int = 500) -> Tensor:
    """The model's outputs ``[N, classes]`` for ``images`` ``[N, C, H, W]``, without gradients.

    An `nn.Module` is put in eval mode meanwhile.
    """
    training = isinstance(model, nn.Module) and model.training
    if isinstance(model, nn.Module):
        model.eval()
    try:
        with torch.no_grad():
            return torch.cat([model(part) for part in images.split(batch_size)])
    finally:
        if isinstance(model, nn.Module):
            model.train(training)


def accuracy_of(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> float:
    """Share of ``images`` whose largest output is at their label."""
    return float((logits_of(model, images).argmax(1) == labels).double().mean())


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        TrainingError: it is not a checkpoint of this package, or it is damaged.
    """
    try:
        state = checkpoint_files.load(path)
    except checkpoint_files.CheckpointError as error:
        raise TrainingError(str(error)) from error
    _check_content(path, state)
    return cast("dict[str, Any]", state)


def _check_content(path: str | Path, state: Any) -> None:
    if (
        not isinstance(state, dict)
        or state.get("format") != CHECKPOINT_FORMAT
        or not state.keys() >= _CHECKPOINT_KEYS
    ):
        raise TrainingError(f"{path} is not a checkpoint written by this version's `bop2nd train`")


def _history_of(path: str | Path, state: dict[str, Any]) -> list[Epoch]:
    try:
        return [Epoch(**epoch) for epoch in state["history"]]
    except TypeError as error:
        raise TrainingError(f"the history in the checkpoint {path} is another version's: {error}") from error


def model_from_checkpoint(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """Rebuild the trained network, in eval mode; returns it and the checkpoint's content.

    Raises:
        FileNotFoundError, TrainingError: as `read_checkpoint`; also when the checkpoint does not say how
            its model was built.
    """
    state = read_checkpoint(path)
    if state["spec"] is None:
        raise TrainingError(f"{path} does not say how its model was built; load its 'model' entry yourself")
    try:
        model = ModelSpec(**state["spec"]).build(seed=0)
        model.load_state_dict(state["model"])
    except (TypeError, ValueError, RuntimeError) as error:
        raise TrainingError(f"the model in {path} cannot be built again: {error}") from error
    return model.eval(), state


def write_history(path: str | Path, history: list[Epoch], **about: object) -> None:
    """Write the history as JSON: ``{**about, "epochs": [...]}``."""
    text = json.dumps({**about, "epochs": [dataclasses.asdict(epoch) for epoch in history]}, indent=1)
    atomic_write(path, lambda file: file.write(text.encode()))
