"""Every GPU kernel once, on sizes that hit body, tail and seam: ``python -m benchmarks.gpu --sanitize``.

Small enough for ``compute-sanitizer --tool memcheck`` (or ``racecheck``) in front of it. Results are compared
with the specification as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from bop2nd_fast import backends, reference

from .gates import equal
from .gpu_operators import OPERATORS
from .registry import GateError, Unavailable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Call: TypeAlias = tuple[str, tuple[Any, ...], dict[str, Any]]  # an operator and what it is called with
Calls: TypeAlias = Iterator[Call]

# rows, features, outputs: popcount kernels, tensor-core tiles, k split, words that are no vector of four
LINEAR = ((1, 4096, 70), (8, 33, 5), (20, 8192, 40), (70, 1023, 130), (129, 640, 132), (300, 512, 200))
MANY_ROWS = ((34_000, 640, 136),)  # enough for the largest tiles on any chip; too slow for an interpreter
# channels, outputs, height, width, kernel, stride, padding, dilation, groups
CONVOLUTIONS = (
    (64, 40, 6, 7, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (128, 136, 12, 11, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (33, 9, 7, 6, (3, 2), (1, 2), (2, 0), (2, 1), 1),
    (70, 6, 4, 5, (2, 3), (1, 1), (3, 4), (3, 2), 2),
)


def _signs(device: str, *shape: int, dim: int = -1) -> Tensor:
    return reference.pack_bits(torch.randn(shape, device=device), dim)


def packing(device: str) -> Calls:
    for dtype in DTYPES:
        for shape, dim in (((5, 64), 1), ((3, 65), 1), ((2, 40, 3, 5), 1), ((64, 7), 0)):
            x = torch.randn(shape, device=device).to(dtype)
            yield "pack_bits", (x, dim), {}
            yield "pack_bits_ste", (x, dim), {}
            yield "unpack_bits", (reference.pack_bits(x, dim), shape[dim], dim), {"dtype": dtype}
        for length in (64, 33):
            grad = torch.randn(5, length, device=device).to(dtype)
            yield "apply_mask_", (grad, _signs(device, 5, length)), {}


def step(device: str) -> Calls:
    for moment in DTYPES[:2]:
        for second in (True, False):
            shapes = [(3, 64), (5, 33), (300,), (9000,), (2, 3, 32)]
            grads = [torch.randn(s, device=device) for s in shapes]
            means = [(0.1 * torch.randn(s, device=device)).to(moment) for s in shapes]
            squares = [torch.rand(s, device=device).to(moment) for s in shapes] if second else []
            weights = [reference.pack_bits(torch.randn(s, device=device)) for s in shapes]
            weights[2] = torch.where(torch.rand(shapes[2], device=device) < 0.5, -1.0, 1.0)  # a dense weight
            hyper = torch.tensor([0.2, 0.1, 0.05 * second, 0.02], device=device)
            counts = torch.empty(len(shapes), 2, dtype=torch.int64, device=device)
            seed = torch.tensor([7, 9], device=device)
            yield "bop_step_", (weights, grads, means, squares, hyper, counts), {"seed": seed}


def _epilogues(outputs: int, device: str) -> Iterator[dict[str, Any]]:
    yield {}
    threshold = torch.arange(outputs, dtype=torch.int32, device=device) % 7 - 3
    yield {"values": False, "signs": True, "threshold": threshold}
    yield {"signs": True, "scale": torch.rand(outputs, device=device), "dtype": torch.float16}


def products(device: str) -> Calls:
    for rows, features, outputs in (*LINEAR, *(MANY_ROWS if device == "cuda" else ())):
        x, w = torch.randn(rows, features, device=device), _signs(device, outputs, features)
        yield "binary_linear", (x, w, True), {}
        for asked in _epilogues(outputs, device):
            yield "binary_linear_packed", (reference.pack_bits(x), w, features), asked
    for channels, outputs, height, width, kernel, *how, groups in CONVOLUTIONS:
        x = torch.randn(2, channels, height, width, device=device)
        w = _signs(device, outputs, *kernel, channels // groups)
        for padding_value in (0, -1):
            where: tuple[Any, ...] = (*how, groups, padding_value)
            operands = (x, w, *where, True)
            yield "binary_conv2d", operands, {}
            words = reference.binary_conv2d(*operands)[1]
            for asked in _epilogues(outputs, device):
                yield "binary_conv2d_packed", (words, w, channels, *where), asked


def signed_products(device: str) -> Calls:
    """Whole numbers: every sum is exact, in whatever order."""
    for dtype in (*DTYPES, torch.int8, torch.uint8):
        real = dtype.is_floating_point
        low = -99 if real else 0
        for rows, features, outputs in LINEAR:
            x = torch.randint(low, 100, (rows, features), device=device).to(dtype)
            yield "signed_linear", (x, _signs(device, outputs, features), *(() if real else (2, 5))), {}
        for channels, outputs, height, width, kernel, *how, groups in CONVOLUTIONS:
            x = torch.randint(low, 100, (2, channels, height, width), device=device).to(dtype)
            w = _signs(device, outputs, *kernel, channels // groups)
            for asked in _epilogues(outputs, device):
                if not (real and "threshold" in asked):
                    yield "signed_conv2d", (x, w, *how, groups), asked
    for dtype in DTYPES:
        yield "quantize_rows", (torch.randn(5, 1500, device=device).to(dtype),), {}


def gradients(device: str) -> Calls:
    """Gradients of -1, 0 and 1: every sum is exact, in whatever order."""
    for dtype in DTYPES:
        for rows, features, outputs in LINEAR[3:5]:
            gradient = torch.randint(-1, 2, (rows, outputs), device=device).to(dtype)
            words = (_signs(device, n, features) for n in (rows, rows, outputs))
            yield "binary_linear_backward", (gradient, *words, features, True, True), {}
        for channels, outputs, height, width, kernel, *how, groups in CONVOLUTIONS[::3]:
            x = torch.randn(2, channels, height, width, device=device)
            w = _signs(device, outputs, *kernel, channels // groups)
            operands: tuple[Any, ...] = (x, w, *how, groups, -1, True)
            out, signs, mask = reference.binary_conv2d(*operands)
            gradient = torch.randint(-1, 2, out.shape, device=device).to(dtype)
            yield "binary_conv2d_backward", (gradient, signs, mask, w, channels, *operands[2:], True), {}


def compare(operators: Any, call: Call) -> None:
    """Results, and operands afterwards (an operator may write them); raises GateError."""
    op, operands, options = call
    sides = []
    for run in (getattr(operators, op), backends._references[op]):
        given = tree_map_only(Tensor, torch.clone, operands)
        results = run(*given, **options)
        sides.append([t for t in tree_leaves((results, given)) if isinstance(t, Tensor)])
    for got, want in zip(*sides, strict=True):
        equal(got, want, op)


def run_all_kernels(device: str) -> int:
    """Run the kernels of every backend that is here; returns the exit status (1: one is wrong, none ran)."""
    torch.manual_seed(3)
    ran = failed = 0
    for name, find in OPERATORS.items():
        try:
            operators = find()
        except Unavailable as reason:
            print(f"{name}: absent, {reason}")
            continue
        more = hasattr(operators, "binary_linear_backward")  # CUDA C++ leaves them to torch and Triton
        for part in (packing, step, products, *((gradients, signed_products) if more else ())):
            ran += 1
            try:
                for call in part(device):
                    compare(operators, call)
            except GateError as error:
                failed += 1
                print(f"{name} {part.__name__}: FAILED, {error}")
            else:
                print(f"{name} {part.__name__}: as specified")
    if device == "cuda":
        torch.cuda.synchronize()
    return 1 if failed or not ran else 0
