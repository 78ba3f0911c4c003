"""What each study compares: recipes and what is changed in them. A study that is new is a table here.

"paper" are the papers' hyperparameters, made for 100 to 500 epochs: their schedules span the run, their
constants stay. "short" are some that suit a few epochs (recipe ``cifar10_short``): gamma starts at 3e-3, and
the threshold is in the order of the noise of ``m / sqrt(v)``, which is ``sqrt(gamma / 2)``.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .. import recipes
from ..optim.courses import parse
from ..recipes import Recipe
from .search import BASE as SEARCH_BASE


class StudyError(RuntimeError):
    """A study cannot be started, resumed or reported; the message says why and what is allowed."""


@dataclass(frozen=True)
class Arm:
    """One line of a study's table: a recipe, and where it stands on the study's grid (for heat maps).

    ``teacher``: it learns the outputs of the study's teacher instead of the labels.
    """

    name: str
    recipe: Recipe
    axes: dict[str, Any] = field(default_factory=dict)
    teacher: bool = False

    def to_plain(self) -> dict[str, Any]:
        recipe = json.loads(self.recipe.to_json())
        return {"name": self.name, "recipe": recipe, "axes": self.axes, "teacher": self.teacher}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Arm:
        """Raises ValueError if the recipe is another version's."""
        recipe = Recipe.from_json(json.dumps(plain["recipe"]))
        return cls(plain["name"], recipe, dict(plain["axes"]), plain["teacher"])


@dataclass(frozen=True)
class Study:
    """A name, a sentence, and its arms. ``epochs``: of a run, where the command line does not say it."""

    name: str
    title: str
    arms: Callable[[], list[Arm]]
    epochs: int = 10


def _arm(name: str, recipe: str, axes: Mapping[str, Any] | None = None, **changes: Any) -> Arm:
    """``changes`` as `Recipe.replace` takes them, schedules in their text form."""
    schedules = {key: parse(text) for key, text in changes.pop("schedules", {}).items()}
    made = recipes.get(recipe).replace(schedules=schedules, **changes)
    return Arm(name, made, dict(axes or {}))


# ------------------------------------------------------------------------------------------- optimizers

VERSIONS = {"biased": "none", "bias-corrected": "reference"}

# cifar10_short's courses for the others. With "reference", m / gamma is compared with sqrt(v / sigma): a
# threshold of 0.02 at the start is 0.02 * sqrt(sigma) / gamma there. Bop's threshold is the paper's.
SHORT_REFERENCE = {
    "gamma": "linear:3e-3:1e-5",
    "sigma": "1e-3",
    "threshold": "0.21",
    "lr": "linear:0.01:1e-4",
}
SHORT_BOP = {"gamma": "linear:3e-3:1e-5", "threshold": "1e-8", "lr": "linear:0.01:1e-4"}

OPTIMIZERS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("latent Adam", "cifar10_latent_adam", {}),
    ("Bop2ndOrder biased, short", "cifar10_short", {}),
    ("Bop2ndOrder reference, short", "cifar10_unbiased", {"schedules": SHORT_REFERENCE}),
    ("Bop2ndOrder adam, short", "cifar10_short", {"bias_correction": "adam"}),
    ("Bop, short", "cifar10_bop", {"schedules": SHORT_BOP}),
    ("Bop2ndOrder biased, paper", "cifar10_biased", {}),
    ("Bop2ndOrder reference, paper", "cifar10_unbiased", {}),
    ("Bop, paper", "cifar10_bop", {}),
)


def _optimizers() -> list[Arm]:
    """Images are mirrored and not cropped, for all: in some ten epochs no network here fits them by heart."""
    same = {"batch_size": 50, "augmentation": "flip"}
    return [_arm(name, recipe, None, **same, **changes) for name, recipe, changes in OPTIMIZERS]


# --------------------------------------------------------------------------------------------- ablation

ABLATION_GRID = {
    "gamma": (1e-9, 1e-7, 1e-5),
    "sigma": (1e-5, 1e-3, 1e-1),
    "threshold": (1e-8, 1e-6, 1e-4),
}


def _ablation() -> list[Arm]:
    """Every point of the grid around the paper's base point (gamma 1e-7, sigma 1e-3, threshold 1e-6)."""
    arms = []
    for version, correction in VERSIONS.items():
        for point in itertools.product(*ABLATION_GRID.values()):
            values = dict(zip(ABLATION_GRID, point, strict=True))
            name = f"{version}, " + ", ".join(f"{key} {value:g}" for key, value in values.items())
            axes = {"version": version, **values}
            arms.append(_arm(name, "ablation", axes, bias_correction=correction, values=values))
    return arms


