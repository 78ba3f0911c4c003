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
