"""Every GPU kernel once, on sizes that hit body, tail and seam: ``python -m benchmarks.gpu --sanitize``.

Small enough for ``compute-sanitizer --tool memcheck`` (or ``racecheck``) in front of it. Results are compared
with the specification as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bop2nd_fast import backends, reference

from .gates import equal
from .gpu_operators import OPERATORS
from .registry import GateError, Unavailable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Check = Callable[[Any, str], None]

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


def _same(got: Any, want: Any, what: str) -> None:
    for g, w in zip(got, want, strict=True):
        equal(g, w, what)


def packing(device: str, operators: Any) -> None:
    for dtype in DTYPES:
        for shape, dim in (((5, 64), 1), (((3, 65)), 1), ((2, 40, 3, 5), 1), ((64, 7), 0)):
            x = torch.randn(shape, device=device).to(dtype)
            words = reference.pack_bits(x, dim)
            equal(operators.pack_bits(x, dim), words, "pack_bits")
            _same(operators.pack_bits_ste(x, dim), reference.pack_bits_ste(x, dim), "pack_bits_ste")
            got = operators.unpack_bits(words, shape[dim], dim, dtype=dtype)
            equal(got, reference.unpack_bits(words, shape[dim], dim, dtype), "unpack_bits")
        for length in (64, 33):
            grad, mask = torch.randn(5, length, device=device).to(dtype), _signs(device, 5, length)
            want = grad.clone()
            reference.apply_mask_(want, mask)
            operators.apply_mask_(grad, mask)
            equal(grad, want, "apply_mask_")


def step(device: str, operators: Any) -> None:
    for moment in DTYPES[:2]:
        for second in (True, False):
            shapes = [(3, 64), (5, 33), (300,), (9000,), (2, 3, 32)]
            grads = [torch.randn(s, device=device) for s in shapes]
            means = [(0.1 * torch.randn(s, device=device)).to(moment) for s in shapes]
            squares = [torch.rand(s, device=device).to(moment) for s in shapes] if second else []
            weights = [reference.pack_bits(torch.randn(s, device=device)) for s in shapes]
            weights[2] = torch.where(torch.rand(shapes[2], device=device) < 0.5, -1.0, 1.0)  # a dense weight
            hyper = torch.tensor([0.2, 0.1, 0.05 * second, 0.02], device=device)
            seed, sides = torch.tensor([7, 9], device=device), []
            for run in (operators.bop_step_, reference.bop_step_):
                copies = [[t.clone() for t in column] for column in (weights, means, squares)]
                counts = torch.empty(len(shapes), 2, dtype=torch.int64, device=device)
                run(copies[0], grads, copies[1], copies[2], hyper, counts, seed=seed)
                sides.append([*copies[0], *copies[1], *copies[2], counts])
            _same(sides[0], sides[1], "bop_step_")


def _epilogues(outputs: int, device: str) -> Iterator[dict[str, Any]]:
    yield {}
    threshold = torch.arange(outputs, dtype=torch.int32, device=device) % 7 - 3
    yield {"values": False, "signs": True, "threshold": threshold}
    yield {"signs": True, "scale": torch.rand(outputs, device=device), "dtype": torch.float16}


def products(device: str, operators: Any) -> None:
    for rows, features, outputs in (*LINEAR, *(MANY_ROWS if device == "cuda" else ())):
        x, w = torch.randn(rows, features, device=device), _signs(device, outputs, features)
        _same(operators.binary_linear(x, w, True), reference.binary_linear(x, w, True), "binary_linear")
        words = reference.pack_bits(x)
        for asked in _epilogues(outputs, device):
            want = reference.binary_linear_packed(words, w, features, **asked)
            _same(operators.binary_linear_packed(words, w, features, **asked), want, "binary_linear_packed")
    for channels, outputs, height, width, kernel, stride, padding, dilation, groups in CONVOLUTIONS:
        x = torch.randn(2, channels, height, width, device=device)
        w = _signs(device, outputs, *kernel, channels // groups)
        for padding_value in (0, -1):
            where = ([*stride], [*padding], [*dilation], groups, padding_value)
            expected = reference.binary_conv2d(x, w, *where, True)
            _same(operators.binary_conv2d(x, w, *where, True), expected, "binary_conv2d")
            for asked in _epilogues(outputs, device):
                packed = (expected[1], w, channels, *where)
                got = operators.binary_conv2d_packed(*packed, **asked)
                _same(got, reference.binary_conv2d_packed(*packed, **asked), "binary_conv2d_packed")


def signed_products(device: str, operators: Any) -> None:
    """Whole numbers: every sum is exact, in whatever order."""
    for dtype in (*DTYPES, torch.int8, torch.uint8):
        real = dtype.is_floating_point
        low = -99 if real else 0
        for rows, features, outputs in LINEAR:
            x = torch.randint(low, 100, (rows, features), device=device).to(dtype)
            given = (x, _signs(device, outputs, features), *(() if real else (2, 5)))
            _same(operators.signed_linear(*given), reference.signed_linear(*given), "signed_linear")
        for channels, outputs, height, width, kernel, *how, groups in CONVOLUTIONS:
            x = torch.randint(low, 100, (2, channels, height, width), device=device).to(dtype)
            given = (x, _signs(device, outputs, *kernel, channels // groups), *how, groups)
            for asked in _epilogues(outputs, device):
                if not (real and "threshold" in asked):
                    got = operators.signed_conv2d(*given, **asked)
                    _same(got, reference.signed_conv2d(*given, **asked), "signed_conv2d")
    for dtype in DTYPES:
        x = torch.randn(5, 1500, device=device).to(dtype)
        _same(operators.quantize_rows(x), reference.quantize_rows(x), "quantize_rows")


def gradients(device: str, operators: Any) -> None:
    """Gradients of -1, 0 and 1: every sum is exact, in whatever order."""
    specified = backends._references
    for dtype in DTYPES:
        for rows, features, outputs in LINEAR[3:5]:
            gradient = torch.randint(-1, 2, (rows, outputs), device=device).to(dtype)
            words = (_signs(device, rows, features), _signs(device, rows, features))
            given = (gradient, *words, _signs(device, outputs, features), features, True, True)
            want = specified["binary_linear_backward"](*given)
            _same(operators.binary_linear_backward(*given), want, "binary_linear_backward")
        for channels, outputs, height, width, kernel, stride, padding, dilation, groups in CONVOLUTIONS[::3]:
            x = torch.randn(2, channels, height, width, device=device)
            w = _signs(device, outputs, *kernel, channels // groups)
            where = ([*stride], [*padding], [*dilation], groups, -1)
            out, signs, mask = reference.binary_conv2d(x, w, *where, True)
            gradient = torch.randint(-1, 2, out.shape, device=device).to(dtype)
            asked = (gradient, signs, mask, w, channels, *where, True, True)
            want = specified["binary_conv2d_backward"](*asked)
            _same(operators.binary_conv2d_backward(*asked), want, "binary_conv2d_backward")


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
                part(device, operators)
            except GateError as error:
                failed += 1
                print(f"{name} {part.__name__}: FAILED, {error}")
            else:
                print(f"{name} {part.__name__}: as specified")
    if device == "cuda":
        torch.cuda.synchronize()
    return 1 if failed or not ran else 0
