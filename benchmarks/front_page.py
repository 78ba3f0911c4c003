"""What the README's first screen shows: whole networks, ours beside floating point.

A table of ratios over all machines, and a picture of the one measured last (``docs/images/networks.svg``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bop2nd_fast.atomic_write import atomic_write

from . import results
from .blocks import Records, link, table
from .goals import contender
from .suites import inference, step, train_step
from .tables import byte_count, duration, significant

FP32 = (inference.FP32, inference.FP32_LAST, inference.COMPILED)
LATENT = (train_step.LATENT, train_step.LATENT_FUSED, train_step.LATENT_COMPILED)
BLUE, GREY, DARK = "#0072B2", "#D0D0D0", "#444444"


@dataclass(frozen=True)
class Pair:
    """One comparison: theirs and ours as texts, and how often ours fits into theirs."""

    theirs: str
    ours: str
    ratio: float


@dataclass(frozen=True)
class Work:
    """A line of the table: what is done, against what, and which contenders of which case are compared.

    Of ``theirs`` the fastest counts. With ``key`` it is bytes of memory of that name that are compared
    (``their_key``, where theirs has another), not times.
    """

    what: str
    against: str
    suite: str
    start: str  # of the case's name
    ours: str
    theirs: Sequence[str]
    key: str = ""
    their_key: str = ""

    def pair(self, records: Records) -> Pair | None:
        """None where the results lack a side."""
        found = [r for r in records if r["suite"] == self.suite and r["case"].startswith(self.start)]
        if not found:
            return None
        record = min(found, key=lambda r: bool(r["case"] != self.start))  # that very case, or the first
        ours = _amounts(record, (self.ours,), self.key)
        theirs = _amounts(record, self.theirs, self.their_key or self.key)
        if not ours or not theirs:
            return None
        (own, text), (other, their_text) = min(ours), min(theirs)
        return Pair(their_text, text, other / own)


def _amounts(record: Mapping[str, Any], names: Sequence[str], key: str) -> list[tuple[float, str]]:
    """What is compared, and how it is written, of the contenders that have it: bytes, or paired times."""
    entries = [e for name in names if (e := contender(record, name))]
    if key:
        return [(n, byte_count(n)) for e in entries if (n := e.get("memory", {}).get(key)) is not None]
    return [(e["ratio"]["median"], duration(e["seconds"]["median"])) for e in entries if "ratio" in e]


ADAM, FLOAT, FUSED = "latent weights, Adam", "the same network in fp32", "`torch.optim.Adam(fused=True)`"
SMALL, BATCH, LARGE = "BinaryNet, 32x32, batch 1", "BinaryNet, 32x32, batch 64", "Bi-Real-Net-18"
_TRAINED = ("train_step", "BinaryNet", train_step.PACKED)
_MEMORY = (*_TRAINED, (train_step.LATENT,))
_STEP = ("step", "ResNet-18", step.PACKED, (step.ADAM,))
_ONE = ("inference", SMALL, inference.PACKED)
WORKS = (
    Work("Training step, BinaryNet, batch 50", ADAM, *_TRAINED, LATENT),
    Work("– memory kept for backward", ADAM, *_MEMORY, "saved_for_backward"),
    Work("– peak memory", ADAM, *_MEMORY, "allocator_peak"),
    Work("Optimizer step, ResNet-18's weights", FUSED, *_STEP),
    Work("Inference, BinaryNet, one image", FLOAT, *_ONE, FP32),
    Work("Inference, BinaryNet, 64 images", FLOAT, "inference", BATCH, inference.PACKED, FP32),
    Work("Inference, Bi-Real-Net-18, 224x224", FLOAT, "inference", LARGE, inference.ROUNDED, FP32),
    Work("Weights of BinaryNet", "fp32", *_ONE, (inference.PACKED,), "weights", "weights_fp32"),
)


def networks_block(machines: Mapping[str, Records], directory: Path, document: Path) -> str:
    """A Markdown table: one line per work, one column of ratios per machine, linked to its results."""
    heads = []
    for name, records in machines.items():
        last = results.newest(records)
        processor = str(last["processor"]).replace("(R)", "").replace(" Processor", "").partition(",")[0]
        heads.append(link(f"{processor}, `{last['active_backend']}`", name, directory, document))
    rows = []
    for work in WORKS:
        pairs = [work.pair(records) for records in machines.values()]
        if any(pairs):
            cells = [f"{significant(pair.ratio)}x" if pair else "-" for pair in pairs]
            rows.append([work.what, work.against, *cells])
    rule = "| --- | --- |" + " --: |" * len(heads)
    return table(["whole networks", "against", *heads], rows, rule)


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
        ours, end = f" {pair.ours},  {significant(pair.ratio)}x less", (1 / pair.ratio, row + 0.2)
        axes.annotate(ours, end, va="center", fontsize=9, color=BLUE, fontweight="bold")
    labels = [work.what.lstrip("– ").replace(", ", "\n", 1) for work, _ in found]
    axes.set_yticks(range(len(found)), labels, fontsize=9)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xticks=[])
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "bottom", "left"]].set_visible(False)
    stamp = results.newest(records)
    title = "Whole networks: bop2nd_fast (blue) beside floating point (grey)"
    figure.suptitle(title, fontsize=12, fontweight="bold")
    software = f"torch {stamp['torch']}, kernels {stamp['active_backend']}, {str(stamp['date'])[:10]}"
    threads = "inference on 1 thread, training on all"
    figure.supxlabel(f"{stamp['processor']}; {threads}. {software}", fontsize=8, color=DARK)
    rcParams["svg.hashsalt"] = path.name  # no random name, no date: the same results give the same file
    clean = {"Date": None, "Creator": None, "Description": described(records)}
    atomic_write(path, lambda file: figure.savefig(file, format="svg", metadata=clean))
    return path
