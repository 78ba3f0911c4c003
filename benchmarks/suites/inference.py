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

from .. import gates
from ..float_network import Sign, floating
from ..goals import goal, over
from ..networks import BINARYNET, BIREALNET
from ..registry import ALL_THREADS, BASELINE, OURS, VARIANT, Case, Contender, Picture, Prepared, Suite

PACKED, BOTH_THREADS = "bf.inference.convert", "bf.inference.convert, all threads"
BYTES = "bf.inference.convert(image_bytes=True)"
ROUNDED, EVAL = "bf.inference.convert(exact=False)", "bop2nd, model.eval()"
FP32, FP32_LAST, BF16 = "fp32", "fp32, channels-last", "bf16, channels-last"
COMPILED = "fp32, torch.compile"
# Sums run in another order: a sign that hangs on the last bit may turn, and then others behind it.
TOLERANCE, SHARE = 0.05, 0.95


def close(got: Tensor, want: Tensor, tolerance: float = TOLERANCE) -> str:
    """Raises GateError unless nearly all images are within the tolerance of the reference.

    A sum of the first, real layer that is rounded to the other side of zero changes all of an image's result.
    """
    errors = (got - want).flatten(1).norm(dim=1) / want.flatten(1).norm(dim=1)
    n = int((errors < tolerance).sum())
    if n < SHARE * len(errors):
        raise gates.GateError(f"only {n} of {len(errors)} images within {tolerance:.0%} of the reference")
    return f"{n} of {len(errors)} images within {tolerance:.0%} of the reference (norm)"


def cases(quick: bool) -> list[Case]:
    rows = [(BINARYNET, 128, 32, 1), (BINARYNET, 128, 32, 64), (BIREALNET, 64, 224, 1)]
    case = partial(Case, "inference", "inference", unit="1/s", inference=True)
    return [
        case(
            f"{network}, {image}x{image}, batch {batch}",
            {"width": width, "image_size": image, "batch": batch},
            contenders=partial(_contenders, network, width, image, batch),
            networks=(network,),
        )
        for network, width, image, batch in ([(BINARYNET, 16, 16, 2)] if quick else rows)
    ]


def build(network: str, width: int, image: int) -> nn.Module:
    """A network in eval mode, its batch norms no identities."""
    torch.manual_seed(3)
    binarynet = network == BINARYNET
    model = bf.models.BinaryNet(width=width, image_size=image) if binarynet else bf.models.BiRealNet18()
    with torch.no_grad():
        model(torch.randn(4, 3, image, image))  # batch norms get statistics that are not 0 and 1
    return model.eval()


def _contenders(network: str, width: int, image: int, batch: int) -> list[Contender]:
    model = build(network, width, image)
    x = torch.randn(batch, 3, image, image)
    entry, theirs = partial(Contender, items=batch), partial(make_float, model, x)
    result = [
        entry(PACKED, OURS, partial(_make_packed, model, x)),
        entry(BOTH_THREADS, VARIANT, partial(_make_packed, model, x), threads=ALL_THREADS),
        entry(ROUNDED, VARIANT, partial(_make_packed, model, x, exact=False)),
        entry(EVAL, VARIANT, partial(_make_eval, model, x)),
        entry(FP32, BASELINE, theirs),
        entry(FP32_LAST, BASELINE, partial(theirs, last=True)),
        entry(BF16, BASELINE, partial(theirs, last=True, dtype=torch.bfloat16)),
    ]
    if network == BINARYNET:  # compiling the larger network would take longer than all of its measurements
        result.append(entry(COMPILED, BASELINE, partial(theirs, compiled=True), slow=True))
        result.insert(3, entry(BYTES, VARIANT, partial(_make_bytes, model, batch, image)))
    return result


def _make_packed(model: nn.Module, x: Tensor, exact: bool = True) -> Prepared:
    packed = bf.inference.convert(model, x[:1], exact=exact)

    def check() -> str:
        if not exact:
            return close(packed(x), model(x))
        if not torch.equal(packed(x), model(x)):
            raise gates.GateError("the packed model's output differs from the trained model's")
        return "equal to the trained model's output"

    def weights() -> dict[str, int]:
        return {"weights": packed.nbytes, "weights_fp32": sum(row.bytes_fp32 for row in packed.report())}

    return Prepared(check, lambda: packed(x), memory=weights)


def _make_bytes(model: nn.Module, batch: int, image: int) -> Prepared:
    bytes = torch.randint(0, 256, (batch, 3, image, image), dtype=torch.uint8)
    packed = bf.inference.convert(model, bytes[:1], image_bytes=True)
    want = model(bytes.float() / 127.5 - 1)

    def check() -> str:
        if not torch.equal(packed(bytes), want):
            raise gates.GateError("the outputs differ from the trained model's on the same images")
        return "equal to the trained model's output on the same images"

    return Prepared(check, lambda: packed(bytes))


def _make_eval(model: nn.Module, x: Tensor) -> Prepared:
    def check() -> str:
        with bf.backends.use("reference"):
            want = model(x[:2])
        return close(model(x[:2]), want)

    return Prepared(check, lambda: model(x))


def make_float(
    model: nn.Module,
    x: Tensor,
    last: bool = False,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
) -> Prepared:
    """The network in floating point, in channels-last with ``last``."""
    net, data = floating(model).to(dtype), x.to(dtype)
    if last:
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        data = data.contiguous(memory_format=torch.channels_last)
    run: Any = torch.compile(net, dynamic=False) if compiled else net

    @torch.inference_mode()
    def check() -> str:
        if dtype != torch.float32:
            if not bool(net(data[:2]).isfinite().all()):
                raise gates.GateError("its output is not finite")
            return "finite (bf16 rounds away the small sums whose sign decides)"
        try:
            Sign.zeros_positive = True  # as the bits of ours have it, for the comparison
            verdict = close(net(data), model(x))
        finally:
            Sign.zeros_positive = False
        return f"uncompiled {verdict}; compiled {close(run(data), net(data))}" if compiled else verdict

    return Prepared(check, lambda: run(data))


SUITE = Suite(
    cases,
    families={"fp32": (FP32, FP32_LAST), "bf16": (BF16,), "fp32, compiled": (COMPILED,)},
    goals=(
        goal(
            "inference",
            "packed BinaryNet on bytes: against real images",
            1.1,
            over(PACKED, ours=BYTES),
            start=BINARYNET,
        ),
    ),
    pictures=(Picture("inference", "Inference: time of others over the packed network's"),),
    summary=lambda record: True,
)
