"""The GPU kernels on one machine: check, time, capture, write. ``python -m benchmarks.gpu --out DIR``.

Every contender is compared with the specification (exact integers and bits, float64) before it is timed;
what fails or raises gets no number and the exit status is 1. Times are CUDA events over rotating buffers, the
contenders of a case in turns (``timing.py``). One JSON line per case goes to ``DIR/gpu.jsonl`` with the stamp
of machine, versions and commit; all of it is meant to take less than 8 minutes on an H200, and cases that
would start later are skipped and say so. What the machine lacks (a backend) stands there as absent.

``--tune`` times candidate tiles for ``kernels/tuning.py`` instead. ``--sanitize`` runs every kernel once on
small sizes, checked and not timed: ``compute-sanitizer --tool memcheck python -m benchmarks.gpu --sanitize``.
``--dry-run`` runs the cases on tiny sizes in Triton's interpreter: no GPU, no timing.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bop2nd_fast.stamp import stamp

from .gpu_cases import PEAK, cases
from .gpu_sanitize import run_all_kernels
from .gpu_setting import Contender, Setting, context_lost, failures
from .registry import GateError, Unavailable
from .timing import Plan, cuda_sampler, measure

PLAN = Plan(rounds=15, min_sample_s=0.004, max_contender_s=1.0)
MINUTES = 7.5  # no case starts later
Rows = dict[str, dict[str, Any]]  # of one case, by contender


@dataclass(frozen=True)
class Goal:
    """A figure made of one case's rows and its aim: at least; ``at_most``: at most; None: only to know it."""

    case: str
    name: str
    aim: float | None
    value: Callable[[Rows], float]
    at_most: bool = False

    def aimed(self) -> str:
        """The aim in words."""
        return "to know" if self.aim is None else f"{'≤' if self.at_most else '≥'} {self.aim:g}"

    def verdict(self, value: float) -> str:
        """``met``, ``missed``, or ``known`` where nothing is aimed at."""
        if self.aim is None:
            return "known"
        return "met" if (value <= self.aim if self.at_most else value >= self.aim) else "missed"


def _faster(ours: str, theirs: str) -> Callable[[Rows], float]:
    return lambda rows: rows[theirs]["seconds"]["median"] / rows[ours]["seconds"]["median"]


def _of_copy(ours: str) -> Callable[[Rows], float]:
    return lambda rows: rows[ours]["bytes_per_second"] / rows["copy"]["bytes_per_second"]


def _conv_goals(shape: str) -> tuple[Goal, ...]:
    case = f"conv 3x3 {shape}"
    return (
        Goal(case, "float to float over cuDNN", 1.5, _faster("triton", CUDNN)),
        Goal(case, "bits to bits over cuDNN", 3.0, _faster("triton bits to bits", CUDNN)),
        Goal(case, "CUDA C++, bits to bits over cuDNN", 3.0, _faster("cuda bits to bits", CUDNN)),
    )


def _peak(rows: Rows) -> float:
    return rows[PEAK]["products_per_second"] / 1e15


def _of_peak(rows: Rows) -> float:
    return rows["cuda"]["products_per_second"] / rows[PEAK]["products_per_second"]


def _host_us(rows: Rows) -> float:
    return rows["triton"]["host_seconds"] * 1e6


def _memory(rows: Rows) -> float:
    return rows["ours, eager"]["peak_bytes"] / rows[FAKE]["peak_bytes"]


LARGE, RESNET, TRAINING = "step, 64 M weights", "step, ResNet-18", "BinaryNet training step"
PACK, CUBLAS, CUDNN = "triton pack signs and mask", "cuBLAS bf16", "cuDNN bf16"
FAKE = "fake-quantized, eager"
GOALS = (
    Goal(LARGE, "of copy bandwidth", 0.9, _of_copy("triton")),
    Goal(LARGE, "over torch.compile", 1.3, _faster("triton", "torch.compile")),
    Goal(LARGE, "over Adam fused", 1.3, _faster("triton", "Adam fused")),
    Goal(LARGE, "over careful eager", 8.0, _faster("triton", "careful eager")),
    Goal(LARGE, "CUDA C++, time over Triton's", 1.03, _faster("triton", "cuda"), at_most=True),
    Goal(RESNET, "of copy bandwidth", 0.7, _of_copy("triton")),
    Goal(RESNET, "host microseconds", 25.0, _host_us, at_most=True),
    Goal("pack rows fp32", "of copy bandwidth", 0.85, _of_copy(PACK)),
    Goal("pack NCHW bf16", "of copy bandwidth", 0.85, _of_copy(PACK)),
    Goal("pack channels-last bf16", "of copy bandwidth", 0.85, _of_copy(PACK)),
    Goal("linear 8192^3", "over cuBLAS bf16", 1.4, _faster("triton", CUBLAS)),
    Goal("linear 8192^3", "tensor cores' peak from registers, 10^15 products a second", None, _peak),
    Goal("linear 8192^3", "CUDA C++, of the tensor cores' peak from registers", 0.7, _of_peak),
    Goal("linear 8192^3", "CUDA C++, over cuBLAS bf16", 3.0, _faster("cuda", CUBLAS)),
    Goal("linear batch 1, 4096^2", "over cuBLAS bf16", 8.0, _faster("triton", CUBLAS)),
    *_conv_goals("64ch 56x56"),
    *_conv_goals("128ch 28x28"),
    *_conv_goals("256ch 14x14"),
    *_conv_goals("512ch 7x7"),
    Goal(TRAINING, "graph over fake-quantized", 2.0, _faster("ours, CUDA graph", FAKE)),
    Goal(TRAINING, "peak memory, of fake-quantized", 0.5, _memory, at_most=True),
)
# What is not a ratio of timed rows, and its aim.
UNTIMED_GOALS = (("compute-sanitizer memcheck and racecheck, --sanitize", "clean"),)


