"""A worker: a process that takes trials of a study until none is left.

    python -m bop2nd_fast.studies.worker FOLDER [--data-dir DIR] [--teacher FILE] [--device cpu] [--threads N]

Start as many as there is room for, on any machine that sees the folder. A worker that is killed loses at most
what its trial did since the last checkpoint; another goes on with that trial. It prints a line for each
epoch, and ends with 0, with 1 if trials failed (a loss that became NaN) or it was interrupted, with 2 if it
could not start.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.trial import TrialState
from torch import nn

from .. import data
from ..checkpoint import CheckpointError
from ..recipes import Recipe
from ..stamp import stamp
from ..train import CHECKPOINT, Epoch, Trainer, TrainingError
from ..train_record import model_from_checkpoint, weights_sha256
from . import records, search
from .definitions import StudyError
from .trials import STATES, Trials

VALIDATION_SHARE = 0.1  # of the training images; what a search judges by


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a worker computes, and the teacher of the trials that have one."""

    device: str
    threads: int
    stamp: dict[str, Any]
    teacher: nn.Module | None = None


class _Pruned(Exception):
    """The pruner stopped the trial."""


def load_data(settings: dict[str, Any], data_dir: Path | None) -> data.Dataset | data.ImageFolder:
    """The study's data set; its training images alone, divided, where the study judges by validation.

    Raises:
        StudyError: these are other images than those the study began with.
        ValueError, FileNotFoundError: as `data.get`.
    """
    dataset = data.get(settings["data"], data_dir)
    found = records.dataset_hash(dataset)
    if found != settings["dataset_sha256"]:
        begun = settings["dataset_sha256"]
        raise StudyError(
            f"the study began with other images of {dataset.name}: SHA-256 {begun[:12]}, now {found[:12]}"
        )
    return held_out(dataset) if settings["split"] == "validation" else dataset


def teacher_of(path: Path, dataset: data.Dataset | data.ImageFolder) -> tuple[nn.Module, str]:
    """The trained network in a checkpoint, and the SHA-256 of its weights and buffers.

    Raises:
        StudyError: it knows other classes than the data set has.
        TrainingError, FileNotFoundError: it is no checkpoint.
    """
    model, plain = model_from_checkpoint(path)
    if (n := len(plain["dataset"]["classes"])) != len(dataset.classes):
        raise StudyError(f"the teacher {path} knows {n} classes, {dataset.name} has {len(dataset.classes)}")
    return model, weights_sha256(model)


def held_out(dataset: data.Dataset | data.ImageFolder) -> data.Dataset:
    """``dataset`` with a tenth of its training images, always the same, in place of the test images."""
    if not isinstance(dataset, data.Dataset):
        raise StudyError(f"a search holds images out of a data set in memory; {dataset.name} is a folder")
    order = torch.randperm(len(dataset.train_labels), generator=torch.Generator().manual_seed(0))
    out, rest = order.tensor_split([max(1, round(VALIDATION_SHARE * len(order)))])
    return dataclasses.replace(
        dataset,
        train_images=dataset.train_images[rest],
        train_labels=dataset.train_labels[rest],
        test_images=dataset.train_images[out],
        test_labels=dataset.train_labels[out],
    )


def _recipe_of(trials: Trials, trial: optuna.Trial) -> tuple[str, int, Recipe, dict[str, float]]:
    """Arm, seed, recipe and what was chosen freely, for a trial that is new or comes back."""
    name = trial.suggest_categorical("arm", list(trials.arms))
    seed = trial.suggest_int("seed", 0, trials.settings["seeds"] - 1)
    recipe, point = trials.arms[name].recipe, {}
    if trials.settings["study"] == "search":
        point = {key: trial.suggest_float(key, r.low, r.high, log=True) for key, r in search.SPACE.items()}
        recipe = search.recipe_at(recipe, point)
    return name, seed, recipe, point


