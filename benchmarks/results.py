"""Result files: one JSON line per case under ``benchmarks/results/<machine>/<suite>.jsonl``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bop2nd_fast.atomic_write import atomic_write

from .registry import GPU_SUITES, ROLES, SUITES, UNITS

SCHEMA = 1
RESULTS = Path(__file__).resolve().parent / "results"

_FIELDS = {
    int: ("schema", "threads"),
    str: ("suite", "op", "case", "unit"),
    dict: ("shapes", "stamp"),
    list: ("networks", "tags", "contenders"),
    bool: ("quick",),
}
_STAMP = (
    *("processor", "cpu_flags", "active_backend"),
    *("torch", "triton", "compiler", "commit", "dirty", "date"),
)
GATES = ("passed", "failed", "unavailable")


def check(record: dict[str, Any]) -> None:
    """Raises ``ValueError`` unless a record has every field, and numbers only behind a passed gate."""
    where = f"record {record.get('suite')}/{record.get('case')}"
    for name, kind in ((name, kind) for kind, names in _FIELDS.items() for name in names):
        if not isinstance(record.get(name), kind):
            raise ValueError(f"{where}: {name} must be {kind.__name__}, got {record.get(name)!r}")
    if record["schema"] != SCHEMA:
        raise ValueError(f"{where}: schema {record['schema']} is not {SCHEMA}")
    if record["suite"] not in SUITES + GPU_SUITES or record["unit"] not in UNITS:
        raise ValueError(f"{where}: unknown suite or unit {record['unit']!r}")
    for name in _STAMP:
        if name not in record["stamp"]:
            raise ValueError(f"{where}: the stamp lacks {name}")
    for entry in record["contenders"]:
        if entry.get("role") not in ROLES or entry.get("gate") not in GATES or not entry.get("gate_detail"):
            raise ValueError(f"{where}: contender {entry.get('name')!r} has no role or no gate")
        if (entry["gate"] == "passed") != ("seconds" in entry) and not record.get("untimed"):
            raise ValueError(f"{where}: contender {entry['name']!r}: a number if and only if the gate passed")


def read(path: Path) -> list[dict[str, Any]]:
    """The records of one file, checked; empty if there is no file."""
    if not path.exists():
        return []
    records = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    for record in records:
        check(record)
    return records


def read_all(directory: Path) -> list[dict[str, Any]]:
    """The records of all suites in a machine's directory."""
    found = [record for suite in SUITES + GPU_SUITES for record in read(directory / f"{suite}.jsonl")]
    return [record for record in found if not record.get("untimed")]


def newest(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The stamp of the record that was measured last."""
    return max((r["stamp"] for r in records), key=lambda stamp: str(stamp["date"]))


def put(directory: Path, record: dict[str, Any], order: list[str]) -> None:
    """Write one record into its suite's file, in place of an earlier one of that case.

    The file is replaced as a whole, so that a run that is stopped leaves every finished case behind.
    ``order`` lists the suite's cases: records keep that order, and cases that no longer exist go.
    """
    check(record)
    path = directory / f"{record['suite']}.jsonl"
    records = {r["case"]: r for r in read(path)} | {record["case"]: record}
    lines = [json.dumps(records[name], ensure_ascii=False) for name in order if name in records]
    directory.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines) + "\n"
    atomic_write(path, lambda file: file.write(text.encode()))
