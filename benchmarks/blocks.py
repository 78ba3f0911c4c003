"""The parts of the reports, made from result records: tables, a paragraph about the machine, pictures."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .families import FAMILIES, best
from .goals import GOALS
from .registry import BOUND, OURS
from .tables import byte_count, duration, significant

Records = Sequence[dict[str, Any]]


class ReportError(RuntimeError):
    """The report cannot be made, or the documents do not match; the message says what to do."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; columns after the first are right-aligned."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|--:" * (len(header) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def suite_block(records: Records, suite: str) -> str:
    """Every contender of every case of a suite."""
    rows = []
    chosen = [r for r in records if r["suite"] == suite]
    if not chosen:
        return f"No results of suite `{suite}` yet."
    for record in chosen:
        for i, entry in enumerate(record["contenders"]):
            case = record["case"] if i == 0 else ""
            name = f"**{entry['name']}**" if entry["role"] == OURS else entry["name"]
            if "seconds" not in entry:
                rows.append(
                    [
                        case,
                        name,
                        str(entry["threads"]),
                        f"{entry['gate']}: {entry['gate_detail']}",
                        "",
                        "",
                        "",
                    ]
                )
                continue
            s = entry["seconds"]
            rate = f"{significant(entry['rate'])} {record['unit']}" if "rate" in entry else ""
            times = f"{entry['ratio']['median']:.2f}" if "ratio" in entry and entry["role"] != BOUND else ""
            spread = f"{duration(s['p10'])} – {duration(s['p90'])}"
            rows.append([case, name, str(entry["threads"]), duration(s["median"]), spread, rate, times])
    header = ("case", "contender", "threads", "median", "10 % – 90 %", "rate", "time / ours")
    text = table(header, rows)
    memory = memory_rows(chosen)
    if memory:
        text += "\n\n" + table(("case", "contender", "what", "bytes", "ours is smaller by"), memory)
    return text


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
    """Every goal with its measured figure and its verdict."""
    rows = []
    for goal in GOALS:
        value = goal.value(records)
        measured = "-" if value is None else f"{significant(value)} {goal.unit}".replace(" x", "x")
        aim = f"{significant(goal.aim)} {goal.unit}".replace(" x", "x")
        verdict = goal.verdict(records)
        rows.append([goal.name, f"≥ {aim}", measured, f"**{verdict}**" if verdict == "missed" else verdict])
    return table(("goal", "aim", "measured", "verdict"), rows)


def gpu_goals_block(directory: Path) -> str:
    """Every GPU goal with its figure, from the one machine whose directory has a ``gpu.jsonl``; else open."""
    from . import gpu  # its cases need Triton when they run, not here

    paths = sorted(directory.glob("*/gpu.jsonl"))
    if len(paths) > 1:
        raise ReportError(f"several machines have a gpu.jsonl: {', '.join(p.parent.name for p in paths)}")
    lines = paths[0].read_text().splitlines() if paths else []
    read = [r for line in lines if not (r := json.loads(line))["dry_run"]]
    records = {r["case"]: {row["name"]: row for row in r.get("contenders", [])} for r in read}
    rows = []
    for goal in gpu.GOALS:
        measured, verdict = "-", "open"
        with contextlib.suppress(KeyError):  # a case or a contender without a number
            value = goal.value(records[goal.case])
            verdict = goal.verdict(value)
            measured, verdict = significant(value), "**missed**" if verdict == "missed" else verdict
        rows.append([f"{goal.case}: {goal.name}", goal.aimed(), measured, verdict])
    rows += [[name, aim, "-", "open"] for name, aim in gpu.UNTIMED_GOALS]
    text = table(("goal on an H200", "aim", "measured", "verdict"), rows)
    if read:
        mark = read[-1]["stamp"]
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
    stamps = [r["stamp"] for r in records]
    if not stamps:
        return "No results yet."
    last = max(stamps, key=lambda s: str(s["date"]))
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
        if not (
            record["suite"] in ("step", "train_step", "inference")
            or {"stage", "1024x1024"} & set(record["tags"])
        ):
            continue
        ours = next((e for e in record["contenders"] if e["role"] == OURS and "seconds" in e), None)
        if ours is None:
            continue
        against = []
        for family, names in FAMILIES[record["suite"]].items():
            if (value := best(record, names)) is not None:
                against.append(f"{value:.3g}x {family}")
        rows.append(
            [f"{record['suite']}: {record['case']}", duration(ours["seconds"]["median"]), ", ".join(against)]
        )
    if not rows:
        return "No results yet."
    return table(("work", "bop2nd_fast", "faster than"), rows)


def pictures_block(directory: Path) -> str:
    """The PNGs of a machine, linked from its own folder."""
    found = sorted(directory.glob("*.png"))
    if not found:
        return "No pictures yet."
    return "\n".join(f"![{p.stem.replace('_', ' ')}]({p.name})" for p in found)


def machines_block(machines: Mapping[str, Records], directory: Path, document: Path) -> str:
    """Every machine with its kernels, its date and how many goals it met, linked relative to the document."""
    rows = []
    for name, records in machines.items():
        last = max((r["stamp"] for r in records), key=lambda s: str(s["date"]))
        verdicts = [goal.verdict(records) for goal in GOALS]
        counts = ", ".join(f"{verdicts.count(v)} {v}" for v in ("met", "missed", "open") if v in verdicts)
        link = f"[{name}]({os.path.relpath(directory / name / 'README.md', document.parent)})"
        rows.append([link, last["processor"], f"`{last['active_backend']}`", str(last["date"])[:10], counts])
    return table(("results", "processor", "kernels", "measured", "goals"), rows)
