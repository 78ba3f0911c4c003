"""Suite ``pack``: sign bits (and the estimator's mask) of activations in one pass, and back."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bop2nd_fast import reference

from .. import roofline
from ..gates import equal, gated
from ..registry import BASELINE, OURS, VARIANT, Case, Contender, GateError, Picture, Suite

PACK, PACK_LAST, PACK_BF16 = "bop2nd::pack_bits_ste", "channels-last input", "bf16 input"
SIGNS_ONLY, ONE_THREAD = "signs only", "1 thread"
EAGER, NUMPY, SIGN = "eager torch", "numpy.packbits (signs only)", "torch.sign (nothing packed)"
UNPACK = "bop2nd::unpack_bits"


def cases(quick: bool) -> list[Case]:
    shapes = [(2, 40, 5, 5)] if quick else [(64, 128, 28, 28), (50, 128, 30, 30), (1, 64, 56, 56)]
    case = partial(Case, "pack", unit="GB/s", threads=None, inference=True)
    operators = (("pack_bits_ste", "pack", _pack), ("unpack_bits", "unpack", _unpack))
    return [
        case(op, f"{word} {'x'.join(map(str, s))}", {"shape": list(s)}, contenders=partial(contenders, s))
        for s in shapes
        for op, word, contenders in operators
    ]


def _input(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape).normal_(generator=torch.Generator().manual_seed(5))


def _pack(shape: tuple[int, ...]) -> list[Contender]:
    x = _input(shape)
    last, half = x.contiguous(memory_format=torch.channels_last), x.bfloat16()
    words = 4 * (x.numel() // shape[1]) * -(-shape[1] // 32)  # bytes of the signs, and of the mask
    ste, signs = torch.ops.bop2nd.pack_bits_ste, torch.ops.bop2nd.pack_bits

    def entry(name: str, role: str, t: Tensor, run: Callable[[], Any], n_out: int, **more: Any) -> Contender:
        make = partial(gated, run, partial(_same_bits, t))
        return Contender(name, role, make, t.nbytes + n_out, items=x.numel(), **more)

    sign = partial(gated, lambda: torch.sign(x), lambda found: equal(found < 0, x < 0, "torch.sign"))
    return [
        entry(PACK, OURS, x, lambda: ste(x, 1), 2 * words, bounded_by=roofline.TRAFFIC),
        entry(PACK_LAST, VARIANT, last, lambda: ste(last, 1), 2 * words),
        entry(PACK_BF16, VARIANT, half, lambda: ste(half, 1), 2 * words),
        entry(SIGNS_ONLY, VARIANT, x, lambda: signs(x, 1), words),
        entry(ONE_THREAD, VARIANT, x, lambda: ste(x, 1), 2 * words, threads=1),
        entry(EAGER, BASELINE, x, lambda: reference.pack_bits_ste(x, 1), 2 * words),
        entry(NUMPY, BASELINE, last, lambda: _numpy_pack(last), words, threads=1),
        Contender(SIGN, BASELINE, sign, 2 * x.nbytes, items=x.numel()),
        roofline.traffic_contender(x.nbytes, 2 * words),
    ]


def _numpy_pack(x: Tensor) -> np.ndarray:
    return np.packbits(np.signbit(x.permute(0, 2, 3, 1).numpy()), axis=-1, bitorder="little")


def _same_bits(x: Tensor, got: Any) -> str:
    """Signs and mask, signs alone, or bytes of signs, against the reference's."""
    want = reference.pack_bits_ste(x, 1)
    if isinstance(got, tuple):
        same = all(map(torch.equal, got, want))
    elif isinstance(got, np.ndarray):
        same = bool((want[0].numpy().view(np.uint8)[..., : got.shape[-1]] == got).all())
    else:
        same = torch.equal(got, want[0])
    if not same:
        raise GateError("bits differ from the reference")
    return "bits equal to the reference"


def _unpack(shape: tuple[int, ...]) -> list[Contender]:
    words, length, items = reference.pack_bits(_input(shape), 1), shape[1], math.prod(shape)
    ours = lambda: torch.ops.bop2nd.unpack_bits(words, length, 1)  # noqa: E731
    eager = lambda: reference.unpack_bits(words, length, 1)  # noqa: E731
    compare = lambda got: equal(got, eager(), "values")  # noqa: E731
    entry = partial(Contender, bytes=words.nbytes + 4 * items, items=items)
    return [
        entry(UNPACK, OURS, partial(gated, ours, compare), bounded_by=roofline.TRAFFIC),
        entry(ONE_THREAD, VARIANT, partial(gated, ours, compare), threads=1),
        entry(EAGER, BASELINE, partial(gated, eager, compare)),
        roofline.traffic_contender(words.nbytes, 4 * items),
    ]


SUITE = Suite(
    cases,
    families={"eager torch": (EAGER,), "numpy.packbits": (NUMPY,), "torch.sign": (SIGN,)},
    pictures=(Picture("pack", "Packing: time of others over bop2nd's"),),
)
