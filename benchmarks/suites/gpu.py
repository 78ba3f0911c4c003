"""Suite ``gpu``: the kernels of every GPU backend, on the machine's GPU; ``python -m benchmarks.gpu``.

With ``quick`` and no GPU the cases are of sizes that Triton's interpreter can do on a CPU. Checks compare
with the specification, exactly where the result is integers or bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bop2nd_fast import backends, reference

from ..gates import close, equal, failing, gated
from ..goals import Formula, Goal, Record, contender, goal, memory_over, over, rate, share
from ..gpu_operators import Setting, on_each_backend
from ..networks import STAGES, WeightShape, resnet18_weights
from ..registry import BASELINE, BOUND, VARIANT, Case, Contender, GateError, Prepared, Suite, Unavailable
from ..steps import StepData, careful
from ..timing import captured
from . import train_step

PEAK, COPY, COMPILED, ADAM = "tensor cores from registers", "copy", "torch.compile", "Adam fused"
CAREFUL, CUBLAS, CUDNN = "careful eager", "cuBLAS bf16", "cuDNN bf16"
LARGE, RESNET, TRAINING = "step, 64 M weights", "step, ResNet-18", "BinaryNet training step"
SIGNED, SIGNED_ONE = "signed linear, 256 rows, 4096^2", "signed linear, 1 row, 4096^2"
FIRST = "first layer, uint8, 3 to 128 channels, 32x32"
F32, BF16 = torch.float32, torch.bfloat16
PADDED = ([1, 1], [1, 1], [1, 1], 1)  # stride, padding, dilation and groups of every convolution here
Compare = Callable[[Any], str]
Entries = Iterator[Contender]


def in_graph(name: str, run: Callable[[], Any], compare: Compare, products: int) -> Contender:
    """The same call replayed from a CUDA graph: without what the host does for a launch."""
    make = lambda: gated(captured(run), compare)  # noqa: E731
    return Contender(f"{name}, CUDA graph", VARIANT, make, operations=products)


def copy_bandwidth(s: Setting, n_bytes: int) -> Contender:
    """A plain copy that moves ``n_bytes``, half of them read: the bound for what only moves memory."""
    source = torch.zeros(max(1, n_bytes // 8), device=s.device)
    target, same = torch.empty_like(source), partial(equal, want=source, what="copy")
    return Contender(COPY, BOUND, partial(gated, lambda: target.copy_(source), same), n_bytes)


def step_case(s: Setting, shapes: Sequence[WeightShape], compiled: bool) -> Entries:
    if s.dry:
        shapes = [(64, 64)] if len(shapes) == 1 else [(8, 3, 3, 3), (8, 40), (4, 64)]
    data, n = StepData(shapes, s.normal), sum(map(math.prod, shapes))

    def ours(name: str, role: str, operators: Any) -> Entries:
        step, low = operators.bop_step_, f"{name}, bf16 state and gradients"
        yield Contender(name, role, partial(data.packed, step, F32, F32), 20 * n + n // 4)
        yield Contender(low, VARIANT, partial(data.packed, step, BF16, BF16), 10 * n + n // 4)

    yield from on_each_backend(ours)
    yield Contender(CAREFUL, BASELINE, partial(data.eager, careful, CAREFUL), 28 * n)
    if compiled and not s.dry:
        yield Contender(COMPILED, BASELINE, data.compiled, 28 * n)
    yield Contender(ADAM, BASELINE, data.adam, 28 * n)
    yield copy_bandwidth(s, 20 * n + n // 4)


def pack_case(s: Setting, shape: tuple[int, ...], dim: int, dtype: Any, last: bool) -> Entries:
    x = s.normal(*shape, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    n_bytes = x.nbytes + x.numel() // 4
    words, want = reference.pack_bits(x, dim), torch.where(x < 0, -1.0, 1.0).to(dtype)
    packed = reference.pack_bits_ste(x, dim)

    def ours(name: str, role: str, operators: Any) -> Entries:
        same = lambda got: [equal(g, w, name) for g, w in zip(got, packed, strict=True)][-1]  # noqa: E731
        pack = partial(gated, lambda: operators.pack_bits_ste(x, dim), same)
        yield Contender(f"{name} pack signs and mask", role, pack, n_bytes)
        unpack = lambda: operators.unpack_bits(words, shape[dim], dim, dtype=dtype)  # noqa: E731
        back = partial(gated, unpack, partial(equal, want=want, what=name))
        yield Contender(f"{name} unpack", VARIANT, back, n_bytes)

    yield from on_each_backend(ours)
    yield copy_bandwidth(s, n_bytes)


# ---------------------------------------------------------------------------------------------- products


def linear_operands(s: Setting, rows: int, outputs: int, features: int) -> tuple[Tensor, Tensor]:
    """Words of random signs, ``[rows, W]`` and ``[outputs, W]``."""
    return reference.pack_bits(s.normal(rows, features)), reference.pack_bits(s.normal(outputs, features))


def conv_operands(s: Setting, batch: int, channels: int, side: int) -> tuple[Tensor, Tensor]:
    """Words of random signs, an image ``[N, H, W, words]`` and 3x3 weights ``[O, 3, 3, words]``."""
    image = s.normal(batch, channels, side, side, dtype=BF16)
    return reference.pack_bits(image, 1), reference.pack_bits(s.normal(channels, channels, 3, 3), 1)


def rotating_weights(
    s: Setting,
    products: int,
    name: str,
    role: str,
    call: Callable[[Tensor], Any],
    weight: Tensor,
    same: Compare,
) -> Contender:
    """A call on as many copies of the weight as no cache holds."""
    runs = [partial(call, w) for w in (weight, *(weight.clone() for _ in range(s.copies(weight.nbytes) - 1)))]
    make = partial(Prepared, lambda: same(runs[0]()), runs[0], rotate=runs[1:])
    return Contender(name, role, make, weight.nbytes, products)


def linear_case(s: Setting, rows: int, outputs: int, features: int, square: bool) -> Entries:
    """``[rows, features] x [features, outputs]``, bits in, dots out; ``square``: and what bounds it."""
    x_words, w_words = linear_operands(s, rows, outputs, features)
    want = reference.binary_linear_packed(x_words, w_words, features)[0]
    products = rows * outputs * features
    rotating = partial(rotating_weights, s, products)

    def ours(name: str, role: str, operators: Any) -> Entries:
        def call(weight: Tensor, **tile: Any) -> Any:
            return operators.binary_linear_packed(x_words, weight, features, **tile)[0]

        same = partial(equal, want=want, what=name)
        yield rotating(name, role, call, w_words, same)
        if square and name == "triton":
            from bop2nd_fast.kernels import tuning

            popcount = partial(call, tile=tuning.POPCOUNT)
            yield rotating("triton popcount", VARIANT, popcount, w_words, same)
        if not square:
            yield in_graph(name, partial(call, w_words), same, products)

    yield from on_each_backend(ours)
    if square:
        yield tensor_core_peak(s)
    x, w = (reference.unpack_bits(t, features, dtype=BF16) for t in (x_words, w_words))
    yield rotating(CUBLAS, BASELINE, partial(F.linear, x), w, partial(close, want=want, what=CUBLAS))


def tensor_core_peak(s: Setting) -> Contender:
    """The instruction of the CUDA C++ products, back to back from registers: their bound on this chip."""
    n_iterations = 4096  # about a millisecond if a multiprocessor does 16384 products a clock
    reason = "an emulated chip has no peak" if s.device != "cuda" else backends.why_not("cuda")

    if reason is not None:
        return failing(PEAK, Unavailable(reason), BOUND)
    peak = partial(backends._cuda.mma_peak, n_iterations)

    def compare(products: float) -> str:
        if products <= 0:
            raise GateError("the peak kernel stands for no work")
        return "stands for work"

    return Contender(PEAK, BOUND, partial(gated, peak, compare), operations=int(peak()))


def conv_case(s: Setting, batch: int, channels: int, side: int) -> Entries:
    signs, words = conv_operands(s, batch, channels, side)
    x, w = (reference.unpack_bits(t, channels, 1, dtype=BF16) for t in (signs, words))  # channels-last
    want = reference.binary_conv2d(x, words, *PADDED, 0, False)[0]
    threshold = torch.arange(channels, dtype=torch.int32, device=s.device) % 7 - 3
    asked: dict[str, Any] = {"values": False, "signs": True, "threshold": threshold}
    bits = reference.binary_conv2d_packed(signs, words, channels, *PADDED, 0, **asked)[1]
    products, n_bytes = batch * side**2 * channels**2 * 9, 4 * x.numel()

    def ours(name: str, role: str, operators: Any) -> Entries:
        floats = lambda: operators.binary_conv2d(x, words, *PADDED, 0, False)[0]  # noqa: E731
        make = partial(gated, floats, partial(equal, want=want, what=f"{name}: conv"))
        yield Contender(name, role, make, n_bytes, products)
        packed = partial(operators.binary_conv2d_packed, signs, words, channels, *PADDED, 0, **asked)
        same = lambda got: equal(got[1], bits, f"{name}: bits")  # noqa: E731
        yield Contender(f"{name} bits to bits", VARIANT, partial(gated, packed, same), operations=products)
        yield in_graph(f"{name} bits to bits", packed, same, products)

    yield from on_each_backend(ours)
    cudnn = partial(gated, lambda: F.conv2d(x, w, padding=1), partial(close, want=want, what="cuDNN"))
    yield Contender(CUDNN, BASELINE, cudnn, n_bytes, products)


def signed_linear_case(s: Setting, rows: int, edge: int) -> Entries:
    """Whole numbers ``[rows, edge]`` in each dtype by signs ``[edge, edge]``: every sum is exact in fp32."""
    x, words = (30 * s.normal(rows, edge)).round().clamp(-127, 127), reference.pack_bits(s.normal(edge, edge))
    want = reference.signed_linear(x.to(torch.int8), words)[0]
    rotating = partial(rotating_weights, s, rows * edge * edge)

    def ours(name: str, role: str, operators: Any) -> Entries:
        if name == "triton":  # the only one that has the operator
            same = lambda got: equal(got[0], want, name)  # noqa: E731
            for dtype, kind in ((torch.int8, "int8"), (F32, "fp32"), (BF16, "bf16")):
                who, product = (
                    role if kind == "int8" else VARIANT,
                    partial(operators.signed_linear, x.to(dtype)),
                )
                yield rotating(f"{name} {kind}", who, product, words, same)

    yield from on_each_backend(ours)
    dense = reference.unpack_bits(words, edge, dtype=F32)
    for name, dtype in (("cuBLAS fp32", F32), (CUBLAS, BF16)):
        same = partial(close, want=want, what="cuBLAS")
        yield rotating(name, BASELINE, partial(F.linear, x.to(dtype)), dense.to(dtype), same)


def first_layer_case(s: Setting, batch: int, side: int) -> Entries:
    """uint8 images ``[N, 3, H, W]``, read as ``2 x - 255``, by 128 kernels of 3x3 signs."""
    x = torch.randint(0, 256, (batch, 3, side, side), device=s.device).to(torch.uint8)
    words = reference.pack_bits(s.normal(s.size(128, 40), 3, 3, 3), 1)
    want = reference.signed_conv2d(x, words, *PADDED, 2, 255)[0]
    products, n_bytes = want.numel() * 27, x.numel() + want.nbytes

    def ours(name: str, role: str, operators: Any) -> Entries:
        if name == "triton":
            call = lambda: operators.signed_conv2d(x, words, *PADDED, 2, 255)[0]  # noqa: E731
            make = partial(gated, call, partial(equal, want=want, what=name))
            yield Contender(name, role, make, n_bytes, products)

    yield from on_each_backend(ours)
    image, dense = (x.to(BF16) * 2 - 255), reference.unpack_bits(words, 3, 1, dtype=BF16)
    compare = lambda got: close(got.permute(0, 2, 3, 1), want, "cuDNN")  # noqa: E731
    cudnn = partial(gated, lambda: F.conv2d(image, dense, padding=1), compare)
    yield Contender(CUDNN, BASELINE, cudnn, n_bytes, products)


# ------------------------------------------------------------------------------------------------ all cases


def cases(quick: bool) -> list[Case]:
    return cases_of(Setting("cuda" if torch.cuda.is_available() else "cpu", quick))


def cases_of(s: Setting) -> list[Case]:
    """All cases at the sizes of a setting."""
    image = (s.size(256, 2), s.size(64, 40), s.size(56, 5), s.size(56, 5))
    edge, wide = s.size(8192, 64), s.size(4096, 64)
    rows: list[tuple[str, str, str, Callable[[], Entries]]] = [
        ("bop_step_", "GB/s", LARGE, partial(step_case, s, [(8192, 8192)], True)),
        ("bop_step_", "GB/s", RESNET, partial(step_case, s, list(resnet18_weights()), False)),
        ("pack_bits_ste", "GB/s", "pack rows fp32", partial(pack_case, s, (edge, edge), -1, F32, False)),
        ("pack_bits_ste", "GB/s", "pack NCHW bf16", partial(pack_case, s, image, 1, BF16, False)),
        ("pack_bits_ste", "GB/s", "pack channels-last bf16", partial(pack_case, s, image, 1, BF16, True)),
        ("binary_linear", "GMAC/s", "linear 8192^3", partial(linear_case, s, edge, edge, edge, True)),
        ("binary_linear", "GMAC/s", "linear batch 1, 4096^2", partial(linear_case, s, 1, wide, wide, False)),
        ("signed_linear", "GMAC/s", SIGNED, partial(signed_linear_case, s, s.size(256, 5), wide)),
        ("signed_linear", "GMAC/s", SIGNED_ONE, partial(signed_linear_case, s, 1, wide)),
        ("signed_conv2d", "GMAC/s", FIRST, partial(first_layer_case, s, s.size(64, 1), s.size(32, 5))),
    ]
    for shape in STAGES[: s.size(4, 1)]:
        channels, side = s.size(shape.channels, 40), s.size(shape.side, 5)
        make = partial(conv_case, s, s.size(256, 1), channels, side)
        rows.append(("binary_conv2d", "GMAC/s", f"conv 3x3 {channels}ch {side}x{side}", make))
    rows.append(("train_step", "1/s", TRAINING, partial(train_step.gpu_contenders, s)))
    return [Case("gpu", op, name, {}, unit, make, device="cuda") for op, unit, name, make in rows]


# ------------------------------------------------------------------------------------------------ goals


def _goal(case: str, what: str, aim: float | None, formula: Formula, unit: str = "x", **more: Any) -> Goal:
    return goal("gpu", f"{case}: {what}", aim, formula, unit, start=case, **more)


def _of_copy(case: str, ours: str, aim: float) -> Goal:
    return _goal(case, "of copy bandwidth", aim, share(ours, COPY), "%")


def _conv_goals(shape: str) -> tuple[Goal, ...]:
    case = f"conv 3x3 {shape}"
    return (
        _goal(case, "float to float over cuDNN", 1.5, over(CUDNN, ours="triton")),
        _goal(case, "bits to bits over cuDNN", 3, over(CUDNN, ours="triton bits to bits")),
        _goal(case, "CUDA C++, bits to bits over cuDNN", 3, over(CUDNN, ours="cuda bits to bits")),
    )


def _host_us(record: Record) -> float | None:
    seconds = (contender(record, "triton") or {}).get("host_seconds")
    return None if seconds is None else 1e6 * seconds


PACK = "triton pack signs and mask"
_MEMORY = memory_over(train_step.GPU_OURS, train_step.GPU_FAKE, "peak")
SUITE = Suite(
    cases,
    families={
        "careful eager": (CAREFUL,),
        "compiled, cuBLAS, cuDNN": (COMPILED, CUBLAS, CUDNN),
        "Adam, fused": (ADAM,),
        "fake-quantized": (train_step.GPU_FAKE,),
    },
    goals=(
        _of_copy(LARGE, "triton", 90),
        _goal(LARGE, "over torch.compile", 1.3, over(COMPILED, ours="triton")),
        _goal(LARGE, "over Adam fused", 1.3, over(ADAM, ours="triton")),
        _goal(LARGE, "over careful eager", 8, over(CAREFUL, ours="triton")),
        _goal(LARGE, "CUDA C++, time over Triton's", 1.03, over("cuda", ours="triton"), at_most=True),
        _of_copy(RESNET, "triton", 70),
        _goal(RESNET, "host time of a call", 25, _host_us, "µs", at_most=True),
        *(_of_copy(f"pack {what}", PACK, 85) for what in ("rows fp32", "NCHW bf16", "channels-last bf16")),
        _goal("linear 8192^3", "over cuBLAS bf16", 1.4, over(CUBLAS, ours="triton")),
        _goal("linear 8192^3", "tensor cores' peak from registers", None, rate(PEAK), "PMAC/s", scale=1e-6),
        _goal("linear 8192^3", "CUDA C++, of the tensor cores' peak", 70, share("cuda", PEAK), "%"),
        _goal("linear 8192^3", "CUDA C++, over cuBLAS bf16", 3, over(CUBLAS, ours="cuda")),
        _goal("linear batch 1, 4096^2", "over cuBLAS bf16", 8, over(CUBLAS, ours="triton")),
        _goal(SIGNED, "int8 over cuBLAS bf16", None, over(CUBLAS, ours="triton int8")),
        _goal(SIGNED, "fp32 over cuBLAS fp32", None, over("cuBLAS fp32", ours="triton fp32")),
        _goal(SIGNED_ONE, "int8 over cuBLAS bf16", 8, over(CUBLAS, ours="triton int8")),
        _goal(FIRST, "over cuDNN bf16", None, over(CUDNN, ours="triton")),
        *(goal for c in STAGES for goal in _conv_goals(f"{c.channels}ch {c.side}x{c.side}")),
        _goal(TRAINING, "graph over fake-quantized", 2, over(train_step.GPU_FAKE, ours=train_step.GPU_GRAPH)),
        _goal(TRAINING, "peak memory, of fake-quantized", 50, _MEMORY, "%", at_most=True),
    ),
    summary=lambda record: True,
)
