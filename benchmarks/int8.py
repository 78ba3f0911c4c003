"""The int8 convolutions and linear layers that torch has on CPUs.

What there is (torch 2.13; tried on a CPU with VNNI):

* ``onednn::qconv2d_pointwise`` / ``qlinear_pointwise``: what ``torch.compile`` lowers a quantized model to.
  uint8 activations, int8 weights packed once, and any output type: with fp32 out it is exact here.
* ``quantized::conv2d`` / ``linear`` on quantized tensors, by engine: ``x86`` (picks FBGEMM or oneDNN by
  shape), ``fbgemm``, ``onednn``. Requantizes its output to 8 bits.
* ``torch._int_mm``: int8 matrix product with int32 out. No convolution: it would need im2col first.

Activations are quantized and weights packed before the clock starts, which favours int8: ours packs its
floating-point input inside the measured time. +-1 is stored as uint8 {0, 2} with zero point 1, scale 1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .gates import equal, gated
from .networks import ConvShape
from .registry import GateError, Prepared, Unavailable

Build = Callable[..., Prepared]
ENGINES = ("x86", "fbgemm")
OUT_SCALE = 4.0  # of the 8-bit outputs: an error of half of it is rounding


def _need(namespace: str, *names: str) -> None:
    for name in names:
        if not hasattr(getattr(torch.ops, namespace), name):
            raise Unavailable(f"this torch has no {namespace}::{name}")


def onednn_conv(shape: ConvShape, signs: Tensor, weight: Tensor, expected: Tensor) -> Prepared:
    """uint8 in, fp32 out, exact."""
    _need("onednn", "qconv2d_pointwise", "qconv_prepack")
    ones, zeros = torch.ones(shape.outputs), torch.zeros(shape.outputs, dtype=torch.int32)
    how = shape.arguments[:4]
    x = (signs + 1).to(torch.uint8).contiguous(memory_format=torch.channels_last)
    packed = torch.ops.onednn.qconv_prepack(weight.to(torch.int8), ones, 1.0, 1, *how, list(x.shape))
    op, fp32 = torch.ops.onednn.qconv2d_pointwise, torch.float32
    run = lambda: op(x, 1.0, 1, packed, ones, zeros, None, *how, 1.0, 0, fp32, "none", [], "")  # noqa: E731
    return gated(run, partial(equal, want=expected, what="output"))


def onednn_linear(x: Tensor, weight: Tensor, expected: Tensor, zero_point: int = 1) -> Prepared:
    """uint8 in, fp32 out, exact: whole numbers of at least ``-zero_point``."""
    _need("onednn", "qlinear_pointwise", "qlinear_prepack")
    ones, zeros = torch.ones(len(weight)), torch.zeros(len(weight), dtype=torch.int32)
    x = (x + zero_point).to(torch.uint8)
    packed = torch.ops.onednn.qlinear_prepack(weight.to(torch.int8), list(x.shape))
    op, fp32, zero = torch.ops.onednn.qlinear_pointwise, torch.float32, zero_point
    run = lambda: op(x, 1.0, zero, packed, ones, zeros, None, 1.0, 0, fp32, "none", [], "")  # noqa: E731
    return gated(run, partial(equal, want=expected, what="output"))


def quantized_conv(shape: ConvShape, x: Tensor, weight: Tensor, expected: Tensor, engine: str) -> Prepared:
    """Quantized tensors in and out, by one of torch's engines."""
    x = x.contiguous(memory_format=torch.channels_last)
    return _quantized("conv2d", engine, x, weight, expected, *shape.arguments[:4])


def quantized_linear(x: Tensor, weight: Tensor, expected: Tensor, engine: str) -> Prepared:
    """Quantized tensors in and out, by one of torch's engines."""
    return _quantized("linear", engine, x, weight, expected)


def _quantized(kind: str, engine: str, x: Tensor, weight: Tensor, expected: Tensor, *how: Any) -> Prepared:
    if engine not in torch.backends.quantized.supported_engines:
        raise Unavailable(f"this torch has no quantized engine {engine!r}")
    _need("quantized", kind, f"{kind}_prepack")
    op, prepack = (getattr(torch.ops.quantized, name) for name in (kind, f"{kind}_prepack"))
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine  # packed weights remember their engine
    try:
        qx = torch.quantize_per_tensor(x, 1.0, 1, torch.quint8)
        packed = prepack(torch.quantize_per_tensor(weight, 1.0, 0, torch.qint8), None, *how)
    finally:
        torch.backends.quantized.engine = before

    def compare(output: Tensor) -> str:
        got = output.dequantize()
        limit = 127 * OUT_SCALE  # 8 bits saturate beyond
        error = (got.clamp(-limit, limit) - expected.clamp(-limit, limit)).abs().max().item()
        if error > OUT_SCALE / 2:
            raise GateError(f"off by {error}, more than rounding to 8 bits explains")
        return f"equal to the exact result but for rounding to 8 bits (<= {OUT_SCALE / 2:g})"

    return gated(lambda: op(qx, packed, OUT_SCALE, 128), compare)


def int_mm(a: Tensor, b: Tensor, expected: Tensor | None) -> Prepared:
    """``a [M, K] @ b [K, N]`` of +-1 as int8 with int32 out."""
    if not hasattr(torch, "_int_mm"):
        raise Unavailable("this torch has no _int_mm")
    x, w = a.to(torch.int8), b.to(torch.int8)
    want = a @ b if expected is None else expected
    return gated(lambda: torch._int_mm(x, w), lambda output: equal(output.float(), want, "output"))


# In the order in which the suites name them.
CONVOLUTIONS: tuple[Build, ...] = (onednn_conv, *(partial(quantized_conv, engine=e) for e in ENGINES))
LINEARS: tuple[Build, ...] = (onednn_linear, *(partial(quantized_linear, engine=e) for e in ENGINES))
