"""The tables in ``docs/evidence.md``: ``python -m bop2nd_fast.studies.evidence [--check]``, in a checkout.

Writes the table and pictures of every study under ``studies/results/`` and what stands in the document
between a pair of comments, each on a line of its own:

    <!-- study:NAME -->
    <!-- /study -->

NAME is a folder there (a study without results says so), ``claims`` for the paper's claims, or a folder with
the ``history.jsonl`` of a single training. ``--check`` changes nothing and fails if a text is not what the
committed results give.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from ..atomic_write import atomic_write
from ..stamp import ROOT
from ..train import HISTORY, Epoch
from . import claims, records, report, tables
from .definitions import STUDIES, StudyError

RESULTS = Path("studies") / "results"
DOCUMENT = Path("docs") / "evidence.md"
SHOWN = (1, 2, 3, 5, 10, 15, 20, 30, 50, 100)  # epochs of a single training
MARKER = re.compile(r"^<!-- study:(?P<name>[\w.-]+) -->\n.*?^<!-- /study -->$", re.MULTILINE | re.DOTALL)


def block(root: Path, name: str) -> str:
    """The text between the markers of ``name``. Raises StudyError for what is no study and no folder."""
    folder = root / RESULTS / name
    if name == "claims":
        return claims.table(all_results(root))
    if (folder / HISTORY).exists():
        text = training(folder / HISTORY)
    elif (folder / records.RESULTS).exists():
        text = tables.table(records.read(folder / records.RESULTS))
    elif name in STUDIES:
        return f"No results yet; `bop2nd study {name}` makes them.\n"
    else:
        raise StudyError(f"there is no study {name!r} and no folder {folder}")
    pictures = "".join(
        f"\n![{name}: {path.stem}](../{(RESULTS / name / path.name).as_posix()})\n"
        for path in sorted(folder.glob("*.png"))
    )
    return text + pictures


def all_results(root: Path) -> dict[str, list[records.Line]]:
    """The lines of every study that has results, by its name."""
    paths = sorted((root / RESULTS).glob(f"*/{records.RESULTS}"))
    return {path.parent.name: records.read(path) for path in paths}


def training(path: Path) -> str:
    """The history of one training as a table: some epochs, and the last."""
    epochs = [Epoch.from_dict(json.loads(line)) for line in path.read_text().splitlines()]
    rows = [
        "| epoch | loss | training [%] | test [%] | flips per weight and step | blocked | seconds |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    seconds = 0.0
    for epoch in epochs:
        seconds += epoch.seconds
        if epoch.epoch in SHOWN or epoch is epochs[-1]:
            flips = "–" if epoch.flip_rate is None else f"{epoch.flip_rate:.1e}"
            blocked = "–" if epoch.blocked_share is None else f"{epoch.blocked_share:.1%}"
            accuracy = f"{100 * epoch.train_accuracy:.1f} | {100 * epoch.test_accuracy:.1f}"
            rows.append(
                f"| {epoch.epoch} | {epoch.loss:.3f} | {accuracy} | {flips} | {blocked} | {seconds:.0f} |"
            )
    return "\n".join(rows) + "\n"


def document(root: Path) -> str:
    """``docs/evidence.md``, its blocks filled. Raises StudyError as :func:`block`."""

    def filled(match: re.Match[str]) -> str:
        return f"<!-- study:{match['name']} -->\n{block(root, match['name'])}<!-- /study -->"

    return MARKER.sub(filled, (root / DOCUMENT).read_text())


def texts(root: Path) -> dict[Path, str]:
    """Every generated text by its path."""
    folders = sorted(path.parent for path in (root / RESULTS).glob(f"*/{records.RESULTS}"))
    found = {folder / report.TABLE: report.text_of(folder) for folder in folders}
    return {**found, root / DOCUMENT: document(root)}


def outdated(root: Path) -> list[Path]:
    """The files that are not what the results give."""
    return [path for path, text in texts(root).items() if not path.exists() or path.read_text() != text]


def write(root: Path) -> None:
    """Write every table, picture and the document."""
    for path in (root / RESULTS).glob(f"*/{records.RESULTS}"):
        report.write(path.parent)
    text = document(root)
    atomic_write(root / DOCUMENT, lambda file: file.write(text.encode()))


def main() -> int:
    parser = argparse.ArgumentParser(description="Fill docs/evidence.md from the committed results.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a text is out of date")
    try:
        if not parser.parse_args().check:
            write(ROOT)
            return 0
        old = outdated(ROOT)
    except (StudyError, OSError) as error:
        print(f"evidence: {error}", file=sys.stderr)
        return 2
    for path in old:
        name = path.relative_to(ROOT)
        print(f"{name} is out of date: run python -m bop2nd_fast.studies.evidence", file=sys.stderr)
    return int(bool(old))


if __name__ == "__main__":
    sys.exit(main())
