"""The pictures of docs/optimizer.md and docs/recipes.md, from runs of this file: `make pictures`, minutes.

``one_weight.svg``: one weight and its moments over time, at three thresholds. ``regimes.svg``: the digits'
recipe trained at many thresholds. ``signal.svg``: how |m| / sqrt(v) is distributed in that network.
``training.png``: what `bop2nd train digits` draws.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

import bop2nd_fast as bf
from bop2nd_fast import data, plots, recipes, train
from bop2nd_fast.atomic_write import atomic_write

IMAGES = Path(__file__).resolve().parent / "images"
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"  # Okabe and Ito's
GREY, DARK = "#9A9A9A", "#444444"
THRESHOLDS = {"inactive": 0.05, "active": 2.0, "frozen": 9.0}  # of the story, in units of the noise


def noise(gamma: float) -> float:
    """Standard deviation of m / sqrt(v) where the gradient is noise alone: the unit of these pictures."""
    return math.sqrt(gamma / 2)


# ------------------------------------------------------------------------- one weight


@dataclasses.dataclass
class Story:
    """Of one weight, after every step: m / sqrt(v) in units of its noise, and the sign."""

    signal: list[float]
    sign: list[float]


def one_weight(threshold: float, steps: int, gamma: float = 1e-2, sigma: float = 1e-2) -> Story:
    """A weight whose gradient is noise around a slope that turns: down, up, flat."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.nn.Parameter(bf.pack(torch.ones(1, 32)))
    optimizer = bf.optim.Bop2ndOrder([weight], gamma=gamma, sigma=sigma, threshold=threshold * noise(gamma))
    story = Story([], [])
    for step in range(steps):
        slope = (0.35, -0.35, 0.0)[3 * step // steps]
        weight.grad = slope + torch.randn(1, 32, generator=generator)
        optimizer.step()
        state = optimizer.state[weight]
        signal = state["exp_avg"][0, 0] / state["exp_avg_sq"][0, 0].sqrt()
        story.signal.append(float(signal) / noise(gamma))
        story.sign.append(float(weight.detach().unpack()[0, 0]))
    return story


def draw_one_weight(path: Path, steps: int) -> None:
    figure = Figure(figsize=(10, 5.4), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True, sharey=True)
    for axes, (regime, threshold) in zip(panels, THRESHOLDS.items(), strict=True):
        story = one_weight(threshold, steps)
        signal, signs = np.array(story.signal), np.array(story.sign)
        flips = np.flatnonzero(np.diff(signs, prepend=1.0))
        axes.axhspan(-threshold, threshold, color="#EEEEEE", zorder=0)
        axes.plot(np.arange(0, steps, 10), signal[::10], color=GREY, linewidth=1)
        axes.plot(flips, signal[flips], "o", markersize=3.7, color=VERMILION, zorder=3)
        box, colours = (0, steps, 9.7, 10.9), ListedColormap([ORANGE, BLUE])
        axes.imshow(signs[None], extent=box, cmap=colours, vmin=-1, vmax=1, interpolation="nearest", zorder=2)
        axes.set_aspect("auto")
        axes.set_xlim(0, steps)
        axes.set_ylim(-8, 11)
        count = f"{len(flips)} flip{'s' if len(flips) != 1 else ''}"
        title = f"{regime}: threshold {threshold:g} units, {count}"
        axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=DARK)
        _plain(axes)
    panels[1].set_ylabel("m / √v, in units of its noise", fontsize=9.5)
    panels[2].set_xlabel("step (a third each: the gradient pulls to -1, to +1, is noise alone)", fontsize=9.5)
    figure.suptitle(
        "One weight. Bar: its sign (blue +1, orange -1). Dots: flips. Band: what the threshold holds back",
        fontsize=10.5,
    )
    _save(figure, path)


# ------------------------------------------------------------------------- the digits at many thresholds


@dataclasses.dataclass
class Run:
    """Of one training: the threshold in units of the noise, and what came out."""

    threshold: float
    accuracy: float
    flips: float
    blocked: float
    histogram: np.ndarray[Any, Any]


