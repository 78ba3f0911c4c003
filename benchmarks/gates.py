"""What gates of several suites share: how to compare, what a contender may raise, a lost GPU."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from .registry import VARIANT, Contender, GateError, Prepared

T = TypeVar("T")


def gated(run: Callable[[], T], compare: Callable[[T], str]) -> Prepared:
    """The usual contender: its gate compares what one run returns."""
    return Prepared(lambda: compare(run()), run)


def failing(name: str, error: Exception, role: str = VARIANT) -> Contender:
    """A contender that cannot be made: its row says why."""

    def make() -> Prepared:
        raise error

    return Contender(name, role, make)


def equal(got: Tensor, want: Tensor, what: str) -> str:
    """Raises GateError unless every element is the same."""
    if not torch.equal(got, want):
        raise GateError(f"{what}: {int((got != want).sum())} of {want.numel()} elements differ")
    return "equal to the reference"


def close(got: Tensor, want: Tensor, what: str, tolerance: float = 1e-2) -> str:
    """Raises GateError unless the error is less than ``tolerance`` of the result, in the norm."""
    error = float((got.double() - want.double()).norm() / want.double().norm())
    if not error < tolerance:
        raise GateError(f"{what}: relative error {error:.2g}")
    return f"within {error:.1e} of the reference (norm)"


def rounded(got: Tensor, want: Tensor, dtype: torch.dtype) -> str:
    """Raises GateError where an element is further from the exact one than rounding to ``dtype`` explains."""
    if not torch.allclose(got.float(), want, rtol=2**-8, atol=0):
        raise GateError(f"further from the exact result than rounding to {dtype} explains")
    return f"equal to the reference but for rounding to {str(dtype).removeprefix('torch.')}"


def failures() -> tuple[type[Exception], ...]:
    """What a contender may raise besides a failed gate: compilers, launches and libraries that refuse."""
    errors: tuple[type[Exception], ...] = (RuntimeError, ValueError, TypeError, subprocess.CalledProcessError)
    if importlib.util.find_spec("triton"):
        from triton.errors import TritonError

        errors += (TritonError,)
    return errors


def context_lost(device: str) -> str | None:
    """Why this process can use its GPU no more (an illegal address, say), or None."""
    if device != "cuda" or not torch.cuda.is_available():
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None
