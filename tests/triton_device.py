"""Where the Triton tests run: on the GPU if there is one, else in Triton's interpreter on the CPU.

Import this before anything that imports triton: the interpreter is chosen when triton is first imported.
"""

from __future__ import annotations

import importlib.util
import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")


def runnable() -> str | None:
    """None if kernels can run in this process, else the reason why not."""
    if importlib.util.find_spec("triton") is None:
        return "the package 'triton' is not installed"
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    if DEVICE == "cpu" and not isinstance(tl.sum, InterpretedFunction):
        return "no GPU, and triton was imported without TRITON_INTERPRET=1"
    return None


def same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal bits; in the interpreter bf16 may be one unit off, because it truncates where GPUs round."""
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    if DEVICE == "cuda" or actual.dtype != torch.bfloat16:
        return torch.equal(actual, expected)
    units = actual.view(torch.int16).int() - expected.view(torch.int16).int()
    return bool((units.abs() <= 1).all())
