"""Results as a table in the terminal; the numbers' formatting is shared with the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from .registry import BOUND, OURS


def duration(seconds: float) -> str:
    """Three significant digits with a unit: ``26.8 ms``."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= scale:
            return f"{significant(seconds / scale)} {unit}"
    return f"{significant(seconds / 1e-9)} ns"


def significant(value: float, digits: int = 3) -> str:
    """``value`` to so many significant digits, never in exponent form."""
    if value == 0:
        return "0"
    text = f"{value:.{digits}g}"
    return f"{float(text):.0f}" if "e" in text else text


def byte_count(n: float) -> str:
    for scale, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if n >= scale:
            return f"{significant(n / scale)} {unit}"
    return f"{n:.0f} B"


def results_table(records: Sequence[dict[str, Any]]) -> Table:
    """One suite's records: a block per case, ours first."""
    table = Table(title=f"suite {records[0]['suite']}", title_justify="left")
    table.add_column("case", max_width=34)
    table.add_column("contender", max_width=44)
    for name in ("threads", "median", "p10 - p90", "rate", "time / ours"):
        table.add_column(name, justify="right", no_wrap=True)
    for record in records:
        for i, entry in enumerate(record["contenders"]):
            cells = [record["case"] if i == 0 else "", entry["name"], str(entry["threads"])]
            if "seconds" not in entry:
                text = Text(f"{entry['gate']}: {entry['gate_detail']}", overflow="ellipsis", no_wrap=True)
                text.truncate(44, overflow="ellipsis")
                table.add_row(*cells, "-", "", "", text, style="red" if entry["gate"] == "failed" else "dim")
                continue
            s = entry["seconds"]
            rate = f"{significant(entry['rate'])} {record['unit']}" if "rate" in entry else ""
            ratio = f"{entry['ratio']['median']:.2f}x" if "ratio" in entry and entry["role"] != BOUND else ""
            spread = f"{duration(s['p10'])} - {duration(s['p90'])}"
            style = "bold" if entry["role"] == OURS else ""
            table.add_row(*cells, duration(s["median"]), spread, rate, ratio, style=style)
        table.add_section()
    return table
