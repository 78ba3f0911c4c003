"""Run suites, write one JSON line per case: ``python -m benchmarks.run [--suite X] [--op X] [--quick] ...``.

Every contender is built, checked against the specification, and only then timed, in turns with the others
of its case (see ``timing.py``). A contender that cannot be had here or fails its gate gets no number; the
record says why. Finished cases are on disk at once, so a stopped run continues with ``--resume``.
``--compare BASE`` measures an old commit against this tree instead (see ``compare.py``).
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bop2nd_fast.stamp import ROOT, machine_name, stamp

from . import blocks, larq_adapter, registry, results, timing
from .compare import compare
from .gates import context_lost, failing, failures
from .registry import GPU_SUITES, OURS, SUITES, Case, Contender, GateError, Prepared, Unavailable, cases
from .timing import Plan, Sampler, Series

QUICK_OUT = ROOT / "out" / "benchmarks"
Say = Callable[[str], None]


class _Refused(Exception):
    """A contender that passed its gate raised while it was timed."""


@dataclass
class _Entrant:
    """A contender with its gate's verdict; prepared only if it passed."""

    contender: Contender
    gate: str
    detail: str
    threads: int
    prepared: Prepared | None = None
    series: Series | None = None
    single: Series | None = None


def run(
    suites: Sequence[str] = SUITES,
    quick: bool = False,
    threads: int | None = None,
    out: Path | None = None,
    *,
    op: str | None = None,
    only: str = "",
    resume: bool = False,
    dry: bool = False,
    minutes: float | None = None,
    say: Say = lambda text: None,
) -> list[dict[str, Any]]:
    """Measure all cases of ``suites`` and return their records (also written to ``out/<suite>.jsonl``).

    Args:
        suites: names out of ``registry.SUITES`` or ``GPU_SUITES``.
        quick: tiny sizes and few rounds: checks the machinery, its numbers mean nothing.
        threads: overrides every case's own number of threads.
        out: directory of the result files. Default: ``benchmarks/results/<machine>``, or with ``quick``
            ``out/benchmarks``, so that tiny sizes never replace real results.
        op: only this operator.
        only: only cases whose name contains this.
        resume: leave out cases that ``out`` holds from this very commit.
        dry: check and do not time.
        minutes: no case starts later; those left out have a record that says so, in the answer alone.
        say: is told what is being measured.

    Raises:
        ValueError: unknown suite or operator, fewer than one thread.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    chosen = [case for case in cases(suites, op, quick) if only in case.name]
    mark, start = stamp(), time.monotonic()
    directory = out or (QUICK_OUT if quick else results.RESULTS / machine_name(mark))
    order = {s: [c.name for c in cases([s], quick=quick)] for s in suites}
    all_threads = torch.get_num_threads()
    records: list[dict[str, Any]] = []
    for case in chosen:
        late = minutes is not None and time.monotonic() - start > 60 * minutes
        if why := "out of time" if late else next((r["lost"] for r in records if "lost" in r), None):
            records.append(_record(case, [], 0, quick, mark) | {"skipped": why})
            continue
        say(f"{case.suite}: {case.name}")
        record = _finished(directory, case, quick, mark) if resume else None
        if record is None:
            plan = timing.QUICK if quick else timing.GPU if case.device == "cuda" else timing.FULL
            record = measure_case(case, plan, threads, all_threads, quick, mark, say, dry)
            results.put(directory, record, order[case.suite])
        records.append(record)
        say("")
    torch.set_num_threads(all_threads)
    larq_adapter.stop()
    return records


def _finished(directory: Path, case: Case, quick: bool, mark: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a case that this very commit measured before."""
    for record in results.read(directory / f"{case.suite}.jsonl"):
        clean = not (mark["dirty"] or record["stamp"]["dirty"] or record.get("untimed"))
        same = record["stamp"]["commit"] == mark["commit"] and record["quick"] == quick
        if record["case"] == case.name and same and clean:
            return record
    return None


