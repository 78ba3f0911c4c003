"""Recipes: a whole training as data. Network, data set, optimizer with its schedules, epochs, batch size.

>>> recipe = bf.recipes.get("cifar10_biased").replace(
...     epochs=10, width=32, values={"sigma": 1e-3}, schedules={"gamma": Linear(1e-3, 1e-5)}
... )
>>> recipe == bf.recipes.Recipe.from_json(recipe.to_json())
True

Every preset of the papers (``optim.presets``) is a recipe; the others are made here.
"""

from __future__ import annotations

import dataclasses
import json
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from . import data, models
from .optim import presets
from .optim.courses import KINDS, Constant, Cosine, Course, Courses, Linear, parse, stretched, text_of
from .optim.presets import Preset

# What can run over a training, by optimizer; lr is Adam's, of the real weights.
HYPERPARAMETERS = {
    "Bop": ("gamma", "threshold", "lr"),
    "Bop2ndOrder": ("gamma", "sigma", "threshold", "lr"),
    "Adam": ("lr",),
}
BIAS_CORRECTIONS = ("none", "reference", "adam")
AUGMENTATIONS = ("none", "flip", "crop_flip", "resized_crop")


@dataclass(frozen=True)
class Recipe:
    """A training run, but for its seed and its machine.

    Args:
        name: what it is called, and its preset with it; a changed recipe keeps the name it comes from.
        preset: network, data set, optimizer, courses, epochs, batch size.
        options: of the network, as ``models.get`` takes them (``width``, ``norm``, ``weights``, ...).
        augmentation: of training images: ``none``, ``flip`` (mirror), ``crop_flip`` (pad by 4, crop, mirror)
            or, for folders, ``resized_crop`` (a crop of 8 to 100 % of the area, resized, mirrored).

    Raises:
        ValueError: anything impossible; the message says what and what is allowed.
    """

    name: str
    preset: Preset
    options: dict[str, Any] = field(default_factory=dict)
    augmentation: str = "none"

    def __post_init__(self) -> None:
        p = dataclasses.replace(self.preset, name=self.name)
        object.__setattr__(self, "preset", p)
        _of_type("name", self.name, str, "a text")
        _of_type("options", self.options, dict, "a dict of name and value")
        _among("network", p.network, models.NAMES)
        _among("data set", p.dataset, data.NAMES)
        _among("optimizer", p.optimizer, tuple(HYPERPARAMETERS))
        _among("augmentation", self.augmentation, AUGMENTATIONS)
        if p.optimizer == "Bop2ndOrder":
            _among("bias_correction", p.bias_correction, BIAS_CORRECTIONS)
        elif p.bias_correction is not None:
            raise ValueError(f"{p.optimizer} has no bias_correction; Bop2ndOrder has")
        for what, count in (("epochs", p.epochs), ("batch_size", p.batch_size)):
            _of_type(what, count, int, "a whole number")
            if count < 1:
                raise ValueError(f"{what} is {count}, it must be at least 1")
        for name in p.courses:
            _among("hyperparameter", name, HYPERPARAMETERS[p.optimizer], f" of {p.optimizer}")
        if missing := [n for n in HYPERPARAMETERS[p.optimizer] if n not in p.courses]:
            raise ValueError(f"{p.optimizer} needs {', '.join(missing)}")
        for name, course in p.courses.items():
            kinds = " or a ".join(kind.__name__ for kind in KINDS.values())
            _of_type(f"the course of {name}", course, tuple(KINDS.values()), f"a {kinds}")
            _check_range(name, course)

    # What a reader asks for, whether the recipe or its preset has it.

    @property
    def network(self) -> str:
        return self.preset.network

    @property
    def dataset(self) -> str:
        return self.preset.dataset

    @property
    def epochs(self) -> int:
        return self.preset.epochs

    @property
    def batch_size(self) -> int:
        return self.preset.batch_size

    @property
    def optimizer(self) -> str:
        return self.preset.optimizer

    @property
    def courses(self) -> Courses:
        return self.preset.courses

    def model(self, dataset: data.Dataset | data.ImageFolder, seed: int = 0) -> nn.Module:
        """The network for these images, its weights drawn from ``seed``; the global random state stays."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(operator.index(seed))
            return models.get(
                self.network,
                num_classes=len(dataset.classes),
                in_channels=dataset.in_channels,
                image_size=dataset.image_size,
                **self.options,
            )

    def replace(
        self,
        *,
        name: str | None = None,
        dataset: str | None = None,
        epochs: int | None = None,
        batch_size: int | None = None,
        width: int | None = None,
        options: Mapping[str, Any] | None = None,
        augmentation: str | None = None,
        bias_correction: str | None = None,
        values: Mapping[str, float] | None = None,
        schedules: Mapping[str, Course] | None = None,
    ) -> Recipe:
        """This recipe with other parts. What is None stays.

        Args:
            epochs: schedules span the run whatever its length; the steps of staircases scale with it.
            width: shorthand for the option of the network.
            options: options of the network, added to those there are.
            values: hyperparameters that are constant from now on.
            schedules: courses of hyperparameters, for the new number of epochs.

        Raises:
            ValueError: an unknown hyperparameter (the message lists what there is), a value out of range.
        """
        p, courses = self.preset, dict(self.courses)
        if epochs is not None:
            epochs = operator.index(epochs)
            courses = {key: stretched(course, epochs / p.epochs) for key, course in courses.items()}
        courses |= {key: Constant(float(value)) for key, value in (values or {}).items()}
        courses |= schedules or {}
        preset = dataclasses.replace(
            p,
            dataset=p.dataset if dataset is None else dataset,
            epochs=p.epochs if epochs is None else epochs,
            batch_size=p.batch_size if batch_size is None else operator.index(batch_size),
            bias_correction=p.bias_correction if bias_correction is None else bias_correction,
            courses=courses,
        )
        given = {} if width is None else {"width": operator.index(width)}
        return Recipe(
            self.name if name is None else name,
            preset,
            {**self.options, **given, **(options or {})},
            self.augmentation if augmentation is None else augmentation,
        )

    def to_json(self) -> str:
        """One line; :meth:`from_json` reads it back to an equal recipe."""
        plain = dataclasses.asdict(self.preset)
        plain["courses"] = {key: text_of(course) for key, course in self.courses.items()}
        plain |= {"name": self.name, "options": self.options, "augmentation": self.augmentation}
        return json.dumps(plain)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Raises ValueError if ``text`` is not a recipe of this version."""
        try:
            plain = dict(json.loads(text))
            own = {key: plain.pop(key) for key in ("options", "augmentation")}
            plain["courses"] = {key: parse(course) for key, course in plain["courses"].items()}
            return cls(plain["name"], Preset(**plain), **own)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is no recipe of this version: {error}") from error

    def differences(self, other: Recipe) -> list[str]:
        """``gamma was constant:0.001, is now constant:0.01``: what ``other`` has otherwise."""
        before, now = (_flat(json.loads(recipe.to_json())) for recipe in (self, other))
        names = [name for name in before | now if before.get(name) != now.get(name)]
        return [f"{name} was {before.get(name)}, is now {now.get(name)}" for name in names]


