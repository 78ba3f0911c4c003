"""Suite ``pack``: sign bits (and the estimator's mask) of activations in one pass, and back."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from bop2nd_fast import reference

from .. import roofline
from ..gates import equal
from ..registry import BASELINE, OURS, VARIANT, Case, Contender, GateError, Picture, Prepared, Suite, gated

PACK, PACK_LAST, PACK_BF16 = "bop2nd::pack_bits_ste", "channels-last input", "bf16 input"
SIGNS_ONLY, ONE_THREAD = "signs only", "1 thread"
EAGER, NUMPY, SIGN = "eager torch", "numpy.packbits (signs only)", "torch.sign (nothing packed)"
UNPACK = "bop2nd::unpack_bits"


def cases(quick: bool) -> list[Case]:
    shapes = [(2, 40, 5, 5)] if quick else [(64, 128, 28, 28), (50, 128, 30, 30), (1, 64, 56, 56)]
    return [
        Case(
            suite="pack",
            op=op,
            name=f"{word} {'x'.join(map(str, shape))}",
            shapes={"shape": list(shape)},
            unit="GB/s",
            contenders=partial(contenders, shape),
            threads=None,
            inference=True,
        )
        for shape in shapes
        for op, word, contenders in (
            ("pack_bits_ste", "pack", _pack_contenders),
            ("unpack_bits", "unpack", _unpack_contenders),
        )
    ]


def _input(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape).normal_(generator=torch.Generator().manual_seed(5))


def _pack_contenders(shape: tuple[int, ...]) -> list[Contender]:
    x = _input(shape)
    rows, n_words = math.prod(shape) // shape[1], -(-shape[1] // 32)
    out = 4 * rows * n_words

    def ste(t: Tensor) -> tuple[Tensor, Tensor]:
        signs, mask = torch.ops.bop2nd.pack_bits_ste(t, 1)
        return signs, mask

    def entry(
        name: str,
        role: str,
        t: Tensor,
        run: Callable[[Tensor], object],
        n_out: int,
        threads: int | None = None,
    ) -> Contender:
        make, bound = partial(_make_pack, t, run), roofline.TRAFFIC if role == OURS else None
        return Contender(
            name, role, make, t.nbytes + n_out, items=x.numel(), bounded_by=bound, threads=threads
        )

    last, half = x.contiguous(memory_format=torch.channels_last), x.bfloat16()
    return [
        entry(PACK, OURS, x, ste, 2 * out),
        entry(PACK_LAST, VARIANT, last, ste, 2 * out),
        entry(PACK_BF16, VARIANT, half, ste, 2 * out),
        entry(SIGNS_ONLY, VARIANT, x, lambda t: torch.ops.bop2nd.pack_bits(t, 1), out),
        entry(ONE_THREAD, VARIANT, x, ste, 2 * out, threads=1),
        entry(EAGER, BASELINE, x, lambda t: reference.pack_bits_ste(t, 1), 2 * out),
        entry(NUMPY, BASELINE, last, _numpy_pack, out, threads=1),
        Contender(SIGN, BASELINE, partial(_make_sign, x), bytes=2 * x.nbytes, items=x.numel()),
        roofline.traffic_contender(x.nbytes, 2 * out),
    ]


def _numpy_pack(x: Tensor) -> np.ndarray:
    return np.packbits(np.signbit(x.permute(0, 2, 3, 1).numpy()), axis=-1, bitorder="little")


def _make_pack(x: Tensor, run: Callable[[Tensor], object]) -> Prepared:
    def compare(got: object) -> str:
        want = reference.pack_bits_ste(x, 1)
        if isinstance(got, tuple):
            same = all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        elif isinstance(got, np.ndarray):
            as_bytes = want[0].numpy().view(np.uint8)[..., : got.shape[-1]]
            same = bool((as_bytes == got).all())
        else:
            assert isinstance(got, Tensor)
            same = torch.equal(got, want[0])
        if not same:
            raise GateError("bits differ from the reference")
        return "bits equal to the reference"

    return gated(lambda: run(x), compare)


def _make_sign(x: Tensor) -> Prepared:
    return gated(lambda: torch.sign(x), lambda signs: equal(signs < 0, x < 0, "torch.sign"))


def _unpack_contenders(shape: tuple[int, ...]) -> list[Contender]:
    words = reference.pack_bits(_input(shape), 1)
    n_bytes = words.nbytes + 4 * math.prod(shape)

    def entry(name: str, role: str, run: Callable[[], Tensor], threads: int | None = None) -> Contender:
        make, bound = partial(_make_unpack, words, shape[1], run), roofline.TRAFFIC if role == OURS else None
        items = math.prod(shape)
        return Contender(name, role, make, n_bytes, items=items, bounded_by=bound, threads=threads)

    def ours() -> Tensor:
        values: Tensor = torch.ops.bop2nd.unpack_bits(words, shape[1], 1)
        return values

    return [
        entry(UNPACK, OURS, ours),
        entry(ONE_THREAD, VARIANT, ours, threads=1),
        entry(EAGER, BASELINE, lambda: reference.unpack_bits(words, shape[1], 1)),
        roofline.traffic_contender(words.nbytes, 4 * math.prod(shape)),
    ]


def _make_unpack(words: Tensor, length: int, run: Callable[[], Tensor]) -> Prepared:
    return gated(run, lambda got: equal(got, reference.unpack_bits(words, length, 1), "values"))


SUITE = Suite(
    cases,
    families={"eager torch": (EAGER,), "numpy.packbits": (NUMPY,), "torch.sign": (SIGN,)},
    pictures=(Picture("pack", "Packing: time of others over bop2nd's"),),
)
