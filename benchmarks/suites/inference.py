"""Suite ``inference``: packed networks against the same networks in floating point.

The floating-point twins hold +-1 weights, binarize their activations with ``torch.sign``, and are in eval
mode.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import bop2nd_fast as bf

from ..float_network import Sign, floating
from ..networks import BINARYNET, BIREALNET
from ..registry import (
    ALL_THREADS,
    BASELINE,
    OURS,
    VARIANT,
    Case,
    Contender,
    GateError,
    Picture,
    Prepared,
    Suite,
)

PACKED, BOTH_THREADS, ROUNDED, EVAL = (
    "bf.inference.convert",
    "bf.inference.convert, all threads",
    "bf.inference.convert(exact=False)",
    "bop2nd, model.eval()",
)
FP32, FP32_LAST, BF16 = "fp32", "fp32, channels-last", "bf16, channels-last"
COMPILED = "fp32, torch.compile"


def cases(quick: bool) -> list[Case]:
    rows: list[tuple[str, int, int, int]]
    if quick:
        rows = [(BINARYNET, 16, 16, 2)]
    else:
        rows = [(BINARYNET, 128, 32, 1), (BINARYNET, 128, 32, 64), (BIREALNET, 64, 224, 1)]
    return [
        Case(
            suite="inference",
            op="inference",
            name=f"{network}, {image}x{image}, batch {batch}",
            shapes={"width": width, "image_size": image, "batch": batch},
            unit="1/s",
            contenders=partial(_contenders, network, width, image, batch),
            networks=(network,),
            inference=True,
        )
        for network, width, image, batch in rows
    ]


def build(network: str, width: int, image: int) -> nn.Module:
    """A network in eval mode, its batch norms no identities."""
    torch.manual_seed(3)
    model: nn.Module
    if network == BINARYNET:
        model = bf.models.BinaryNet(width=width, image_size=image)
    else:
        model = bf.models.BiRealNet18()
    model.train()
    with torch.no_grad():
        model(torch.randn(4, 3, image, image))  # batch norms get statistics that are not 0 and 1
    return model.eval()


def _contenders(network: str, width: int, image: int, batch: int) -> list[Contender]:
    model = build(network, width, image)
    x = torch.randn(batch, 3, image, image)

    def entry(name: str, role: str, make: Any, **more: Any) -> Contender:
        return Contender(name, role, make, items=batch, **more)

    result = [
        entry(PACKED, OURS, partial(_make_packed, model, x)),
        entry(BOTH_THREADS, VARIANT, partial(_make_packed, model, x), threads=ALL_THREADS),
        entry(ROUNDED, VARIANT, partial(_make_packed, model, x, exact=False)),
        entry(EVAL, VARIANT, partial(_make_eval, model, x)),
        entry(FP32, BASELINE, partial(make_float, model, x)),
        entry(FP32_LAST, BASELINE, partial(make_float, model, x, channels_last=True)),
        entry(BF16, BASELINE, partial(make_float, model, x, channels_last=True, dtype=torch.bfloat16)),
    ]
    if network == BINARYNET:  # compiling the larger network would take longer than all of its measurements
        result.append(entry(COMPILED, BASELINE, partial(make_float, model, x, compiled=True), slow=True))
    return result


def _make_packed(model: nn.Module, x: Tensor, exact: bool = True) -> Prepared:
    packed = bf.inference.convert(model, x[:1], exact=exact)

    def check() -> str:
        if not exact:
            return close(packed(x), model(x))
        if not torch.equal(packed(x), model(x)):
            raise GateError("the packed model's output differs from the trained model's")
        return "equal to the trained model's output"

    def weights() -> dict[str, int]:
        return {"weights": packed.nbytes, "weights_fp32": sum(row.bytes_fp32 for row in packed.report())}

    return Prepared(check, lambda: packed(x), memory=weights)


def _make_eval(model: nn.Module, x: Tensor) -> Prepared:
    def check() -> str:
        before = bf.backends.forced() or "auto"
        got = model(x[:2])
        with bf.backends.use("reference"):
            want = model(x[:2])
        bf.backends.use(before)
        return close(got, want)

    return Prepared(check, lambda: model(x))


def make_float(
    model: nn.Module,
    x: Tensor,
    channels_last: bool = False,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
) -> Prepared:
    net = floating(model).to(dtype)
    data = x.to(dtype)
    if channels_last:
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        data = data.contiguous(memory_format=torch.channels_last)
    run: Any = torch.compile(net, dynamic=False) if compiled else net

    def check() -> str:
        if dtype != torch.float32:
            with torch.inference_mode():
                if not bool(net(data[:2]).isfinite().all()):
                    raise GateError("its output is not finite")
            return "finite (bf16 rounds away the small sums whose sign decides)"
        with torch.inference_mode():
            _zeros_positive(net, True)
            verdict = close(net(data), model(x))
            _zeros_positive(net, False)
            if not compiled:
                return verdict
            return f"uncompiled {verdict}; compiled {close(run(data), net(data))}"

    return Prepared(check, lambda: run(data))


def _zeros_positive(net: nn.Module, value: bool) -> None:
    """Exact zeros count as the bits of ours have it, for a comparison."""
    for module in net.modules():
        if isinstance(module, Sign):
            module.zeros_positive = value


def close(got: Tensor, want: Tensor) -> str:
    """Sums run in another order: a sign that hangs on the last bit may turn, and then others behind it."""
    error = float((got - want).norm() / want.norm())
    if error > 0.05:
        raise GateError(f"differs by {error:.2g} of the output's norm")
    return f"within {error:.1e} of the reference's output (norm)"


SUITE = Suite(
    cases,
    families={"fp32": (FP32, FP32_LAST), "bf16": (BF16,), "fp32, compiled": (COMPILED,)},
    pictures=(Picture("inference", "Inference: time of others over the packed network's"),),
    summary=lambda record: True,
)
