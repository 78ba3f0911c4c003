"""bnn-lab's product of packed rows by packed weights, in this process.

    pip install --no-deps -r benchmarks/requirements-bnn-lab.txt
    python -m benchmarks.run --suite linear

The package asks for older versions of torch and NumPy than its kernel needs: hence ``--no-deps``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .gates import gated
from .registry import Prepared, Unavailable


def linear(x: Tensor, weight: Tensor, compare: Callable[[Tensor], str]) -> Prepared:
    """``[rows, K]`` by ``[outputs, K]`` of +1 and -1, packed beforehand, fp32 out, one thread.

    Raises:
        Unavailable: no bnn-lab, or one without its compiled kernel.
    """
    try:
        lab: Any = importlib.import_module("bnn.kernels")
    except ImportError as error:
        raise Unavailable(f"{error} (see benchmarks/requirements-bnn-lab.txt)") from None
    if not lab.native_kernel_available():
        raise Unavailable("this bnn-lab has no compiled kernel")
    lab.set_num_threads(1)
    (x_words, n), (w_words, _) = (lab.pack_binary_pm1(t.numpy()) for t in (x, weight))
    run = lambda: lab.binary_gemm_native_prepacked(x_words, w_words, n)  # noqa: E731
    return gated(run, lambda output: compare(torch.from_numpy(output)))
