"""The parts of the reports, made from result records: tables, a paragraph about the machine, pictures."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from . import results
from .goals import Goal, best
from .registry import BOUND, GPU_SUITES, OURS, all_goals, suite
from .tables import byte_count, duration, significant

Records = Sequence[dict[str, Any]]
HEADER = ("case", "contender", "threads", "median", "10 % – 90 %", "rate", "time / ours")
SINGLE = "– single calls"
# What is not a figure of timed rows, and its aim.
UNTIMED_GOALS = (("compute-sanitizer memcheck and racecheck, --sanitize", "clean"),)


class ReportError(RuntimeError):
    """The report cannot be made, or the documents do not match; the message says what to do."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]], rule: str = "") -> str:
    """A Markdown table; columns after the first are right-aligned, unless ``rule`` says otherwise."""
    lines = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
    lines.insert(1, rule or "|---" + "|--:" * (len(header) - 1) + "|")
    return "\n".join(lines)


def link(text: str, machine: str, directory: Path, document: Path) -> str:
    """To the numbers of a machine, relative to the document."""
    return f"[{text}]({os.path.relpath(directory / machine / 'README.md', document.parent)})"


def result_rows(record: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Gate, role or "single", and the cells of ``HEADER``, for each line of a record; the first names it."""
    for i, entry in enumerate(record["contenders"]):
        cells = [record["case"] if i == 0 else "", entry["name"], str(entry["threads"])]
        if "seconds" not in entry:
            yield entry["gate"], [*cells, f"{entry['gate']}: {entry['gate_detail']}", "", "", ""]
            continue
        rate = f"{significant(entry['rate'])} {record['unit']}" if "rate" in entry else ""
        if bound := entry.get("bound"):
            rate += f", {bound['share']:.0%} of its bound"
        ratio = f"{entry['ratio']['median']:.2f}" if "ratio" in entry and entry["role"] != BOUND else ""
        yield entry["role"], [*cells, *_times(entry["seconds"]), rate, ratio]
        if single := entry.get("single"):
            times = f"{single['ratio']:.2f}" if "ratio" in single else ""
            yield "single", ["", SINGLE, "", *_times(single), "", times]


def _times(seconds: Mapping[str, float]) -> tuple[str, str]:
    return duration(seconds["median"]), f"{duration(seconds['p10'])} – {duration(seconds['p90'])}"


def terminal_table(records: Records) -> Table:
    """One suite's records for a terminal: a block per case, ours in bold."""
    result = Table(title=f"suite {records[0]['suite']}", title_justify="left")
    for name, width in zip(HEADER, (34, 44), strict=False):
        result.add_column(name, max_width=width)
    for name in HEADER[2:]:
        result.add_column(name, justify="right", no_wrap=True)
    styles = {OURS: "bold", "failed": "red", "unavailable": "dim", "single": "dim"}
    for record in records:
        for kind, cells in result_rows(record):
            row: list[str | Text] = [*cells]
            if kind in ("failed", "unavailable"):
                reason = Text(cells[3], overflow="ellipsis", no_wrap=True)
                reason.truncate(44, overflow="ellipsis")
                row[3:] = ["-", "", "", reason]
            result.add_row(*row, style=styles.get(kind, ""))
        result.add_section()
    return result


def suite_block(records: Records, name: str) -> str:
    """Every contender of every case of a suite."""
    chosen = [r for r in records if r["suite"] == name]
    if not chosen:
        return f"No results of suite `{name}` yet."
    rows = []
    for kind, (case, who, *cells) in (row for record in chosen for row in result_rows(record)):
        rows.append([case, f"**{who}**" if kind == OURS else who, *cells])
    text, memory = table(HEADER, rows), memory_rows(chosen)
    if memory:
        text += "\n\n" + table(("case", "contender", "what", "bytes", "ours is smaller by"), memory)
    return text


def compare_block(path: Path) -> str:
    """Old and new side by side: what ``bop2nd bench --compare BASE --out`` wrote."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [
        [
            *(r[key] for key in ("case", "contender")),
            *(duration(r[key]) for key in ("old_s", "new_s")),
            *(f"{r['median']:.2f}", f"{r['low']:.2f} – {r['high']:.2f}"),
        ]
        for r in found
    ]
    new = results.newest(found)
    head = (
        f"Commits {found[0]['base']} and {new['commit'][:12]} in turns, {new['date'][:10]}: the ratio is the "
        "median of rounds, with its 95 % interval."
    )
    return f"{head}\n\n" + table(("case", "contender", "old", "new", "new / old", "95 %"), rows)


def memory_rows(records: Records) -> list[list[str]]:
    rows = []
    for record in records:
        entries = [e for e in record["contenders"] if "memory" in e]
        ours: dict[str, int] = next((e["memory"] for e in entries if e["role"] == OURS), {})
        for entry in entries:
            for key, value in entry["memory"].items():
                factor = f"{value / ours[key]:.2f}x" if key in ours and entry["role"] != OURS else ""
                rows.append([record["case"], entry["name"], key.replace("_", " "), byte_count(value), factor])
    return rows


def goals_block(records: Records) -> str:
    """Every goal on CPUs with its measured figure and its verdict."""
    return table(("goal", "aim", "measured", "verdict"), goal_rows(all_goals(), records))


def goal_rows(goals: Sequence[Goal], records: Records) -> list[list[str]]:
    rows = []
    for goal in goals:
        verdict = goal.verdict(records)
        marked = "**missed**" if verdict == "missed" else verdict
        rows.append([goal.name, goal.aimed(), goal.text(goal.value(records)), marked])
    return rows


def gpu_goals_block(directory: Path) -> str:
    """Every GPU goal with its figure, from the one machine that has results of a GPU; else open."""
    names = [p.parent.name for name in GPU_SUITES for p in sorted(directory.glob(f"*/{name}.jsonl"))]
    if len(set(names)) > 1:
        raise ReportError(f"several machines have results of a GPU: {', '.join(names)}")
    records = results.read_all(directory / names[0]) if names else []
    records = [r for r in records if r["suite"] in GPU_SUITES]
    rows = goal_rows(all_goals(GPU_SUITES), records)
    rows += [[name, aim, "-", "open"] for name, aim in UNTIMED_GOALS]
    text = table(("goal on an H200", "aim", "measured", "verdict"), rows)
    if records:
        mark = records[-1]["stamp"]
        software = f"torch {mark['torch']}, Triton {mark['triton']}, commit {mark['commit']}"
        text += f"\n\nMeasured on {mark['gpu']}, {software}."
    return text


def gpu_dispatch_block() -> str:
    """What decides which kernel runs on a GPU, with reasons: ``backends.gpu_table()``."""
    from bop2nd_fast import backends

    rows = [
        [limit.backend, ", ".join(f"`{op}`" for op in limit.ops), limit.chip, limit.what, str(limit.value)]
        + [limit.reason, limit.measured or "not yet"]
        for limit in backends.gpu_table()
    ]
    return table(("kernels", "operators", "chips", "decision", "value", "reason", "measured"), rows)


def machine_block(records: Records) -> str:
    """One paragraph: where and with what the results were measured."""
    if not records:
        return "No results yet."
    last, stamps = results.newest(records), [r["stamp"] for r in records]
    commits = sorted({s["commit"] + ("+changes" if s["dirty"] else "") for s in stamps})
    flags = ", ".join(last["cpu_flags"])
    return (
        f"Measured on {last['processor']} ({flags}); kernels: `{last['active_backend']}`. "
        f"torch {last['torch']}, {last['compiler']}. Commit {', '.join(commits)}, {str(last['date'])[:10]}."
    )


def summary_block(records: Records) -> str:
    """For the front page: our time and how often it fits into the best of each family of baselines."""
    rows = []
    for record in records:
        ours = next((e for e in record["contenders"] if e["role"] == OURS and "seconds" in e), None)
        declared = suite(record["suite"])
        if ours is None or not declared.summary(record):
            continue
        found = {family: best(record, names) for family, names in declared.families.items()}
        against = ", ".join(f"{value:.3g}x {family}" for family, value in found.items() if value is not None)
        rows.append([f"{record['suite']}: {record['case']}", duration(ours["seconds"]["median"]), against])
    return table(("work", "bop2nd_fast", "faster than"), rows) if rows else "No results yet."


def pictures_block(directory: Path) -> str:
    """The PNGs of a machine, linked from its own folder."""
    found = [f"![{p.stem.replace('_', ' ')}]({p.name})" for p in sorted(directory.glob("*.png"))]
    return "\n".join(found) or "No pictures yet."


def machines_block(machines: Mapping[str, Records], directory: Path, document: Path) -> str:
    """Every machine with its kernels, its date and how many goals it met, linked relative to the document."""
    rows = []
    for name, records in machines.items():
        last = results.newest(records)
        verdicts = [goal.verdict(records) for goal in all_goals()]
        counts = ", ".join(f"{verdicts.count(v)} {v}" for v in ("met", "missed", "open") if v in verdicts)
        where = link(name, name, directory, document)
        rows.append([where, last["processor"], f"`{last['active_backend']}`", str(last["date"])[:10], counts])
    return table(("results", "processor", "kernels", "measured", "goals"), rows)
