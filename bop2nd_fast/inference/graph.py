"""What a packed model is made of: steps in order, references between them, and how it is called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Ref:
    """The result of an earlier step, or a constant of the model, inside the arguments of a later step."""

    name: str


@dataclass(frozen=True)
class Step:
    """One line of the graph. ``target`` is the name of a layer, or of an operator of ``operators.py``."""

    name: str
    kind: Literal["input", "layer", "operator", "output"]
    target: str = ""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class InputSpec:
    """What an input of the model must be: ``shape`` of the example, its dtype, which axes are free.

    ``free`` holds one truth value per axis. None stands for what a layer's words take: any batch and image
    size, the channels of the example.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    free: tuple[bool, ...] | None = None

    @cached_property
    def axes(self) -> tuple[int | None, ...]:
        """The size of every fixed axis, None for a free one."""
        n_axes = len(self.shape)
        free = self.free or tuple(i != 1 or n_axes not in (2, 4) for i in range(n_axes))
        return tuple(None if f else size for f, size in zip(free, self.shape, strict=True))

    def check(self, value: Any, name: str | int) -> None:
        """Raise unless rank, dtype and the size of every fixed axis are those of the example."""
        if not isinstance(value, Tensor):
            raise TypeError(f"input {name} must be a tensor, got {type(value).__name__}")
        shape, axes = value.shape, self.axes
        if len(shape) != len(axes) or any(a is not None and a != s for a, s in zip(axes, shape, strict=True)):
            letters = "NCHW" if len(axes) == 4 else "NTUVWXYZ"
            wanted = [str(a) if a is not None else letters[i : i + 1] or "*" for i, a in enumerate(axes)]
            raise ValueError(f"input {name} must be [{', '.join(wanted)}], got shape {tuple(shape)}")
        if value.dtype != self.dtype:
            raise TypeError(f"input {name} must be {self.dtype}, as in the conversion; got {value.dtype}")


REQUIRED: Any = inspect.Parameter.empty

PARAMETER_KINDS = {
    "positional": inspect.Parameter.POSITIONAL_ONLY,
    "any": inspect.Parameter.POSITIONAL_OR_KEYWORD,
    "args": inspect.Parameter.VAR_POSITIONAL,
    "keyword": inspect.Parameter.KEYWORD_ONLY,
    "kwargs": inspect.Parameter.VAR_KEYWORD,
}


@dataclass(frozen=True)
class Parameter:
    """One parameter of the user's ``forward``: its default is plain data, or ``REQUIRED``."""

    name: str
    kind: Literal["positional", "any", "args", "keyword", "kwargs"] = "any"
    default: Any = REQUIRED


