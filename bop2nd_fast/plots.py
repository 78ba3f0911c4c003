"""Pictures of a training run and of benchmark results (needs matplotlib, extra ``[cli]``).

Colours are Okabe and Ito's, which colour-blind readers can tell apart; layers run through viridis by depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from .atomic_write import atomic_write
from .train_record import Epoch

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#8C8C8C"


def training(history: Sequence[Epoch], path: str | Path, title: str) -> None:
    """Loss, accuracy and flip rate per layer over the epochs, as one PNG."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    figure.suptitle(title, fontsize=13, fontweight="bold")
    loss, accuracy, flips = figure.subplots(1, 3, width_ratios=(1, 1, 1.25))
    epochs = [entry.epoch for entry in history]
    for axes in (loss, accuracy, flips):
        _plain(axes)
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

    flips.set_title("Flip rate per layer")
    _flip_rates(flips, history)
    _save(figure, path)


def _flip_rates(axes: Axes, history: Sequence[Epoch]) -> None:
    """One line per layer on a logarithmic axis; an epoch without a flip leaves a gap."""
    names = list(history[0].layers)
    shades = colormaps["viridis"]
    for depth, name in enumerate(names):
        axes.plot(
            [entry.epoch for entry in history],
            [entry.layers[name] or float("nan") for entry in history],
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
        _plain(axes, grid="x")
        _bar_panel(axes, name, entries)
    if note:
        figure.supxlabel(note, fontsize=9, color="#555555")
    _save(figure, path)


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


def _plain(axes: Axes, grid: str = "y") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x" if grid == "x" else "y", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)


def _save(figure: Figure, path: str | Path) -> None:
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=150))
