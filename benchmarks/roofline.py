"""Loops that show this machine's limits, measured beside the operators they bound.

* copy: ``torch.Tensor.copy_`` that moves as many bytes (half read, half written) as the operator.
* stream loop (C++): reads and writes exactly the arrays the step does, with no arithmetic worth naming.
* register loop (C++): the instructions of the binary inner loop on operands that never leave the registers
  and the first cache lines.
"""

from __future__ import annotations

import ctypes
import time
from typing import Any

import torch
from torch import Tensor

from bop2nd_fast import backends

from .registry import BOUND, Contender, GateError, Prepared, Unavailable

REGISTER_LOOP, STREAM_LOOP = "bop2nd_register_loop", "bop2nd_bandwidth_loop"
COPY, COPY_ONE_THREAD = "copy of as many bytes", "copy of as many bytes, 1 thread"
STREAM, STREAM_HALF, REGISTER = "read/write loop", "read/write loop, 2-byte elements", "register loop"


def symbol(name: str, argument_types: list[Any]) -> Any:
    """A plain C function of the extension that returns a double; raises :class:`Unavailable`."""
    library = backends._extension.symbols
    if library is None:
        raise Unavailable(f"the C++ extension is not there ({backends._extension.missing})")
    try:
        function = getattr(library, name)
    except AttributeError:
        raise Unavailable(f"this build of the extension has no {name}") from None
    function.restype, function.argtypes = ctypes.c_double, argument_types
    return function


def copy_contender(n_bytes: int, threads: int | None = None) -> Contender:
    """A torch copy moving ``n_bytes`` in total."""

    def make() -> Prepared:
        source = torch.ones(max(1, n_bytes // 8), dtype=torch.float32)
        target = torch.zeros_like(source)

        def check() -> str:
            target.copy_(source)
            if not torch.equal(source, target):
                raise GateError("the copy differs from its source")
            return "equal to its source"

        return Prepared(check, lambda: target.copy_(source))

    name = COPY_ONE_THREAD if threads == 1 else COPY
    return Contender(name, BOUND, make, bytes=n_bytes // 8 * 8, threads=threads)


def stream_contender(n_weights: int, element_bytes: int = 4) -> Contender:
    """The arrays of a packed step, read and written back; the extension says how many bytes it moved.

    ``element_bytes``: of gradients and moments, 4 or 2.
    """
    n = n_weights // 32 * 32
    expected = n * 5 * element_bytes + n // 4

    def make() -> Prepared:
        loop = symbol(STREAM_LOOP, [ctypes.c_void_p] * 4 + [ctypes.c_int64, ctypes.c_int])
        arrays: list[Tensor] = [torch.ones(n * element_bytes // 4) for _ in range(3)]
        words = torch.zeros(n // 32, dtype=torch.int32)
        pointers = [t.data_ptr() for t in (*arrays, words)]

        def check() -> str:
            moved = loop(*pointers, n, element_bytes)
            if moved != expected:
                raise GateError(f"the loop says it moved {moved} bytes, the step moves {expected}")
            return f"moves {expected} bytes, as the step does"

        return Prepared(check, lambda: (loop(*pointers, n, element_bytes), arrays, words)[0])

    return Contender(STREAM if element_bytes == 4 else STREAM_HALF, BOUND, make, bytes=expected)


def register_contender(instruction_set: str | None = None) -> Contender:
    """The binary inner loop without memory, one thread, for the active (or a named) instruction set."""

    def make() -> Prepared:
        loop = symbol(REGISTER_LOOP, [ctypes.c_int, ctypes.c_int64])
        active = instruction_set or backends.active("cpu")
        if active not in backends.INSTRUCTION_SETS:
            raise Unavailable(f"the active backend is {active}, which has no inner loop of its own")
        isa = backends.INSTRUCTION_SETS.index(active)
        if not backends._extension.supports(active):
            raise Unavailable(backends.why_not(active) or "not supported")
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


REGISTER_OPERATIONS = 1 << 30
