"""What a change costs: ``bop2nd bench --compare BASE [--suite conv] [--op ...] [--rounds 21]``.

BASE (a commit) is checked out beside this tree, in ``build/compare``, and built there, by the same
interpreter or by one of its own (``--base-python``: another torch, say). Two processes, one a tree, hold the
same cases of the registry and are timed in turns; which of them goes first changes every round. The ratio
new / old is formed inside a round, between neighbours in time, and reported as its median with a 95 %
interval of that median (order statistics of the binomial law). A contender is checked by its gate in both
trees before it is timed; the exit status is 1 if one of this tree fails, whatever the times are.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bop2nd_fast.stamp import ROOT, stamp

from .registry import cases
from .tables import duration
from .timing import quantile
from .worker import Worker

TREES = ROOT / "build" / "compare"
Sample = Callable[[int], float]


@dataclass(frozen=True)
class Ratio:
    """new / old of one contender: the median and the bounds of its 95 % interval."""

    case: str
    contender: str
    old_s: float
    new_s: float
    median: float
    low: float
    high: float


def compare_samples(
    old: Sample, new: Sample, rounds: int, min_sample_s: float = 0.02
) -> tuple[list[float], list[float], list[float]]:
    """(old seconds, new seconds, ratios), one of each a round; the two take turns at going first."""
    once = max(1e-9, min(old(1), old(1), new(1), new(1)))
    n = max(1, math.ceil(min_sample_s / once))
    olds: list[float] = []
    news: list[float] = []
    for r in range(rounds):
        for side in ("old", "new") if r % 2 else ("new", "old"):
            sample, seconds = (old, olds) if side == "old" else (new, news)
            seconds.append(sample(n) / n)
    return olds, news, [b / a for a, b in zip(olds, news, strict=True)]


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Median and the order statistics that hold the true median with at least 95 %."""
    n, ordered = len(values), sorted(values)
    tail, k = 0.5**n, 0
    while k + 1 < n // 2 and tail + math.comb(n, k + 1) * 0.5**n <= 0.025:
        k += 1
        tail += math.comb(n, k) * 0.5**n
    return quantile(ordered, 0.5), ordered[k], ordered[n - 1 - k]


def worker_of(tree: Path, python: str = sys.executable) -> Worker:
    """A process that runs the contenders of one tree; raises RuntimeError if it cannot."""
    script = Path(__file__).with_name("compare_worker.py")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # it may name another tree
    return Worker([python, str(script)], cwd=tree, env=environment)


def sampler(worker: Worker, contender: str) -> Sample:
    return lambda n: float(worker.ask(run=contender, n=n)["seconds"])


def tree_of(base: str, python: str = sys.executable) -> Path:
    """The commit, checked out and built.

    Raises:
        ValueError: no such commit.
    """
    command = ["git", "rev-parse", "--verify", "--quiet", f"{base}^{{commit}}"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode:
        raise ValueError(f"{base!r} is not a commit of this repository")
    tree = TREES / found.stdout.strip()[:12]
    if not tree.is_dir():
        command = ["git", "worktree", "add", "--force", "--detach", str(tree), found.stdout.strip()]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    build = [python, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(build, cwd=tree, check=True, stdout=subprocess.DEVNULL)
    return tree


def ratios_of(
    old: Worker, new: Worker, suites: Sequence[str], op: str | None, quick: bool, rounds: int
) -> Iterator[Ratio | str]:
    """A :class:`Ratio` for every contender of ours that both trees have; a line for one of this tree that
    fails its gate."""
    for case in cases(suites, op, quick):
        asked = {"suite": case.suite, "case": case.name, "quick": quick}
        theirs, ours = old.ask(**asked), new.ask(**asked)
        yield from (f"{case.suite}: {case.name}: {line}" for line in ours["failed"])
        for contender in ours["contenders"]:
            if contender not in theirs["contenders"]:
                continue
            seconds = compare_samples(sampler(old, contender), sampler(new, contender), rounds)
            before, after = (quantile(s, 0.5) for s in seconds[:2])
            yield Ratio(f"{case.suite}: {case.name}", contender, before, after, *median_interval(seconds[2]))


def table(ratios: Sequence[Ratio], base: str) -> Table:
    """A row a contender; red where all of the interval is slower, green where all of it is faster."""
    result = Table(title=f"this tree against {base}: time new / old", title_justify="left")
    result.add_column("case")
    result.add_column("contender")
    for name in ("old", "new", "new / old", "95 %"):
        result.add_column(name, justify="right", no_wrap=True)
    for r in ratios:
        style = "red" if r.low > 1 else "green" if r.high < 1 else ""
        times = (duration(r.old_s), duration(r.new_s), f"{r.median:.3f}", f"{r.low:.3f} - {r.high:.3f}")
        result.add_row(r.case, r.contender, *times, style=style)
    return result


def compare(
    base: str,
    suites: Sequence[str],
    console: Console,
    *,
    op: str | None = None,
    quick: bool = False,
    rounds: int = 21,
    python: str = sys.executable,
    out: Path | None = None,
) -> int:
    """Compare, print the table, write the ratios to ``out`` as JSON lines; returns the exit status. Named
    ``compare-BASE.jsonl`` beside a machine's results, they are a table of its README.

    Raises:
        ValueError: no such commit, an unknown suite or operator, fewer than 6 rounds, ``out`` exists.
    """
    cases(suites, op, quick)
    if out and out.exists():
        raise ValueError(f"{out} is there already: ratios of two runs would be one table")
    if rounds < 6:
        raise ValueError(f"a 95 % interval of a median needs at least 6 rounds, got {rounds}")
    tree = tree_of(base, python)
    where = {"base": tree.name, "stamp": stamp()}
    old, new = worker_of(tree, python), worker_of(ROOT)
    ratios: list[Ratio] = []
    failed: list[str] = []
    with console.status("comparing") as status:
        for found in ratios_of(old, new, suites, op, quick, rounds):
            if isinstance(found, str):
                failed.append(found)
                continue
            ratios.append(found)
            status.update(f"{found.case}: {found.contender}: {found.median:.3f}")
            if out:
                with out.open("a") as file:
                    file.write(json.dumps(vars(found) | where) + "\n")
    old.close()
    new.close()
    console.print(table(ratios, base))
    for line in failed:
        console.print(f"[bold red]gate failed[/] {line}", highlight=False)
    return 1 if failed else 0