def measure_case(
    case: Case,
    plan: Plan,
    threads: int | None,
    all_threads: int,
    quick: bool,
    mark: dict[str, Any],
    say: Say = lambda text: None,
    dry: bool = False,
) -> dict[str, Any]:
    """Gate and time all contenders of one case (``dry``: only gate them); returns its record."""
    case_threads = threads or case.threads or all_threads
    torch.set_num_threads(case_threads)
    entrants: list[_Entrant] = []
    with torch.no_grad():
        for contender in _contenders(case):
            say(f"{case.suite}: {case.name}: {contender.name}")
            own = threads or (all_threads if contender.threads == registry.ALL_THREADS else contender.threads)
            entrants.append(admit(contender, own or case_threads, quick, case.device))
        lost = context_lost(case.device)
        if not dry and lost is None:
            say(f"{case.suite}: {case.name}: timing in turns")
            with torch.inference_mode(case.inference):
                _time(case, entrants, plan)
        torch.set_num_threads(case_threads)
        record = _record(case, entrants, case_threads, quick, mark)
    record |= ({"lost": lost} if lost else {}) | ({"untimed": True} if dry or lost else {})
    for entrant in entrants:
        if entrant.prepared is not None and entrant.prepared.close is not None:
            entrant.prepared.close()
    del entrants
    gc.collect()
    torch._dynamo.reset()
    return record


def _contenders(case: Case) -> Iterator[Contender]:
    """A case's contenders; where making them raises, one of that name that fails, and no more."""
    try:
        yield from case.contenders()
    except failures() as error:
        yield failing("the operands", error)


def admit(contender: Contender, threads: int, quick: bool, device: str = "cpu") -> _Entrant:
    """Build a contender and pass it through its gate."""
    if quick and contender.slow:
        return _Entrant(contender, "unavailable", "left out of quick runs", threads)
    torch.set_num_threads(threads)
    try:
        prepared = contender.make()
        detail = prepared.check()
        if device == "cuda" and torch.cuda.is_available():
            torch.cuda.synchronize()  # whose launch it was that failed
    except Unavailable as error:
        return _Entrant(contender, "unavailable", str(error), threads)
    except GateError as error:
        return _Entrant(contender, "failed", str(error), threads)
    except failures() as error:  # a bug, but no reason to lose the other numbers
        return _Entrant(contender, "failed", _said(error), threads)
    return _Entrant(contender, "passed", detail, threads, prepared)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _time(case: Case, entrants: Sequence[_Entrant], plan: Plan) -> None:
    """Warm loops, then single calls between other work; one that raises fails, the others are timed anew."""
    while running := {e.contender.name: _sampler(e, case.device) for e in entrants if e.gate == "passed"}:
        try:
            warm = timing.measure(running, plan)
            single: dict[str, Series] = {}
            if plan.singles:
                bounds = [e.contender.name for e in entrants if e.contender.role == registry.BOUND]
                called = {name: sample for name, sample in running.items() if name not in bounds}
                other = timing.other_work(case.device, plan.other_bytes)
                single = timing.measure_singles(called, other, warm, plan)
        except _Refused:
            continue
        for entrant in entrants:
            entrant.series = warm.get(entrant.contender.name)
            entrant.single = single.get(entrant.contender.name)
        return


def _sampler(entrant: _Entrant, device: str) -> Sampler:
    prepared = entrant.prepared
    assert prepared is not None
    timed = prepared.sample
    if timed is None:
        assert prepared.run is not None
        runs, on_gpu = [prepared.run, *prepared.rotate], device == "cuda"
        timed = timing.cuda_sampler(runs) if on_gpu else timing.cpu_sampler(runs[0], entrant.threads)

    def sample(n: int) -> float:
        try:
            return timed(n)
        except failures() as error:
            entrant.gate, entrant.detail = "failed", f"while it was timed: {_said(error)}"
            raise _Refused from error

    return sample


def _record(
    case: Case, entrants: Sequence[_Entrant], threads: int, quick: bool, mark: dict[str, Any]
) -> dict[str, Any]:
    ours = next((e for e in entrants if e.contender.role == OURS and e.series), None)
    bounds = {e.contender.name: e for e in entrants if e.contender.role == registry.BOUND and e.series}
    rows = [_row(case, e, ours, bounds.get(e.contender.bounded_by or "")) for e in entrants]
    what = {"suite": case.suite, "op": case.op, "case": case.name, "shapes": case.shapes}
    what |= {"networks": list(case.networks), "tags": list(case.tags), "unit": case.unit}
    how = {"device": case.device, "threads": threads, "quick": quick}
    return {"schema": results.SCHEMA, **what, **how, "contenders": rows, "stamp": mark}


