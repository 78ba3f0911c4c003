"""What the command line prints: two consoles, names that cannot harm a terminal, mistakes as one line."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch
import typer
from rich.console import Console
from rich.markup import escape

out = Console()
err = Console(stderr=True)


def shown(value: object) -> str:
    """Text for a console: control characters and bytes that are no text are spelled out, markup escaped."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value))
    return escape(text)


@contextmanager
def user_errors(*kinds: type[Exception], status: int = 2) -> Iterator[None]:
    """Turn exceptions of these kinds, and a lack of memory, into one line on standard error and a status."""
    try:
        yield
    except kinds as error:
        fail(one_line(error), status)
    except (MemoryError, RuntimeError) as error:
        if not _lacks_memory(error):
            raise
        fail(f"there is not enough memory ({one_line(error)})", status)


def fail(message: str, status: int) -> NoReturn:
    """Print ``message`` as an error and end with ``status``."""
    err.print(f"[bold red]error:[/] {shown(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(status) from None


def one_line(error: BaseException) -> str:
    """What went wrong, in the user's words where the error is the operating system's."""
    if isinstance(error, ModuleNotFoundError):
        return f"the package {error.name!r} is missing; install it with pip install 'bop2nd-fast[cli]'"
    if (
        isinstance(error, OSError)
        and error.errno is not None
        and not isinstance(error.filename, (str, bytes))
    ):
        return f"the output could not be written: {error.strerror}"
    if not isinstance(error, OSError) or error.errno is None:
        return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if not isinstance(error.filename, (str, bytes)):
        return f"the output could not be written: {error.strerror}"
    name = os.fsdecode(error.filename)
    if error.strerror != os.strerror(error.errno):  # a sentence of ours
        return f"{error.strerror} {name}"
    sentences = {
        errno.ENOENT: f"there is no file {name}",
        errno.EISDIR: f"{name} is a folder; allowed is a file",
        errno.ENOTDIR: f"{name} cannot be: a part of this path is a file, not a folder",
        errno.EEXIST: f"{name} is a file; allowed is a folder",
        errno.EACCES: f"no permission for {name}",
        errno.EPERM: f"no permission for {name}",
        errno.ENOSPC: f"the disk is full: {name} could not be written",
        errno.EDQUOT: f"the quota is used up: {name} could not be written",
        errno.EROFS: f"{name} lies on a file system that is read-only",
    }
    return sentences.get(error.errno, f"{name}: {error.strerror}")


def refuse_existing(*paths: Path, instead: str) -> None:
    """Raise ``ValueError`` for the first of ``paths`` that exists; ``instead`` says what is allowed."""
    for path in paths:
        if os.path.lexists(path):
            raise ValueError(f"{path} exists; {instead}")


def _lacks_memory(error: BaseException) -> bool:
    """torch's CPU allocator raises a plain RuntimeError."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)
