"""The operators of each GPU backend, called directly, whatever ``backends.use`` has made the default.

``OPERATORS[name]()`` gives an object whose attributes are the operators, or raises :class:`Unavailable`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

from .registry import Unavailable


def triton() -> Any:
    """The launchers of ``kernels/``; they take tiles as well."""
    from bop2nd_fast import backends

    if (reason := backends.why_not("triton")) is not None:
        raise Unavailable(reason)
    found = SimpleNamespace()
    for op, module in backends._TRITON_LAUNCHERS.items():
        setattr(found, op, getattr(importlib.import_module(f"bop2nd_fast.kernels.{module}"), op))
    return found


@functools.cache
def cuda() -> Any:
    """The kernels that ``_C_cuda`` registered."""
    from bop2nd_fast import backends
    from bop2nd_fast.cuda_library import OPS

    if (reason := backends.why_not("cuda")) is not None:
        raise Unavailable(reason)
    found, keys = SimpleNamespace(), torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with backends.use("cuda"):  # Triton's registrations lie over them otherwise
        for op in OPS:
            kernel = torch.library.get_kernel(f"bop2nd::{op}", "CUDA")
            setattr(found, op, functools.partial(kernel.call_boxed, keys))
    return found


OPERATORS: dict[str, Callable[[], Any]] = {"triton": triton, "cuda": cuda}


def on_each_backend(make: Callable[[str, Any], Iterator[Any]], absent: Callable[..., Any]) -> Iterator[Any]:
    """What ``make(name, operators)`` yields for each backend; ``absent(name, reason)`` for a missing one."""
    for name, operators in OPERATORS.items():
        try:
            found = operators()
        except Unavailable as reason:
            yield absent(name, reason)
        else:
            yield from make(name, found)
