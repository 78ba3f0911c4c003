"""The operators of each GPU backend, called directly, whatever ``backends.use`` has made the default.

:class:`Setting` says where and how large GPU cases are.

``OPERATORS[name]()`` gives an object whose attributes are the operators, or raises :class:`Unavailable`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bop2nd_fast import backends
from bop2nd_fast.cuda_library import OPS

from .gates import failing
from .registry import OURS, VARIANT, Contender, Unavailable

ROTATE_BYTES = 256 << 20  # buffers are repeated up to this size: several times the second-level cache


@dataclass
class Setting:
    """Where and how large: the GPU at full size, or tiny sizes, there or in Triton's interpreter."""

    device: str
    dry: bool

    def size(self, full: int, tiny: int) -> int:
        return tiny if self.dry else full

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=self.device).to(dtype)

    def copies(self, n_bytes: int) -> int:
        return 1 if self.dry else max(1, min(64, ROTATE_BYTES // max(1, n_bytes)))


def triton() -> Any:
    """The launchers of ``kernels/``; they take tiles as well."""
    if (reason := backends.why_not("triton")) is not None:
        raise Unavailable(reason)
    modules = {op: f"bop2nd_fast.kernels.{name}" for op, name in backends._TRITON_LAUNCHERS.items()}
    return SimpleNamespace(**{op: getattr(importlib.import_module(m), op) for op, m in modules.items()})


@functools.cache
def cuda() -> Any:
    """The kernels that ``_C_cuda`` registered."""
    if (reason := backends.why_not("cuda")) is not None:
        raise Unavailable(reason)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with backends.use("cuda"):  # Triton's registrations lie over them otherwise
        kernels = {op: torch.library.get_kernel(f"bop2nd::{op}", "CUDA") for op in OPS}
    return SimpleNamespace(**{op: functools.partial(k.call_boxed, keys) for op, k in kernels.items()})


OPERATORS: dict[str, Callable[[], Any]] = {"triton": triton, "cuda": cuda}


def on_each_backend(make: Callable[[str, str, Any], Iterator[Contender]]) -> Iterator[Contender]:
    """What ``make(name, role, operators)`` yields for each backend; the first that is here is ours, the
    others are variants. A contender without a number stands for a missing one."""
    role = OURS
    for name, operators in OPERATORS.items():
        try:
            found = operators()
        except Unavailable as reason:
            yield failing(name, reason)
        else:
            yield from make(name, role, found)
            role = VARIANT
