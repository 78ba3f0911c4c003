"""How much memory a call may take: every step of a model from a file says what it will take before it runs.

A file decides what a model allocates: a few bytes can ask for a padding of 2**31, or double a value 60 times.
So the first call with inputs of new shapes goes step by step. Layers know their sizes, of most operators a
bound is known from the operands, and the rest run first on torch's ``meta`` device, which has no memory.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from ..kernels.geometry import output_size
from . import operators
from .graph import map_leaves
from .packed_layer import PackedLayer
from .program import Program, Source

LIMIT = 2**30  # bytes of all results of a call that are held at one time ...
PER_INPUT_BYTE = 4096  # ... and this many for every byte of its inputs
_WIDEST = 8  # bytes of an element, at most
_KEPT = 256  # sets of input shapes that are remembered


class Gauge:
    """Runs a program for the first time with inputs of some shapes; ``knows`` the shapes it has seen."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._seen: set[tuple[Any, ...]] = set()

    def knows(self, inputs: Sequence[Tensor], limit: int) -> bool:
        return _key(inputs, limit) in self._seen

    def run(
        self, constants: Sequence[Tensor], device: torch.device | None, inputs: Sequence[Tensor], limit: int
    ) -> Any:
        """The output.

        Raises:
            ValueError: a step would bring the memory of the call above ``limit`` + ``PER_INPUT_BYTE`` * the
                inputs' bytes. It has not run.
        """
        program = self.program
        allowed = limit + PER_INPUT_BYTE * sum(x.nbytes for x in inputs)
        registers = program.registers(constants, device, inputs)
        held = _Held([*constants, *inputs])
        for (call, take, result, finished), (name, source) in zip(
            program.instructions, program.origins, strict=True
        ):
            args = take(registers)
            if source is not None and source.operator.name in operators.GUARDS:
                operators.GUARDS[source.operator.name](source.arguments(args))
            total = held.bytes + _bytes_of(call, source, args, name)
            if total > allowed:
                raise ValueError(
                    f"step {name!r} would bring the memory of this call to {total:,} bytes; for these inputs "
                    f"a model from a file may take {allowed:,} (PackedModel.memory_limit)"
                )
            registers[result] = call(*args)
            held.add(result, registers[result])
            if any(t.numel() * t.element_size() > allowed for t in _tensors(registers[result])):
                raise ValueError(f"step {name!r} makes a view of more than the {allowed:,} bytes allowed")
            del args
            for register in finished:
                registers[register] = None
                held.drop(register)
        if len(self._seen) >= _KEPT:
            self._seen.clear()
        self._seen.add(_key(inputs, limit))
        return registers[program.output]


def _key(inputs: Sequence[Tensor], limit: int) -> tuple[Any, ...]:
    return (limit, *((tuple(x.shape), x.stride()) for x in inputs))


