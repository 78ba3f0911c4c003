"""What every layer of a packed model is: plain attributes and tensors, from which a file can rebuild it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels.geometry import INT32_LIMIT
from .graph import dtype_name

REQUIRED: Any = object()


class Attribute(NamedTuple):
    """What a layer's attribute may be: a sentence, a test, and the value where it is left out."""

    allowed: str
    test: Callable[[Any], bool]
    default: Any = REQUIRED


def integer(least: int, default: Any = REQUIRED, limit: int = INT32_LIMIT) -> Attribute:
    """A whole number, ``least`` to ``limit`` - 1."""
    return Attribute(
        f"an integer from {least} to {limit - 1}",
        lambda v: type(v) is int and least <= v < limit,
        default,
    )


def pair(least: int, default: Any = REQUIRED) -> Attribute:
    """One whole number for rows, one for columns."""
    single = integer(least)
    return Attribute(
        f"two integers from {least} to {INT32_LIMIT - 1}",
        lambda v: isinstance(v, (list, tuple)) and len(v) == 2 and all(map(single.test, v)),
        default,
    )


def one_of(choices: Sequence[Any], default: Any = REQUIRED) -> Attribute:
    return Attribute(
        f"one of {list(choices)}", lambda v: any(type(v) is type(c) and v == c for c in choices), default
    )


class PackedLayer(nn.Module):
    """A layer that a file can hold: plain ``config`` values and tensors, from which it can be rebuilt.

    ``attributes`` says what ``config`` may hold. Defaults are filled in; one of None stands for
    nothing.

    Raises:
        ValueError: an attribute that is missing, unknown, or not what it has to be.
    """

    kind: ClassVar[str]
    attributes: ClassVar[dict[str, Attribute]] = {}
    tensors: ClassVar[tuple[str, ...]] = ()  # names of those it may hold
    operands: ClassVar[tuple[str, ...]] = ()  # what a call gives it
    optional: ClassVar[tuple[str, ...]] = ("residual", "input_scale")  # of those, what may be left out

    def __init__(self, **config: Any) -> None:
        super().__init__()
        if unknown := config.keys() - self.attributes.keys():
            raise ValueError(f"{self.kind} has no attributes {sorted(unknown)}, but {list(self.attributes)}")
        for name, (allowed, test, default) in self.attributes.items():
            if name not in config and default is REQUIRED:
                raise ValueError(f"{self.kind} misses its attribute {name!r}")
            if not test(config.setdefault(name, default)):
                raise ValueError(f"{self.kind}: {name} must be {allowed}, got {config[name]!r}")
        self.config = {name: config[name] for name in self.attributes if config[name] is not None}

    def describe(self) -> str:
        """One short phrase for ``repr`` and reports."""
        return "pixel after pixel"

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The operands of a call by their names.

        Raises:
            ValueError: too many, too few or unknown ones.
        """
        given = dict(zip(self.operands, args, strict=False)) | kwargs
        required = [name for name in self.operands if name not in self.optional]
        fits = len(given) == len(args) + len(kwargs) and given.keys() <= set(self.operands)
        if not fits or not all(name in given for name in required):
            raise ValueError(f"{self.kind} takes {list(self.operands)}, got {len(args)} and {sorted(kwargs)}")
        return {name: given[name] for name in self.operands if name in given}

    def unbind(self, given: dict[str, Any]) -> tuple[Any, ...]:
        """The inverse of :meth:`bind`: operands by position."""
        return tuple(self.bind((), given).values())

    def memory(self, *args: Tensor) -> int:
        """Bytes that a call takes at most, results and temporaries. May raise what the call would raise."""
        return 3 * 8 * sum(t.numel() for t in args)

    def _tensor(
        self, name: str, tensor: Tensor | None, dtype: torch.dtype | None = None, shape: tuple[int, ...] = ()
    ) -> None:
        """Hold a tensor of that dtype and shape (with a dtype None, whatever it is), or None."""
        if tensor is not None and dtype is not None and (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
            wanted = f"{dtype_name(dtype)} {list(shape)}"
            got = f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"
            raise ValueError(f"{self.kind}: {name} must be {wanted}, got {got}")
        self.register_buffer(name, tensor)
