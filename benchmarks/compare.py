"""What a change costs: ``python -m benchmarks.compare BASE [--suite conv] [--op ...] [--rounds 21]``.

BASE (a commit) is checked out beside this tree, in ``build/compare``, and built there with the same
interpreter. Two processes, one a tree, hold the same cases of the registry and are timed in turns; which of
them goes first changes every round. The ratio new / old is formed inside a round, between neighbours in time,
and reported as its median with a 95 % interval of that median (order statistics of the binomial law). A
contender is checked by its gate in both trees before it is timed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bop2nd_fast.stamp import ROOT

from .registry import SUITES, cases
from .tables import duration
from .timing import quantile

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
    """(old seconds, new seconds, ratios), one of each a round; the two take turns at going first.

    Raises:
        ValueError: fewer than 6 rounds: no interval of a median holds 95 % then.
    """
    if rounds < 6:
        raise ValueError(f"a 95 % interval of a median needs at least 6 rounds, got {rounds}")
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


class Worker:
    """A process that runs the contenders of one tree."""

    def __init__(self, tree: Path) -> None:
        script = Path(__file__).with_name("compare_worker.py")
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # it may name another tree
        self._process = subprocess.Popen(
            [sys.executable, str(script)],
            cwd=tree,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.ask()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request (none: only wait for the first answer) and return its answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        if request:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process in {self._process.args!r} ended; its output is above")
        return json.loads(line)

    def sampler(self, contender: str) -> Sample:
        return lambda n: self.ask(run=contender, n=n)["seconds"]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def tree_of(base: str) -> Path:
    """The commit, checked out and built.

    Raises:
        ValueError: no such commit.
    """
    found = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", f"{base}^{{commit}}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if found.returncode:
        raise ValueError(f"{base!r} is not a commit of this repository")
    tree = TREES / found.stdout.strip()[:12]
    if not tree.is_dir():
        command = ["git", "worktree", "add", "--detach", str(tree), found.stdout.strip()]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(build, cwd=tree, check=True, stdout=subprocess.DEVNULL)
    return tree


def compare(
    old: Worker, new: Worker, suites: Sequence[str], op: str | None, quick: bool, rounds: int
) -> Iterator[Ratio]:
    """Yield a :class:`Ratio` for every contender of ours that both trees have."""
    for case in cases(suites, op, quick):
        asked = {"suite": case.suite, "case": case.name, "quick": quick}
        theirs = old.ask(**asked)["contenders"]
        for contender in new.ask(**asked)["contenders"]:
            if contender not in theirs:
                continue
            seconds = compare_samples(old.sampler(contender), new.sampler(contender), rounds)
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


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.split("\n")[0])
    parser.add_argument("base", help="the commit to compare this tree with")
    parser.add_argument("--suite", action="append", choices=SUITES, help="may be repeated; default: all")
    parser.add_argument("--op", help="only cases of this operator")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to check that everything runs")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path, help="write the ratios there as JSON lines")
    chosen = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 150)
    suites = chosen.suite or list(SUITES)
    try:
        cases(suites, chosen.op, chosen.quick)
        if chosen.rounds < 6:
            raise ValueError(f"a 95 % interval of a median needs at least 6 rounds, got {chosen.rounds}")
        tree = tree_of(chosen.base)
    except ValueError as error:
        print(f"benchmarks.compare: {error}", file=sys.stderr)
        return 2
    old, new = Worker(tree), Worker(ROOT)
    ratios = []
    with console.status("comparing") as status:
        for ratio in compare(old, new, suites, chosen.op, chosen.quick, chosen.rounds):
            ratios.append(ratio)
            status.update(f"{ratio.case}: {ratio.contender}: {ratio.median:.3f}")
            if chosen.out:
                with chosen.out.open("a") as file:
                    file.write(json.dumps(vars(ratio)) + "\n")
    old.close()
    new.close()
    console.print(table(ratios, chosen.base))
    if chosen.quick:
        console.print("Quick run: it shows that everything works; its numbers mean nothing.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
