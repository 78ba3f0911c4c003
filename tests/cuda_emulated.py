"""The CUDA operators on emulated blocks: what ``csrc/register_cuda.cpp`` registers, for host tensors.

The binding is compiled with ``tests/cpp/cuda_emulated_launch.cpp`` in place of the launchers, into a
namespace of its own.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bop2nd_fast  # noqa: F401  (defines the operators whose schemas are copied)
from bop2nd_fast.cuda_library import OPS

ROOT = Path(__file__).resolve().parent.parent


def _build() -> Path:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler: the emulated CUDA library cannot be built")
    torch_root = Path(torch.__file__).parent
    sources = [
        ROOT / "csrc" / "register_cuda.cpp",
        ROOT / "tests" / "cpp" / "cuda_emulated_launch.cpp",
    ]
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off"]
    flags += ["-Wall", "-Wno-unknown-pragmas", "-DBOP2ND_EMULATED"]
    flags += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030A0000"]
    flags += [f"-I{torch_root / 'include'}", f"-I{sysconfig.get_paths()['include']}"]
    digest = hashlib.sha256(f"{torch.__version__} {compiler} {flags}".encode())
    for path in sorted(
        [*sources, *(ROOT / "csrc").rglob("*.h"), ROOT / "tests" / "cpp" / "cuda_host_block.h"]
    ):
        digest.update(path.read_bytes())
    library = ROOT / "build" / "cuda" / f"emulated-{digest.hexdigest()[:16]}.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    with (library.parent / "emulated.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes: one builds, the others wait
        if not library.exists():
            for old in library.parent.glob("emulated-*.so"):
                old.unlink()
            part = library.with_suffix(".part")
            libraries = [f"-L{torch_root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
            command = [compiler, *flags, "-x", "c++", "-", "-o", str(part), *libraries]
            together = "".join(f'#include "{path}"\n' for path in sources)  # torch's headers are read once
            done = subprocess.run(command, input=together, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            part.rename(library)
    return library


_schemas = torch.library.Library("bop2nd_emulated", "DEF")


class Emulated:
    """The operators of the emulated library, and its control symbols."""

    def __init__(self, symbols: ctypes.CDLL) -> None:
        self.symbols = symbols
        symbols.bop2nd_cuda_calls.restype = ctypes.c_int64

    def __getattr__(self, op: str) -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(torch.ops.bop2nd_emulated, op)
        return function

    def become(self, chip: int, n_multiprocessors: int = 132) -> None:
        self.symbols.bop2nd_emulated_chip(chip, n_multiprocessors)

    def calls(self) -> int:
        return int(self.symbols.bop2nd_cuda_calls())


@functools.cache
def emulated_library() -> Emulated:
    """Built, loaded and registered once in a process; skips the test where there is no compiler."""
    path = _build()
    for op in OPS:
        schema = str(getattr(torch.ops.bop2nd, op).default._schema)
        _schemas.define(schema.replace("bop2nd::", ""))
    return Emulated(ctypes.CDLL(str(path)))
