"""What the README's first screen shows: whole networks, ours beside floating point.

A table of ratios over all machines, and a picture of the one measured last (``docs/images/networks.svg``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from bop2nd_fast.atomic_write import atomic_write

from .goals import contender
from .suites import inference, step, train_step
from .tables import byte_count, duration, significant

Records = Sequence[dict[str, Any]]
FP32 = (inference.FP32, inference.FP32_LAST, inference.COMPILED)
LATENT = (train_step.LATENT, train_step.LATENT_FUSED, train_step.LATENT_COMPILED)
BLUE, GREY, DARK = "#0072B2", "#D0D0D0", "#444444"


@dataclass(frozen=True)
class Pair:
    """One comparison: theirs and ours as texts, and how often ours fits into theirs."""

    theirs: str
    ours: str
    ratio: float


Reader: TypeAlias = Callable[[Records], "Pair | None"]


@dataclass(frozen=True)
class Work:
    """A line of the table: what is done, against what, and the pair that the results hold."""

    what: str
    against: str
    pair: Reader


def _record(records: Records, suite: str, start: str) -> dict[str, Any] | None:
    found = [r for r in records if r["suite"] == suite and r["case"].startswith(start)]
    return next((r for r in found if r["case"] == start), found[0] if found else None)


def _times(suite: str, start: str, ours: str, theirs: Sequence[str]) -> Reader:
    """The fastest of ``theirs`` against the contender ``ours``, by the ratios of paired rounds."""

    def pair(records: Records) -> Pair | None:
        record = _record(records, suite, start)
        own = contender(record, ours) if record else None
        found = [e for n in theirs if record and (e := contender(record, n)) and "ratio" in e]
        if own is None or "ratio" not in own or not found:
            return None
        best = min(found, key=lambda e: e["ratio"]["median"])
        ratio = best["ratio"]["median"] / own["ratio"]["median"]
        return Pair(duration(best["seconds"]["median"]), duration(own["seconds"]["median"]), ratio)

    return pair


def _bytes(suite: str, start: str, ours: tuple[str, str], theirs: tuple[str, str]) -> Reader:
    """Bytes of a contender's entry (name, key) against another's."""

    def pair(records: Records) -> Pair | None:
        record = _record(records, suite, start)
        entries = [contender(record, name) if record else None for name in (theirs[0], ours[0])]
        values = [
            (e or {}).get("memory", {}).get(key) for e, key in zip(entries, (theirs[1], ours[1]), strict=True)
        ]
        if None in values:
            return None
        return Pair(byte_count(values[0]), byte_count(values[1]), values[0] / values[1])

    return pair


ADAM, FLOAT = "latent weights, Adam", "the same network in fp32"
SMALL, BATCH = "BinaryNet, 32x32, batch 1", "BinaryNet, 32x32, batch 64"


def _training_memory(key: str) -> Reader:
    return _bytes("train_step", "BinaryNet", (train_step.PACKED, key), (train_step.LATENT, key))


WORKS = (
    Work(
        "Training step, BinaryNet, batch 50",
        ADAM,
        _times("train_step", "BinaryNet", train_step.PACKED, LATENT),
    ),
    Work("– memory kept for backward", ADAM, _training_memory("saved_for_backward")),
    Work("– peak memory", ADAM, _training_memory("allocator_peak")),
    Work(
        "Optimizer step, ResNet-18's weights",
        "`torch.optim.Adam(fused=True)`",
        _times("step", "ResNet-18", step.PACKED, (step.ADAM,)),
    ),
    Work("Inference, BinaryNet, one image", FLOAT, _times("inference", SMALL, inference.PACKED, FP32)),
    Work("Inference, BinaryNet, 64 images", FLOAT, _times("inference", BATCH, inference.PACKED, FP32)),
    Work(
        "Inference, Bi-Real-Net-18, 224x224",
        FLOAT,
        _times("inference", "Bi-Real-Net-18", inference.ROUNDED, FP32),
    ),
    Work(
        "Weights of BinaryNet",
        "fp32",
        _bytes("inference", SMALL, (inference.PACKED, "weights"), (inference.PACKED, "weights_fp32")),
    ),
)


def networks_block(machines: Mapping[str, Records], directory: Path, document: Path) -> str:
    """A Markdown table: one line per work, one column of ratios per machine, linked to its results."""
    heads = []
    for name, records in machines.items():
        last = max((r["stamp"] for r in records), key=lambda s: str(s["date"]))
        link = os.path.relpath(directory / name / "README.md", document.parent)
        heads.append(f"[{_processor(last)}, `{last['active_backend']}`]({link})")
    rows = []
    for work in WORKS:
        pairs = [work.pair(records) for records in machines.values()]
        if any(pairs):
            cells = [f"{significant(pair.ratio)}x" if pair else "-" for pair in pairs]
            rows.append([work.what, work.against, *cells])
    lines = [["whole networks", "against", *heads], ["---", "---", *["--:"] * len(heads)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _processor(stamp: Mapping[str, Any]) -> str:
    return str(stamp["processor"]).replace("(R)", "").replace(" Processor", "").partition(",")[0]


def described(records: Records) -> str:
    """The picture in words."""
    found = [(work, pair) for work in WORKS if (pair := work.pair(records)) is not None]
    return "; ".join(f"{work.what}: {pair.ours}, {work.against}: {pair.theirs}" for work, pair in found)


def draw(records: Records, path: Path) -> Path | None:
    """Theirs as a full bar, ours beside it in proportion; None where the results hold too little."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    found = [(work, pair) for work in WORKS if (pair := work.pair(records)) is not None]
    if not found:
        return None
    figure = Figure(figsize=(9.6, 0.62 * len(found) + 0.75), layout="constrained")
    axes = figure.subplots()
    for row, (work, pair) in enumerate(found):
        axes.barh(row - 0.2, 1, height=0.36, color=GREY)
        axes.barh(row + 0.2, 1 / pair.ratio, height=0.36, color=BLUE)
        theirs = f"{work.against.strip('`')}: {pair.theirs}"
        axes.annotate(theirs, (0.008, row - 0.2), va="center", fontsize=8.5, color=DARK)
        axes.annotate(
            f" {pair.ours},  {significant(pair.ratio)}x less", (1 / pair.ratio, row + 0.2),
            va="center", fontsize=9, color=BLUE, fontweight="bold",
        )  # fmt: skip
    labels = [work.what.lstrip("– ").replace(", ", "\n", 1) for work, _ in found]
    axes.set_yticks(range(len(found)), labels, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "bottom", "left"]].set_visible(False)
    stamp = max((r["stamp"] for r in records), key=lambda s: str(s["date"]))
    title = "Whole networks: bop2nd_fast (blue) beside floating point (grey)"
    figure.suptitle(title, fontsize=12, fontweight="bold")
    software = f"torch {stamp['torch']}, kernels {stamp['active_backend']}, {str(stamp['date'])[:10]}"
    threads = "inference on 1 thread, training on all"
    figure.supxlabel(f"{stamp['processor']}; {threads}. {software}", fontsize=8, color=DARK)
    rcParams["svg.hashsalt"] = path.name  # no random name, no date: the same results give the same file
    clean = {"Date": None, "Creator": None, "Description": described(records)}
    atomic_write(path, lambda file: figure.savefig(file, format="svg", metadata=clean))
    return path
