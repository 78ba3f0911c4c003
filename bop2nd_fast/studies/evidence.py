"""The tables in ``docs/evidence.md``: ``python -m bop2nd_fast.studies.evidence [--check]``, in a checkout.

Writes the table and pictures of every study under ``studies/results/`` and what stands in the document
between a pair of comments, each on a line of its own:

    <!-- study:NAME -->
    <!-- /study -->

NAME is a folder there. ``--check`` changes nothing and fails if a text is not what the committed results
give.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from ..atomic_write import atomic_write
from ..stamp import ROOT
from . import records, report, tables
from .definitions import StudyError

RESULTS = Path("studies") / "results"
DOCUMENT = Path("docs") / "evidence.md"
MARKER = re.compile(r"^<!-- study:(?P<name>[\w.-]+) -->\n.*?^<!-- /study -->$", re.MULTILINE | re.DOTALL)


def block(root: Path, name: str) -> str:
    """The text between the markers of the study ``name``. Raises StudyError as `records.read`."""
    folder = root / RESULTS / name
    lines = records.read(folder / records.RESULTS)
    pictures = "".join(
        f"\n![{name}: {path.stem}](../{(RESULTS / name / path.name).as_posix()})\n"
        for path in sorted(folder.glob("*.png"))
    )
    return f"{tables.table(lines)}{pictures}"


def document(root: Path) -> str:
    """``docs/evidence.md``, its blocks filled. Raises StudyError if a study it names has no results."""

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
