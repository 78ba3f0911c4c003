"""The pictures of the report: bars of speed-up for every suite, and a roofline.

Colours are Okabe and Ito's, which colour-blind readers can tell apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from bop2nd_fast.atomic_write import atomic_write

from . import roofline
from .goals import best, contender
from .registry import OURS, SUITES, VARIANT, suite
from .suites import conv, linear, step
from .tables import significant

BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
GREY, DARK = "#9A9A9A", "#444444"
FAMILY_COLOURS = (BLUE, ORANGE, GREEN, PURPLE)

Records = Sequence[dict[str, Any]]


def draw_all(records: Records, directory: Path) -> list[Path]:
    """Draw what the records allow, as PNGs in ``directory``; returns the files."""
    written = []
    for name in SUITES:
        declared = suite(name)
        for picture in declared.pictures:
            draw = _training if picture.kind == "training" else _speedups
            chosen = [r for r in _of(records, name) if picture.chosen(r)]
            if any(best(r, names) for r in chosen for names in declared.families.values()):
                written.append(_save(draw(picture.title, chosen), directory / f"{picture.name}.png"))
    if any(contender(r, roofline.REGISTER) for r in records):
        written.append(_save(_roofline(records), directory / "roofline.png"))
    return written


def _of(records: Records, suite: str) -> list[dict[str, Any]]:
    return [r for r in records if r["suite"] == suite]


def _framed(figure: Figure, title: str, records: Records, more: str = "") -> Figure:
    """The figure with its title, and below it where and with what the records were measured."""
    figure.suptitle(title, fontsize=12.5, fontweight="bold")
    stamp = records[0]["stamp"]
    software = f"torch {stamp['torch']}, kernels {stamp['active_backend']}"
    text = f"{stamp['processor']}, {_threads(records)}, {software}. {more}"
    figure.supxlabel(text, fontsize=8.5, color=DARK)
    return figure


def _threads(records: Records) -> str:
    counts = sorted({r["threads"] for r in records})
    return " or ".join(map(str, counts)) + (" thread" if counts == [1] else " threads")


def _plain(axes: Axes, grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#DDDDDD", linewidth=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def _labels(axes: Axes, title: str, along_x: str) -> None:
    axes.set_title(title, fontsize=10.5, loc="left")
    axes.set_xlabel(along_x, fontsize=9)


def _beside(axes: Axes, text: str, at: tuple[float, float], by: Any = (4, 0), **more: Any) -> None:
    """A text so many points beside a place of the data."""
    looks: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 9} | more
    axes.annotate(text, at, xytext=by, **looks)


# ------------------------------------------------------------------------------------- speed-ups


def _speedups(title: str, records: Records) -> Figure:
    """Grouped horizontal bars, one group per case, one bar per class of baselines, logarithmic axis."""
    families = suite(records[0]["suite"]).families
    shown = [r for r in records if any(best(r, names) for names in families.values())]
    classes = list(enumerate(families.values()))
    bars = [[(i, v) for i, names in classes if (v := best(r, names)) is not None] for r in shown]
    height = 0.21 * sum(map(len, bars)) + 0.19 * len(bars) + 1.7
    figure = Figure(figsize=(9.5, height), layout="constrained")
    axes = figure.subplots()
    _plain(axes, "x")
    top, ticks, labels = 0.0, [], []
    for record, group in zip(shown, bars, strict=True):
        for k, (i, value) in enumerate(group):
            looks: dict[str, Any] = {"color": FAMILY_COLOURS[i], "label": list(families)[i]}
            axes.barh(top + k, value - 1, left=1, height=0.84, **looks)
            _beside(axes, f"{significant(value)}x", (max(value, 1), top + k), (5, 0), fontsize=8.5)
        ticks.append(top + (len(group) - 1) / 2)
        labels.append(_case_label(record))
        top += len(group) + 1.1
    axes.set_yticks(ticks, labels, fontsize=9)
    axes.tick_params(axis="y", length=0)
    values = [v for group in bars for _, v in group]
    left = min(0.8, *(0.85 * v for v in values))
    axes.set(ylim=(top - 0.9, -0.8), xscale="log", xlim=(left, 1.7 * max(values)))
    if max(values) < 20:  # powers of ten would leave most of the axis without a number
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{significant(x)}x"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda x, _: ""))
    axes.axvline(1, color=DARK, linewidth=1.2)
    axes.set_xlabel("median of paired time ratios, logarithmic; right of 1: bop2nd is faster", fontsize=9)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    ordered = [f for f in families if f in handles]
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 4}
    axes.legend([handles[f] for f in ordered], ordered, **place, frameon=False, fontsize=9)
    more = "Of each class the fastest variant." if any(len(n) > 1 for n in families.values()) else ""
    return _framed(figure, title, shown, more)


def _case_label(record: dict[str, Any]) -> str:
    text = str(record["case"])
    if record["suite"] == "conv":
        head, _, batch = text.partition(" batch ")
        return f"{head}\nbatch {batch}" if batch != "1" else head
    return text.replace(", ", "\n", 1) if len(text) > 26 else text


# --------------------------------------------------------------------------------------- training


def _training(title: str, records: Records) -> Figure:
    """Time and three kinds of memory of one training step, ours beside the latent-weight networks."""
    record = records[0]
    entries = [e for e in record["contenders"] if "seconds" in e]
    names = [str(e["name"]).replace(", ", "\n") for e in entries]
    colours = [{OURS: BLUE, VARIANT: SKY}.get(e["role"], ORANGE) for e in entries]
    panels = [("Time", "ms", [1e3 * e["seconds"]["median"] for e in entries])]
    for key, what in (
        ("allocator_peak", "Peak of torch's allocator"),
        ("rss_growth", "Growth of the resident set"),
        ("saved_for_backward", "Kept for backward"),
    ):
        if any(key in e.get("memory", {}) for e in entries):
            panels.append((what, "MiB", [e.get("memory", {}).get(key, 0) / 2**20 for e in entries]))
    size = (max(9.5, 3.1 * len(panels) + 1.2), 0.62 * len(entries) + 1.9)
    figure = Figure(figsize=size, layout="constrained")
    for k, (what, unit, values) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), k + 1)
        _plain(axes, "x")
        axes.barh(range(len(values)), values, color=colours, height=0.7)
        for row, value in enumerate(values):
            text = f"{significant(value)} {unit}" if value else "not measured"
            if value and colours[row] != BLUE and values[0]:
                text += f"\n{significant(value / values[0])}x ours"
            _beside(axes, text, (value, row), fontsize=8.5)
        axes.set_yticks(range(len(values)), names if k == 0 else [""] * len(values), fontsize=9)
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.5 * max(values))
        _labels(axes, what, unit)
    return _framed(figure, f"{title}: {record['case']}", [record])


# --------------------------------------------------------------------------------------- roofline


def _roofline(records: Records) -> Figure:
    """Left: binary layers under the register loop and one thread's bandwidth. Right: the step's bandwidth."""
    with_step = bool(_of(records, "step"))
    figure = Figure(figsize=(12.5 if with_step else 8, 5.4), layout="constrained")
    widths = (1.45, 1)[: 1 + with_step]
    panels = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    _roofline_layers(panels[0], records)
    if with_step:
        _step_bandwidths(panels[1], records)
    title = "Roofline: how close the operators come to this machine's limits"
    return _framed(figure, title, [r for r in records if r["suite"] in ("conv", "linear")] or records)


def _rates(records: Records, names: Sequence[str]) -> list[float]:
    return [e["rate"] for r in records for name in names if (e := contender(r, name))]


def _roofline_layers(axes: Axes, records: Records) -> None:
    peak = float(max(_rates(records, (roofline.REGISTER,))))
    layers = [r for r in records if r["suite"] in ("conv", "linear")]
    found = [(r["suite"], e) for r in layers if (e := contender(r, conv.PACKED))]
    points = [(suite, e["operations"] / e["bytes"], e["rate"]) for suite, e in found]
    copies = _rates(records, (roofline.STREAM_ONE, roofline.COPY_ONE_THREAD))
    low = min([x for _, x, _ in points], default=1) / 3
    high = max([x for _, x, _ in points], default=100) * 3
    if copies:
        low = min(low, peak / max(copies) / 4)  # so that the slope can be seen
    grid = np.geomspace(low, high, 200)
    roof = np.full_like(grid, peak)
    axes.axhline(peak, color=DARK, linewidth=1.2)
    above: dict[str, Any] = {"by": (-4, 5), "ha": "right", "va": "baseline"}
    _beside(axes, f"register loop: {significant(peak)} GMAC/s", (high, peak), **above)
    if copies:
        bandwidth = float(max(copies))
        roof = np.minimum(roof, bandwidth * grid)
        axes.plot(grid, np.minimum(bandwidth * grid, peak), color=DARK, linewidth=1.2)
        text = f"memory, one thread: {significant(bandwidth)} GB/s"
        _beside(axes, text, (low, bandwidth * low), (8, 0), va="top")
    looks = (("conv", "o", BLUE, "convolutions"), ("linear", "s", VERMILION, "linear layers"))
    for name, marker, colour, label in looks:
        if chosen := [(x, y) for suite, x, y in points if suite == name]:
            x, y = zip(*chosen, strict=True)
            axes.scatter(x, y, s=36, marker=marker, color=colour, label=label, zorder=3, alpha=0.85)
    if fp32 := _rates(layers, (*conv.FP32, linear.FP32)):
        best_fp32 = max(fp32)
        axes.axhline(best_fp32, color=ORANGE, linewidth=1.2, linestyle="--")
        _beside(axes, f"best fp32 layer: {significant(best_fp32)} GMAC/s", (high, best_fp32), **above)
    axes.fill_between(grid, roof, color="#F2F2F2", zorder=0)
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    axes.set_ylim(top=3 * peak)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda x, _: significant(x)))
    _plain(axes, "both")
    title = "Binary layers, one thread, float in to float out"
    _labels(axes, title, "multiply-accumulates per byte of input, weight and output")
    axes.set_ylabel("GMAC/s", fontsize=9)
    axes.legend(loc="upper left", frameon=True, framealpha=0.9, edgecolor="none", fontsize=9)


def _step_bandwidths(axes: Axes, records: Records) -> None:
    names = [
        (roofline.STREAM, "read/write loop\nof the same bytes", GREY),
        (roofline.COPY, "copy", GREY),
        (step.PACKED, "bop2nd", BLUE),
        (step.BF16, "bop2nd, bf16", SKY),
        (step.COMPILED, "careful eager,\ncompiled", ORANGE),
        (step.ADAM, "Adam, fused", ORANGE),
        (step.CAREFUL, "careful eager", ORANGE),
    ]
    record = _of(records, "step")[0]
    found = [(label, e["rate"], colour) for n, label, colour in names if (e := contender(record, n))]
    _plain(axes, "x")
    axes.barh([f[0] for f in found], [f[1] for f in found], color=[f[2] for f in found], height=0.7)
    for row, (_, rate, _) in enumerate(found):
        _beside(axes, significant(rate), (rate, row))
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0, labelsize=9)
    if found:
        axes.set_xlim(0, 1.15 * max(f[1] for f in found))
    title = f"Step: {record['case']}, {_threads([record])}"
    _labels(axes, title, "GB/s, counting the bytes each must move at least")


def _save(figure: Figure, path: Path) -> Path:
    # No software version or date inside: the same results give the same file.
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=130, metadata={"Software": None}))
    return path
