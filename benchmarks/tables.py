"""How numbers are written in tables and texts."""

from __future__ import annotations


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
