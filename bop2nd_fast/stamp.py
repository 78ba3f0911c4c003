"""The stamp every result carries: which machine, which software, which commit."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from . import __version__, backends, system_report

ROOT = Path(__file__).resolve().parent.parent
FLAGS = (
    *("avx2", "fma", "avx512f", "avx512bw", "avx512vl"),
    *("avx512_vnni", "avx512_bitalg", "avx512_bf16", "amx_int8"),
)


def _cpu_flags() -> list[str]:
    """Those of the processor's flags that decide which kernel can run (Linux on x86; else none)."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return []
    found = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    present = set(found.group(1).split()) if found else set()
    return [flag for flag in FLAGS if flag in present]


def _git(*arguments: str) -> str:
    """What git says of the checkout; nothing for an installed package, whatever repository lies around it."""
    if not (ROOT / "csrc").is_dir():
        return ""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def stamp() -> dict[str, Any]:
    """Plain values describing this machine and this state of the project, now."""
    versions = system_report.versions()
    dirty = _git(
        "status",
        "--porcelain",
        "--untracked-files=no",
        "--",
        ".",
        ":!benchmarks/results",
        ":!studies/results",
        ":!*.md",
    )
    return {
        "processor": versions["processor"],
        "cpu_flags": _cpu_flags(),
        "cores": os.cpu_count() or 1,
        "active_backend": backends.active("cpu"),
        "openmp": backends.parallel(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "bop2nd_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": versions["Triton"],
        "compiler": versions["C++ compiler"],
        "system": f"{platform.system()} {platform.machine()}",
        "commit": _git("rev-parse", "--short=12", "HEAD") or "unknown",
        "dirty": bool(dirty),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def machine_name(values: dict[str, Any]) -> str:
    """A directory name for the machine of a stamp: processor and cores, without clock and trade marks."""
    model = str(values["processor"]).split(",")[0]
    model = re.sub(r"\((R|TM)\)|\bCPU\b|\bProcessor\b", " ", model, flags=re.IGNORECASE)
    words = re.findall(r"[a-z0-9.]+", model.lower())
    return "-".join([*words, f"{values['cores']}-cores"])