# ----------------------------------------------------------------------------------- schedulers and norms


def _schedulers() -> list[Arm]:
    """The paper's staircases, scaled to the run's length: of one hyperparameter, of all, of none."""
    arms = []
    for version, paper in (("biased", "biased"), ("bias-corrected", "unbiased")):
        base = recipes.get(f"schedulers_all_{paper}")
        fixed = {name: base.courses[name].start for name in ("gamma", "sigma", "threshold")}
        arms.append(_arm(f"{version}, none", base.name, {"version": version}, values=fixed))
        arms += [
            _arm(f"{version}, {what}", f"schedulers_{what}_{paper}", {"version": version})
            for what in ("gamma", "sigma", "threshold", "all")
        ]
    return arms


def _norms() -> list[Arm]:
    return [
        _arm(f"{version}, {norm} norm", f"norm_comparison_{paper}", options={"norm": norm})
        for version, paper in (("biased", "biased"), ("bias-corrected", "unbiased"))
        for norm in ("batch", "layer")
    ]


# ----------------------------------------------------------------------------------------------- ladder

RUNGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("Bi-Real", {}),
    ("+ RSign", {"sign": "rsign"}),
    ("+ RPReLU", {"activation": "rprelu"}),
    ("+ scale", {"scale": True}),
    ("+ distillation", {}),
)


def _ladder() -> list[Arm]:
    """Every rung has what those before it have; Bop2ndOrder beside latent weights with Adam on each."""
    arms: list[Arm] = []
    options: dict[str, Any] = {}
    for rung, added in RUNGS:
        options |= added
        for optimizer, recipe in (
            ("Bop2ndOrder", "cifar10_birealnet"),
            ("latent Adam", "cifar10_birealnet_latent_adam"),
        ):
            arm = _arm(f"{rung}, {optimizer}", recipe, {"optimizer": optimizer}, options=options)
            arms.append(dataclasses.replace(arm, teacher=rung == "+ distillation"))
    return arms


# ----------------------------------------------------------------------------------------------- search


def _search() -> list[Arm]:
    return [Arm("search", recipes.get(SEARCH_BASE))]


STUDIES = {
    study.name: study
    for study in (
        Study("optimizers", "Optimizers: the same network and budget", _optimizers),
        Study("ablation", "Ablation: gamma, sigma and threshold over decades", _ablation, epochs=3),
        Study("schedulers", "Schedulers: which hyperparameter gains from one", _schedulers),
        Study("norms", "Batch norm against layer norm", _norms),
        Study("ladder", "The ladder: how far latent-free training goes", _ladder),
        Study("search", "Search for hyperparameters of a short run", _search, epochs=3),
    )
}


def get(name: str) -> Study:
    """The study called ``name``; ``STUDIES`` lists them.

    Raises:
        StudyError: there is no such study.
    """
    if name not in STUDIES:
        raise StudyError(f"there is no study {name!r}; there are {', '.join(STUDIES)}")
    return STUDIES[name]


def arms_of(
    name: str,
    dataset: str,
    *,
    epochs: int | None = None,
    width: int | None = None,
    batch_size: int | None = None,
    only: tuple[str, ...] = (),
) -> list[Arm]:
    """The arms of a study for a data set and a budget.

    Args:
        only: keep the arms whose names contain one of these texts.

    Raises:
        StudyError: no such study, or nothing is left of it.
        ValueError: an impossible number.
    """
    study = get(name)
    arms = [arm for arm in study.arms() if not only or any(text in arm.name for text in only)]
    if not arms:
        names = "; ".join(arm.name for arm in study.arms())
        raise StudyError(
            f"{name} has no line with {' or '.join(map(repr, only))} in its name; it has: {names}"
        )
    changes: dict[str, Any] = {
        "dataset": dataset,
        "epochs": study.epochs if epochs is None else epochs,
        "width": width,
        "batch_size": batch_size,
        "augmentation": "none" if dataset in ("digits", "mnist", "fashion_mnist") else None,
    }
    return [dataclasses.replace(arm, recipe=arm.recipe.replace(**changes)) for arm in arms]
