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

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint_file import PREVIOUS, UNFIT, CheckpointError, load, load_latest, save
from .checkpoint_sharded import resume_sharded, save_sharded, sharded_checkpoints

__all__ = [
    "PREVIOUS",
    "CheckpointError",
    "Run",
    "load",
    "load_latest",
    "restore",
    "resume_sharded",
    "save",
    "save_sharded",
    "sharded_checkpoints",
]


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
        """Write the checkpoint: ``step`` steps are done. Raises as ``checkpoint.save``."""
        states = {name: _state_of(member) for name, member in self.members.items()}
        save(self.path, {"step": int(step), "members": states, "random": _state_of(_GlobalRandom())})

    def resume(self) -> int:
        """Restore the newest usable checkpoint; returns how many steps it had done, 0 if there is none.

        Raises:
            CheckpointError: it is damaged, was saved with other members, or a member refuses its part.
                Nothing is changed then.
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
        members = {**self.members, _RANDOM: _GlobalRandom()}
        restore(members, {**state["members"], _RANDOM: state["random"]}, self.path)
        return int(state["step"])


_RANDOM = "global random state"


class _GlobalRandom:
    """The random state of the CPU and, if CUDA is in use, of its devices, as a member of a run."""

    def state_dict(self) -> dict[str, Any]:
        has_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if has_cuda else []}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["cpu"])
        if torch.cuda.is_available():
            for device, saved in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
                torch.cuda.set_rng_state(saved, device)


def restore(members: Mapping[str, Any], states: Mapping[str, Any], where: str | Path) -> None:
    """Load every member's saved state, or none: if one refuses, all get back what they had.

    Meanwhile a copy of the members' states is kept on the CPU. ``where`` is named in the error.

    Raises:
        CheckpointError: a member refuses its state.
    """
    before = {name: _copied(_state_of(member)) for name, member in members.items()}
    name = ""
    try:
        for name, member in members.items():
            _load(member, states[name])
    except BaseException as error:
        for other, member in members.items():
            _load(member, before[other])
        if isinstance(error, UNFIT):
            raise CheckpointError(f"the {name} in {where} does not fit: {error}") from error
        raise


def _state_of(member: Any) -> Any:
    return member.get_state() if isinstance(member, torch.Generator) else member.state_dict()


def _load(member: Any, state: Any) -> None:
    if isinstance(member, torch.Generator):
        member.set_state(state)
    else:
        member.load_state_dict(state)


def _copied(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.detach().clone() if state.device.type == "cpu" else state.detach().cpu()
    if isinstance(state, dict):
        result = copy.copy(state)  # a module's OrderedDict keeps its _metadata
        for key, value in state.items():
            result[key] = _copied(value)
        return result
    if isinstance(state, (list, tuple)) and type(state) in (list, tuple):
        return type(state)(_copied(value) for value in state)
    return copy.deepcopy(state)
