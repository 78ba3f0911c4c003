"""Tables and pictures from the results: ``python -m benchmarks.report [--machine NAME] [--check]``.

Writes PNGs beside the results and replaces what stands between the markers of README.md and
benchmarks/README.md; a marker is a pair of comments, each on a line of its own:

    <!-- benchmark:NAME -->
    <!-- /benchmark -->

NAME is one of ``summary``, ``goals``, ``gpu-goals``, ``gpu-dispatch``, ``machine``, ``pictures`` or a suite;
``NAME@MACHINE`` takes another machine's results than the default one. ``--check`` changes nothing and fails
if a table is not what the committed results give.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bop2nd_fast.atomic_write import atomic_write

from . import results
from .families import FAMILIES, best
from .goals import GOALS
from .registry import BOUND, OURS, SUITES
from .stamp import ROOT
from .tables import byte_count, duration, significant

DOCUMENTS = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
MARKER = re.compile(
    r"^<!-- benchmark:(?P<name>[a-z_-]+)(?:@(?P<machine>[\w.-]+))? -->\n(?P<body>.*?)^<!-- /benchmark -->$",
    re.MULTILINE | re.DOTALL,
)

Records = Sequence[dict[str, Any]]


class ReportError(RuntimeError):
    """The report cannot be made, or the documents do not match; the message says what to do."""


# ------------------------------------------------------------------------------------------ blocks


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


def pictures_block(directory: Path, document: Path) -> str:
    """The PNGs of a machine, linked relative to the document."""
    found = sorted(directory.glob("*.png"))
    if not found:
        return "No pictures yet."
    links = [(p.stem.replace("_", " "), os.path.relpath(p, document.parent)) for p in found]
    return "\n".join(f"![{name}]({link})" for name, link in links)


# --------------------------------------------------------------------------------------- documents


def default_machine(directory: Path) -> str:
    """The machine whose CPU results are the newest, by the dates of their stamps.

    Raises:
        ReportError: there are none.
    """
    names = sorted({p.parent.name for suite in SUITES for p in directory.glob(f"*/{suite}.jsonl")})
    if not names:
        raise ReportError(f"no results in {directory.name}/: run benchmarks.run first")
    return max(names, key=lambda name: max(r["stamp"]["date"] for r in results.read_all(directory / name)))


def block(name: str, machine: str, directory: Path, document: Path) -> str:
    """The text that belongs between the markers ``name``; raises :class:`ReportError` for an unknown one."""
    records = results.read_all(directory / machine)
    if name in SUITES:
        return suite_block(records, name)
    if name == "pictures":
        return pictures_block(directory / machine, document)
    if name == "gpu-goals":
        return gpu_goals_block(directory)
    if name == "gpu-dispatch":
        return gpu_dispatch_block()
    makers = {"summary": summary_block, "goals": goals_block, "machine": machine_block}
    if name not in makers:
        raise ReportError(
            f"{document.name}: unknown marker benchmark:{name}; there are "
            f"{', '.join(['pictures', 'gpu-goals', 'gpu-dispatch', *makers, *SUITES])}"
        )
    return makers[name](records)


def updated(document: Path, machine: str, directory: Path) -> str:
    """A document's text with every marked block made anew.

    Raises:
        ReportError: it has no marker, an unclosed or an unknown one.
    """
    text = document.read_text()
    found = len(MARKER.findall(text))
    if not found:
        raise ReportError(
            f"{document.name} has no '<!-- benchmark:NAME -->' marker: its tables cannot be generated"
        )
    if found != text.count("<!-- benchmark:") or found != text.count("<!-- /benchmark -->"):
        raise ReportError(
            f"{document.name} has a benchmark marker without its '<!-- /benchmark -->', or the reverse"
        )

    def replace(match: re.Match[str]) -> str:
        where = match["machine"] or machine
        head = match[0].partition("\n")[0]
        return f"{head}\n{block(match['name'], where, directory, document)}\n<!-- /benchmark -->"

    return MARKER.sub(replace, text)


def write_documents(documents: Sequence[Path], machine: str, directory: Path) -> list[Path]:
    """Bring the documents up to date; returns those that changed."""
    changed = []
    for document in documents:
        text = updated(document, machine, directory)
        if text != document.read_text():
            atomic_write(document, lambda file, text=text: file.write(text.encode()))  # type: ignore[misc]
            changed.append(document)
    return changed


def differences(documents: Sequence[Path], machine: str, directory: Path) -> list[str]:
    """One line for every document whose tables are not what the results give."""
    lines = []
    for document in documents:
        if not document.exists():
            lines.append(f"{document.name} does not exist")
            continue
        try:
            if updated(document, machine, directory) != document.read_text():
                lines.append(f"{document.name} does not match the results: run python -m benchmarks.report")
        except ReportError as error:
            lines.append(str(error))
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--machine", help="directory under benchmarks/results; default: the one measured last"
    )
    parser.add_argument("--results", type=Path, default=results.RESULTS, help="instead of benchmarks/results")
    parser.add_argument("--check", action="store_true", help="only compare; fail if a table differs")
    parser.add_argument("--pictures-only", action="store_true", help="leave the documents alone")
    chosen = parser.parse_args(arguments)
    try:
        machine = chosen.machine or default_machine(chosen.results)
        if not results.read_all(chosen.results / machine):
            raise ReportError(f"no results in {chosen.results / machine}")
        if chosen.check:
            problems = differences(DOCUMENTS, machine, chosen.results)
            for line in problems:
                print(f"benchmarks.report: {line}", file=sys.stderr)
            return 1 if problems else 0
        from .pictures import draw_all  # matplotlib is an extra

        for path in draw_all(results.read_all(chosen.results / machine), chosen.results / machine):
            print(f"wrote {os.path.relpath(path)}")
        if not chosen.pictures_only:
            for path in write_documents(DOCUMENTS, machine, chosen.results):
                print(f"updated {path.name} in {path.parent.name}/")
    except ReportError as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
