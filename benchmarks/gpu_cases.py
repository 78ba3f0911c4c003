"""What ``benchmarks.gpu`` measures: each case yields contenders that do the same work, with their checks.

A check compares with the specification, exactly where the result is integers or bits, and raises GateError.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .eager_step import EPS, GAMMA, SIGMA, TAU, DenseState, careful
from .gpu_operators import on_each_backend
from .gpu_setting import Contender, Run, Setting, absent, close, equal
from .gpu_training import training_case
from .networks import STAGES, resnet18_weights
from .registry import GateError, Unavailable

PEAK = "tensor cores from registers"


# ---------------------------------------------------------------------------------------------- the step


def copy_bandwidth(s: Setting, n_bytes: int) -> Contender:
    """A plain copy that moves ``n_bytes``, half of them read: the bound for what only moves memory."""
    source = torch.zeros(max(1, n_bytes // 8), device=s.device)
    target = torch.empty_like(source)
    return Contender(
        "copy", [lambda: target.copy_(source)], lambda: equal(target.copy_(source), source, "copy"), n_bytes
    )


def step_contender(
    s: Setting, shapes: list[tuple[int, ...]], name: str, step: Callable[..., None], grad: Any, moment: Any
) -> Contender:
    """The operator ``step`` on packed weights, with gradients and moments of these dtypes."""
    from bop2nd_fast import reference

    words = [reference.pack_bits(s.normal(*shape)) for shape in shapes]
    grads = [s.normal(*shape, dtype=grad) for shape in shapes]
    m = [s.normal(*shape).mul_(3e-3).to(moment) for shape in shapes]
    v = [s.normal(*shape).square_().mul_(0.1).add_(0.9).to(moment) for shape in shapes]
    hyper = torch.tensor([GAMMA, SIGMA, TAU, TAU * EPS], device=s.device)
    counts = torch.empty(len(shapes), 2, dtype=torch.int64, device=s.device)
    seed = torch.tensor([5, 1], device=s.device) if moment == torch.bfloat16 else None

    def run() -> None:
        step(words, grads, m, v, hyper, counts, seed=seed)

    def check() -> None:
        want = [[t.clone() for t in column] for column in (words, grads, m, v)]
        want_counts = torch.empty_like(counts)
        reference.bop_step_(want[0], want[1], want[2], want[3], hyper, want_counts, seed=seed)
        run()
        equal(counts, want_counts, f"{name}: counts")
        for what, got, wanted in zip(("words", "m", "v"), (words, m, v), (want[0], *want[2:]), strict=True):
            for g, w in zip(got, wanted, strict=True):
                equal(g, w, f"{name}: {what}")

    def host() -> dict[str, float]:
        samples = []
        for _ in range(50):
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            samples.append(time.perf_counter() - start)
        return {"host_seconds": sorted(samples)[25]}

    n = sum(map(math.prod, shapes))
    n_bytes = n * (torch.empty(0, dtype=grad).element_size() + 4 * m[0].element_size()) + n // 4
    return Contender(name, [run], check, n_bytes, extra=None if s.dry else host)


def dense_baselines(s: Setting, shapes: list[tuple[int, ...]], compiled: bool) -> Iterator[Contender]:
    """Careful eager, the same compiled, and fused Adam, on dense fp32 weights."""
    weights = [s.normal(*shape).sign_().add_(0.5).sign_() for shape in shapes]
    grads = [s.normal(*shape) for shape in shapes]
    m, v = ([torch.zeros_like(g) for g in grads] for _ in range(2))
    state, n = DenseState(weights, grads, m, v), sum(map(math.prod, shapes))

    def moved(step: Run, what: str) -> Callable[[], None]:
        def check() -> None:
            want = [torch.lerp(a, g, GAMMA) for a, g in zip(m, grads, strict=True)]
            step()
            for got, w in zip(m, want, strict=True):
                close(got, w, what, 1e-5)

        return check

    def eager() -> None:
        careful(state)

    yield Contender("careful eager", [eager], moved(eager, "careful eager"), 28 * n)
    if compiled:
        function = torch.compile(careful, fullgraph=True, dynamic=False)
        yield Contender(
            "torch.compile", [lambda: function(state)], moved(lambda: function(state), "compiled"), 28 * n
        )
    params = [torch.nn.Parameter(w.clone()) for w in weights]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    adam = torch.optim.Adam(params, lr=1e-4, fused=True)

    def first_step() -> None:
        before = params[0].detach().clone()
        adam.step()
        close(before - params[0].detach(), 1e-4 * grads[0].sign(), "Adam's first step")

    yield Contender("Adam fused", [adam.step], first_step, 28 * n)


def step_case(s: Setting, shapes: list[tuple[int, ...]], compiled: bool) -> Iterator[Contender]:
    if s.dry:
        shapes = [(64, 64)] if len(shapes) == 1 else [(8, 3, 3, 3), (8, 40), (4, 64)]
    f32, bf16 = torch.float32, torch.bfloat16

    def ours(name: str, operators: Any) -> Iterator[Contender]:
        yield step_contender(s, shapes, name, operators.bop_step_, f32, f32)
        low = f"{name}, bf16 state and gradients"
        yield step_contender(s, shapes, low, operators.bop_step_, bf16, bf16)

    yield from on_each_backend(ours, absent)
    yield from dense_baselines(s, shapes, compiled and not s.dry)
    n = sum(map(math.prod, shapes))
    yield copy_bandwidth(s, 20 * n + n // 4)


# ---------------------------------------------------------------------------------------------- packing


def pack_case(s: Setting, shape: tuple[int, ...], dim: int, dtype: Any, last: bool) -> Iterator[Contender]:
    from bop2nd_fast import reference

    x = s.normal(*shape, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    n_bytes = x.numel() * x.element_size() + x.numel() // 4
    words, want = reference.pack_bits(x, dim), torch.where(x < 0, -1.0, 1.0).to(dtype)

    def ours(name: str, operators: Any) -> Iterator[Contender]:
        def pack() -> Any:
            return operators.pack_bits_ste(x, dim)

        def unpack() -> Tensor:
            return operators.unpack_bits(words, shape[dim], dim, dtype=dtype)

        def check() -> None:
            for got, expected in zip(pack(), reference.pack_bits_ste(x, dim), strict=True):
                equal(got, expected, f"{name}: pack")

        yield Contender(f"{name} pack signs and mask", [pack], check, n_bytes)
        yield Contender(f"{name} unpack", [unpack], lambda: equal(unpack(), want, f"{name}: unpack"), n_bytes)

    yield from on_each_backend(ours, absent)
    yield copy_bandwidth(s, n_bytes)


# ---------------------------------------------------------------------------------------------- products


def linear_operands(s: Setting, rows: int, outputs: int, features: int) -> tuple[Tensor, Tensor]:
    """Words of random signs, ``[rows, W]`` and ``[outputs, W]``."""
    from bop2nd_fast import reference

    return reference.pack_bits(s.normal(rows, features)), reference.pack_bits(s.normal(outputs, features))


def conv_operands(s: Setting, batch: int, channels: int, side: int) -> tuple[Tensor, Tensor]:
    """Words of random signs, an image ``[N, H, W, words]`` and 3x3 weights ``[O, 3, 3, words]``."""
    from bop2nd_fast import reference

    image = s.normal(batch, channels, side, side, dtype=torch.bfloat16)
    return reference.pack_bits(image, 1), reference.pack_bits(s.normal(channels, channels, 3, 3), 1)


def linear_case(s: Setting, rows: int, outputs: int, features: int, square: bool) -> Iterator[Contender]:
    """``[rows, features] x [features, outputs]``, bits in, dots out; ``square``: and what bounds it."""
    from bop2nd_fast import reference

    x_words, w_words = linear_operands(s, rows, outputs, features)
    want = reference.binary_linear_packed(x_words, w_words, features)[0]
    products = rows * outputs * features
    buffers = [w_words.clone() for _ in range(s.copies(4 * w_words.numel()))]

    def contender(name: str, operator: Callable[..., Any], **tile: Any) -> Contender:
        def run(weight: Tensor) -> Tensor:
            result: Tensor = operator(x_words, weight, features, **tile)[0]
            return result

        runs: list[Run] = [partial(run, b) for b in buffers]
        return Contender(name, runs, lambda: equal(run(w_words), want, name), 4 * w_words.numel(), products)

    def ours(name: str, operators: Any) -> Iterator[Contender]:
        yield contender(name, operators.binary_linear_packed)
        if square and name == "triton":
            from bop2nd_fast.kernels import tuning

            yield contender("triton popcount", operators.binary_linear_packed, tile=tuning.POPCOUNT)

    yield from on_each_backend(ours, absent)
    if square:
        yield tensor_core_peak(s)
    dense = [reference.unpack_bits(t, features, dtype=torch.bfloat16) for t in (x_words, w_words)]
    dense_bytes = 2 * dense[1].numel()
    copies = [dense[1].clone() for _ in range(s.copies(dense_bytes))]
    runs: list[Run] = [partial(F.linear, dense[0], c) for c in copies]
    check = lambda: close(F.linear(*dense), want, "cuBLAS")  # noqa: E731
    yield Contender("cuBLAS bf16", runs, check, dense_bytes, products)


def tensor_core_peak(s: Setting) -> Contender:
    """The instruction of the CUDA C++ products, back to back from registers: their bound on this chip."""
    from bop2nd_fast import backends

    if s.dry:
        return absent(PEAK, Unavailable("an emulated chip has no peak"))
    if (reason := backends.why_not("cuda")) is not None:
        return absent(PEAK, Unavailable(reason))
    n_iterations = 4096  # about a millisecond if a multiprocessor does 16384 products a clock

    def check() -> None:
        if backends._cuda.mma_peak(1) <= 0:
            raise GateError("the peak kernel stands for no work")

    products = int(backends._cuda.mma_peak(n_iterations))
    return Contender(PEAK, [lambda: backends._cuda.mma_peak(n_iterations)], check, 0, products)


def conv_case(s: Setting, batch: int, channels: int, side: int) -> Iterator[Contender]:
    from bop2nd_fast import reference

    bf16 = torch.bfloat16
    signs, words = conv_operands(s, batch, channels, side)
    x, w = (reference.unpack_bits(t, channels, 1, dtype=bf16) for t in (signs, words))  # channels-last
    geometry = ([1, 1], [1, 1], [1, 1], 1, 0)
    want = reference.binary_conv2d(x, words, *geometry, False)[0]
    threshold = torch.arange(channels, dtype=torch.int32, device=s.device) % 7 - 3
    asked: dict[str, Any] = {"values": False, "signs": True, "threshold": threshold}
    bits = reference.binary_conv2d_packed(signs, words, channels, *geometry, **asked)[1]
    products, n_bytes = batch * side**2 * channels**2 * 9, 4 * x.numel()

    def ours(name: str, operators: Any) -> Iterator[Contender]:
        def floats() -> Tensor:
            result: Tensor = operators.binary_conv2d(x, words, *geometry, False)[0]
            return result

        def packed() -> Tensor:
            result: Tensor = operators.binary_conv2d_packed(signs, words, channels, *geometry, **asked)[1]
            return result

        yield Contender(name, [floats], lambda: equal(floats(), want, f"{name}: conv"), n_bytes, products)
        check = lambda: equal(packed(), bits, f"{name}: bits")  # noqa: E731
        yield Contender(f"{name} bits to bits", [packed], check, 0, products)

    def cudnn() -> Tensor:
        return F.conv2d(x, w, padding=1)

    yield from on_each_backend(ours, absent)
    yield Contender("cuDNN bf16", [cudnn], lambda: close(cudnn(), want, "cuDNN"), n_bytes, products)


# ------------------------------------------------------------------------------------------------ all cases


def cases(s: Setting) -> dict[str, Callable[[], Iterator[Contender]]]:
    f32, bf16 = torch.float32, torch.bfloat16
    image = (s.size(256, 2), s.size(64, 40), s.size(56, 5), s.size(56, 5))
    edge, wide = s.size(8192, 64), s.size(4096, 64)
    found: dict[str, Callable[[], Iterator[Contender]]] = {
        "step, 64 M weights": lambda: step_case(s, [(8192, 8192)], True),
        "step, ResNet-18": lambda: step_case(s, list(resnet18_weights()), False),
        "pack rows fp32": lambda: pack_case(s, (edge, edge), -1, f32, False),
        "pack NCHW bf16": lambda: pack_case(s, image, 1, bf16, False),
        "pack channels-last bf16": lambda: pack_case(s, image, 1, bf16, True),
        "linear 8192^3": lambda: linear_case(s, edge, edge, edge, True),
        "linear batch 1, 4096^2": lambda: linear_case(s, 1, wide, wide, False),
    }
    for shape in STAGES[: s.size(4, 1)]:
        channels, side = s.size(shape.channels, 40), s.size(shape.side, 5)
        found[f"conv 3x3 {channels}ch {side}x{side}"] = partial(conv_case, s, s.size(256, 1), channels, side)
    found["BinaryNet training step"] = lambda: training_case(s)
    return found