def _row(case: Case, entrant: _Entrant, ours: _Entrant | None, bound: _Entrant | None) -> dict[str, Any]:
    c, prepared, series = entrant.contender, entrant.prepared, entrant.series
    row: dict[str, Any] = {"name": c.name, "role": c.role, "threads": entrant.threads}
    row |= {"gate": entrant.gate, "gate_detail": entrant.detail}
    row |= {k: v for k in ("bytes", "operations", "items") if (v := getattr(c, k)) is not None}
    if series is None or prepared is None:
        return row
    seconds, (count, scale) = series.seconds(), registry.UNITS[case.unit]
    row["seconds"] = seconds.to_dict() | {"repeats": series.repeats}
    if (amount := getattr(c, count)) is not None:
        row["rate"] = amount / (series.fastest() if c.role == registry.BOUND else seconds.median) / scale
        if bound is not None and bound.series is not None:
            limit = getattr(bound.contender, count) / bound.series.fastest()
            share = (c.needed or amount) / seconds.median / limit
            row["bound"] = {"name": bound.contender.name, "share": share}
    if ours is not None and ours.series is not None:
        row["ratio"] = series.ratio_to(ours.series).to_dict()
    if entrant.single is not None:
        row["single"] = entrant.single.seconds().to_dict()
        if ours is not None and ours.single is not None:
            row["single"]["ratio"] = entrant.single.ratio_to(ours.single).median
    if case.device == "cuda" and c.role in (OURS, registry.VARIANT) and prepared.run is not None:
        row["host_seconds"] = timing.host_seconds(prepared.run)
    if prepared.memory is not None:
        try:
            row["memory"] = prepared.memory()
        except failures() as error:
            row["gate_detail"] += f"; its memory was not measured: {_said(error)}"
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 1 if a contender failed its gate."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.split("\n")[0])
    names = SUITES + GPU_SUITES
    parser.add_argument("--suite", action="append", choices=names, help="repeatable; default: CPU suites")
    parser.add_argument("--op", help="only cases of this operator")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to check that everything runs")
    parser.add_argument("--threads", type=int, help="instead of each case's own number of threads")
    parser.add_argument("--out", type=Path, help="directory of the result files")
    parser.add_argument("--resume", action="store_true", help="keep results that are from this commit")
    parser.add_argument("--larq-python", help="an interpreter with larq_compute_engine (larq_adapter.py)")
    parser.add_argument("--compare", metavar="BASE", help="time this commit against this tree, in turns")
    parser.add_argument("--rounds", type=int, default=21, help="of --compare, at least 6")
    parser.add_argument("--base-python", default=sys.executable, help="an interpreter of BASE's own")
    chosen = parser.parse_args(arguments)
    suites = chosen.suite or SUITES
    if chosen.larq_python:
        larq_adapter.use_interpreter(chosen.larq_python)
    asked = {"op": chosen.op, "quick": chosen.quick, "out": chosen.out}
    try:
        if chosen.compare:
            more = {"rounds": chosen.rounds, "python": chosen.base_python}
            return compare(chosen.compare, suites, _console(), **asked, **more)
        more = {"only": chosen.only, "resume": chosen.resume, "threads": chosen.threads}
        return measured(suites, **asked, **more)
    except ValueError as error:
        print(f"benchmarks.run: {error}", file=sys.stderr)
        return 2


def measured(suites: Sequence[str], quick: bool = False, **more: Any) -> int:
    """:func:`run` with progress and tables on the terminal; returns the exit status."""
    console = _console()
    total = len([c for c in cases(suites, more.get("op"), quick) if more.get("only", "") in c.name])
    columns = (BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)

        def say(text: str) -> None:
            progress.update(task, description=text) if text else progress.advance(task)

        records = run(suites, quick, **more, say=say)
    return told(records, console, quick)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 150)


def told(records: Sequence[dict[str, Any]], console: Console, quick: bool) -> int:
    """Print the records; returns the exit status: 1 where a gate failed or nothing ran."""
    for suite in dict.fromkeys(r["suite"] for r in records):
        console.print(blocks.terminal_table([r for r in records if r["suite"] == suite]))
    failed = False
    for record in records:
        case = f"{record['suite']}/{record['case']}"
        for c in record["contenders"]:
            if c["gate"] == "failed":
                failed = True
                line = f"{case}: {c['name']}: {c['gate_detail']}"
                console.print(f"[bold red]gate failed[/] {line}", highlight=False)
        if why := record.get("skipped"):
            console.print(f"[bold]skipped[/] {case}: {why}", highlight=False)
    if any("lost" in record for record in records):
        console.print("The GPU's context is lost: run the other cases by --only.")
    if quick:
        console.print("Quick run: it shows that everything works; its numbers mean nothing.")
    return 1 if failed or not records else 0


if __name__ == "__main__":
    sys.exit(main())
