"""The claims of arXiv 2104.05124's abstract, each with what the committed studies measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .records import Line
from .summary import Group, fair_seconds, groups_of, percent, spread

Results = Mapping[str, Sequence[Line]]  # the lines of each study that has results, by its name
NOTHING = "not measured yet"


@dataclass(frozen=True)
class Claim:
    """What the paper says, what was measured here, and what that does not show."""

    says: str
    measured: str
    leaves_open: str


def table(results: Results) -> str:
    """A Markdown table with a row for each claim. Same results, same text."""
    rows = ["| the paper | measured here | what this does not show |", "|---|---|---|"]
    rows += [f"| {claim.says} | {claim.measured} | {claim.leaves_open} |" for claim in claims(results)]
    return "\n".join(rows) + "\n"


def claims(results: Results) -> list[Claim]:
    """In the order of the abstract."""
    optimizers = [group for group in groups_of(results.get("optimizers", ())) if group.complete]
    short = "Whether the order stays over the paper's 500 epochs, at width 128, on the original images"
    return [
        Claim("Bop2ndOrder converges faster", _faster(optimizers), f"{short}."),
        Claim(
            "it is robust to changes of its hyperparameters",
            _robust(groups_of(results.get("ablation", ()))),
            "Robustness of trained networks to other settings than these decades; more than one network.",
        ),
        Claim("it reaches a better accuracy", _better(optimizers), f"{short}."),
        Claim(
            "schedulers of gamma, sigma and threshold matter",
            _schedulers(groups_of(results.get("schedulers", ()))),
            "Other schedules than staircases; that of Adam's learning rate, which is constant here.",
        ),
    ]


def _seeds(groups: Sequence[Group]) -> str:
    counts = sorted({len(group.complete) for group in groups})
    return f"{'–'.join(map(str, counts))} seed{'s' if counts != [1] else ''}"


def _each(groups: Sequence[Group], figure: dict[str, tuple[float, float] | None], timed: bool = False) -> str:
    """``name 50.0 ± 1.0``, best first; what has no figure is left out. ``timed``: of runs whose time is
    known."""
    counts = {group.arm: sum(run.timed or not timed for run in group.complete) for group in groups}
    several = {name: count > 1 for name, count in counts.items()}
    found = {name: value for name, value in figure.items() if value is not None}
    order = sorted(found, key=lambda name: -found[name][0])
    return "; ".join(f"{name} {percent(found[name], several[name])}" for name in order)


def _faster(groups: Sequence[Group]) -> str:
    if len(groups) < 2:
        return NOTHING
    first = {group.arm: group.over(lambda run: run.lines[0]["accuracy"]) for group in groups}
    fair = fair_seconds(groups) or 0.0
    text = f"Accuracy after the first epoch [%], {_seeds(groups)}: {_each(groups, first)}."
    timed = {group.arm: group.over_time(lambda run: run.accuracy_at(fair)) for group in groups}
    if sum(value is not None for value in timed.values()) < 2:
        return text
    return f"{text} After the same {fair:.0f} s of training: {_each(groups, timed, timed=True)}."


def _better(groups: Sequence[Group]) -> str:
    if len(groups) < 2:
        return NOTHING
    epochs = groups[0].complete[0].last["epochs"]
    last = {group.arm: group.accuracy() for group in groups}
    return f"Accuracy after {epochs} epochs [%], {_seeds(groups)}: {_each(groups, last)}."


def _versions(groups: Sequence[Group]) -> dict[str, list[Group]]:
    found: dict[str, list[Group]] = {}
    for group in groups:
        if group.complete:
            found.setdefault(str(group.axes["version"]), []).append(group)
    return found


def _robust(groups: Sequence[Group]) -> str:
    parts = []
    for version, own in _versions(groups).items():
        means = [mean[0] for group in own if (mean := group.accuracy()) is not None]
        low, high = 100 * min(means), 100 * max(means)
        settings = percent(spread(means))
        parts.append(
            f"{version}: {len(own)} settings, {settings} % over them, from {low:.1f} to {high:.1f} %"
        )
    return "; ".join(parts) + "." if parts else NOTHING


def _schedulers(groups: Sequence[Group]) -> str:
    parts = []
    for own in _versions(groups).values():
        what = {group.arm: group.accuracy() for group in own}
        parts.append(f"{_seeds(own)} [%]: {_each(own, what)}")
    return ". ".join(parts) + "." if parts else NOTHING
