"""Grids and 32-bit indices: what every launcher asks before a launch.

CUDA allows 2**31 - 1 programs along the first axis of a grid and 65535 along the others. So every grid here
is one axis: the kernels take it apart again with :func:`program_of`, two divisions once in a program. Indices
of rows, words and pixels are int32 in the kernels; the block of the last index ends past it and has to fit.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

INDEX_LIMIT = 2**31 - 2**16  # the blocks of all splits of a sum together round up by less


@triton.jit
def program_of(first, second):
    """This program's place ``(0 .. first - 1, 0 .. second - 1, the rest)`` in a grid of one axis."""
    program = tl.program_id(0)
    rest = program // first
    return program % first, rest % second, rest // second


def check_index(count: int, what: str) -> None:
    """Raises ValueError where ``count`` rows, words or pixels (``what``) are too many for 32-bit indices."""
    if count >= INDEX_LIMIT:
        raise ValueError(f"{count} {what}: the kernel's indices allow fewer than 2**31 - 65536")


def grid_of(*blocks: int) -> tuple[int]:
    """The grid of ``blocks`` programs along each axis, the fastest first; ValueError above 2**31 - 1."""
    programs = math.prod(blocks)
    if programs >= 2**31:
        raise ValueError(f"{' x '.join(map(str, blocks))} programs: a launch allows fewer than 2**31")
    return (programs,)
