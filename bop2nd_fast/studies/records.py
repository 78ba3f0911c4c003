"""Result files of studies: one JSON line for each trial and epoch, with a stamp.

``results.jsonl`` is made from the lines that each trial keeps in its own folder, so that nothing is lost or
mixed when processes write at once. A line holds everything that tables and pictures need.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .. import data
from ..atomic_write import atomic_write
from ..train import Epoch
from .definitions import StudyError
from .trials import STATES, Trials, lock

SCHEMA = 1
RESULTS = "results.jsonl"
EPOCHS = "epochs.jsonl"  # in a trial's folder
Line = dict[str, Any]

_FIELDS: dict[str, type | tuple[type, ...]] = {
    "schema": int,
    "study": str,
    "trial": int,
    "state": str,  # of the trial, when the lines were collected: waiting, running, complete, pruned, failed
    "arm": str,
    "axes": dict,
    "params": dict,  # what a search chose
    "seed": int,
    "recipe": dict,
    "split": str,  # what ``accuracy`` was measured on: "test", or "validation" images held out of training
    "epoch": int,
    "epochs": int,
    "loss": float,
    "train_accuracy": float,
    "accuracy": float,
    "flip_rate": (float, type(None)),  # per weight and step; None without Bop
    "blocked_share": (float, type(None)),  # of the flips that sign(m) alone would make
    "seconds": (float, type(None)),  # of this epoch's training, evaluation left out; None: not known
    "clock": str,  # what they are of: "processor" (what a run takes alone on a processor), or "wall"
    "threads": int,
    "device": str,
    "dataset": dict,  # name and SHA-256
    "stamp": dict,
}
_STAMP = ("processor", "active_backend", "torch", "commit", "dirty", "date")


def check(line: Line, where: str) -> None:
    """Raises StudyError unless a line has every field, of its type."""
    for name, kind in _FIELDS.items():
        if not isinstance(line.get(name), kind):
            raise StudyError(f"{where}: {name} is {line.get(name)!r}; these are no results of this version")
    if line["schema"] != SCHEMA:
        raise StudyError(f"{where}: schema {line['schema']} is not {SCHEMA}")
    if missing := [name for name in _STAMP if name not in line["stamp"]]:
        raise StudyError(f"{where}: the stamp lacks {', '.join(missing)}")


def line_of(epoch: Epoch, **about: Any) -> Line:
    """The line of one epoch; ``about`` is what the trial and its machine add to it.

    One thread on a CPU is timed by its processor: workers then do not disturb each other's figures.
    """
    alone = about["device"] == "cpu" and about["threads"] == 1
    return {
        "schema": SCHEMA,
        **about,
        "epoch": epoch.epoch,
        "loss": epoch.loss,
        "train_accuracy": epoch.train_accuracy,
        "accuracy": epoch.test_accuracy,
        "flip_rate": epoch.flip_rate,
        "blocked_share": epoch.blocked_share,
        "seconds": epoch.processor_seconds if alone else epoch.seconds,
        "clock": "processor" if alone else "wall",
    }


def append(folder: Path, line: Line) -> None:
    """Add an epoch's line to those of its trial. Lines of this and of later epochs are replaced: a process
    that was killed behind its checkpoint may have left them."""
    path = folder / EPOCHS
    kept = [old for old in _lines(path) if old["epoch"] < line["epoch"]]
    _write(path, [*kept, line])


def n_epochs(folder: Path) -> int:
    """How many epochs of its trial the folder has lines of."""
    return len(_lines(folder / EPOCHS))


def collect(trials: Trials) -> list[Line]:
    """Write ``results.jsonl`` from the trials' own lines; returns the lines."""
    with open(trials.folder / f".{RESULTS}.lock", "a+") as file:
        lock(file, wait=True)
        lines = [
            {**line, "state": STATES[trial.state]}
            for trial in trials.all()
            for line in _lines(trials.folder_of(trial.number) / EPOCHS)
        ]
        _write(trials.folder / RESULTS, lines)
    return lines


def read(path: str | Path) -> list[Line]:
    """The lines of a result file, checked.

    Raises:
        StudyError: there is no such file, it is empty, or not of this version.
    """
    path = Path(path)
    if not path.is_file():
        raise StudyError(f"there are no results: {path} does not exist")
    lines = _lines(path)
    for number, line in enumerate(lines, start=1):
        check(line, f"{path}, line {number}")
    if not lines:
        raise StudyError(f"there are no results in {path} yet: no epoch was finished")
    return lines


def _lines(path: Path) -> list[Line]:
    if not path.exists():
        return []
    try:
        return [json.loads(text) for text in path.read_text().splitlines()]
    except ValueError as error:
        raise StudyError(f"{path} is damaged: {error}") from error


def _write(path: Path, lines: Iterable[Line]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    atomic_write(path, lambda file: file.write(text.encode()))


# ------------------------------------------------------------------------- which images they were


def dataset_hash(dataset: data.Dataset | data.ImageFolder) -> str:
    """SHA-256 of images and labels, shapes and values; of a folder, names, labels and sizes of its files."""
    digest = hashlib.sha256()
    if isinstance(dataset, data.ImageFolder):
        for pictures in (dataset.train_pictures, dataset.test_pictures):
            _add_pictures(digest, dataset.root, pictures)
        return digest.hexdigest()
    parts = (dataset.train_images, dataset.train_labels, dataset.test_images, dataset.test_labels)
    for part in parts:
        digest.update(f"{part.dtype} {list(part.shape)}\n".encode())
        digest.update(part.contiguous().numpy().data)
    return digest.hexdigest()


def _add_pictures(digest: Any, root: Path, pictures: Sequence[tuple[Path, int]]) -> None:
    for path, label in pictures:
        digest.update(f"{path.relative_to(root)} {label} {path.stat().st_size}\n".encode())
