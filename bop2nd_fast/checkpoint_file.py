"""One checkpoint in one file: whole, checked by its checksum, with its predecessor beside it.

The file is what ``torch.save`` writes, a zip archive, with the archive's comment set to
``bop2nd_fast sha256`` and the SHA-256, in hexadecimal, of every byte before the comment's length.
``torch.load`` reads it too.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import warnings
from pathlib import Path
from typing import IO, Any

import torch

from .atomic_write import atomic_write

PREVIOUS = ".previous"
_MARK = b"bop2nd_fast sha256 "
_COMMENT = len(_MARK) + 64
_END = 2 + _COMMENT  # the comment's length and the comment
_CHUNK = 1 << 20
# What torch.load and load_state_dict raise for content that is not what they expect.
UNFIT = (
    *(RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError),
    *(OSError, EOFError, ImportError, pickle.UnpicklingError),
)


class CheckpointError(RuntimeError):
    """A checkpoint is damaged or belongs to something else; the message says which and why."""


def save(path: str | Path, state: Any, keep_previous: bool = True) -> None:
    """Write ``state`` (what ``torch.load(weights_only=True)`` reads) to ``path``.

    After a crash or an error at any moment ``path`` holds the old or the new state. The state before the
    newest stays as ``<path>.previous``, against files that a failing disk spoils later; a save that fails
    leaves it too, and a damaged file never takes its place. One writer at a time.

    Raises:
        CheckpointError: ``state`` holds something that could not be read back. Nothing is written then.
        OSError: as ``atomic_write``.
    """
    path = Path(os.path.realpath(path))
    kept = path.with_name(f".{path.name}{PREVIOUS}.part")
    kept.unlink(missing_ok=True)  # left by a writer that was killed
    previous = path.with_name(path.name + PREVIOUS)
    if keep_previous and path.is_file() and (not previous.exists() or _is_whole_file(path)):
        _second_name(path, kept)
    try:
        atomic_write(path, lambda file: _write(file, state))
    except BaseException:
        kept.unlink(missing_ok=True)
        raise
    if kept.exists():
        os.replace(kept, previous)


def _second_name(path: Path, name: Path) -> None:
    try:
        os.link(path, name)
    except OSError:  # a file system without links
        shutil.copyfile(path, name)


def _write(file: IO[bytes], state: Any) -> None:
    hashed = _Hashed(file)
    try:
        torch.save(state, hashed)  # type: ignore[arg-type]
        digest = hashed.finish().hexdigest()
        file.write(_COMMENT.to_bytes(2, "little") + _MARK + digest.encode())
        file.flush()
        torch.load(file.name, map_location="cpu", mmap=True, weights_only=True)
    except RuntimeError as error:
        interrupt = _interrupt_behind(error)
        if interrupt is None:
            raise
        raise interrupt from error
    except (pickle.PickleError, AttributeError, TypeError) as error:
        raise CheckpointError(f"this state cannot be written and read back ({_first_line(error)})") from error


def _interrupt_behind(error: BaseException | None) -> KeyboardInterrupt | None:
    """torch.save closes its archive after Ctrl-C, and that raises an error of its own."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error


class _Hashed:
    """A file for ``torch.save`` that hashes what passes; the last two bytes (no comment) are held back."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest, self._held = file, hashlib.sha256(), b""

    def write(self, data: Any) -> int:
        data = self._held + bytes(data)
        self._held = data[-2:]
        self._digest.update(data[:-2])
        self._file.write(data[:-2])
        return len(data)

    def flush(self) -> None:
        pass

    def finish(self) -> Any:
        assert self._held == b"\0\0", "torch.save ends with a zip archive's empty comment"
        return self._digest


def load(path: str | Path) -> Any:
    """The state in ``path``, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, or cannot be read as a checkpoint.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path} is not a checkpoint, it is no regular file")
        with path.open("rb") as file:
            if not _is_whole(file):
                raise CheckpointError(
                    f"{path} is not a checkpoint, or it is damaged (its checksum does not fit)"
                )
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except (FileNotFoundError, CheckpointError):
        raise
    except UNFIT as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint ({_first_line(error)})") from error


def _is_whole_file(path: Path) -> bool:
    with path.open("rb") as file:
        return _is_whole(file)


def _is_whole(file: IO[bytes]) -> bool:
    left = os.fstat(file.fileno()).st_size - _END
    digest = hashlib.sha256()
    while left > 0 and (data := file.read(min(left, _CHUNK))):
        digest.update(data)
        left -= len(data)
    end = file.read(_END + 1)
    return left == 0 and end == _COMMENT.to_bytes(2, "little") + _MARK + digest.hexdigest().encode()


def load_latest(path: str | Path) -> Any | None:
    """The state in ``path``; the previous one, with a warning, if ``path`` is damaged or lost; None if there
    is none.

    Raises:
        CheckpointError: ``path`` is damaged and there is no usable previous one.
    """
    path = Path(os.path.realpath(path))
    previous = path.with_name(path.name + PREVIOUS)
    try:
        return load(path)
    except FileNotFoundError:
        if not previous.exists():
            return None
        reason: Any = f"there is no file {path}"
    except CheckpointError as error:
        if not previous.exists():
            raise
        reason = error
    state = load(previous)
    warnings.warn(f"{reason}; going on from {previous}", RuntimeWarning, stacklevel=2)
    return state


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