@dataclass(frozen=True)
class Signature:
    """How the model is called: its parameters, and the example's call with a ``Ref`` for every tensor.

    ``call`` maps every parameter to what the example gave it (or its default): tensors are the ``Ref`` of an
    input step, inside tuples, lists and dicts; everything else is a constant, for which alone the conversion
    holds.
    """

    parameters: tuple[Parameter, ...]
    call: dict[str, Any]

    @staticmethod
    def positional(names: Sequence[str]) -> Signature:
        """Tensors by position only, one per name."""
        return Signature(
            tuple(Parameter(f"input_{i}", "positional") for i in range(len(names))),
            {f"input_{i}": Ref(name) for i, name in enumerate(names)},
        )

    @cached_property
    def _signature(self) -> inspect.Signature:
        return inspect.Signature(
            [inspect.Parameter(p.name, PARAMETER_KINDS[p.kind], default=p.default) for p in self.parameters]
        )

    @cached_property
    def plain(self) -> tuple[str, ...] | None:
        """The inputs in order if a call by position gives one tensor for each parameter; else None."""
        simple = all(p.kind in ("positional", "any") for p in self.parameters)
        values = [self.call[p.name] for p in self.parameters] if simple else []
        return tuple(v.name for v in values) if simple and all(isinstance(v, Ref) for v in values) else None

    def check(self, inputs: Sequence[str]) -> None:
        """Raise ``ValueError`` unless the call names every parameter, and every input step once."""
        if [p.name for p in self.parameters] != list(self.call):
            raise ValueError(f"the call names {list(self.call)}, not the parameters of the signature")
        found: list[str] = []
        map_leaves(self.call, lambda leaf: found.append(leaf.name) if isinstance(leaf, Ref) else None)
        if sorted(found) != sorted(inputs):
            raise ValueError(f"the call gives the inputs {sorted(found)}, the steps take {sorted(inputs)}")
        _ = self._signature  # names and order of the parameters are Python's to judge

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The value of every input step.

        Raises:
            TypeError: too many or too few arguments, as Python says it, or a container of another kind.
            ValueError: a constant that differs from the one the model was converted with.
        """
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(
                f"this model takes ({', '.join(map(_shown, self.parameters))}): {error}"
            ) from None
        bound.apply_defaults()
        values: dict[str, Any] = {}
        for name, wanted in self.call.items():
            _match(wanted, bound.arguments[name], name, values)
        return values


def _shown(parameter: Parameter) -> str:
    star = {"args": "*", "kwargs": "**"}.get(parameter.kind, "")
    return star + parameter.name + ("" if parameter.default is REQUIRED else f"={parameter.default!r}")


def _match(wanted: Any, given: Any, where: str, values: dict[str, Any]) -> None:
    """Collect the tensors of ``given`` that stand where ``wanted`` has a reference."""
    if isinstance(wanted, Ref):
        values[wanted.name] = given
    elif isinstance(wanted, (tuple, list)):
        kind = tuple if isinstance(wanted, tuple) else list
        if not isinstance(given, kind) or len(given) != len(wanted):
            raise TypeError(f"{where} must be a {kind.__name__} of {len(wanted)}, as in the conversion")
        for i, (inner, value) in enumerate(zip(wanted, given, strict=True)):
            _match(inner, value, f"{where}[{i}]", values)
    elif isinstance(wanted, dict):
        if not isinstance(given, dict) or given.keys() != wanted.keys():
            raise TypeError(f"{where} must be a dict with the keys {list(wanted)}, as in the conversion")
        for key, inner in wanted.items():
            _match(inner, given[key], f"{where}[{key!r}]", values)
    elif isinstance(given, Tensor) or type(given) is not type(wanted) or given != wanted:
        got = "a tensor" if isinstance(given, Tensor) else repr(given)
        raise ValueError(f"{where} was {wanted!r} in the conversion, which holds for that alone; got {got}")


def map_leaves(tree: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to the leaves of nested lists, tuples, dicts and slices, which become plain ones."""
    if isinstance(tree, (list, tuple)):
        mapped = [map_leaves(v, function) for v in tree]
        return tuple(mapped) if isinstance(tree, tuple) else mapped
    if isinstance(tree, dict):
        return {key: map_leaves(v, function) for key, v in tree.items()}
    if isinstance(tree, slice):
        return slice(
            map_leaves(tree.start, function), map_leaves(tree.stop, function), map_leaves(tree.step, function)
        )
    return function(tree)


def refers(tree: Any) -> bool:
    """Whether a reference is in a tree."""
    if isinstance(tree, (list, tuple)):
        return any(map(refers, tree))
    if isinstance(tree, dict):
        return any(map(refers, tree.values()))
    if isinstance(tree, slice):
        return any(map(refers, (tree.start, tree.stop, tree.step)))
    return isinstance(tree, Ref)


def references(step: Step) -> set[str]:
    """Names of the results and constants a step reads."""
    names: set[str] = set()

    def note(leaf: Any) -> None:
        if isinstance(leaf, Ref):
            names.add(leaf.name)

    map_leaves((step.args, step.kwargs), note)
    return names
