"""Facts about this machine and its software that a bug report or a benchmark needs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from . import __version__, backends


def versions() -> dict[str, str]:
    """What is installed, in the order in which to print it; a missing part says so."""
    return {
        "bop2nd_fast": __version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "Triton": _installed("triton"),
        "C++ compiler": _compiler(),
        "processor": f"{_processor()}, {os.cpu_count()} logical cores",
        "threads": _threads(),
        "instruction set": backends.active("cpu"),
        "extension _C": backends.extension(),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use",
    }


def _threads() -> str:
    note = ""
    if backends.parallel() is False:
        note = ", but the extension was built without OpenMP and runs on one"
    return f"torch uses {torch.get_num_threads()}{note}"


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _compiler() -> str:
    name = os.environ.get("CXX") or "c++"
    path = shutil.which(name)
    if path is None:
        return f"{name} not found"
    output = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    return output.partition("\n")[0] or path


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