def digits(recipe: recipes.Recipe, threshold: float, picture: Path | None = None) -> Run:
    """The recipe of the digits with another threshold (in units of the noise)."""
    value = threshold * noise(recipe.courses["gamma"].start)
    trainer = train.Trainer(recipe.replace(values={"threshold": value}), data.digits())
    history = trainer.run()
    last = history[-1]
    if picture is not None:
        plots.training(history, picture, "bop2nd train digits")
    counts = sum(trainer.optimizer.signal_histogram().values())
    assert isinstance(counts, torch.Tensor) and last.flip_rate is not None and last.blocked_share is not None
    return Run(threshold, last.test_accuracy, last.flip_rate, last.blocked_share, counts.numpy())


def draw_regimes(path: Path, runs: list[Run], about: str) -> None:
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    accuracy, flips, blocked = figure.subplots(1, 3)
    x = [run.threshold for run in runs]
    accuracy.plot(x, [100 * run.accuracy for run in runs], "o-", color=DARK, markersize=4)
    accuracy.set_title("test accuracy [%]", loc="left", fontsize=10.5)
    shown = [run for run in runs if run.flips > 0]
    flips.plot([r.threshold for r in shown], [r.flips for r in shown], "o-", color=DARK, markersize=4)
    flips.set_yscale("log")
    flips.set_title("flips per weight and step, last epoch", loc="left", fontsize=10.5)
    blocked.plot(x, [100 * run.blocked for run in runs], "o-", color=DARK, markersize=4)
    blocked.set_title("held back by the threshold [%]", loc="left", fontsize=10.5)
    for axes in (accuracy, flips, blocked):
        axes.set_xscale("log")
        axes.set_xlabel("threshold / √(gamma / 2)", fontsize=9)
        _plain(axes)
    figure.suptitle(about, fontsize=10.5)
    _save(figure, path)


def draw_signal(path: Path, run: Run, about: str) -> None:
    figure = Figure(figsize=(10, 3), layout="constrained")
    axes = figure.subplots()
    share = run.histogram[:-1] / run.histogram.sum()
    edges = np.linspace(0, 8, len(share) + 1)
    axes.bar(edges[:-1], 100 * share, width=np.diff(edges), align="edge", color=GREY)
    axes.axvline(run.threshold, color=GREEN, linewidth=2)
    axes.annotate(
        f"the recipe's threshold: {run.threshold:.2g}",
        (run.threshold, 0.92 * 100 * share.max()),
        xytext=(6, 0),
        textcoords="offset points",
        color=GREEN,
        fontsize=9.5,
    )
    axes.set_xlabel("|m| / √v, in units of its noise √(gamma / 2)", fontsize=9.5)
    axes.set_ylabel("weights [%]", fontsize=9.5)
    _plain(axes)
    figure.suptitle(about, fontsize=10.5)
    _save(figure, path)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E4E4E4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)


def _save(figure: Figure, path: Path) -> None:
    # No date, version or random name inside: the same runs give the same file. Text stays text.
    rcParams["svg.hashsalt"], rcParams["svg.fonttype"] = path.name, "none"
    atomic_write(
        path, lambda file: figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    )
    print(f"wrote {path.name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder of the pictures")
    parser.add_argument("--quick", action="store_true", help="tiny runs, to see that everything works")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    recipe = recipes.get("digits")
    if chosen.quick:
        recipe = recipe.replace(epochs=1, width=4)
    gamma, sigma = recipe.courses["gamma"].start, recipe.courses["sigma"].start
    own = recipe.courses["threshold"].start / noise(gamma)
    thresholds = (own,) if chosen.quick else (0.01, 0.1, 0.3, own, 2, 3, 5, 8, 12)
    draw_one_weight(chosen.out / "one_weight.svg", 300 if chosen.quick else 3000)
    training = {own: chosen.out / "training.png"}
    runs = [digits(recipe, threshold, training.get(threshold)) for threshold in thresholds]
    about = f"{recipe.epochs} epochs, gamma {gamma:g}, sigma {sigma:g}"
    name = f"BinaryNet, width {recipe.options['width']}, on scikit-learn's digits, {about}"
    draw_regimes(chosen.out / "regimes.svg", runs, f"{name}, one seed")
    draw_signal(
        chosen.out / "signal.svg", runs[thresholds.index(own)], f"{name}: all binary weights after training"
    )


if __name__ == "__main__":
    main()
