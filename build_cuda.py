"""For setup.py: which CUDA toolkit can build ``_C_cuda``, asked before anything is compiled.

BOP2ND_BUILD_CUDA is 0, 1 or auto (the default). ``auto`` never ends an installation: whatever is wrong with
the toolkit is said in a banner, and the package is installed without CUDA C++ kernels. ``1`` ends it with the
reason.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAME = "bop2nd_fast._C_cuda"
# Machine code for these, PTX where later chips of a family (11.0, 12.1, ...) are to be served as well.
ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0+PTX;12.0+PTX"
LOWEST = (8, 0)  # m16n8k256, cp.async, bf16 conversions
TOO_OLD = ("Kepler", "Maxwell", "Pascal", "Volta", "Turing")  # torch's names of what lies below
WHERE_LIBRARIES_LIE = ("lib64", "lib", "lib/*-linux-gnu", "targets/*/lib")


class UnfitError(RuntimeError):
    """CUDA C++ kernels cannot be built here; the message says why."""


@dataclass(frozen=True)
class Toolkit:
    """A complete CUDA toolkit: its folder, the folder of its runtime library, what it can compile for."""

    home: Path
    libraries: Path
    release: tuple[int, int]
    architectures: frozenset[tuple[int, int]]


def banner(*lines: str) -> None:
    """A warning that cannot be overlooked among a builder's output."""
    print("=" * 88, *lines, "=" * 88, sep="\n", file=sys.stderr)