class _Held:
    """Bytes of the storages that registers hold; those of inputs and constants do not count."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        self.bytes = 0
        self._given = {t.untyped_storage()._cdata for t in given}
        self._users: Counter[int] = Counter()
        self._sizes: dict[int, int] = {}
        self._of: dict[int, list[int]] = {}

    def add(self, register: int, value: Any) -> None:
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in _tensors(value)}
        self._of[register] = [s for s in storages if s not in self._given]
        for storage in self._of[register]:
            if not self._users[storage]:
                self._sizes[storage] = storages[storage]
                self.bytes += storages[storage]
            self._users[storage] += 1

    def drop(self, register: int) -> None:
        for storage in self._of.pop(register, ()):
            self._users[storage] -= 1
            if not self._users[storage]:
                self.bytes -= self._sizes.pop(storage)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


# ------------------------------------------------------------------------------------------- one step


def _bytes_of(call: Callable[..., Any], source: Source | None, args: Sequence[Any], name: str) -> int:
    """Bytes that a step takes beside its operands, at most."""
    if isinstance(call, PackedLayer):
        if not all(isinstance(a, Tensor) for a in args):
            raise TypeError(
                f"step {name!r}: {call.kind} takes tensors, got {[type(a).__name__ for a in args]}"
            )
        return call.memory(*args)
    if source is None or source.operator.schema is None:
        return 0  # a container or a number
    pieces = _pieces(source, args)
    if source.operator.name in _VIEWS:
        return pieces
    bound = _bound_for(source.operator.name)
    if bound is not None:
        try:
            return pieces + _WIDEST * bound(source.arguments(args))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            pass  # operands of another kind or rank: the operator itself says what is wrong with them
    return _measured(call, source.operator, args, name)


def _pieces(source: Source, args: Sequence[Any]) -> int:
    """Bytes of the objects of an operator that cuts its operand into many views; others make one."""
    name = source.operator.name
    if not any(word in name for word in ("split", "chunk", "unbind")):
        return 0
    sizes = [n for t in _tensors(list(args)) for n in t.shape]
    given = source.arguments(args)
    asked = [n for n in (given.get("chunks"), given.get("sections")) if type(n) is int]
    return 1024 * max([*sizes, *asked, 1])


def _measured(call: Callable[..., Any], operator: operators.Operator, args: Sequence[Any], name: str) -> int:
    """Bytes of the results, from a run on tensors without memory."""
    try:
        results = call(*map_leaves(tuple(args), _without_memory))
    except (NotImplementedError, AssertionError) as error:
        raise ValueError(f"step {name!r}: {operator.name} does not take these operands: {error}") from None
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in _tensors(results)}.values())


def _without_memory(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")
    return torch.device("meta") if isinstance(leaf, torch.device) else leaf


# ------------------------------------------------------------------------------- bounds, in elements

Given = dict[str, Any]  # arguments by name


def _together(given: Given) -> int:
    """As many elements as all operands have: three results or temporaries of that size."""
    return 3 * sum(t.numel() for t in _tensors(list(given.values())))


def _broadcast(given: Given) -> int:
    """One element for every element of the shape that the operands broadcast to, and one temporary."""
    shapes = [t.shape for t in _tensors(list(given.values()))]
    return 2 * math.prod(map(max, zip_longest(*map(reversed, shapes), fillvalue=1)))


def _windows(given: Given) -> int:
    """A pool whose padding is at most half its window: at most one output more than pixels along an axis."""
    tensor = given["self"]
    return 2 * math.prod(tensor.shape[:2]) * math.prod(n + 1 for n in tensor.shape[2:])


def _linear(given: Given) -> int:
    return given["input"].shape[:-1].numel() * given["weight"].shape[:-1].numel()


def _matmul(given: Given) -> int:
    """Rows of one times columns of the other, for every pair of matrices that meet."""
    a, b = (given[k] if k in given else given["mat2"] for k in ("self", "other"))
    rows = a.shape[:-1].numel()
    columns = b.shape[-1] if b.dim() > 1 else 1
    return rows * columns * (b.shape[:-2].numel() if b.dim() > 2 and a.shape[:-2] != b.shape[:-2] else 1)


def _embedding(given: Given) -> int:
    return given["indices"].numel() * given["weight"].shape[-1]


def _index(given: Given) -> int:
    """Whole rows, one for every place of the index tensors; as many elements as there are for a mask."""
    tensor, indices = given["self"], given["indices"]
    if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices):
        return _together(given)
    rest = [n for n, i in zip_longest(tensor.shape, indices) if i is None]
    return _broadcast({"indices": indices}) * math.prod(rest)


def _convolution(given: Given) -> int:
    """Outputs, and the patches that some implementations write down, of one image in the worst case."""
    image, weight = given["input"], given["weight"]
    spatial = weight.dim() - 2

    def all_axes(name: str, default: int) -> list[int]:
        value = given.get(name, default)
        sizes = value if isinstance(value, (list, tuple)) else [value]
        return list(sizes) * spatial if len(sizes) == 1 else list(sizes)

    if isinstance(given.get("padding"), str):
        return 2 * image.shape[:-spatial].numel() * image.shape[-spatial:].numel() * max(1, weight.shape[0])
    axes = zip(
        image.shape[-spatial:], weight.shape[2:], all_axes("stride", 1), all_axes("padding", 0),
        all_axes("dilation", 1), strict=False,
    )  # fmt: skip
    pixels = math.prod(max(0, output_size(*axis)) for axis in axes)
    padded = math.prod(
        n + 2 * p for n, p in zip(image.shape[-spatial:], all_axes("padding", 0), strict=False)
    )
    batch = image.shape[0] if image.dim() == weight.dim() else 1
    return batch * (pixels * weight.shape[0] + padded * weight.shape[1]) + pixels * weight[:1].numel()


_VIEWS = operators.full_names(operators.VIEWS)
_BOUNDS: dict[str, Callable[[Given], int]] = {
    "aten.linear.default": _linear,
    "aten.matmul.default": _matmul,
    "aten.mm.default": _matmul,
    "aten.bmm.default": _matmul,
    "aten.embedding.default": _embedding,
    "aten.index.Tensor": _index,
    "aten.conv1d.default": _convolution,
    "aten.conv2d.default": _convolution,
    "aten.conv3d.default": _convolution,
    "aten.convolution.default": _convolution,
}
_CLASSES = (
    (operators.full_names(operators.ELEMENTWISE), _broadcast),
    (operators.full_names(operators.KEPT), _together),
    (operators.full_names(operators.POOLS), _windows),
)


@cache
def _bound_for(name: str) -> Callable[[Given], int] | None:
    """A bound of the elements that an operator makes, or None: then it has to be measured."""
    return _BOUNDS.get(name) or next((bound for names, bound in _CLASSES if name in names), None)