def run_case(s: Setting, name: str, make: Callable[[], Iterator[Contender]]) -> dict[str, Any]:
    """Gate all contenders, then time those that passed, in turns. One that raises has its row."""
    rows: list[dict[str, Any]] = []
    passed = []
    contenders = make()
    while True:
        row: dict[str, Any] = {"name": "the operands", "gate": "passed"}
        rows.append(row)
        try:
            contender = next(contenders)
            row["name"] = contender.name
            contender.check()
            passed.append((contender, row))
        except StopIteration:
            rows.pop()
            break
        except GateError as error:
            row |= {"gate": "failed", "detail": str(error)}
        except Unavailable as error:
            row |= {"gate": "absent", "detail": str(error)}
        except failures() as error:
            row |= {"gate": "error", "detail": f"{type(error).__name__}: {error}"}
    record: dict[str, Any] = {"case": name, "contenders": rows}
    if (lost := context_lost(s)) is not None:
        record["lost"] = lost
    elif not s.dry:
        _time(passed, rows)
    return record


def _time(passed: list[tuple[Contender, dict[str, Any]]], rows: list[dict[str, Any]]) -> None:
    """Add the times of the contenders that passed to their rows."""
    try:
        series = measure({c.name: cuda_sampler(c.runs) for c, _ in passed}, PLAN)
    except failures() as error:
        rows.append({"name": "timing", "gate": "error", "detail": f"{type(error).__name__}: {error}"})
        return
    for contender, row in passed:
        seconds = series[contender.name].seconds()
        row["seconds"] = seconds.to_dict()
        row |= {
            f"{k}_per_second": v / seconds.median
            for k in ("bytes", "products")
            if (v := getattr(contender, k))
        }
        row |= contender.extra() if contender.extra else {}


def verdicts(records: dict[str, Rows]) -> Iterator[str]:
    """A line per goal: the figure against the aim, or open where a row has no number."""
    for goal in GOALS:
        try:
            value = goal.value(records[goal.case])
        except KeyError:
            yield f"open    {goal.case}: {goal.name} (aim {goal.aimed()})"
            continue
        yield f"{goal.verdict(value):7} {goal.case}: {goal.name} {value:.3g} (aim {goal.aimed()})"


def run_all(s: Setting, out: Path, only: str) -> int:
    """Run the cases whose name contains ``only``; returns the exit status."""
    out.mkdir(parents=True, exist_ok=True)
    mark, start, failed = stamp(), time.monotonic(), 0
    records: dict[str, Rows] = {}
    lost: str | None = None  # why nothing more can run in this process
    with (out / "gpu.jsonl").open("w") as file:
        for name, make in cases(s).items():
            if only not in name:
                continue
            late = time.monotonic() - start > MINUTES * 60
            record: dict[str, Any]
            if lost or late:
                record = {"case": name, "skipped": lost or "out of time"}
            else:
                record = run_case(s, name, make)
            lost = lost or record.get("lost")
            file.write(json.dumps(record | {"dry_run": s.dry, "stamp": mark}) + "\n")
            file.flush()
            records[name] = {row["name"]: row for row in record.get("contenders", [])}
            for row in records[name].values():
                failed += row["gate"] in ("failed", "error")
                time_us = f"{row['seconds']['median'] * 1e6:12.1f} us" if "seconds" in row else ""
                print(
                    f"{name:28} {row['name']:36} {row['gate']:7}{time_us} {row.get('detail', '')}", flush=True
                )
            gc.collect()
    if lost:
        print(f"the GPU's context is lost ({lost}): run the other cases by --only")
    if not s.dry:
        print("\n".join(verdicts(records)))
    print(f"{time.monotonic() - start:.0f} s, {failed} checks failed, written to {out / 'gpu.jsonl'}")
    return 1 if failed or not records else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="directory of the result file")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--tune", action="store_true", help="time candidate tiles instead of the cases")
    parser.add_argument("--sanitize", action="store_true", help="every kernel once on small sizes, no timing")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny sizes in Triton's interpreter, no timing"
    )
    chosen = parser.parse_args(arguments)
    if chosen.out is None and not chosen.sanitize:
        parser.error("--out is needed, except with --sanitize")
    if chosen.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
        setting = Setting("cpu", True)
    elif torch.cuda.is_available():
        setting = Setting("cuda", False)
    else:
        text = "no CUDA GPU here, nothing was measured (--dry-run checks the cases without one)"
        print(f"benchmarks.gpu: {text}", file=sys.stderr)
        return 2
    if chosen.sanitize:
        return run_all_kernels(setting.device)
    if chosen.tune:
        from .gpu_tune import tune

        return tune(setting, chosen.out)
    return run_all(setting, chosen.out, chosen.only)


if __name__ == "__main__":
    sys.exit(main())
