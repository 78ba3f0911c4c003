"""Barriers of the CUDA kernels: their bodies run with warps as threads, watched by ThreadSanitizer.

Emulated blocks run one thread after the other, so a missing ``__syncthreads`` would not show in them. Here
every barrier is also left out in turn, which must be noticed: by a race, or by a wrong value.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLAGS = (
    "-std=c++17",
    "-O1",
    "-g1",
    "-fsanitize=thread",
    "-ffp-contract=off",
    "-Wno-unknown-pragmas",
    "-pthread",
)
RACE = 66

# Kernels of cuda_warp_test.cpp: the barriers of a block, and those whose absence does not show.
# With slices of k the last barrier of the loop is followed by another one before anything is overwritten, and
# the one before a slice reports its arrival orders atomics, which are never a race here (the GPU needs it).
BARRIERS = {
    "small": (8, ()),
    "lean": (8, ()),
    "split": (6, (2, 3)),
    "lean split": (8, (2, 3)),
    "terms": (3, ()),
    "skinny": (1, ()),
    "step, whole words": (2, ()),
    "step, ragged rows": (2, ()),
}


@pytest.fixture(scope="module")
def program() -> Path:
    """The test program, built once for all processes; skips where ThreadSanitizer is not to be had."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    sources = [*(ROOT / "csrc" / "cuda").glob("*.h"), *(ROOT / "csrc" / "core").glob("*.h")]
    sources += [*(ROOT / "csrc" / "cpu").glob("*.h"), *(ROOT / "tests" / "cpp").glob("cuda_*")]
    digest = hashlib.sha256(f"{compiler} {FLAGS}".encode())
    for path in sorted(sources):
        digest.update(path.read_bytes())
    built = ROOT / "build" / "cuda" / f"warps-{digest.hexdigest()[:16]}"
    built.parent.mkdir(parents=True, exist_ok=True)
    with (built.parent / "warps.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            for old in built.parent.glob("warps-*"):
                old.unlink()
            part = built.with_suffix(".part")
            source = ROOT / "tests" / "cpp" / "cuda_warp_test.cpp"
            done = subprocess.run(
                [compiler, *FLAGS, str(source), "-o", str(part)], capture_output=True, text=True, check=False
            )
            if "tsan" in done.stderr or "-fsanitize=thread" in done.stderr:
                pytest.skip(f"ThreadSanitizer is not installed: {done.stderr.strip()}")
            assert done.returncode == 0, done.stderr
            part.rename(built)
    if "unexpected memory mapping" in _run(built).stderr:
        pytest.skip("ThreadSanitizer cannot run here: it needs `setarch -R` and the right to use it")
    return built


def _run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Newer kernels place libraries where ThreadSanitizer keeps its own memory, unless told not to.
    launcher = ["setarch", "-R"] if shutil.which("setarch") else []
    return subprocess.run(
        [*launcher, str(program), *arguments],
        env={**os.environ, "TSAN_OPTIONS": f"halt_on_error=1 exitcode={RACE}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_every_kernel_is_named(program: Path) -> None:
    assert sorted(_run(program).stdout.splitlines()) == sorted(BARRIERS)


@pytest.mark.parametrize("kernel", BARRIERS)
def test_warps_at_once_meet_no_race(kernel: str, program: Path) -> None:
    done = _run(program, kernel)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == BARRIERS[kernel][0]


@pytest.mark.parametrize(
    ("kernel", "barrier"),
    [(k, i) for k, (n, silent) in BARRIERS.items() for i in range(n) if i not in silent],
)
def test_a_barrier_left_out_is_noticed(kernel: str, barrier: int, program: Path) -> None:
    assert _run(program, kernel, str(barrier)).returncode in (1, RACE)
