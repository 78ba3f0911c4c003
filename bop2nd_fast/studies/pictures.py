"""The pictures of a study, from its lines (needs matplotlib, extra ``[cli]``)."""

from __future__ import annotations

import itertools
import statistics
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..plots import plain, save
from . import search, tables
from .records import Line
from .summary import Group, Run, groups_of, runs_of, spread

# Okabe and Ito's colours, which colour-blind readers can tell apart; line styles continue where they end.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":")
CURVES = 12  # arms beyond which curves are not drawn: they could not be told apart
GRID = ("gamma", "sigma", "threshold")


def draw(lines: Sequence[Line], folder: Path) -> list[Path]:
    """Every picture that these lines allow, as PNGs in ``folder``; returns their paths."""
    groups = groups_of(lines)
    title = f"{tables.title(lines)} – {tables.name_of(lines[0])}"
    drawn: list[Path] = []

    def add(name: str, picture: Figure) -> None:
        save(picture, folder / name)
        drawn.append(folder / name)

    if lines[0]["study"] == "search":
        add("search.png", _slices(runs_of(lines), title))
        return drawn
    finished = [group for group in groups if group.complete]
    if 0 < len(finished) <= CURVES:
        add("accuracy.png", _curves(finished, title))
    if all(name in group.axes for group in groups for name in GRID):
        for version in dict.fromkeys(str(group.axes["version"]) for group in finished):
            own = [group for group in finished if group.axes["version"] == version]
            add(f"heatmap_{version}.png", _heat_maps(own, f"{title}: {version}"))
    blocked = [run for group in finished for run in group.complete if run.last["blocked_share"] is not None]
    if blocked:
        add("blocked.png", _blocked(finished, title))
    return drawn


def _figure(title: str, width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(textwrap.fill(title, round(8 * width)), fontsize=13, fontweight="bold")
    return figure


def _looks() -> itertools.cycle[tuple[str, str]]:
    return itertools.cycle((colour, style) for style in STYLES for colour in COLOURS)


def _percent(axes: Axes, lines: Sequence[Line]) -> None:
    plain(axes)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylabel(f"{lines[0]['split']} accuracy")


# ------------------------------------------------------------------------------------------------ curves


def _curves(groups: Sequence[Group], title: str) -> Figure:
    """Mean over the seeds with a band of one standard deviation: over epochs, and over training time."""
    figure = _figure(title, 13, 4.8)
    by_epoch, by_time = figure.subplots(1, 2, sharey=True)
    for axes, label in ((by_epoch, "epoch"), (by_time, "seconds of training, mean over seeds")):
        _percent(axes, groups[0].runs[0].lines)
        axes.set_xlabel(label)
    by_epoch.xaxis.set_major_locator(MaxNLocator(integer=True))
    for group, (colour, style) in zip(groups, _looks(), strict=False):
        runs = group.complete
        epochs = range(1, runs[0].last["epochs"] + 1)
        found = [spread([run.lines[epoch - 1]["accuracy"] for run in runs]) for epoch in epochs]
        timed = [run.seconds() for run in runs if run.timed]
        seconds = [statistics.fmean(own[epoch - 1] for own in timed) for epoch in epochs] if timed else []
        for axes, x in ((by_epoch, list(epochs)), (by_time, seconds)):
            if not x:
                continue
            means, low = [m for m, _ in found], [m - s for m, s in found]
            label = f"{group.arm} ({len(runs)} seed{'s' if len(runs) > 1 else ''})"
            axes.plot(x, means, style, color=colour, marker=".", label=label)
            axes.fill_between(x, low, [m + s for m, s in found], color=colour, alpha=0.18, linewidth=0)
    figure.legend(
        *by_epoch.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9
    )
    return figure


def _blocked(groups: Sequence[Group], title: str) -> Figure:
    """Accuracy against the share of flips that the threshold held back, both in the last epoch."""
    figure = _figure(f"{title}: accuracy and blocked flips", 8, 4.8)
    axes = figure.subplots()
    lines = [run.last for group in groups for run in group.complete if run.last["blocked_share"] is not None]
    _percent(axes, lines)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("blocked flips in the last epoch, as a share of those that sign(m) would make")
    key: Callable[[Line], str] = lambda line: line["axes"].get("version") or line["arm"]  # noqa: E731
    names = list(dict.fromkeys(map(key, lines)))
    for name, (colour, _) in zip(names, _looks(), strict=False):
        own = [line for line in lines if key(line) == name]
        x, y = ([line[field] for line in own] for field in ("blocked_share", "accuracy"))
        axes.scatter(x, y, color=colour, label=name, alpha=0.8)
    axes.set_xlim(-0.02, 1.02)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


# ---------------------------------------------------------------------------------------------- heat maps


def _heat_maps(groups: Sequence[Group], title: str) -> Figure:
    """A panel for each threshold: accuracy over gamma and sigma; empty where no run has ended."""
    values = {name: sorted({float(str(group.axes[name])) for group in groups}) for name in GRID}
    cells = {
        tuple(float(str(group.axes[name])) for name in GRID): mean[0]
        for group in groups
        if (mean := group.accuracy()) is not None
    }
    low, high = min(cells.values()), max(cells.values())
    figure = _figure(title, 1.5 + 3.6 * len(values["threshold"]), 4)
    panels = figure.subplots(1, len(values["threshold"]), squeeze=False)[0]
    for axes, threshold in zip(panels, values["threshold"], strict=True):
        grid = [
            [cells.get((gamma, sigma, threshold), float("nan")) for gamma in values["gamma"]]
            for sigma in values["sigma"]
        ]
        image = axes.imshow(grid, origin="lower", cmap=colormaps["viridis"], vmin=low, vmax=high)
        for (row, own), column in itertools.product(enumerate(grid), range(len(values["gamma"]))):
            dark = own[column] < (low + high) / 2
            text = f"{100 * own[column]:.1f}" if own[column] == own[column] else ""
            axes.text(column, row, text, ha="center", va="center", color="white" if dark else "black")
        axes.set_title(f"threshold {threshold:g}", fontsize=11)
        axes.set_xticks(range(len(values["gamma"])), [f"{x:g}" for x in values["gamma"]])
        axes.set_yticks(range(len(values["sigma"])), [f"{x:g}" for x in values["sigma"]])
        axes.set_xlabel("gamma")
    panels[0].set_ylabel("sigma")
    figure.colorbar(image, ax=panels, format=PercentFormatter(1, decimals=0), label="accuracy")
    return figure


# ------------------------------------------------------------------------------------------------- search


def _slices(runs: Sequence[Run], title: str) -> Figure:
    """Accuracy over each hyperparameter; trials stopped early are grey, at what they had reached."""
    figure = _figure(title, 13, 6.4)
    panels = figure.subplots(2, (len(search.SPACE) + 1) // 2, sharey=True).flatten()
    for axes in panels[len(search.SPACE) :]:
        axes.set_axis_off()
    ended, stopped = [run for run in runs if run.complete], [run for run in runs if not run.complete]
    for axes, name in zip(panels, search.SPACE, strict=False):
        _percent(axes, runs[0].lines)
        for own, colour, label in (
            (stopped, "#B0B0B0", "stopped early"),
            (ended, COLOURS[0], "run to the end"),
        ):
            x = [run.last["params"][name] for run in own]
            axes.scatter(x, [run.last["accuracy"] for run in own], color=colour, s=18, label=label)
        axes.set_xscale("log")
        axes.set_xlabel(name)
    panels[0].legend(frameon=False, fontsize=8)
    return figure
