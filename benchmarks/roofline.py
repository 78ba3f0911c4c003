"""Loops that show this machine's limits, measured beside the operators they bound.

* read/write loop (C++): reads and writes the very arrays of a step, as they were, with no arithmetic; or
  reads as many bytes as an operator does and writes as many, on its threads.
* register loop (C++): the instructions of the binary inner loop on operands that never leave the registers
  and the first cache lines.

A limit is what a loop reaches at best: rates and shares count its fastest sample.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bop2nd_fast import backends

from .gates import gated
from .registry import BOUND, Contender, GateError, Prepared, Unavailable

STREAM, STREAM_HALF = "read/write loop", "read/write loop, 2-byte elements"
STREAM_MIXED, STREAM_ONE = "read/write loop, 2-byte gradients", "read/write loop, 1 thread"
TRAFFIC, REGISTER = "read/write loop of as many bytes", "register loop"
COPY, COPY_ONE_THREAD = "copy of as many bytes", "copy of as many bytes, 1 thread"  # of older results
REGISTER_OPERATIONS = 1 << 30
State: TypeAlias = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


def symbol(name: str, argument_types: list[Any]) -> Any:
    """A plain C function of the extension that returns a double; raises :class:`Unavailable`."""
    library = backends._extension.symbols
    if library is None:
        raise Unavailable(f"the C++ extension is not there ({backends._extension.missing})")
    function: Any = getattr(library, name, None)
    if function is None:
        raise Unavailable(f"this build of the extension has no {name}")
    function.restype, function.argtypes = ctypes.c_double, argument_types
    return function


def traffic_contender(n_read: int, n_written: int, threads: int | None = None) -> Contender:
    """Reads and writes so many bytes, rounded down to whole vectors of the loop."""
    n_read, n_written = n_read // 256 * 64, n_written // 256 * 64

    def make() -> Prepared:
        loop = symbol("bop2nd_traffic_loop", [ctypes.c_void_p, ctypes.c_int64] * 2)
        source, target = (torch.zeros(n, dtype=torch.int32) for n in (n_read, n_written))
        arguments = (source.data_ptr(), n_read, target.data_ptr(), n_written)
        return _moves(4 * (n_read + n_written), lambda: (loop(*arguments), source, target)[0])

    return Contender(TRAFFIC, BOUND, make, bytes=4 * (n_read + n_written), threads=threads)


def stream_contender(
    name: str, state: Callable[[], State], weights: Sequence[int], sizes: tuple[int, int], threads: Any = None
) -> Contender:
    """The arrays of a packed step (words, gradients and both moments of every tensor), read and written back.

    ``weights``: of every tensor; ``sizes``: bytes of a gradient and of a moment.
    """
    whole = [n // 32 * 32 for n in weights]
    expected = (sizes[0] + 4 * sizes[1]) * sum(whole) + sum(whole) // 4

    def make() -> Prepared:
        loop = symbol("bop2nd_bandwidth_loop", [ctypes.c_int64] + [ctypes.c_void_p] * 5 + [ctypes.c_int] * 2)
        words, grads, m, v = state()
        pointers = ctypes.c_void_p * len(whole)
        columns = [pointers(*(t.data_ptr() for t in column)) for column in (grads, m, v, words)]
        counts = (ctypes.c_int64 * len(whole))(*whole)
        kept = (words, grads, m, v)
        return _moves(expected, lambda: (loop(len(whole), *columns, counts, *sizes), kept)[0])

    return Contender(name, BOUND, make, bytes=expected, threads=threads)


def _moves(expected: int, loop: Callable[[], float]) -> Prepared:
    def compare(moved: float) -> str:
        if moved != expected:
            raise GateError(f"the loop says it moved {moved:.0f} bytes, not {expected}")
        return f"moves {expected} bytes"

    return gated(loop, compare)


def register_contender() -> Contender:
    """The binary inner loop without memory, one thread, for the active instruction set."""

    def make() -> Prepared:
        loop = symbol("bop2nd_register_loop", [ctypes.c_int, ctypes.c_int64])
        active = backends.active("cpu")
        if active not in backends.INSTRUCTION_SETS:
            raise Unavailable(f"the active backend is {active}, which has no inner loop of its own")
        isa = backends.INSTRUCTION_SETS.index(active)
        macs = loop(isa, 1)

        def check() -> str:
            if macs <= 0 or loop(isa, 3) != 3 * macs:
                raise GateError("the loop's count of operations is not proportional to its iterations")
            return f"{macs:.0f} MAC per iteration, {active}"

        def sample(n: int) -> float:  # scaled to OPERATIONS per run
            iterations = max(1, round(n * REGISTER_OPERATIONS / macs))
            start = time.perf_counter()
            done = loop(isa, iterations)
            return (time.perf_counter() - start) * n * REGISTER_OPERATIONS / done

        return Prepared(check, sample=sample)

    return Contender(REGISTER, BOUND, make, operations=REGISTER_OPERATIONS, threads=1)
