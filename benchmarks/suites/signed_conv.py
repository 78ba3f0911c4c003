"""Suite ``signed_conv``: the first layer of BinaryNet on real images and on bytes, against torch's fp32."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bop2nd_fast import reference

from .. import roofline
from ..gates import equal, gated
from ..goals import goal, over
from ..networks import BINARYNET
from ..registry import ALL_THREADS, BASELINE, OURS, VARIANT, Case, Contender, Prepared, Suite

GOAL, FASTER = "batch 64", "first layer of BinaryNet, batch 64, real images: against fp32"
REAL, BYTES, BITS = "bop2nd, fp32 in", "bop2nd, uint8 in", "bop2nd, uint8 in, bits out"
BOTH_THREADS = "bop2nd, fp32 in, all threads"
FP32, FP32_LAST = "F.conv2d fp32", "F.conv2d fp32, channels-last"
GEOMETRY = ([1, 1], [1, 1], [1, 1], 1)
BYTE = {"multiplier": 2, "zero_point": 255}  # how a byte of an image is read: 2 x - 255


def cases(quick: bool) -> list[Case]:
    rows = [(2, 16, 8)] if quick else [(64, 128, 32), (1, 128, 32)]
    case = partial(Case, "signed_conv", "signed_conv2d", unit="GMAC/s", inference=True)
    return [
        case(
            f"3-{outputs} 3x3, {size}x{size}, batch {batch}",
            {"batch": batch, "outputs": outputs, "size": size},
            contenders=partial(_contenders, batch, outputs, size),
            networks=() if quick else (BINARYNET,),
            tags=(GOAL,) if batch == 64 else (),
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
        self.compare = partial(equal, want=self.expected, what="sums")

    def compare_bits(self, words: Tensor) -> str:
        below = self.expected < self.threshold[:, None, None]
        return equal(words, reference.pack_bits(0.5 - below.float(), 1), "words of signs")

    def ours(self, x: Tensor) -> Prepared:
        op, numbers = torch.ops.bop2nd.signed_conv2d, {} if x.is_floating_point() else BYTE
        run = lambda: op(x, self.words, *GEOMETRY, **numbers)[0].permute(0, 3, 1, 2)  # noqa: E731
        return gated(run, self.compare)

    def bits(self) -> Prepared:
        asked = {"values": False, "signs": True, "threshold": self.threshold, **BYTE}
        op = torch.ops.bop2nd.signed_conv2d
        return gated(lambda: op(self.images, self.words, *GEOMETRY, **asked)[1], self.compare_bits)

    def floats(self, layout: torch.memory_format) -> Prepared:
        x, weight = (t.contiguous(memory_format=layout) for t in (self.real, self.dense))
        return gated(lambda: F.conv2d(x, weight, None, 1, 1), self.compare)


def _contenders(batch: int, outputs: int, size: int) -> list[Contender]:
    data, pixels = _Data(batch, outputs, size), batch * size * size
    values = 4 * pixels * outputs
    real, whole = 12 * pixels + values, 3 * pixels + values  # bytes of fp32 or uint8 in, fp32 out
    entry, ours = partial(Contender, operations=pixels * outputs * 27), partial(data.ours, data.real)
    return [
        entry(REAL, OURS, ours, real),
        entry(BYTES, VARIANT, partial(data.ours, data.images), whole),
        entry(BITS, VARIANT, data.bits, 3 * pixels + values // 32),
        entry(BOTH_THREADS, VARIANT, ours, real, threads=ALL_THREADS),
        entry(FP32, BASELINE, partial(data.floats, torch.contiguous_format), real),
        entry(FP32_LAST, BASELINE, partial(data.floats, torch.channels_last), real),
        roofline.traffic_contender(12 * pixels, values, threads=1),
    ]


SUITE = Suite(
    cases,
    goals=(goal("signed_conv", FASTER, 1.5, over(FP32), tag=GOAL),),
)
