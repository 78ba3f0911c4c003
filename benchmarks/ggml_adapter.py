"""ggml's product of 1-bit weights (``Q1_0``) and 8-bit inputs (``Q8_0``), by the package ggml-python.

    pip install -r benchmarks/requirements-ggml.txt
    python -m benchmarks.run --suite signed_linear

ggml takes fp32 rows and quantizes them to ``Q8_0`` (32 numbers and a scale) inside the measured time. The
rows given here have a 127 in each such block: the scales are 1, and the sums are exact.
"""

from __future__ import annotations

import ctypes
import importlib
from typing import Any

import torch
from torch import Tensor

from .registry import GateError, Prepared, Unavailable

BLOCK_1, BLOCK_8 = 128, 32  # numbers that share a scale, of weights and of inputs


def linear(x: Tensor, weight: Tensor) -> Prepared:
    """``[rows, K]`` int8 as fp32 by ``[outputs, K]`` of +1 and -1, one thread.

    Raises:
        Unavailable: no ggml-python that knows ``Q1_0``, or rows that are not whole blocks.
    """
    if x.shape[1] % BLOCK_1:
        raise Unavailable(f"rows of Q1_0 are multiples of {BLOCK_1}, these have {x.shape[1]}")
    try:
        ggml: Any = importlib.import_module("ggml")
    except ImportError as error:
        raise Unavailable(f"{error} (see benchmarks/requirements-ggml.txt)") from None
    if not hasattr(ggml, "GGML_TYPE_Q1_0"):
        raise Unavailable("this ggml-python does not know Q1_0 (see benchmarks/requirements-ggml.txt)")
    return _prepared(ggml, x.float().index_fill(1, torch.arange(0, x.shape[1], BLOCK_8), 127.0), weight)


def _prepared(ggml: Any, x: Tensor, weight: Tensor) -> Prepared:
    (rows, features), outputs = x.shape, weight.shape[0]
    ggml.ggml_cpu_init()
    # weights, inputs, results, and room for what ggml keeps beside them
    size = weight.numel() // 4 + 4 * x.numel() + 4 * rows * outputs + (16 << 20)
    context = ggml.ggml_init(ggml.ggml_init_params(mem_size=size, mem_buffer=None, no_alloc=False))
    packed = ggml.ggml_new_tensor_2d(context, ggml.GGML_TYPE_Q1_0, features, outputs)
    numbers = ggml.ggml_new_tensor_2d(context, ggml.GGML_TYPE_F32, features, rows)
    product = ggml.ggml_mul_mat(context, packed, numbers)
    graph = ggml.ggml_new_graph(context)
    ggml.ggml_build_forward_expand(graph, product)
    dense = weight.float().contiguous()
    source = ctypes.cast(dense.data_ptr(), ctypes.POINTER(ctypes.c_float))
    to = ggml.ggml_get_data(packed)
    ggml.ggml_quantize_chunk(ggml.GGML_TYPE_Q1_0, source, to, 0, outputs, features, None)
    ctypes.memmove(ggml.ggml_get_data(numbers), x.data_ptr(), x.nbytes)

    # Its own plan: `ggml_graph_compute_with_ctx` takes more of the context's memory in every call.
    plan = ggml.ggml_graph_plan(graph, 1, None)
    work = (ctypes.c_uint8 * max(1, plan.work_size))()
    plan.work_data = ctypes.cast(work, type(plan.work_data))

    def run() -> None:
        ggml.ggml_graph_compute(graph, ctypes.byref(plan))

    def check() -> str:
        run()
        got = torch.empty(rows, outputs)
        ctypes.memmove(got.data_ptr(), ggml.ggml_get_data(product), got.nbytes)
        if not torch.equal(got.double(), x.double() @ weight.double().T):
            raise GateError("its sums are not the exact ones")
        return "equal to the exact sums"

    return Prepared(check, run, close=lambda: ggml.ggml_free(context))
