"""Builds targets of CMakeLists.txt for tests, in the folders that ``make test`` and ``make arm-test`` use."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARM_TOOLS = all(map(shutil.which, ("aarch64-linux-gnu-g++", "qemu-aarch64")))


def run(*command: object, **options: object) -> str:
    """Standard output of a command that succeeds."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(target: str, arm: bool = False) -> Path:
    """Build one target, one process at a time, and return the build folder."""
    folder = ROOT / "build" / ("arm" if arm else "cmake")
    folder.mkdir(parents=True, exist_ok=True)
    toolchain = ["--toolchain", ROOT / "cmake/aarch64-linux-gnu.cmake"] if arm else []
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", *toolchain)
        run("cmake", "--build", folder, "--target", target)
    return folder
