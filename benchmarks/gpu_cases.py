"""What ``benchmarks.gpu`` measures: each case yields contenders that do the same work, with their checks.

A check compares with the specification, exactly where the result is integers or bits, and raises GateError.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .eager_step import EPS, GAMMA, SIGMA, TAU, DenseState, careful
from .networks import STAGES, resnet18_weights
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


def equal(got: Tensor, want: Tensor, what: str) -> None:
    if not torch.equal(got, want):
        raise GateError(f"{what}: {int((got != want).sum())} of {want.numel()} elements differ")


def close(got: Tensor, want: Tensor, what: str, tolerance: float = 1e-2) -> None:
    error = float((got.double() - want.double()).norm() / want.double().norm())
    if not error < tolerance:
        raise GateError(f"{what}: relative error {error:.2g}")


# ---------------------------------------------------------------------------------------------- the step


def copy_bandwidth(s: Setting, n_bytes: int) -> Contender:
    """A plain copy that moves ``n_bytes``, half of them read: the bound for what only moves memory."""
    source = torch.zeros(max(1, n_bytes // 8), device=s.device)
    target = torch.empty_like(source)
    return Contender(
        "copy", [lambda: target.copy_(source)], lambda: equal(target.copy_(source), source, "copy"), n_bytes
    )


def triton_step(s: Setting, shapes: list[tuple[int, ...]], name: str, grad: Any, moment: Any) -> Contender:
    from bop2nd_fast import reference
    from bop2nd_fast.kernels import bop_step

    words = [reference.pack_bits(s.normal(*shape)) for shape in shapes]
    grads = [s.normal(*shape, dtype=grad) for shape in shapes]
    m = [s.normal(*shape).mul_(3e-3).to(moment) for shape in shapes]
    v = [s.normal(*shape).square_().mul_(0.1).add_(0.9).to(moment) for shape in shapes]
    hyper = torch.tensor([GAMMA, SIGMA, TAU, TAU * EPS], device=s.device)
    counts = torch.empty(len(shapes), 2, dtype=torch.int64, device=s.device)
    seed = torch.tensor([5, 1], device=s.device) if moment == torch.bfloat16 else None

    def run() -> None:
        bop_step.bop_step_(words, grads, m, v, hyper, counts, seed=seed)

    def check() -> None:
        want = [[t.clone() for t in column] for column in (words, grads, m, v)]
        want_counts = torch.empty_like(counts)
        reference.bop_step_(*want, hyper, want_counts, seed=seed)
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
    ours = triton_step(s, shapes, "triton", f32, f32)
    yield ours
    yield triton_step(s, shapes, "triton, bf16 state and gradients", bf16, bf16)
    yield from dense_baselines(s, shapes, compiled and not s.dry)
    yield copy_bandwidth(s, ours.bytes)


# ---------------------------------------------------------------------------------------------- packing


def pack_case(s: Setting, shape: tuple[int, ...], dim: int, dtype: Any, last: bool) -> Iterator[Contender]:
    from bop2nd_fast import reference
    from bop2nd_fast.kernels import pack_bits

    x = s.normal(*shape, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    n_bytes = x.numel() * x.element_size() + x.numel() // 4

    def check() -> None:
        for got, want in zip(pack_bits.pack_bits_ste(x, dim), reference.pack_bits_ste(x, dim), strict=True):
            equal(got, want, "pack")

    words = reference.pack_bits(x, dim)

    def unpack() -> Tensor:
        return pack_bits.unpack_bits(words, shape[dim], dim, dtype=dtype)

    yield Contender("triton pack signs and mask", [lambda: pack_bits.pack_bits_ste(x, dim)], check, n_bytes)
    want = torch.where(x < 0, -1.0, 1.0).to(dtype)
    yield Contender("triton unpack", [unpack], lambda: equal(unpack(), want, "unpack"), n_bytes)
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


def linear_case(s: Setting, rows: int, outputs: int, features: int, loops: bool) -> Iterator[Contender]:
    from bop2nd_fast import reference
    from bop2nd_fast.kernels import binary_linear, tuning

    x_words, w_words = linear_operands(s, rows, outputs, features)
    want = reference.binary_linear_packed(x_words, w_words, features)[0]
    products = rows * outputs * features
    buffers = [w_words.clone() for _ in range(s.copies(4 * w_words.numel()))]

    def contender(name: str, tile: Any) -> Contender:
        def run(weight: Tensor) -> Tensor:
            return binary_linear.binary_linear_packed(x_words, weight, features, tile=tile)[0]

        runs: list[Run] = [lambda weight=b: run(weight) for b in buffers]
        return Contender(name, runs, lambda: equal(run(w_words), want, name), 4 * w_words.numel(), products)

    yield contender("triton", None)
    if loops:
        yield contender("triton popcount", tuning.POPCOUNT)
    dense = [reference.unpack_bits(t, features, dtype=torch.bfloat16) for t in (x_words, w_words)]
    dense_bytes = 2 * dense[1].numel()
    copies = [dense[1].clone() for _ in range(s.copies(dense_bytes))]
    runs: list[Run] = [lambda weight=c: F.linear(dense[0], weight) for c in copies]
    check = lambda: close(F.linear(*dense), want, "cuBLAS")  # noqa: E731
    yield Contender("cuBLAS bf16", runs, check, dense_bytes, products)


def conv_case(s: Setting, batch: int, channels: int, side: int) -> Iterator[Contender]:
    from bop2nd_fast import reference
    from bop2nd_fast.kernels import binary_conv2d

    bf16 = torch.bfloat16
    signs, words = conv_operands(s, batch, channels, side)
    x, w = (reference.unpack_bits(t, channels, 1, dtype=bf16) for t in (signs, words))  # channels-last
    geometry = ([1, 1], [1, 1], [1, 1], 1, 0)
    want = reference.binary_conv2d(x, words, *geometry, False)[0]
    threshold = torch.arange(channels, dtype=torch.int32, device=s.device) % 7 - 3
    asked = {"values": False, "signs": True, "threshold": threshold}
    bits = reference.binary_conv2d_packed(signs, words, channels, *geometry, **asked)[1]
    products = batch * side**2 * channels**2 * 9

    def floats() -> Tensor:
        return binary_conv2d.binary_conv2d(x, words, *geometry, False)[0]

    def packed() -> Tensor:
        return binary_conv2d.binary_conv2d_packed(signs, words, channels, *geometry, **asked)[1]

    n_bytes = 4 * x.numel()
    yield Contender("triton", [floats], lambda: equal(floats(), want, "conv"), n_bytes, products)
    yield Contender("triton bits to bits", [packed], lambda: equal(packed(), bits, "bits"), 0, products)

    def cudnn() -> Tensor:
        return F.conv2d(x, w, padding=1)

    yield Contender("cuDNN bf16", [cudnn], lambda: close(cudnn(), want, "cuDNN"), n_bytes, products)


# ---------------------------------------------------------------------------------------- training step


class Training:
    """BinaryNet, ours with Bop2ndOrder or its fake-quantized twin with Adam, in bf16 autocast."""

    def __init__(self, s: Setting, ours: bool) -> None:
        import bop2nd_fast as bf

        from .latent_network import twin

        torch.manual_seed(7)
        image, batch = s.size(32, 10), s.size(50, 2)
        model: torch.nn.Module = bf.models.BinaryNet(width=s.size(128, 4), image_size=image)
        model = (model if ours else twin(model)).to(s.device)
        self.x = s.normal(batch, 3, image, image)
        self.labels = torch.arange(batch, device=s.device) % 10
        graphs = not s.dry
        if ours:
            binary, real = bf.optim.split_parameters(model)
            self.words = [p.words for p in binary]
            self.optimizers = [
                bf.optim.Bop2ndOrder(binary, gamma=1e-4, sigma=1e-3, capturable=graphs),
                torch.optim.Adam(real, lr=0.01, capturable=graphs),
            ]
        else:
            trained = [p for p in model.parameters() if p.requires_grad]
            self.optimizers = [torch.optim.Adam(trained, lr=0.01, fused=graphs)]
        self.model, self.kind = model, torch.device(s.device).type

    def step(self) -> Tensor:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.kind, dtype=torch.bfloat16):
            loss = F.cross_entropy(self.model(self.x).float(), self.labels)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.detach()

    def captured(self) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.loss = self.step()
        return graph


def _peak_bytes(s: Setting, ours: bool) -> dict[str, float]:
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    training = Training(s, ours)
    training.step()
    torch.cuda.reset_peak_memory_stats()
    training.step()
    return {"peak_bytes": torch.cuda.max_memory_allocated() - before}


def training_case(s: Setting) -> Iterator[Contender]:
    import bop2nd_fast as bf

    def same_as_reference() -> None:
        losses = {}
        for backend in ("triton", "reference"):
            with bf.backends.use(backend):
                training = Training(s, True)
                losses[backend] = [float(training.step()) for _ in range(s.size(2, 1))]
        if not all(abs(a - b) < 0.05 for a, b in zip(*losses.values(), strict=True)):
            raise GateError(f"losses {losses}")

    def finite(training: Training) -> None:
        if not math.isfinite(float(training.step())):
            raise GateError("the loss is not finite")

    ours, twin = Training(s, True), Training(s, False)
    memory = (None, None) if s.dry else (lambda: _peak_bytes(s, True), lambda: _peak_bytes(s, False))
    yield Contender("ours, eager", [ours.step], same_as_reference, extra=memory[0])
    yield Contender("fake-quantized, eager", [twin.step], lambda: finite(twin), extra=memory[1])
    if s.dry:
        return
    replayed, eager = Training(s, True), Training(s, True)
    graph = replayed.captured()

    def like_eager() -> None:
        for _ in range(3):
            eager.step()
        for _ in range(2):
            graph.replay()
            loss = eager.step()
        differ = sum(int((a != b).sum()) for a, b in zip(replayed.words, eager.words, strict=True))
        if differ > 0.02 * sum(w.numel() for w in eager.words) or abs(float(loss - replayed.loss)) > 0.1:
            raise GateError(f"{differ} words, losses {float(loss)} and {float(replayed.loss)} differ")

    yield Contender("ours, CUDA graph", [graph.replay], like_eager)


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
        found[f"conv 3x3 {channels}ch {side}x{side}"] = lambda c=channels, d=side: conv_case(
            s, s.size(256, 1), c, d
        )
    found["BinaryNet training step"] = lambda: training_case(s)
    return found
