"""What every GPU case is made of: contenders, how large and where, and the two ways to compare results."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .registry import GateError

ROTATE_BYTES = 256 << 20  # buffers are repeated up to this size: several times the second-level cache
Run = Callable[[], object]


@dataclass
class Contender:
    """One way to do a case's work: ``runs`` do it on buffers of their own, ``check`` raises GateError."""

    name: str
    runs: list[Run]
    check: Callable[[], None]
    bytes: int = 0
    products: int = 0
    extra: Callable[[], dict[str, float]] | None = None


@dataclass
class Setting:
    """Where and how large: the GPU at full size, or the interpreter at sizes it can do."""

    device: str
    dry: bool

    def size(self, full: int, tiny: int) -> int:
        return tiny if self.dry else full

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=self.device).to(dtype)

    def copies(self, n_bytes: int) -> int:
        return 1 if self.dry else max(1, min(64, ROTATE_BYTES // max(1, n_bytes)))


def failures() -> tuple[type[Exception], ...]:
    """What a contender may raise besides a failed gate: compilers, launches and libraries that refuse."""
    errors: tuple[type[Exception], ...] = (RuntimeError, ValueError, TypeError, subprocess.CalledProcessError)
    if importlib.util.find_spec("triton"):
        from triton.errors import TritonError

        errors += (TritonError,)
    return errors


def context_lost(s: Setting) -> str | None:
    """Why this process can use its GPU no more (an illegal address, say), or None."""
    if s.device != "cuda":
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def absent(name: str, reason: Exception) -> Contender:
    """A contender without a number: its check raises ``reason``."""

    def check() -> None:
        raise reason

    return Contender(name, [], check)


def equal(got: Tensor, want: Tensor, what: str) -> None:
    if not torch.equal(got, want):
        raise GateError(f"{what}: {int((got != want).sum())} of {want.numel()} elements differ")


def close(got: Tensor, want: Tensor, what: str, tolerance: float = 1e-2) -> None:
    error = float((got.double() - want.double()).norm() / want.double().norm())
    if not error < tolerance:
        raise GateError(f"{what}: relative error {error:.2g}")
