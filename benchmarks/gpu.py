"""The GPU kernels on one machine: check, time, capture, write. ``python -m benchmarks.gpu --out DIR``.

Runs suite ``gpu`` like any other (``run.py``): every contender is compared with the specification before it
is timed, in turns, by CUDA events over rotating buffers; what fails or raises gets no number, the others go
on, and the exit status is 1. One JSON line per case goes to ``DIR/gpu.jsonl``; all of it is meant to take
less than 8 minutes on an H200, and cases that would start later are skipped and say so. The goals follow.

``--tune`` times candidate tiles for ``kernels/tuning.py`` instead. ``--sanitize`` runs every kernel once on
small sizes, checked and not timed: ``compute-sanitizer --tool memcheck python -m benchmarks.gpu --sanitize``.
``--dry-run`` runs the cases on tiny sizes in Triton's interpreter: no GPU, no timing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import results
from .gpu_operators import Setting
from .registry import GPU_SUITES, all_goals
from .run import measured

MINUTES = 7.5  # no case starts later


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 1 where a check failed or nothing ran, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="directory of the result file")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--tune", action="store_true", help="time candidate tiles instead of the cases")
    parser.add_argument("--sanitize", action="store_true", help="every kernel once on small sizes, no timing")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes in an interpreter, no timing")
    chosen = parser.parse_args(arguments)
    if chosen.out is None and not chosen.sanitize:
        parser.error("--out is needed, except with --sanitize")
    if chosen.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    elif not torch.cuda.is_available():
        text = "no CUDA GPU here, nothing was measured (--dry-run checks the cases without one)"
        print(f"benchmarks.gpu: {text}", file=sys.stderr)
        return 2
    device = "cpu" if chosen.dry_run else "cuda"
    if chosen.sanitize:
        from .gpu_sanitize import run_all_kernels

        return run_all_kernels(device)
    if chosen.tune:
        from .gpu_tune import tune

        return tune(Setting(device, chosen.dry_run), chosen.out)
    return run_all(chosen.out, chosen.only, chosen.dry_run)


def run_all(out: Path, only: str = "", dry: bool = False) -> int:
    """Run the cases whose name contains ``only`` and tell the goals; returns the exit status."""
    status = measured(GPU_SUITES, dry, out=out, only=only, dry=dry, minutes=MINUTES)
    if not dry:
        records = results.read_all(out)
        print("\n".join(goal.line(records) for goal in all_goals(GPU_SUITES)))
    return status


if __name__ == "__main__":
    sys.exit(main())
