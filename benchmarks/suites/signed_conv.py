"""Suite ``signed_conv``: the first layer of BinaryNet on real images and on bytes, against torch's fp32."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bop2nd_fast import reference

from .. import roofline
from ..gates import equal
from ..goals import Goal, mean, over
from ..networks import BINARYNET
from ..registry import (
    ALL_THREADS,
    BASELINE,
    OURS,
    VARIANT,
    Case,
    Contender,
    Prepared,
    Suite,
    gated,
)  # fmt: skip

GOAL = "batch 64"
REAL, BYTES, BITS = "bop2nd, fp32 in", "bop2nd, uint8 in", "bop2nd, uint8 in, bits out"
BOTH_THREADS = "bop2nd, fp32 in, all threads"
FP32, FP32_LAST = "F.conv2d fp32", "F.conv2d fp32, channels-last"
GEOMETRY = ([1, 1], [1, 1], [1, 1], 1)


def cases(quick: bool) -> list[Case]:
    rows = [(2, 16, 8)] if quick else [(64, 128, 32), (1, 128, 32)]
    return [
        Case(
            suite="signed_conv",
            op="signed_conv2d",
            name=f"3-{outputs} 3x3, {size}x{size}, batch {batch}",
            shapes={"batch": batch, "outputs": outputs, "size": size},
            unit="GMAC/s",
            contenders=partial(_contenders, batch, outputs, size),
            networks=() if quick else (BINARYNET,),
            tags=(GOAL,) if batch == 64 else (),
            inference=True,
        )
        for batch, outputs, size in rows
    ]


class _Data:
    def __init__(self, batch: int, outputs: int, size: int) -> None:
        generator = torch.Generator().manual_seed(19)
        self.images = torch.randint(0, 256, (batch, 3, size, size), generator=generator, dtype=torch.uint8)
        self.real = 2 * self.images.float() - 255
        weight = torch.empty(outputs, 3, 3, 3).normal_(generator=generator)
        self.words = reference.pack_bits(weight, 1)
        self.dense = reference.unpack_bits(self.words, 3, dim=1)
        self.threshold = torch.randint(-99, 99, (outputs,), generator=generator, dtype=torch.int32)
        self.expected = F.conv2d(self.real.double(), self.dense.double(), None, 1, 1).float()

    def compare(self, output: Tensor) -> str:
        return equal(output, self.expected, "sums")

    def compare_bits(self, words: Tensor) -> str:
        below = self.expected < self.threshold[:, None, None]
        return equal(words, reference.pack_bits(0.5 - below.float(), 1), "words of signs")


def _contenders(batch: int, outputs: int, size: int) -> list[Contender]:
    data = _Data(batch, outputs, size)
    pixels = batch * size * size
    macs, values = pixels * outputs * 27, 4 * pixels * outputs

    def entry(name: str, role: str, make: Any, n_bytes: int, threads: int | None = None) -> Contender:
        return Contender(name, role, make, bytes=n_bytes, operations=macs, threads=threads)

    return [
        entry(REAL, OURS, partial(_make_ours, data, data.real), 12 * pixels + values),
        entry(BYTES, VARIANT, partial(_make_ours, data, data.images), 3 * pixels + values),
        entry(BITS, VARIANT, partial(_make_bits, data), 3 * pixels + values // 32),
        entry(BOTH_THREADS, VARIANT, partial(_make_ours, data, data.real), 12 * pixels + values, ALL_THREADS),
        entry(FP32, BASELINE, partial(_make_float, data, False), 12 * pixels + values),
        entry(FP32_LAST, BASELINE, partial(_make_float, data, True), 12 * pixels + values),
        roofline.traffic_contender(12 * pixels, values, threads=1),
    ]


def _numbers(x: Tensor) -> dict[str, int]:
    return {} if x.is_floating_point() else {"multiplier": 2, "zero_point": 255}


def _make_ours(data: _Data, x: Tensor) -> Prepared:
    def run() -> Tensor:
        values: Tensor = torch.ops.bop2nd.signed_conv2d(x, data.words, *GEOMETRY, **_numbers(x))[0]
        return values.permute(0, 3, 1, 2)

    return gated(run, data.compare)


def _make_bits(data: _Data) -> Prepared:
    asked = {"values": False, "signs": True, "threshold": data.threshold}

    def run() -> Tensor:
        images: Any = (data.images, data.words, *GEOMETRY)
        words: Tensor = torch.ops.bop2nd.signed_conv2d(*images, **_numbers(data.images), **asked)[1]
        return words

    return gated(run, data.compare_bits)


def _make_float(data: _Data, last: bool) -> Prepared:
    layout = torch.channels_last if last else torch.contiguous_format
    x, weight = data.real.contiguous(memory_format=layout), data.dense.contiguous(memory_format=layout)

    return gated(lambda: F.conv2d(x, weight, None, 1, 1), data.compare)


SUITE = Suite(
    cases,
    goals=(
        Goal(
            "first layer of BinaryNet, batch 64, real images: against fp32",
            1.5,
            mean("signed_conv", over(FP32), tag=GOAL),
        ),
    ),
)