def run_trial(
    trials: Trials, trial: optuna.Trial, dataset: data.Dataset | data.ImageFolder, place: Place
) -> str:
    """Train one trial to its end, from its checkpoint if it has one; returns how it ended.

    Raises:
        KeyboardInterrupt: the process got SIGINT or SIGTERM, or its parent has gone; a checkpoint is written.
    """
    arm, seed, recipe, point = _recipe_of(trials, trial)
    folder = trials.folder_of(trial.number)
    teacher = place.teacher if trials.arms[arm].teacher else None
    trainer = Trainer(recipe, dataset, seed=seed, device=place.device, out=folder, teacher=teacher)
    about = {
        "study": trials.settings["study"],
        "trial": trial.number,
        "state": "running",
        "arm": arm,
        "axes": trials.arms[arm].axes,
        "params": point,
        "seed": seed,
        "recipe": json.loads(recipe.to_json()),
        "split": trials.settings["split"],
        "epochs": recipe.epochs,
        "threads": place.threads,
        "device": place.device,
        "dataset": {"name": dataset.name, "sha256": trials.settings["dataset_sha256"]},
        "stamp": place.stamp,
    }
    parent = os.getppid()

    def record(epoch: Epoch) -> None:
        records.append(folder, records.line_of(epoch, **about))
        if epoch.epoch not in trials.all()[trial.number].intermediate_values:
            trial.report(epoch.test_accuracy, epoch.epoch)

    def on_epoch(epoch: Epoch) -> None:
        record(epoch)
        print(
            f"trial {trial.number:3d}  {arm}, seed {seed}: epoch {epoch.epoch}/{recipe.epochs}  "
            f"loss {epoch.loss:.3f}  accuracy {epoch.test_accuracy:.2%}  {epoch.seconds:.0f} s",
            flush=True,
        )
        if trials.settings["study"] == "search" and epoch.epoch < recipe.epochs and trial.should_prune():
            raise _Pruned
        if os.getppid() != parent:
            trainer.interrupt()

    try:
        trainer.restore()
        for epoch in trainer.history[records.n_epochs(folder) :]:
            record(epoch)  # its checkpoint was written, and then the process died
        with _signals(trainer):
            trainer.run(on_epoch=on_epoch)
        trials.study.tell(trial, trainer.history[-1].test_accuracy)
    except _Pruned:
        trials.study.tell(trial, state=TrialState.PRUNED)
    except (TrainingError, CheckpointError) as error:
        trial.set_user_attr("error", str(error))
        trials.study.tell(trial, state=TrialState.FAIL)
        print(f"trial {trial.number:3d}  {arm}, seed {seed}: failed: {error}", flush=True)
    for path in folder.glob(f"{CHECKPOINT}*"):  # a finished trial is its lines
        path.unlink()
    return STATES[trials.all()[trial.number].state]


@contextmanager
def _signals(trainer: Trainer) -> Iterator[None]:
    """SIGINT and SIGTERM let the trainer write a checkpoint before it stops."""
    before = [(n, signal.signal(n, lambda *_: trainer.interrupt())) for n in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def work(
    folder: Path, data_dir: Path | None, device: str, threads: int, teacher_file: Path | None = None
) -> int:
    """Take trials until none is left; returns how many of them failed.

    Raises:
        StudyError: another data set or teacher than the study began with.
    """
    torch.set_num_threads(threads)
    trials = Trials(folder)
    dataset = load_data(trials.settings, data_dir)
    teacher, found = (None, None) if teacher_file is None else teacher_of(teacher_file, dataset)
    if found != trials.settings["teacher_sha256"]:
        raise StudyError(f"the study began with another teacher than {teacher_file}")
    place, failed = Place(device, threads, stamp(), teacher), 0
    while True:
        with trials.take() as trial:
            if trial is None:
                return failed
            failed += run_trial(trials, trial, dataset, place) == "failed"
        records.collect(trials)


def main() -> int:
    parser = argparse.ArgumentParser(description="Take trials of a study until none is left.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    try:
        return int(work(given.folder, given.data_dir, given.device, given.threads, given.teacher) > 0)
    except KeyboardInterrupt:
        return 1
    except (StudyError, TrainingError, ValueError, OSError) as error:
        print(f"worker: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
