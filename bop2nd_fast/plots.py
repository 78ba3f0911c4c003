"""Pictures of a training run and of benchmark results (needs matplotlib, extra ``[cli]``).

Colours are Okabe and Ito's, which colour-blind readers can tell apart; layers run through viridis by depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from .atomic_write import atomic_write
from .network_summary import Summary
from .train_record import Epoch

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#8C8C8C"
REGIMES = {
    "inactive": "#56B4E9",
    "active": "#009E73",
    "frozen": "#E69F00",
    "idle": "#DDDDDD",
    "not finite": "#D55E00",
}


def training(history: Sequence[Epoch], path: str | Path, title: str) -> None:
    """Loss, accuracy, flip rate and regime of every binary layer over the epochs, as one PNG."""
    has_layers = bool(history[0].layers)
    figure = Figure(figsize=(18 if has_layers else 9, 4.2), layout="constrained")
    figure.suptitle(title, fontsize=13, fontweight="bold")
    widths = (1, 1, 1.25, 1.25) if has_layers else (1, 1)
    loss, accuracy, *layers = figure.subplots(1, len(widths), width_ratios=widths)
    epochs = [entry.epoch for entry in history]
    for axes in (loss, accuracy, *layers):
        plain(axes)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    loss.set_title("Training loss")
    loss.plot(epochs, [entry.loss for entry in history], color=BLUE, marker="o", markersize=3.5)
    loss.set_ylabel("cross-entropy [nat]")
    loss.set_ylim(bottom=0)

    accuracy.set_title("Accuracy")
    test = [entry.test_accuracy for entry in history]
    accuracy.plot(
        epochs,
        [entry.train_accuracy for entry in history],
        color=BLUE,
        marker="o",
        markersize=3.5,
        label="training, mean over the epoch",
    )
    accuracy.plot(
        epochs,
        test,
        color=ORANGE,
        marker="s",
        markersize=3.5,
        label=f"test, at its end (last: {test[-1]:.1%})",
    )
    accuracy.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    accuracy.set_ylabel("share of images classified correctly")
    accuracy.set_ylim(top=1.01)
    accuracy.legend(loc="lower right", frameon=False)

    if has_layers:
        layers[0].set_title("Flip rate per layer")
        _flip_rates(layers[0], history)
        layers[1].set_title("Regime per layer")
        _regimes(layers[1], history)
    save(figure, path)


def _flip_rates(axes: Axes, history: Sequence[Epoch]) -> None:
    """One line per layer on a logarithmic axis; an epoch without a flip leaves a gap."""
    names = list(history[0].layers)
    shades = colormaps["viridis"]
    for depth, name in enumerate(names):
        axes.plot(
            [entry.epoch for entry in history],
            [entry.layers[name].flip_rate or float("nan") for entry in history],
            color=shades(0.95 * depth / max(1, len(names) - 1)),
            linewidth=1.6,
            marker=".",
            label=name.removesuffix(".weight"),
        )
    axes.set_yscale("log")
    axes.set_ylabel("flips per weight and step")
    axes.legend(
        loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9, title="first to last"
    )


def _regimes(axes: Axes, history: Sequence[Epoch]) -> None:
    """One row per layer, first on top; a cell's colour is the regime of that epoch."""
    names, regimes = list(history[0].layers), list(REGIMES)
    cells = [[regimes.index(entry.layers[name].regime) for entry in history] for name in names]
    edges = [entry.epoch - 0.5 for entry in history] + [history[-1].epoch + 0.5]
    colours = ListedColormap(list(REGIMES.values()))
    axes.grid(False)
    axes.pcolormesh(edges, range(len(names) + 1), cells, cmap=colours, vmin=0, vmax=len(regimes) - 1)
    axes.set_yticks([i + 0.5 for i in range(len(names))], [name.removesuffix(".weight") for name in names])
    axes.invert_yaxis()
    shown = sorted({cell for row in cells for cell in row})
    patches = [Patch(color=REGIMES[regimes[cell]], label=regimes[cell]) for cell in shown]
    axes.legend(handles=patches, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)


