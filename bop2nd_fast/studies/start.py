"""Start or resume a study on this machine: its settings, its trials, its workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import data
from . import records, search
from .definitions import StudyError, arms_of
from .trials import JOURNAL, Trials, create, differences
from .worker import held_out, teacher_of


def settings_of(
    name: str,
    data_name: str,
    data_dir: Path | None,
    *,
    seeds: int = 3,
    epochs: int | None = None,
    width: int | None = None,
    batch_size: int | None = None,
    n_trials: int = 60,
    only: Sequence[str] = (),
    teacher: Path | None = None,
) -> dict[str, Any]:
    """Everything that decides what a study computes, as plain data; a resumed study must have the same.

    Raises:
        StudyError, ValueError, FileNotFoundError: an unknown study or data set, an impossible number, missing
            files.
    """
    is_search = name == "search"
    arms = arms_of(name, data_name, epochs=epochs, width=width, batch_size=batch_size, only=tuple(only))
    for what, count in (("seeds", seeds), ("trials", n_trials)):
        if count < 1:
            raise ValueError(f"{what} is {count}, it must be at least 1")
    taught = [arm.name for arm in arms if arm.teacher]
    if bool(taught) != (teacher is not None):
        wanted = f"{taught[0]} needs a teacher" if taught else f"nothing in {name} has a teacher"
        raise StudyError(f"{wanted}; --only chooses lines, --teacher the checkpoint they learn from")
    dataset = data.get(data_name, data_dir)
    if is_search:
        held_out(dataset)
    networks = {(arm.recipe.network, str(arm.recipe.options)): arm.recipe for arm in arms}
    for recipe in networks.values():
        recipe.model(dataset)  # what cannot be built is said now, not by a worker
    return {
        "study": name,
        "data": data_name,
        "dataset_sha256": records.dataset_hash(dataset),
        "split": "validation" if is_search else "test",
        "seeds": 1 if is_search else seeds,
        "trials": n_trials if is_search else len(arms) * seeds,
        "teacher_sha256": None if teacher is None else teacher_of(teacher, dataset)[1],
        "arms": [arm.to_plain() for arm in arms],
    }


def open_study(folder: Path, settings: Mapping[str, Any]) -> Trials:
    """The study in ``folder`` with these settings: the one that is there, or a new one.

    Raises:
        StudyError: a study with other settings is there, or other files; nothing is written then.
    """
    if not (folder / JOURNAL).exists():
        if folder.exists() and (not folder.is_dir() or any(map(_is_foreign, folder.iterdir()))):
            raise StudyError(f"{folder} exists and holds no study; choose another --out")
        create(folder, settings, _parameters(settings))
    trials = Trials(folder)
    if changed := differences(trials.settings, settings):
        shown = "; ".join(changed[:3]) + (f"; and {len(changed) - 3} more" if len(changed) > 3 else "")
        raise StudyError(f"the study in {folder} has other settings: {shown}; choose another --out")
    return trials


def _is_foreign(path: Path) -> bool:
    return not path.name.startswith(f".{JOURNAL}.")  # else another process is making the same study


def _parameters(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is fixed of each trial; seeds go round outside, so that a study that is stopped is even."""
    if settings["study"] == "search":
        fixed = {"arm": settings["arms"][0]["name"], "seed": 0}
        return [{**fixed, **search.FIRST}, *({**fixed} for _ in range(settings["trials"] - 1))]
    return [
        {"arm": arm["name"], "seed": seed} for seed in range(settings["seeds"]) for arm in settings["arms"]
    ]


def run_workers(
    trials: Trials, workers: int, data_dir: Path | None, device: str, teacher: Path | None
) -> list[int]:
    """Start ``workers`` processes, torch's threads divided among them, and wait; returns their exit statuses.

    Raises:
        KeyboardInterrupt: this process got SIGINT or SIGTERM; the workers have written their checkpoints.
    """
    threads = max(1, (os.cpu_count() or 1) // workers)
    command = [sys.executable, "-m", "bop2nd_fast.studies.worker", str(trials.folder)]
    command += ["--device", device, "--threads", str(threads)]
    for option, path in (("--data-dir", data_dir), ("--teacher", teacher)):
        command += [] if path is None else [option, str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    started = [subprocess.Popen(command, env=environment) for _ in range(workers)]
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return [process.wait() for process in started]
    except KeyboardInterrupt:
        for process in started:
            process.terminate()
        for process in started:
            process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
