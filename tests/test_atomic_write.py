"""Files written as a whole or not at all, whatever stands in their place and whatever happens meanwhile."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import resource
import subprocess
import sys
import tempfile
import textwrap
import threading
from pathlib import Path

import pytest
import torch

from bop2nd_fast.atomic_write import atomic_write

NEW = b"new"


def write_new(path: str | Path) -> None:
    atomic_write(path, lambda file: file.write(NEW))


@pytest.fixture
def umask():
    """Sets the process's umask for one test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def in_child(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run ``program`` after ``from bop2nd_fast.atomic_write import atomic_write`` in a new process."""
    text = "import os, sys\nfrom bop2nd_fast.atomic_write import atomic_write\n" + textwrap.dedent(program)
    command = [sys.executable, "-c", text, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    write_new(path)
    assert path.read_bytes() == NEW and os.listdir(tmp_path) == ["file"]


def test_an_error_of_the_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half of the n")
        raise ZeroDivisionError("the writer's own")

    with pytest.raises(ZeroDivisionError, match="the writer's own"):
        atomic_write(path, fail)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o000])
def test_a_new_file_has_the_permissions_of_the_umask(tmp_path, umask, mask):
    umask(mask)
    write_new(tmp_path / "file")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~mask


def test_an_existing_file_keeps_its_permissions(tmp_path, umask):
    path = tmp_path / "secret"
    path.write_bytes(b"old")
    path.chmod(0o600)
    write_new(path)
    assert path.read_bytes() == NEW and path.stat().st_mode & 0o777 == 0o600


def test_the_umask_is_never_touched(tmp_path, umask):
    umask(0o077)
    modes, stop = set(), threading.Event()

    def other_thread() -> None:
        n = 0
        while not stop.is_set():
            handle = os.open(tmp_path / f"other{n % 50}", os.O_CREAT | os.O_TRUNC, 0o666)
            modes.add(os.fstat(handle).st_mode & 0o777)
            os.close(handle)
            os.unlink(tmp_path / f"other{n % 50}")
            n += 1

    thread = threading.Thread(target=other_thread)
    thread.start()
    for _ in range(300):
        write_new(tmp_path / "file")
    stop.set()
    thread.join()
    assert modes == {0o600}


@pytest.mark.parametrize("name", ["a[b].pt", "*.pt", "?", "a b.pt", "ü.pt", ".hidden", "-", "a\nb"])
def test_any_name_that_a_file_can_have(tmp_path, name):
    write_new(tmp_path / name)
    write_new(tmp_path / name)
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_bytes() == NEW


# ------------------------------------------------------------------------------- what stands there


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "far").mkdir()
    target = tmp_path / "far" / "target"
    target.write_bytes(b"old")
    link, dangling = tmp_path / "link", tmp_path / "dangling"
    link.symlink_to(target)
    dangling.symlink_to("far/other")
    write_new(link)
    write_new(dangling)
    assert link.is_symlink() and dangling.is_symlink()
    assert target.read_bytes() == NEW == (tmp_path / "far" / "other").read_bytes()
    assert sorted(os.listdir(tmp_path / "far")) == ["other", "target"]


def test_what_is_no_regular_file_is_left_alone(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "pipe", "/dev/null", tmp_path / "folder", tmp_path / "loop"):
        before = os.lstat(path)
        with pytest.raises(OSError, match=re.escape(str(path))):
            write_new(path)
        assert os.lstat(path).st_mode == before.st_mode and os.lstat(path).st_ino == before.st_ino
    assert sorted(os.listdir(tmp_path)) == ["folder", "loop", "pipe"]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        write_new(tmp_path / "no" / "file")
    assert caught.value.filename == str(tmp_path / "no") and "there is no folder" in str(caught.value)
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(NotADirectoryError):
        write_new(tmp_path / "file" / "below")


def test_a_folder_without_permission_is_said():
    with tempfile.TemporaryDirectory() as name:  # not pytest's: no other user may enter that
        folder, path = Path(name), Path(name) / "file"
        path.write_bytes(b"old")
        folder.chmod(0o555)
        done = in_child(
            """
            if os.geteuid() == 0:
                os.setgid(65534), os.setuid(65534)
            assert open(sys.argv[1], "rb").read() == b"old"
            try:
                atomic_write(sys.argv[1], lambda file: file.write(b"new"))
            except PermissionError as error:
                print(error.filename)
            """,
            path,
        )
        folder.chmod(0o755)
        assert done.stdout.strip() == str(path), done.stderr
        assert path.read_bytes() == b"old" and os.listdir(folder) == ["file"]


# --------------------------------------------------------------------------------------- full disks


@pytest.mark.parametrize(
    "write",
    [
        lambda file: file.write(bytes(1 << 20)),
        lambda file: [file.write(bytes(1000)) for _ in range(1000)],
        lambda file: torch.save({"a": torch.zeros(1 << 18)}, file),
    ],
    ids=["one write", "many writes", "torch.save"],
)
def test_a_full_disk_is_the_error_and_the_old_file_stays(tmp_path, write):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        with pytest.raises(OSError) as caught:
            atomic_write(path, write)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(path)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


# ------------------------------------------------------------------------------- killed and parallel


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path):
    path = tmp_path / "run[1].pt"
    killed = in_child(
        "atomic_write(sys.argv[1], lambda file: (file.write(b'half'), os.kill(os.getpid(), 9)))", path
    )
    assert killed.returncode == -9
    (left,) = os.listdir(tmp_path)
    neighbours = [".run[1].pt.old.0123abcd.part", ".run1.pt.0123abcd.part", ".run[1].pt.part", left + ".part"]
    for name in neighbours:
        (tmp_path / name).write_bytes(b"")
    in_use = tmp_path / ".run[1].pt.00000000.part"
    with in_use.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write_new(path)
    assert sorted(os.listdir(tmp_path)) == sorted([path.name, in_use.name, *neighbours])


def test_writers_of_the_same_file_do_not_hurt_each_other(tmp_path):
    path = tmp_path / "file"
    errors = []

    def writer(letter: bytes) -> None:
        try:
            for _ in range(100):
                atomic_write(path, lambda file: [file.write(letter * 1000) for _ in range(10)])
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=writer, args=(letter,)) for letter in (b"a", b"b", b"c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    content = path.read_bytes()
    assert not errors and len(content) == 10_000 and len(set(content)) == 1
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_only_file_systems_that_cannot_flush_folders_are_excused(tmp_path, monkeypatch, number):
    flush = os.fsync

    def fsync(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(number, os.strerror(number))
        flush(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    if number == errno.EIO:
        with pytest.raises(OSError, match="file"):
            write_new(tmp_path / "file")
    else:
        write_new(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == NEW