@dataclass(frozen=True)
class Bar:
    """One measured median with a lower and an upper quantile, in seconds.

    ``factor`` is its time as a multiple of ours; None for ours, which is drawn in colour.
    """

    label: str
    median: float
    lower: float
    upper: float
    factor: float | None = None


def bars(groups: Sequence[tuple[str, Sequence[Bar]]], path: str | Path, title: str, note: str = "") -> None:
    """Horizontal bars of times, one panel per group (panel title, its bars); shorter is better.

    Each bar carries its time and its factor; whiskers go from ``lower`` to ``upper``. Axes start at zero, so
    that lengths can be compared.
    """
    counts = [len(entries) for _, entries in groups]
    figure = Figure(figsize=(9.5, 1.1 + 0.42 * sum(counts) + 0.75 * len(groups)), layout="constrained")
    figure.suptitle(title, fontsize=13, fontweight="bold")
    panels = figure.subplots(len(groups), 1, height_ratios=[n + 1 for n in counts], squeeze=False)[:, 0]
    for axes, (name, entries) in zip(panels, groups, strict=True):
        plain(axes, grid="x")
        _bar_panel(axes, name, entries)
    if note:
        figure.supxlabel(note, fontsize=9, color="#555555")
    save(figure, path)


def _bar_panel(axes: Axes, name: str, entries: Sequence[Bar]) -> None:
    longest = max(bar.median for bar in entries)
    scale, unit = (1e3, "ms") if longest >= 1e-3 else (1e6, "µs")
    axes.set_title(name, loc="left", fontsize=11)
    for row, bar in enumerate(entries):
        middle = bar.median * scale
        spread = [[middle - bar.lower * scale], [bar.upper * scale - middle]]
        axes.barh(row, middle, color=BLUE if bar.factor is None else GREY, height=0.7)
        axes.errorbar(middle, row, xerr=spread, color="black", capsize=2.5, linewidth=1)
        text = f"{middle:.3g} {unit}"
        if bar.factor is not None:
            text += f"   {bar.factor:.2g}x" if bar.factor < 10 else f"   {bar.factor:.0f}x"
        axes.annotate(
            text, (bar.upper * scale, row), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9
        )
    axes.set_yticks(range(len(entries)), [bar.label for bar in entries])
    axes.invert_yaxis()
    axes.set_xlabel(f"median time [{unit}], shorter is better", fontsize=9)
    axes.set_xlim(0, 1.25 * max(bar.upper for bar in entries) * scale)


def layers(found: Summary, path: str | Path, title: str) -> None:
    """Bytes of every layer as it is held and in fp32 (logarithmic axis); times where they were measured."""
    rows = [row for row in found.rows if row.bytes_fp32 or row.seconds]
    timed = any(row.seconds for row in rows)
    height = 1.6 + 0.22 * len(rows)
    figure = Figure(figsize=(13 if timed else 8, height), layout="constrained")
    figure.suptitle(title, fontsize=13, fontweight="bold")
    panels = figure.subplots(1, 2 if timed else 1, sharey=True, squeeze=False)[0]
    places = range(len(rows))
    for axes in panels:
        plain(axes, grid="x")
    panels[0].set_title("Parameters")
    for shift, label, color, values in (
        (-0.2, "as they are held", BLUE, [row.bytes_packed for row in rows]),
        (0.2, "in fp32", GREY, [row.bytes_fp32 for row in rows]),
    ):
        panels[0].barh([i + shift for i in places], values, height=0.38, color=color, label=label)
    panels[0].set_xscale("log")
    panels[0].set_xlabel("bytes")
    panels[0].legend(frameon=False, fontsize=9)
    panels[0].set_yticks(places, [f"{row.name}  {row.kind}" for row in rows], fontsize=8)
    panels[0].invert_yaxis()
    if timed:
        panels[1].set_title("Time of a call")
        panels[1].barh(places, [1e3 * (row.seconds or 0) for row in rows], color=ORANGE, height=0.7)
        panels[1].set_xlabel("median [ms]")
    save(figure, path)


def plain(axes: Axes, grid: str = "y") -> None:
    """No frame but the axes, a light grid along one of them."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x" if grid == "x" else "y", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)


def save(figure: Figure, path: str | Path) -> None:
    """Write ``figure`` as PNG."""
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=150))
