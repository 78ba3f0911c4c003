"""The trials of a study: an Optuna study in a journal file, from which any number of processes take trials.

The folder of a study holds ``journal.log`` (Optuna's; ``optuna.load_study`` and its dashboard open it) and a
folder for each trial. The journal knows that a trial is running, not whether its process lives. So whoever
works on a trial holds a POSIX lock on its file ``lock``: the kernel (of a shared folder, the file server)
frees it when the process or its machine dies, and the trial is taken again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from .definitions import Arm, StudyError

JOURNAL = "journal.log"
SETTINGS = "settings"
STATES = {
    TrialState.WAITING: "waiting",
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


def create(folder: Path, settings: Mapping[str, Any], trials: Sequence[Mapping[str, Any]]) -> None:
    """Make a study with these trials: what is fixed of their parameters, the rest is sampled.

    The journal appears as a whole, so a process that is killed here leaves no half of a study; if another
    process was faster, its study stays.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    draft = folder / f".{JOURNAL}.{os.getpid()}"
    draft.unlink(missing_ok=True)
    try:
        study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(draft))),
            study_name=settings["study"],
            direction="maximize",
        )
        study.set_user_attr(SETTINGS, dict(settings))
        for parameters in trials:
            study.enqueue_trial(dict(parameters))
        with contextlib.suppress(FileExistsError):
            os.link(draft, folder / JOURNAL)  # unlike a rename, replaces nothing
    finally:
        draft.unlink(missing_ok=True)


class Trials:
    """The trials of the study in ``folder``.

    Raises:
        StudyError: there is no study in this folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        journal = self.folder / JOURNAL
        if not journal.is_file():
            raise StudyError(f"there is no study in {self.folder}")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.storage = JournalStorage(JournalFileBackend(str(journal)))
        names = optuna.get_all_study_names(self.storage)
        if len(names) != 1:
            raise StudyError(f"{journal} holds {len(names)} studies, it must be one")
        # Successive halving judges after 1, 3, 9, ... epochs and lets the better third of the trials go on.
        self.study = optuna.load_study(
            study_name=names[0],
            storage=self.storage,
            sampler=optuna.samplers.TPESampler(n_startup_trials=15),
            pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3),
        )
        self.study_id = self.storage.get_study_id_from_name(names[0])
        self.settings: dict[str, Any] = self.study.user_attrs[SETTINGS]
        self.arms = {arm.name: arm for arm in map(Arm.from_plain, self.settings["arms"])}

    def folder_of(self, number: int) -> Path:
        return self.folder / "trials" / f"{number:04d}"

    def all(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def counts(self) -> dict[str, int]:
        """How many trials are in each state, by its name; states without trials are left out."""
        found = [STATES[trial.state] for trial in self.all()]
        return {name: found.count(name) for name in STATES.values() if name in found}

    def finished(self) -> bool:
        return all(trial.state.is_finished() for trial in self.all())

    def errors(self) -> dict[int, str]:
        """Why trials failed, by their numbers."""
        failed = [trial for trial in self.all() if trial.state == TrialState.FAIL]
        return {trial.number: str(trial.user_attrs.get("error")) for trial in failed}

    @contextlib.contextmanager
    def take(self) -> Iterator[optuna.Trial | None]:
        """The first unfinished trial that nobody works on, for this process; None if there is none.

        A trial whose process died comes back with the parameters it had.
        """
        for number in [trial.number for trial in self.all() if not trial.state.is_finished()]:
            with _locked(self.folder_of(number)) as mine:
                if not mine:
                    continue
                trial_id = self.storage.get_trial_id_from_study_id_trial_number(self.study_id, number)
                state = self.storage.get_trial(trial_id).state  # another may have finished it meanwhile
                if state.is_finished():
                    continue
                if state == TrialState.WAITING:
                    self.storage.set_trial_state_values(trial_id, TrialState.RUNNING)
                yield optuna.Trial(self.study, trial_id)
                return
        yield None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of a trial's folder, if nobody does; yields whether it is ours."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a+") as file:
        yield lock(file, wait=False)


def lock(file: IO[Any], wait: bool) -> bool:
    """Lock an open file for this process until it is closed; False if another holds it and we do not wait."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except PermissionError:  # what POSIX also allows to be said of a lock that is held
        return False
    return True


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """``epochs was 10, is now 3``: in what two studies' settings differ; arms by name."""
    found = [
        f"{key} was {before.get(key)}, is now {now.get(key)}"
        for key in sorted({*before, *now} - {"arms"})
        if before.get(key) != now.get(key)
    ]
    old, new = ({arm["name"]: arm for arm in settings["arms"]} for settings in (before, now))
    found += [f"{name} is new" for name in new if name not in old]
    found += [f"{name} is gone" for name in old if name not in new]
    for name in old:
        if name in new and old[name] != new[name]:
            changes = Arm.from_plain(old[name]).recipe.differences(Arm.from_plain(new[name]).recipe)
            found.append(f"{name}: {', '.join(changes) or 'other axes'}")
    return found