def _flat(plain: dict[str, Any]) -> dict[str, Any]:
    return {**plain, **plain["courses"], **plain["options"], "courses": None, "options": None}


def _among(what: str, value: object, allowed: tuple[str, ...], of: str = "") -> None:
    if value not in allowed:
        raise ValueError(f"there is no {what} {value!r}{of}; there are {', '.join(allowed)}")


def _of_type(what: str, value: object, kind: type | tuple[type, ...], allowed: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{what} is {value!r}, it must be {allowed}")


def _check_range(name: str, course: Course) -> None:
    for value in (course.start, getattr(course, "end", course.start)):
        rate = name in ("gamma", "sigma")
        if not (math.isfinite(value) and value >= 0 and (not rate or value <= 1)):
            allowed = "in (0, 1]" if rate else "a finite number >= 0"
            raise ValueError(f"{name} is {value}, it must be {allowed}")
    if name == "gamma" and course.start == 0:
        raise ValueError("gamma starts at 0, it must be in (0, 1]: with 0 no weight would ever flip")
    if getattr(course, "end", None) is not None and course.start <= 0:
        raise ValueError(f"a schedule of {name} starts above 0, not at {course.start}")
    if not all(0 < getattr(course, part, 1) < math.inf for part in ("every", "factor")):
        raise ValueError(f"a staircase of {name} needs a finite factor and number of epochs above 0")


def _of_preset(preset: Preset) -> Recipe:
    augmentation = "resized_crop" if preset.dataset == "imagenet" else "crop_flip"
    return Recipe(preset.name, preset, augmentation=augmentation)


def _digits() -> Recipe:
    # With seeds 0, 1 and 2 better than batches of 50 and than a threshold of 3e-2.
    values = {"gamma": 1e-3, "sigma": 1e-2, "threshold": 2e-2, "lr": 0.01}
    courses: Courses = {name: Constant(value) for name, value in values.items()}
    preset = Preset("digits", "binarynet", "digits", "Bop2ndOrder", "none", 20, 32, courses)
    return Recipe("digits", preset, {"width": 32})


def _cifar10_short() -> Recipe:
    """For some ten epochs: gamma falls further, the threshold is half the noise of m / sqrt(v) at the start
    (``sqrt(gamma / 2)``) and nine times that at the end. See docs/evidence.md."""
    courses: Courses = {
        "gamma": Linear(3e-3, 1e-5),
        "sigma": Constant(1e-3),
        "threshold": Constant(0.02),
        "lr": Linear(0.01, 1e-4),
    }
    preset = Preset("cifar10_short", "binarynet", "cifar10", "Bop2ndOrder", "none", 10, 50, courses)
    return Recipe(preset.name, preset, {"width": 64}, "flip")


def _cifar10_birealnet() -> list[Recipe]:
    """Bi-Real-Net-18 for small images, narrow, in some ten epochs: latent-free, with latent weights, and the
    real-valued network of its shape, a teacher."""
    short = _cifar10_short().preset
    adam: dict[str, Any] = {"optimizer": "Adam", "bias_correction": None, "courses": {"lr": Cosine(1e-3)}}
    made = []
    for name, weights, change in (
        ("cifar10_birealnet", "binary", {}),
        ("cifar10_birealnet_latent_adam", "latent", adam),
        ("cifar10_teacher", "real", adam),
    ):
        preset = dataclasses.replace(short, name=name, network="birealnet18", **change)
        options = {"cifar": True, "width": 16, "weights": weights}
        made.append(Recipe(name, preset, options, "flip"))
    return made


def _latent_adam() -> Recipe:
    courses: Courses = {"lr": Cosine(1e-3)}
    preset = Preset("cifar10_latent_adam", "binarynet", "cifar10", "Adam", None, 500, 50, courses)
    return Recipe(preset.name, preset, {"weights": "latent"}, "crop_flip")


_RECIPES = {
    recipe.name: recipe
    for recipe in [
        _digits(),
        _cifar10_short(),
        *_cifar10_birealnet(),
        _latent_adam(),
        *(_of_preset(presets.get(name)) for name in presets.NAMES),
    ]
}
NAMES = tuple(sorted(_RECIPES))


def get(name: str) -> Recipe:
    """The recipe called ``name``; ``recipes.NAMES`` lists them.

    Raises:
        ValueError: there is no recipe of that name.
    """
    if name not in _RECIPES:
        raise ValueError(f"there is no recipe {name!r}; there are {', '.join(NAMES)}")
    return _RECIPES[name]
