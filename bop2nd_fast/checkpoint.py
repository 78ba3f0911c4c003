"""Checkpoints that survive a crash at any moment: write beside, flush to the disk, rename, keep the previous.

One process, one file::

    run = checkpoint.Run("run.pt", model=model, optimizer=optimizer, scheduler=scheduler)
    for step in range(run.resume(), n_steps):
        ...
        run.save(step + 1)

Sharded parameters (``fully_shard``), one directory per step, readable on another number of processes::

    step = checkpoint.resume_sharded("run", model, optimizers)
    ...
    checkpoint.save_sharded("run", step, model, optimizers)
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch

from .atomic_write import atomic_write

PREVIOUS = ".previous"
_STEP = re.compile(r"step_(\d{10})")


class CheckpointError(RuntimeError):
    """A checkpoint is damaged or belongs to something else; the message says which and why."""


def save(path: str | Path, state: Any, keep_previous: bool = True) -> None:
    """Write ``state`` (what ``torch.load(weights_only=True)`` reads) to ``path``.

    After a crash at any moment ``path`` holds the old or the new state. The state before the newest stays
    as ``<path>.previous``, against files that a failing disk spoils later. One writer at a time.
    """
    path = Path(path)
    for part in path.parent.glob(f".{path.name}.*.part"):  # left by a writer that was killed
        part.unlink(missing_ok=True)
    previous = path.with_name(path.name + PREVIOUS)
    # After a crash between the two renames they are one file; renaming a link over itself would do nothing.
    if keep_previous and path.exists() and not (previous.exists() and previous.samefile(path)):
        linked = path.with_name(f".{path.name}.link.part")
        os.link(path, linked)
        os.replace(linked, previous)
    atomic_write(path, lambda file: torch.save(state, file))


def load(path: str | Path) -> Any:
    """The state in ``path``, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it cannot be read as a checkpoint.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} is not a checkpoint, or it is damaged ({error})") from error


def load_latest(path: str | Path) -> Any | None:
    """The state in ``path``; the previous one, with a warning, if ``path`` is damaged; None if there is none.

    Raises:
        CheckpointError: ``path`` is damaged and there is no usable previous one.
    """
    path = Path(path)
    previous = path.with_name(path.name + PREVIOUS)
    try:
        return load(path)
    except FileNotFoundError:
        return load(previous) if previous.exists() else None
    except CheckpointError as error:
        if not previous.exists():
            raise
        state = load(previous)
        warnings.warn(f"{error}; going on from {previous}", RuntimeWarning, stacklevel=2)
        return state


class Run:
    """What has to be saved for a run to continue bit for bit, and where.

    Args:
        path: the file. Its directory is made.
        members: anything with ``state_dict`` and ``load_state_dict`` (model, optimizers, schedulers,
            GradScaler), and ``torch.Generator`` objects.

    The global random state of the CPU and of every CUDA device is saved too.

    Raises:
        TypeError: a member that has no state.
    """

    def __init__(self, path: str | Path, **members: Any) -> None:
        for name, member in members.items():
            if not isinstance(member, torch.Generator) and not hasattr(member, "load_state_dict"):
                raise TypeError(f"{name} has no state_dict to save, it is a {type(member).__name__}")
        self.path, self.members = Path(path), members
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def save(self, step: int) -> None:
        """Write the checkpoint: ``step`` steps are done."""
        save(self.path, {"step": step, "members": self._states(), "random": _random_state()})

    def resume(self) -> int:
        """Restore the newest usable checkpoint; returns how many steps it had done, 0 if there is none.

        Raises:
            CheckpointError: it is damaged, or was saved with other members. Nothing is changed then.
        """
        state = load_latest(self.path)
        if state is None:
            return 0
        if not isinstance(state, dict) or set(state) != {"step", "members", "random"}:
            raise CheckpointError(f"{self.path} was not written by Run.save")
        if set(state["members"]) != set(self.members):
            raise CheckpointError(
                f"{self.path} holds {sorted(state['members'])}, this run has {sorted(self.members)}"
            )
        for name, member in self.members.items():
            saved = state["members"][name]
            if isinstance(member, torch.Generator):
                member.set_state(saved)
            else:
                member.load_state_dict(saved)
        torch.set_rng_state(state["random"]["cpu"])
        if state["random"]["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["random"]["cuda"])
        return int(state["step"])

    def _states(self) -> dict[str, Any]:
        return {
            name: member.get_state() if isinstance(member, torch.Generator) else member.state_dict()
            for name, member in self.members.items()
        }


def _random_state() -> dict[str, Any]:
    has_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if has_cuda else []}


# ------------------------------------------------------------------------------------- sharded


def save_sharded(directory: str | Path, step: int, model: Any, optimizers: Any, keep: int = 2) -> Path:
    """Every process of the default group writes its blocks; returns the checkpoint, ``directory/step_...``.

    The name appears only when all processes have written and flushed theirs, so a crash leaves the earlier
    checkpoints as they were; of those, ``keep`` - 1 are kept. ``directory`` must be the same file system
    for all. Collective.
    """
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    directory = Path(directory)
    target, part = directory / f"step_{step:010d}", directory / f".step_{step:010d}.part"
    if dist.get_rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        for stale in (part, target):  # an unfinished writer's, or this step's from before a resume
            shutil.rmtree(stale, ignore_errors=True)
    dist.barrier()
    states = get_state_dict(model, optimizers)
    dcp.save(
        {"model": states[0], "optimizers": states[1]},
        storage_writer=dcp.FileSystemWriter(part, sync_files=True),
    )
    if dist.get_rank() == 0:
        _flush(part)
        os.replace(part, target)
        _flush(directory)
        for old in sharded_checkpoints(directory)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return target


def resume_sharded(directory: str | Path, model: Any, optimizers: Any) -> int:
    """Restore the newest checkpoint of ``directory``, saved by any number of processes; returns its step.

    0 if there is none. Collective.
    """
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    chosen: list[Any] = [sharded_checkpoints(directory)[-1:]]  # rank 0 decides: others may look later
    dist.broadcast_object_list(chosen)
    if not chosen[0]:
        return 0
    states = get_state_dict(model, optimizers)
    state: dict[str, Any] = {"model": states[0], "optimizers": states[1]}
    dcp.load(state, checkpoint_id=chosen[0][0])
    set_state_dict(model, optimizers, model_state_dict=state["model"], optim_state_dict=state["optimizers"])
    return int(_STEP.fullmatch(chosen[0][0].name)[1])  # type: ignore[index]


def sharded_checkpoints(directory: str | Path) -> list[Path]:
    """The complete checkpoints in ``directory``, oldest first."""
    found = [entry for entry in Path(directory).glob("step_*") if _STEP.fullmatch(entry.name)]
    return sorted(found, key=lambda entry: entry.name)


def _flush(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
