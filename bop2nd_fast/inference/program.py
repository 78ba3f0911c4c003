"""A graph made ready to run: callables, constants, argument lists and last uses are settled once.

Every value has a register. The registers of a run start as constants, the model's device, literals and empty
places. An instruction takes its arguments with one ``itemgetter`` and puts its result into one register:
nested arguments (a list of tensors to concatenate, say) are built by instructions of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import operators
from .graph import Ref, Step, refers
from .packed_layer import PackedLayer

# What to call, how to take its arguments, the register of its result, the registers it empties.
Instruction = tuple[Callable[..., Any], Callable[[Sequence[Any]], Sequence[Any]], int, tuple[int, ...]]


class Source(NamedTuple):
    """The operator of an instruction, and how the instruction's values are its arguments."""

    operator: operators.Operator
    n_args: int
    fixed: dict[str, Any]
    keys: tuple[str, ...]  # of the values behind the first ``n_args``

    def arguments(self, values: Sequence[Any]) -> dict[str, Any]:
        """By the names of the schema."""
        named = dict(zip(self.keys, values[self.n_args :], strict=True))
        return operators.bind(self.operator, tuple(values[: self.n_args]), self.fixed | named)


class Program:
    """The instructions of a graph.

    Raises:
        ValueError: a reference to what no earlier step makes, a name twice, an unknown layer or operator, no
            output, or one before the last step.
    """

    def __init__(
        self, steps: Sequence[Step], layers: Mapping[str, nn.Module], constants: Sequence[str]
    ) -> None:
        self.layers = dict(layers)
        self.constants = list(constants)
        self._registers: dict[str, int] = {name: i for i, name in enumerate(constants)}
        self._device = len(self._registers)
        self._initial: list[Any] = [None] * (self._device + 1)
        self._code: list[tuple[Callable[..., Any], list[int], int]] = []
        self.origins: list[tuple[str, Source | None]] = []  # for every instruction: its step, its operator
        self.inputs: list[int] = []
        self.output = -1
        for step in steps:
            self._step(step)
            self.origins += [(step.name, None)] * (len(self._code) - len(self.origins))
            if step.kind == "operator":
                self.origins[-1] = (step.name, self._source)
        if self.output < 0:
            raise ValueError("the graph has no output")
        self.instructions = self._with_last_uses()
        self.initial = tuple(self._initial[self._device + 1 :])

    def run(self, constants: Iterable[Tensor], device: torch.device | None, inputs: Sequence[Any]) -> Any:
        """The output. ``constants`` in the order of their names, ``inputs`` in the order of the steps."""
        registers = self.registers(constants, device, inputs)
        for call, take, result, finished in self.instructions:
            registers[result] = call(*take(registers))
            for register in finished:
                registers[register] = None
        return registers[self.output]

    def registers(
        self, constants: Iterable[Tensor], device: torch.device | None, inputs: Sequence[Any]
    ) -> list[Any]:
        """The registers at the start of a run."""
        registers = [*constants, device, *self.initial]
        for register, value in zip(self.inputs, inputs, strict=True):
            registers[register] = value
        return registers

    # ---------------------------------------------------------------------------------------- building

    def _step(self, step: Step) -> None:
        if self.output >= 0:
            raise ValueError(f"step {step.name!r} comes after the output")
        if step.kind == "output":
            if len(step.args) != 1 or step.kwargs:
                raise ValueError("an output has one argument")
            self.output = self._value(step.args[0], step)
            return
        if step.name in self._registers:
            raise ValueError(f"two values have the name {step.name!r}")
        if step.kind == "input":
            self._registers[step.name] = self._new(None)
            self.inputs.append(self._registers[step.name])
            return
        call, args, kwargs = self._callable(step), step.args, step.kwargs
        if isinstance(call, PackedLayer):
            args, kwargs = tuple(call.bind(args, kwargs).values()), {}
        taken = [self._value(a, step) for a in args]
        n_args, fixed = len(taken), kwargs
        keys: tuple[str, ...] = ()
        if refers(kwargs):
            fixed, keys = {}, tuple(kwargs)
            taken += [self._value(a, step) for a in kwargs.values()]
        if step.kind == "operator":
            found = operators.find(str(step.target))
            if operators.makes_from_nothing(found):
                keys = (*keys, "device")
                taken.append(self._device)
            self._source = Source(found, n_args, fixed, keys)
        call = partial(call, **fixed) if fixed else call
        call = _with_keywords(call, n_args, keys) if keys else call
        self._registers[step.name] = self._emit(call, taken)

    def _callable(self, step: Step) -> Callable[..., Any]:
        target = step.target
        if step.kind == "operator":
            found = operators.check(str(target), step.args, step.kwargs)
            sizes = operators.has_sizes(found, step.args, step.kwargs)
            return _judged(found) if sizes or found.name in operators.GUARDS else found.call
        if step.kind == "layer":
            if target not in self.layers:
                raise ValueError(f"step {step.name!r} calls layer {target!r}, which the model has not")
            return self.layers[str(target)]
        raise ValueError(f"step {step.name!r} is of unknown kind {step.kind!r}")

    def _new(self, value: Any) -> int:
        self._initial.append(value)
        return len(self._initial) - 1

    def _emit(self, call: Callable[..., Any], taken: list[int]) -> int:
        result = self._new(None)
        self._code.append((call, taken, result))
        return result

    def _value(self, tree: Any, step: Step) -> int:
        """The register that holds an argument; containers with references are built by an instruction."""
        if isinstance(tree, Ref):
            if tree.name not in self._registers:
                raise ValueError(f"step {step.name!r} reads {tree.name!r}, which no earlier step makes")
            return self._registers[tree.name]
        if isinstance(tree, (list, tuple)) and refers(tree):
            return self._emit(
                _list if isinstance(tree, list) else _tuple, [self._value(v, step) for v in tree]
            )
        if isinstance(tree, dict) and refers(tree):
            return self._emit(_dict_of(tuple(tree)), [self._value(v, step) for v in tree.values()])
        if isinstance(tree, slice) and refers(tree):
            parts = (tree.start, tree.stop, tree.step)
            return self._emit(slice, [self._value(v, step) for v in parts])
        return self._new(tree)

    def _with_last_uses(self) -> tuple[Instruction, ...]:
        """Registers nobody reads later are emptied, as variables that go out of use would be in Python."""
        made = {result for _, _, result in self._code} | set(self.inputs)
        seen = {self.output}
        code: list[Instruction] = []
        for call, taken, result in reversed(self._code):
            finished = sorted(({*taken, result} & made) - seen)
            seen.update(taken)
            code.append((call, _taker(taken), result, tuple(finished)))
        return tuple(reversed(code))


def _taker(registers: list[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    if not registers:
        return itemgetter(slice(0, 0))
    if len(registers) == 1:  # a slice, since one index would give the bare value
        return itemgetter(slice(registers[0], registers[0] + 1))
    return itemgetter(*registers)


def _list(*values: Any) -> list[Any]:
    return list(values)


def _tuple(*values: Any) -> tuple[Any, ...]:
    return values


def _dict_of(keys: tuple[Any, ...]) -> Callable[..., Any]:
    return lambda *values: dict(zip(keys, values, strict=True))


def _with_keywords(call: Callable[..., Any], n_args: int, keys: tuple[str, ...]) -> Callable[..., Any]:
    return lambda *values: call(*values[:n_args], **dict(zip(keys, values[n_args:], strict=True)))


def _judged(found: operators.Operator) -> Callable[..., Any]:
    """An operator that has to be looked at when its operands are there."""

    def call(*args: Any, **kwargs: Any) -> Any:
        operators.check_call(found, args, kwargs)
        return found.call(*args, **kwargs)

    return call
