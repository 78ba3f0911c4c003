"""Run suites, write one JSON line per case: ``python -m benchmarks.run [--suite X] [--op X] [--quick] ...``.

Every contender is built, checked against the specification, and only then timed, in turns with the others
of its case (see ``timing.py``). A contender that cannot be had here or fails its gate gets no number; the
record says why. Finished cases are on disk at once, so a stopped run continues with ``--resume``.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bop2nd_fast.stamp import ROOT, machine_name, stamp

from . import larq_adapter, results
from .registry import OURS, SUITES, UNITS, Case, Contender, GateError, Prepared, Unavailable, cases
from .tables import results_table
from .timing import FULL, QUICK, Plan, Sampler, Series, cpu_sampler, measure

QUICK_OUT = ROOT / "out" / "benchmarks"
Say = Callable[[str], None]


@dataclass
class _Entrant:
    """A contender with its gate's verdict; prepared only if it passed."""

    contender: Contender
    gate: str
    detail: str
    threads: int
    prepared: Prepared | None = None
    series: Series | None = None


def run(
    suites: Sequence[str] = SUITES,
    quick: bool = False,
    threads: int | None = None,
    out: Path | None = None,
    *,
    op: str | None = None,
    resume: bool = False,
    say: Say | None = None,
) -> list[dict[str, Any]]:
    """Measure all cases of ``suites`` and return their records (also written to ``out/<suite>.jsonl``).

    Args:
        suites: names out of ``registry.SUITES``.
        quick: tiny sizes and few rounds: checks the machinery, its numbers mean nothing.
        threads: overrides every case's own number of threads.
        out: directory of the result files. Default: ``benchmarks/results/<machine>``, or with ``quick``
            ``out/benchmarks``, so that tiny sizes never replace real results.
        op: only this operator.
        resume: leave out cases that ``out`` holds from this very commit.
        say: is told what is being measured.

    Raises:
        ValueError: unknown suite or operator, fewer than one thread.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    chosen = cases(suites, op, quick)
    mark = stamp()
    directory = out or (QUICK_OUT if quick else results.RESULTS / machine_name(mark))
    order = {s: [c.name for c in cases([s], quick=quick)] for s in suites}
    all_threads = torch.get_num_threads()
    records = []
    for case in chosen:
        done = {r["case"]: r for r in results.read(directory / f"{case.suite}.jsonl")}.get(case.name)
        same = (
            done
            and done["stamp"]["commit"] == mark["commit"]
            and not (mark["dirty"] or done["stamp"]["dirty"])
        )
        if resume and done and same and done["quick"] == quick:
            records.append(done)
        else:
            if say:
                say(f"{case.suite}: {case.name}")
            record = measure_case(case, QUICK if quick else FULL, threads, all_threads, quick, mark, say)
            results.put(directory, record, order[case.suite])
            records.append(record)
        if say:
            say("")
    torch.set_num_threads(all_threads)
    larq_adapter.stop()
    return records


def measure_case(
    case: Case,
    plan: Plan,
    threads: int | None,
    all_threads: int,
    quick: bool,
    mark: dict[str, Any],
    say: Say | None = None,
) -> dict[str, Any]:
    """Gate and time all contenders of one case; returns its record."""
    case_threads = threads or case.threads or all_threads
    torch.set_num_threads(case_threads)
    entrants: list[_Entrant] = []
    with torch.no_grad():
        for contender in case.contenders():
            if say:
                say(f"{case.suite}: {case.name}: {contender.name}")
            own = threads or (all_threads if contender.threads == 0 else contender.threads) or case_threads
            entrants.append(admit(contender, own, quick))
        running = {e.contender.name: _sampler(e) for e in entrants if e.prepared is not None}
        if say:
            say(f"{case.suite}: {case.name}: timing {len(running)} contenders in turns")
        with torch.inference_mode(case.inference):
            measured = measure(running, plan)
        for entrant in entrants:
            entrant.series = measured.get(entrant.contender.name)
        torch.set_num_threads(case_threads)
        record = _record(case, entrants, case_threads, quick, mark)
    for entrant in entrants:
        if entrant.prepared is not None and entrant.prepared.close is not None:
            entrant.prepared.close()
    del entrants, running, measured
    gc.collect()
    torch._dynamo.reset()
    return record


def admit(contender: Contender, threads: int, quick: bool) -> _Entrant:
    """Build a contender and pass it through its gate."""
    if quick and contender.slow:
        return _Entrant(contender, "unavailable", "left out of quick runs", threads)
    torch.set_num_threads(threads)
    try:
        prepared = contender.make()
        detail = prepared.check()
    except Unavailable as error:
        return _Entrant(contender, "unavailable", str(error), threads)
    except GateError as error:
        return _Entrant(contender, "failed", str(error), threads)
    except (RuntimeError, TypeError, ValueError) as error:  # a bug, but no reason to lose the other numbers
        message = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return _Entrant(contender, "failed", message, threads)
    return _Entrant(contender, "passed", detail, threads, prepared)


def _sampler(entrant: _Entrant) -> Sampler:
    assert entrant.prepared is not None
    if entrant.prepared.sample is not None:
        return entrant.prepared.sample
    assert entrant.prepared.run is not None
    return cpu_sampler(entrant.prepared.run, entrant.threads)


def _record(
    case: Case, entrants: Sequence[_Entrant], threads: int, quick: bool, mark: dict[str, Any]
) -> dict[str, Any]:
    ours = next((e.series for e in entrants if e.contender.role == OURS), None)
    count, scale = UNITS[case.unit]
    rows = []
    for entrant in entrants:
        c = entrant.contender
        row: dict[str, Any] = {"name": c.name, "role": c.role, "threads": entrant.threads}
        row |= {"gate": entrant.gate, "gate_detail": entrant.detail, "note": c.note}
        row |= {k: v for k in ("bytes", "operations", "items") if (v := getattr(c, k)) is not None}
        if entrant.series is not None:
            seconds = entrant.series.seconds()
            row["seconds"] = seconds.to_dict() | {"repeats": entrant.series.repeats}
            if (amount := getattr(c, count)) is not None:
                row["rate"] = amount / seconds.median / scale
            if ours is not None:
                row["ratio"] = entrant.series.ratio_to(ours).to_dict()
        if entrant.prepared is not None and entrant.prepared.memory is not None:
            row["memory"] = entrant.prepared.memory()
        rows.append(row)
    return {
        "schema": results.SCHEMA,
        "suite": case.suite,
        "op": case.op,
        "case": case.name,
        "shapes": case.shapes,
        "networks": list(case.networks),
        "tags": list(case.tags),
        "unit": case.unit,
        "threads": threads,
        "quick": quick,
        "contenders": rows,
        "stamp": mark,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 1 if one of our own contenders failed its gate."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.split("\n")[0])
    parser.add_argument("--suite", action="append", choices=SUITES, help="may be repeated; default: all")
    parser.add_argument("--op", help="only cases of this operator")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to check that everything runs")
    parser.add_argument("--threads", type=int, help="instead of each case's own number of threads")
    parser.add_argument("--out", type=Path, help="directory of the result files")
    parser.add_argument("--resume", action="store_true", help="keep results that are from this commit")
    parser.add_argument(
        "--larq-python", help="an interpreter that has larq_compute_engine (see larq_adapter.py)"
    )
    chosen = parser.parse_args(arguments)
    if chosen.larq_python:
        larq_adapter.use_interpreter(chosen.larq_python)
    console = Console(width=None if sys.stdout.isatty() else 150)
    suites = chosen.suite or list(SUITES)
    try:
        total = len(cases(suites, chosen.op, chosen.quick))
        columns = (BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("", total=total)

            def say(text: str) -> None:
                progress.update(task, description=text) if text else progress.advance(task)

            records = run(
                suites, chosen.quick, chosen.threads, chosen.out, op=chosen.op, resume=chosen.resume, say=say
            )
    except ValueError as error:
        print(f"benchmarks.run: {error}", file=sys.stderr)
        return 2
    for suite in suites:
        if part := [r for r in records if r["suite"] == suite]:
            console.print(results_table(part))
    failed = [
        f"{r['suite']}/{r['case']}: {c['name']}: {c['gate_detail']}"
        for r in records
        for c in r["contenders"]
        if c["gate"] == "failed"
    ]
    for line in failed:
        console.print(f"[bold red]gate failed[/] {line}", highlight=False)
    if chosen.quick:
        console.print("Quick run: it shows that everything works; its numbers mean nothing.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
