"""How much memory a call may take, found before it takes any: the graph runs once on tensors without memory.

A file decides what a model allocates: a few bytes can ask for a padding of 2**31 or double a tensor 60 times.
So a model from a file is measured on torch's ``meta`` device first, once for every set of input shapes.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..binary_tensor import BinaryTensor
from .packed_layer import PackedLayer
from .program import Program

LIMIT = 2**30  # bytes of all results of a call that are held at one time ...
PER_INPUT_BYTE = 4096  # ... and this many for every byte of its inputs
_KEPT = 256  # sets of input shapes that are remembered


class Gauge:
    """Measures the calls of one program.

    Raises (``check``):
        ValueError: the call would hold more than ``limit`` + ``PER_INPUT_BYTE`` * its inputs' bytes at once,
            or a layer or operator refuses the sizes it is given.
    """

    def __init__(self, program: Program, constants: Sequence[Tensor]) -> None:
        self.program = program
        self._constants = [_without_memory(t) for t in constants]
        self._twins = {id(layer): _twin(layer) for layer in program.layers.values()}
        self._seen: set[tuple[Any, ...]] = set()

    def check(self, inputs: Sequence[Tensor], limit: int) -> None:
        key = (limit, *((tuple(x.shape), x.stride()) for x in inputs))
        if key in self._seen:
            return
        self._measure(inputs, limit + PER_INPUT_BYTE * sum(x.nbytes for x in inputs))
        if len(self._seen) >= _KEPT:
            self._seen.clear()
        self._seen.add(key)

    def _measure(self, inputs: Sequence[Tensor], limit: int) -> None:
        program = self.program
        twins = [_without_memory(x) for x in inputs]
        registers = program.registers(self._constants, torch.device("meta"), twins)
        given = {t.untyped_storage()._cdata for t in (*self._constants, *twins)}
        held = _Held(given)
        for (call, take, result, finished), name in zip(program.instructions, program.names, strict=True):
            twin = self._twins.get(id(call), call)
            args = take(registers)
            try:
                registers[result] = twin(*args)
            except NotImplementedError:
                raise ValueError(f"step {name!r}: its memory cannot be told in advance") from None
            scratch = twin.scratch(*args) if isinstance(twin, PackedLayer) else 0
            held.add(result, registers[result])
            if held.bytes + scratch > limit:
                raise ValueError(
                    f"step {name!r} would bring the memory of this call to {held.bytes + scratch:,} bytes; "
                    f"for these inputs a model from a file may take {limit:,} (PackedModel.memory_limit)"
                )
            for register in finished:
                registers[register] = None
                held.drop(register)


class _Held:
    """Bytes of the storages that registers hold; those of inputs and constants do not count."""

    def __init__(self, given: set[int]) -> None:
        self.bytes = 0
        self._given = given
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


def _without_memory(tensor: Tensor) -> Tensor:
    if isinstance(tensor, BinaryTensor):
        return BinaryTensor(tensor.words.to("meta"), tensor.bit_layout)
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _twin(layer: nn.Module) -> nn.Module:
    """The same layer with tensors that have no memory."""
    twin = copy.copy(layer)
    for held in ("_buffers", "_parameters"):
        own = getattr(layer, held).items()
        twin.__dict__[held] = {name: t if t is None else _without_memory(t) for name, t in own}
    twin.__dict__["_forward_hooks"], twin.__dict__["_forward_pre_hooks"] = {}, {}
    return twin
