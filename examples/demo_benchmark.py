"""The short benchmark of the demo: a few contenders of three cases of ``benchmarks/``, and their bars."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.registry import Case, Contender, cases
from benchmarks.run import measure_case
from benchmarks.suites import conv, step
from benchmarks.timing import Plan
from bop2nd_fast import plots
from bop2nd_fast.stamp import stamp

SHORT = Plan(rounds=15, min_sample_s=0.004, max_contender_s=1.5, min_samples=3)

# Case -> the contenders to measure and what to call them here.
STEP = {
    step.PACKED: "bop2nd_fast: one fused pass",
    step.COMPILED: "eager torch under torch.compile",
    step.ADAM: "torch.optim.Adam(fused=True)",
    step.CAREFUL: "eager torch, written with care",
    step.PUBLISHED: "eager torch, as published",
}
CONV = {
    conv.PACKED: "bop2nd_fast: pack, XNOR, popcount",
    conv.FP32[0]: "F.conv2d fp32",
    conv.FP32[1]: "F.conv2d fp32, channels-last",
    conv.BF16[1]: "F.conv2d bf16, channels-last",
}


def measure_short(path: Path, console: Console) -> list[dict[str, Any]]:
    """Measure, print a table, draw ``path``; returns the records.

    A contender whose result is not the specification's gets no number; the table then says why.
    """
    mark = stamp()
    all_threads = torch.get_num_threads()
    panels, records = [], []
    for case, names in _chosen():
        with console.status(f"measuring {case.suite}: {case.name}"):
            record = measure_case(case, SHORT, None, all_threads, False, mark)
        records.append(record)
        title = f"{_title(case)}, {record['threads']} thread{'s' if record['threads'] > 1 else ''}"
        panels.append((title, _bars(record, names)))
        table = Table("", "median", "10 % to 90 %", "factor", title=title, title_justify="left")
        for row in record["contenders"]:
            table.add_row(names[row["name"]], *_cells(row))
        console.print(table)
    torch.set_num_threads(all_threads)
    note = f"{mark['processor']}; whiskers: 10 % to 90 %; factors: time as a multiple of bop2nd_fast's"
    plots.bars(panels, path, "A short benchmark", note)
    return records


def _chosen() -> list[tuple[Case, dict[str, str]]]:
    """BinaryNet's step, and the binary convolution at a small and at a large image."""
    steps = [(case, STEP) for case in cases(["step"]) if case.name.startswith("BinaryNet")]
    stages = [(case, CONV) for case in cases(["conv"]) if conv.GOAL in case.tags]
    return [(_only(case, names), names) for case, names in [*steps, stages[0], stages[2]]]


def _only(case: Case, names: dict[str, str]) -> Case:
    """The case with these contenders alone, in this order."""

    def contenders() -> Sequence[Contender]:
        by_name = {contender.name: contender for contender in case.contenders()}
        return [by_name[name] for name in names]

    return dataclasses.replace(case, contenders=functools.partial(contenders))


def _title(case: Case) -> str:
    if case.suite == "step":
        n_weights, n_tensors = case.shapes["weights"], case.shapes["tensors"]
        return f"Optimizer step, {n_weights / 1e6:.1f} M weights in {n_tensors} tensors"
    return f"Convolution {case.name}, float in, float out"


def _bars(record: dict[str, Any], names: dict[str, str]) -> list[plots.Bar]:
    return [
        plots.Bar(names[row["name"]], s["median"], s["p10"], s["p90"], _factor(row))
        for row in record["contenders"]
        if (s := row.get("seconds"))
    ]


def _factor(row: dict[str, Any]) -> float | None:
    """Time as a multiple of ours: the median over rounds, in which both ran one after the other."""
    return None if row["role"] == "ours" else row["ratio"]["median"]


def _cells(row: dict[str, Any]) -> tuple[str, str, str]:
    if "seconds" not in row:
        return row["gate"], row["gate_detail"], ""
    s, factor = row["seconds"], _factor(row)
    spread = f"{s['p10'] * 1e3:.3g} to {s['p90'] * 1e3:.3g} ms"
    return f"{s['median'] * 1e3:.3g} ms", spread, "" if factor is None else f"{factor:.2f}x"
