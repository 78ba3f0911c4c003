"""Files that are either the old one or the new one, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

# A folder that may be written but not read, a file system that flushes no folders: the rename stands.
_NO_FOLDER_FLUSH = (errno.EACCES, errno.EINVAL, errno.ENOTSUP)


def atomic_write(path: str | Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, flush it to the disk, rename it over ``path``.

    A crash at any moment leaves the previous content, and at most a temporary file that the next call for the
    same path removes. A symbolic link is followed: the file it points to is replaced, the link stays. A file
    that exists keeps its permissions, a new one gets those that the umask leaves.

    Raises:
        OSError: there is no such folder, ``path`` is no regular file (a folder, a device, a pipe), no
            permission, the disk is full. It names ``path`` or the folder; the old content stays.
        Exception: whatever ``write`` raises; the old content stays.
    """
    target, mode = check_target(path)
    with _errors_name(target):
        _remove_left_over(target)
        raw = _Temporary.beside(target)
        try:
            if mode is not None:
                os.fchmod(raw.fileno(), mode)
            _fill(raw, write)
            os.replace(raw.name, target)
        except BaseException:
            Path(raw.name).unlink(missing_ok=True)
            raise
        finally:
            raw.close()  # only now: until then its lock says that somebody is at work
        _flush_folder(target.parent)


def check_target(path: str | Path) -> tuple[Path, int | None]:
    """Where `atomic_write` would write, links followed, and the permissions of the file there (None: new).

    Raises:
        OSError: there is no such folder, or ``path`` is no regular file.
    """
    target = Path(os.path.realpath(path))
    try:
        found = os.stat(path)
    except FileNotFoundError:
        if not target.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "there is no folder", str(target.parent)) from None
        return target, None
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "only regular files are written, not", str(path))
    return target, stat.S_IMODE(found.st_mode)


class _Temporary(io.FileIO):
    """A new, locked file; remembers the first error of a write, which ``torch.save`` hides behind its own."""

    failure: OSError | None = None

    @classmethod
    def beside(cls, target: Path) -> _Temporary:
        while True:
            name = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
            file = cls(os.fspath(name), "xb")  # the permissions of any new file: the umask is never touched
            with contextlib.suppress(OSError):  # no locks here: then nothing is ever taken for a left-over
                fcntl.flock(file.fileno(), fcntl.LOCK_EX)
            if name.exists():  # else another writer came between the two calls and took it for one
                return file
            file.close()

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failure = self.failure or error
            raise


def _fill(raw: _Temporary, write: Callable[[IO[bytes]], object]) -> None:
    file = io.BufferedWriter(raw)
    try:
        write(file)
        file.flush()
        os.fsync(raw.fileno())
        file.detach()
    except Exception as error:
        with contextlib.suppress(OSError, ValueError):
            file.close()  # tries to write once more
        if raw.failure is None or error is raw.failure:
            raise
        raise raw.failure from error


@contextlib.contextmanager
def _errors_name(target: Path) -> Iterator[None]:
    """Let errors of the file system name the file that was wanted, not the temporary one."""
    try:
        yield
    except OSError as error:
        part = isinstance(error.filename, str) and _is_part(Path(error.filename).name, target)
        if error.errno is not None and (error.filename is None or part):
            raise type(error)(error.errno, error.strerror, str(target)) from error
        raise


def _is_part(name: str, target: Path) -> bool:
    return re.fullmatch(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.part", name) is not None


def _remove_left_over(target: Path) -> None:
    """Remove temporary files of killed writers of ``target``: those that nobody holds a lock on."""
    try:
        names = [entry.name for entry in os.scandir(target.parent) if _is_part(entry.name, target)]
    except PermissionError:
        return  # a folder that may be written but not listed
    for part in map(target.with_name, names):
        with contextlib.suppress(OSError):  # in use, gone, or somebody else's
            handle = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                part.unlink()
            finally:
                os.close(handle)


def _flush_folder(folder: Path) -> None:
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDER_FLUSH:
            raise
