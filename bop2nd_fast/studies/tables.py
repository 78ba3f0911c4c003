"""The Markdown of a study: what was run, on what, and a line for each arm."""

from __future__ import annotations

from collections.abc import Sequence

from . import search
from .definitions import STUDIES
from .records import Line
from .summary import Group, Run, fair_seconds, groups_of, number, percent, runs_of

SHOWN = 10  # trials of a search


def table(lines: Sequence[Line]) -> str:
    """What was measured and a table with mean and standard deviation, as Markdown. Same lines, same text."""
    rows = _search(lines) if lines[0]["study"] == "search" else _arms(groups_of(lines))
    return "\n\n".join([_setting(lines), "\n".join(rows)]) + "\n"


def _setting(lines: Sequence[Line]) -> str:
    first, recipe = lines[0], lines[0]["recipe"]
    width = recipe["options"].get("width")
    network = recipe["network"] + (f", width {width}" if width is not None else "")
    machines = sorted({f"{line['stamp']['processor']}, {_threads(line)}" for line in lines})
    versions = sorted({f"torch {line['stamp']['torch']}" for line in lines})
    commits = sorted({line["stamp"]["commit"] + "+" * line["stamp"]["dirty"] for line in lines})
    dates = sorted({line["stamp"]["date"][:10] for line in lines})
    held_out = "validation images (a tenth of the training images)"
    images = held_out if first["split"] == "validation" else "test images"
    data = f"{name_of(first)} (SHA-256 {first['dataset']['sha256'][:12]})"
    budget = f"{first['epochs']} epochs, batches of {recipe['batch_size']}"
    if any(line["clock"] == "processor" and line["seconds"] is not None for line in lines):
        budget += "; seconds are a processor's" + _untimed(runs_of(lines))
    where = f"{'; '.join(machines)}; {', '.join(versions)}; commit {', '.join(commits)}; {', '.join(dates)}"
    return f"{network}; {data}; {budget}; accuracy on {images}. {where}."


def name_of(line: Line) -> str:
    """The data set's name in texts; one that was changed on its way here is never called the original."""
    sha256 = line["dataset"]["sha256"]
    return KNOWN.get(sha256, str(line["dataset"]["name"]))


# Variants of a known data set, by their SHA-256: all images went through JPEG of quality 75 here.
KNOWN = {"0d84e7a84558e46cab167448d817c8962197dcb29734d116a9079a026be6c17d": "CIFAR-10 (JPEG-75)"}


def _untimed(runs: Sequence[Run]) -> str:
    """Which seeds have no times."""
    seeds = sorted({run.last["seed"] for run in runs if not run.timed})
    return f" (those of seed {', '.join(map(str, seeds))} were not measured)" if seeds else ""


def _threads(line: Line) -> str:
    where = "" if line["device"] == "cpu" else f" on {line['stamp']['gpu']}"
    return f"{line['threads']} thread{'s' if line['threads'] > 1 else ''}{where}"


def _arms(groups: Sequence[Group]) -> list[str]:
    fair = fair_seconds(groups)
    at = "–" if fair is None else f"{fair:.0f} s"
    rows = [
        f"| | seeds | accuracy [%] | best epoch [%] | after {at} [%] | s/epoch | flips | blocked |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for group in groups:
        n = len(group.complete)
        cells = [group.arm, str(n) if n == len(group.runs) else f"{n} of {len(group.runs)}"]
        if not n:
            furthest = max(group.runs, key=lambda run: run.last["epoch"]).last
            reached = f"epoch {furthest['epoch']} of {furthest['epochs']}: {100 * furthest['accuracy']:.1f}"
            rows.append(f"| {' | '.join(cells)} | {reached} | | | | | |")
            continue
        several, timed = n > 1, sum(run.timed for run in group.complete)
        cells += [
            percent(group.accuracy(), several),
            percent(group.over(lambda run: max(line["accuracy"] for line in run.lines)), several),
            percent(group.over_time(lambda run: run.accuracy_at(fair or 0)), timed > 1),
            _mean(group.over_time(lambda run: run.seconds()[-1] / len(run.lines)), "{:.1f}"),
            _mean(group.over(lambda run: run.last["flip_rate"]), "{:.1e}"),
            _mean(group.over(lambda run: run.last["blocked_share"]), "{:.1%}"),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _mean(found: tuple[float, float] | None, form: str) -> str:
    return "–" if found is None else form.format(found[0])


def _search(lines: Sequence[Line]) -> list[str]:
    """The best trials that were run to their end, with their hyperparameters."""
    runs = runs_of(lines)
    best = sorted((run for run in runs if run.complete), key=lambda run: -run.last["accuracy"])
    stopped = sum(run.last["state"] == "pruned" for run in runs)
    rows = [
        f"{len(runs)} trials, {len(best)} of them run to their end, {stopped} stopped early by successive "
        f"halving. The best {min(SHOWN, len(best))}:",
        "",
        "| trial | accuracy [%] | " + " | ".join(search.SPACE) + " |",
        "|--:|--:|" + "--:|" * len(search.SPACE),
    ]
    for run in best[:SHOWN]:
        cells = [str(run.last["trial"]), f"{100 * run.last['accuracy']:.1f}", *_point(run)]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _point(run: Run) -> list[str]:
    return [number(run.last["params"][name]) for name in search.SPACE]


def title(lines: Sequence[Line]) -> str:
    return STUDIES[lines[0]["study"]].title