def choose() -> Toolkit | None:
    """The toolkit to build with, or None: without.

    It is named to torch's builder: CUDA_HOME, TORCH_CUDA_ARCH_LIST. Exits with the reason where
    BOP2ND_BUILD_CUDA=1 cannot be obeyed, or has another value.
    """
    choice = os.environ.get("BOP2ND_BUILD_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        sys.exit(f"BOP2ND_BUILD_CUDA={choice!r}: allowed are 0, 1 and auto")
    if choice == "0":
        return None
    import torch

    if torch.version.cuda is None:
        if choice == "1":
            sys.exit("BOP2ND_BUILD_CUDA=1: this torch is a CPU build")
        return None
    try:
        toolkit = find()
        if toolkit.release[0] != int(torch.version.cuda.partition(".")[0]):
            found = "{}.{}".format(*toolkit.release)
            raise UnfitError(
                f"{toolkit.home} is CUDA {found}, torch was built with CUDA {torch.version.cuda}: "
                f"they must agree in the first number"
            )
        wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
        architectures = buildable(wanted, toolkit.architectures)
    except UnfitError as unfit:
        if choice == "1":
            sys.exit(f"BOP2ND_BUILD_CUDA=1: {unfit}")
        _without(str(unfit))
        return None
    os.environ["CUDA_HOME"] = str(toolkit.home)  # torch takes a link's folder for it
    os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
    return toolkit


def _without(reason: str) -> None:
    banner(
        "bop2nd_fast: installing WITHOUT CUDA C++ kernels (_C_cuda):",
        reason,
        "Everything else is there; on GPUs Triton's kernels run. BOP2ND_BUILD_CUDA=0 silences this.",
    )


def find() -> Toolkit:
    """The first complete toolkit: CUDA_HOME alone if it is set, else of nvcc on the PATH or /usr/local/cuda.

    Raises:
        UnfitError: none is complete; the message says what each place lacks.
    """
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    homes = [Path(named)] if named else _homes_of(shutil.which("nvcc"))
    lacking = []
    for home in dict.fromkeys(homes):
        lacks, libraries = _lacks(home)
        if libraries is not None and not lacks:
            return Toolkit(home, libraries, *_ask(home / "bin" / "nvcc"))
        lacking.append(f"{home} lacks {', '.join(lacks)}")
    where = "CUDA_HOME" if named else "nvcc on the PATH and /usr/local/cuda"
    raise UnfitError(f"no complete CUDA toolkit ({where}): {'; '.join(lacking)}")


def _homes_of(nvcc: str | None) -> list[Path]:
    """Folders that may be the toolkit of an nvcc that may be a link or a script which calls another one."""
    homes = []
    if nvcc is not None:
        homes += [Path(nvcc).resolve().parent.parent, Path(nvcc).absolute().parent.parent]
        told = _output([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull])[1]
        if here := re.search(r"^#\$ _(?:THERE|HERE)_=(.+)$", told, re.MULTILINE):
            homes.append(Path(here[1].strip()).parent)
    return [*homes, Path("/usr/local/cuda")]


def _output(command: list[str]) -> tuple[bool, str]:
    """Whether a program ended well, and all it said (or why it did not start)."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    except (OSError, subprocess.SubprocessError) as error:
        return False, str(error)
    return done.returncode == 0, done.stdout + done.stderr


def _lacks(home: Path) -> tuple[list[str], Path | None]:
    """What a toolkit's folder lacks, and where its runtime library lies."""
    lacks = [] if os.access(home / "bin" / "nvcc", os.X_OK) else ["bin/nvcc"]
    headers = (home / "include" / "cuda_runtime.h", *home.glob("targets/*/include/cuda_runtime.h"))
    if not any(header.exists() for header in headers):
        lacks.append("include/cuda_runtime.h")
    folders = [folder for pattern in WHERE_LIBRARIES_LIE for folder in home.glob(pattern)]
    libraries = next((folder for folder in folders if (folder / "libcudart.so").exists()), None)
    if libraries is None:
        lacks.append("lib64/libcudart.so")
    return lacks, libraries


def _ask(nvcc: Path) -> tuple[tuple[int, int], frozenset[tuple[int, int]]]:
    """An nvcc's release, and the architectures it compiles for.

    Raises:
        UnfitError: it does not answer.
    """
    answers = []
    for question in ("--version", "--list-gpu-arch"):
        well, told = _output([str(nvcc), question])
        if not well:
            raise UnfitError(f"{nvcc} {question} failed: {told.strip()}")
        answers.append(told)
    release = re.search(r"release (\d+)\.(\d+)", answers[0])
    known = frozenset((int(a), int(b)) for a, b in re.findall(r"compute_(\d+)(\d)\b", answers[1]))
    if release is None or not known:
        raise UnfitError(f"{nvcc} names neither its release nor its architectures")
    return (int(release[1]), int(release[2])), known


def buildable(wanted: str, known: frozenset[tuple[int, int]]) -> str:
    """Of a list as in TORCH_CUDA_ARCH_LIST, what our kernels and this nvcc can be compiled for.

    Names of families ("Hopper") are left to torch; "native" means every architecture, for the machine that
    builds may have no GPU. PTX of something that had to go is made for the newest that stays.

    Raises:
        UnfitError: nothing stays.
    """
    kept: list[str] = []
    ptx_lost = False
    for entry in re.split(r"[\s;,]+", wanted.replace("native", ARCHITECTURES).strip(" ;,")):
        number = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", entry)
        if number is None:
            if not entry.startswith(TOO_OLD):
                kept.append(entry)
            continue
        capability = int(number[1]), int(number[2])
        if capability >= LOWEST and capability in known:
            kept.append(entry)
        else:
            ptx_lost = ptx_lost or number[3] is not None
    if not kept:
        newest = "{}.{}".format(*max(known))
        raise UnfitError(
            f"of {wanted!r} nothing can be compiled: the kernels need 8.0 or above, nvcc knows up to {newest}"
        )
    if ptx_lost and not any(entry.endswith("+PTX") for entry in kept):
        kept[-1] += "+PTX"
    return ";".join(kept)


def tolerant_builder() -> Any:
    """torch's BuildExtension; under ``auto`` it goes on without ``_C_cuda`` where that cannot be built."""
    from setuptools.errors import BaseError, CompileError, LinkError
    from torch.utils.cpp_extension import BuildExtension

    forced = os.environ.get("BOP2ND_BUILD_CUDA") == "1"

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except (RuntimeError, ValueError, OSError, subprocess.SubprocessError) as error:
                self._go_on(error)
            except (BaseError, CompileError, LinkError) as error:
                self._go_on(error)

        def _go_on(self, error: Exception) -> None:
            rest = [extension for extension in self.extensions if extension.name != NAME]
            if forced or len(rest) == len(self.extensions):
                raise error
            _without(f"building them failed: {error}")
            Path(self.get_ext_fullpath(NAME)).unlink(missing_ok=True)  # of an earlier build
            self.extensions = rest
            super().build_extensions()  # what is built already is not built again; a fault of its own ends it

    return Build
