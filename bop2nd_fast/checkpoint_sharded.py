"""Checkpoints of sharded parameters (``fully_shard``): one directory per step, written by all processes.

``checksums.json`` in it holds the SHA-256 of every other file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

from .checkpoint_file import UNFIT, CheckpointError

_STEP = re.compile(r"step_(\d{10})")
_CHECKSUMS = "checksums.json"


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
        shutil.rmtree(part, ignore_errors=True)  # an unfinished writer's
    dist.barrier()
    states = get_state_dict(model, optimizers)
    dcp.save(
        {"model": states[0], "optimizers": states[1]},
        storage_writer=dcp.FileSystemWriter(part, sync_files=True),
    )
    sums = {name: digest for share in _everywhere(_checksums(part)) for name, digest in share.items()}
    if dist.get_rank() == 0:
        _write_flushed(part / _CHECKSUMS, json.dumps(sums, indent=1))
        _flush(part)
        shutil.rmtree(target, ignore_errors=True)  # this step's from before a resume
        os.replace(part, target)
        _flush(directory)
        for old in sharded_checkpoints(directory)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return target


def resume_sharded(directory: str | Path, model: Any, optimizers: Any) -> int:
    """Restore the newest whole checkpoint of ``directory``; returns its step, 0 if there is none.

    Any number of processes may have saved it. A damaged one is passed over, with a warning. Collective.

    Raises:
        CheckpointError: on every process: all checkpoints are damaged, or it belongs to something else.
    """
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    chosen: list[Any] = [sharded_checkpoints(directory)[::-1]]  # rank 0 decides: others may look later
    dist.broadcast_object_list(chosen)
    reasons: list[str] = []
    for path in chosen[0]:
        damage = [what for share in _everywhere(_damage(path)) for what in share]
        if damage:
            reasons.append(f"{path} is damaged ({'; '.join(damage)})")
            continue
        if reasons:
            warnings.warn(f"{'; '.join(reasons)}; going on from {path}", RuntimeWarning, stacklevel=2)
        states = get_state_dict(model, optimizers)
        state: dict[str, Any] = {"model": states[0], "optimizers": states[1]}
        try:
            dcp.load(state, checkpoint_id=path)
            set_state_dict(
                model, optimizers, model_state_dict=state["model"], optim_state_dict=state["optimizers"]
            )
        except (dcp.api.CheckpointException, *UNFIT) as error:
            raise CheckpointError(f"{path} does not fit this model and its optimizers: {error}") from error
        return int(_STEP.fullmatch(path.name)[1])  # type: ignore[index]
    if reasons:
        raise CheckpointError("; ".join(reasons))
    return 0


def sharded_checkpoints(directory: str | Path) -> list[Path]:
    """The complete checkpoints in ``directory``, oldest first."""
    if not Path(directory).is_dir():
        return []
    found = [entry for entry in Path(directory).iterdir() if _STEP.fullmatch(entry.name)]
    return sorted(found, key=lambda entry: entry.name)


def _share(names: list[str]) -> list[str]:
    """Those of the files that this process reads."""
    import torch.distributed as dist

    return sorted(names)[dist.get_rank() :: dist.get_world_size()]


def _everywhere(value: Any) -> list[Any]:
    """The value of every process, on every process."""
    import torch.distributed as dist

    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _checksums(directory: Path) -> dict[str, str]:
    return {name: _sha256(directory / name) for name in _share([e.name for e in directory.iterdir()])}


def _damage(directory: Path) -> list[str]:
    """What is wrong with this process's share of the files; nothing for a whole checkpoint."""
    try:
        wanted = json.loads((directory / _CHECKSUMS).read_text(encoding="utf-8"))
        return [
            f"the checksum of {name} does not fit"
            for name in _share(list(wanted))
            if _sha256(directory / name) != wanted[name]
        ]
    except UNFIT as error:
        return [f"{type(error).__name__}: {error}"]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def _write_flushed(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
