"""What a training leaves: progress, history, and checkpoints that others can read."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import checkpoint, models
from .binary_tensor import BinaryTensor
from .optim.telemetry import LayerReport
from .recipes import Recipe

if TYPE_CHECKING:
    from .train import Trainer

FORMAT = "bop2nd_fast.checkpoint.3"


class TrainingError(RuntimeError):
    """Training cannot go on, or a checkpoint cannot be used; the message says why."""


@dataclass(frozen=True)
class Progress:
    """What happened since the last report: means over these steps, flips per weight in the last of them.

    ``flip_rate`` is None for a network without binary weights.
    """

    epoch: int
    step: int
    n_steps: int
    loss: float
    accuracy: float
    flip_rate: float | None
    steps_per_second: float


@dataclass(frozen=True)
class Layer:
    """One binary layer in one epoch: flips per weight and step, blocked flips as a share of those that the
    sign of the moment alone would make, and the regime (see ``Bop2ndOrder.report``)."""

    flip_rate: float
    blocked_share: float
    regime: str


@dataclass(frozen=True)
class Epoch:
    """One line of history. ``seconds`` are those of training, ``test_seconds`` of the test after it, on the
    clock; ``processor_seconds`` what training took of this process's processors, over all threads (None: it
    was not measured). Beside other work they say more than the clock.

    ``hyperparameters``: in force after the epoch. ``layers``: name -> `Layer`, empty where no weight is
    binary; ``flip_rate`` and ``blocked_share`` are then None.
    """

    epoch: int
    step: int
    loss: float
    train_accuracy: float
    test_accuracy: float
    flip_rate: float | None
    blocked_share: float | None
    seconds: float
    test_seconds: float
    steps_per_second: float
    processor_seconds: float | None = None
    hyperparameters: dict[str, float] = field(default_factory=dict)
    layers: dict[str, Layer] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: list[LayerReport], **values: Any) -> Epoch:
        """With what the optimizer's report says of the layers."""
        weights = [row.numel * row.steps for row in rows]
        candidates = sum(row.candidate_rate * n for row, n in zip(rows, weights, strict=True))
        flips = sum(row.flip_rate * n for row, n in zip(rows, weights, strict=True))
        return cls(
            **values,
            flip_rate=flips / max(1, sum(weights)) if rows else None,
            blocked_share=(candidates - flips) / max(1, candidates) if rows else None,
            layers={row.name: Layer(row.flip_rate, row.blocked_share, row.regime) for row in rows},
        )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Epoch:
        layers = {name: Layer(**layer) for name, layer in plain["layers"].items()}
        return cls(**{**plain, "layers": layers})


class Record:
    """A checkpoint's member: which run it is, and its history."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        it = self.trainer
        return {
            "format": FORMAT,
            "recipe": it.recipe.to_json(),
            "dataset": {
                "classes": list(it.dataset.classes),
                "in_channels": it.dataset.in_channels,
                "image_size": it.dataset.image_size,
            },
            "run": {"seed": it.seed, "amp": it.amp, "teacher": it.teacher_sha256},
            "history": [epoch.to_dict() for epoch in it.history],
            "epoch": it._epoch.state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError if it is of another run."""
        check_format(state)
        own, it = self.state_dict(), self.trainer
        different = Recipe.from_json(state["recipe"]).differences(it.recipe)
        for part in ("dataset", "run"):
            before, now = state[part], own[part]
            different += [f"{k} was {before[k]}, is now {now[k]}" for k in now if before[k] != now[k]]
        if different:
            raise ValueError(f"it is of another run: {'; '.join(different)}")
        history = [Epoch.from_dict(epoch) for epoch in state["history"]]
        it._epoch.load(state["epoch"], it.replicas)
        it.history = history


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 of a network's weights and buffers: names, shapes and values."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        raw = value.words if isinstance(value, BinaryTensor) else value
        digest.update(f"{name} {list(value.shape)}\n".encode())
        digest.update(raw.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_format(state: Any) -> None:
    """Raises ValueError for anything but a `Record` of this version."""
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError("it was not written by this version's training loop")


# ----------------------------------------------------------------------------- reading back


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, int]:
    """How many of the images get their label as the largest output, in eval mode; and how many there are."""
    training, n = model.training, 0
    correct: Tensor | float = 0.0
    model.eval()
    try:
        for images, labels in batches:
            correct = correct + (model(images).argmax(1) == labels).sum()
            n += len(labels)
    finally:
        model.train(training)
    return float(correct), n


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


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint's content, on the CPU: ``step``, ``members`` (one is the ``record``), ``random``.

    Raises:
        FileNotFoundError: there is no such file.
        TrainingError: it is not a checkpoint of this package, or it is damaged.
    """
    return _read(path, checkpoint.load)


def recorded(path: str | Path) -> tuple[Recipe, dict[str, Any]]:
    """The recipe of the newest usable checkpoint at ``path`` (see ``checkpoint.load_latest``), and the run's
    seed, amp and the SHA-256 of its teacher (None without one). Raises as `read_checkpoint`."""
    record = _read(path, checkpoint.load_latest)["members"]["record"]
    return Recipe.from_json(record["recipe"]), record["run"]


def _read(path: str | Path, load: Callable[[str | Path], Any]) -> dict[str, Any]:
    try:
        state: dict[str, Any] | None = load(path)
        if state is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        check_format(state["members"]["record"])
    except checkpoint.CheckpointError as error:
        raise TrainingError(str(error)) from error
    except (ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{path} is not a checkpoint written by this version's `bop2nd train`") from error
    return state


def model_from_checkpoint(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """Rebuild the trained network, in eval mode; returns it and the checkpoint's record (recipe, data set,
    history).

    Raises:
        FileNotFoundError, TrainingError: as `read_checkpoint`; also when its network cannot be built again.
    """
    members = read_checkpoint(path)["members"]
    record = members["record"]
    try:
        recipe, images = Recipe.from_json(record["recipe"]), record["dataset"]
        model = models.get(
            recipe.network,
            num_classes=len(images["classes"]),
            in_channels=images["in_channels"],
            image_size=images["image_size"],
            **recipe.options,
        )
        model.load_state_dict(members["model"])
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        raise TrainingError(f"the model in {path} cannot be built again: {error}") from error
    return model.eval(), record
