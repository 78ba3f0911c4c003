"""Suite ``conv``: binary convolution, float in to float out, against fp32, bf16, int8 and Larq.

Ours binarizes and packs a real-valued input inside the measured time; the others get their input already in
the type and the memory format they like best.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bop2nd_fast as bf
from bop2nd_fast import reference

from .. import int8, larq_adapter, roofline
from ..gates import equal, gated, rounded
from ..goals import Goal, faster, goal, over
from ..networks import CONVOLUTIONS, OTHERS, STAGES, ConvShape, networks_with
from ..registry import ALL_THREADS, BASELINE, OURS, VARIANT, Case, Contender, Picture, Prepared, Suite

GOAL, LARGE_BATCH, INNER = "stage", "stage, batch 64", "inner loop"
STAGE_GOALS = "3x3 convolution, 4 stages, batch 1"

PACKED, BOTH_THREADS, MODULE = "bop2nd", "bop2nd, all threads", "bf.nn.BinaryConv2d"
BITS, TRAINING = "bop2nd, bits in", "bop2nd, with the mask for training"
FP32 = ("F.conv2d fp32", "F.conv2d fp32, channels-last")
BF16 = ("F.conv2d bf16", "F.conv2d bf16, channels-last")
INT8 = ("int8 onednn::qconv2d", "int8 quantized::conv2d (x86)", "int8 quantized::conv2d (fbgemm)")
INT_MM = "int8 matrix product alone"
LARQ = "Larq Compute Engine"
CHECKED_IMAGES = 2
_OPS = torch.ops.bop2nd
LARQ_WORDS = 1 << 17  # its converter takes most of a minute for the largest layers of XNOR-Net


def cases(quick: bool) -> list[Case]:
    chosen: list[tuple[ConvShape, tuple[str, ...]]]
    if quick:
        chosen = [
            (ConvShape(1, 64, 8, 64, 3, padding=1), (GOAL,)),
            (ConvShape(3, 33, 7, 40, 3, stride=2, padding=1), ()),
            (ConvShape(1, 64, 6, 32, 3, padding=2, dilation=2, groups=2), ()),
        ]
    else:
        chosen = [(s, (GOAL,)) for s in STAGES]
        chosen += [(s.with_batch(64), (LARGE_BATCH,)) for s in STAGES]
        chosen.append((ConvShape(1, 512, 14, 512, 3, padding=1), (INNER,)))
        rest = [s for shapes in CONVOLUTIONS.values() for s in shapes if s not in STAGES]
        chosen += [(s, ()) for s in [*rest, *OTHERS]]
    case = partial(Case, "conv", "binary_conv2d", unit="GMAC/s", inference=True)
    return [
        case(s.name, asdict(s), contenders=partial(_contenders, s), networks=networks_with(s), tags=tags)
        for s, tags in chosen
    ]


class Operands:
    """Input, weight and the exact result of a convolution, each made when first asked for; its contenders."""

    def __init__(self, shape: ConvShape) -> None:
        self.shape = shape
        generator = torch.Generator().manual_seed(1906)
        x = torch.empty(shape.input_size).normal_(generator=generator)
        self.x = x.contiguous(memory_format=torch.channels_last)
        self.weight = bf.pack(torch.empty(shape.weight_size).normal_(generator=generator), dim=1)

    @cached_property
    def blocked(self) -> Tensor | None:
        """The weight's words as the CPU kernels like them best."""
        words, groups = self.weight.words, self.shape.groups
        return torch.ops.bop2nd.prepack_weight(words, groups) if bf.backends.wants_blocked() else None

    @cached_property
    def bits(self) -> Tensor:
        """The input's sign words."""
        return torch.ops.bop2nd.pack_bits_ste(self.x, 1, self.shape.groups)[0]

    @cached_property
    def signs(self) -> Tensor:
        return torch.where(self.x < 0, -1.0, 1.0)

    @cached_property
    def dense(self) -> Tensor:
        return reference.unpack_bits(self.weight.words, self.weight.shape[1], dim=1)

    @cached_property
    def expected(self) -> Tensor:
        """The specification's result for the images that are compared."""
        x = self.x[-CHECKED_IMAGES:]
        return reference.binary_conv2d(x, self.weight.words, *self.shape.arguments, False)[0]

    def compare(self, output: Tensor) -> str:
        """Exact comparison of the last images; a channels-last or a plain output alike."""
        equal(output[-CHECKED_IMAGES:].float(), self.expected, "output")
        return f"equal to the reference (last {len(self.expected)} images)"

    def ours(self, ste_clip: bool = False) -> Prepared:
        op, words, how, blocked = _OPS.binary_conv2d, self.weight.words, self.shape.arguments, self.blocked
        return gated(lambda: op(self.x, words, *how, ste_clip, blocked=blocked)[0], self.compare)

    def module(self) -> Prepared:
        s = self.shape
        module = bf.nn.BinaryConv2d(s.channels, s.outputs, s.kernel, *s.arguments[:4])
        module.weight.copy_(self.weight)
        return gated(lambda: module(self.x), self.compare)

    def from_bits(self) -> Prepared:
        op, words, how, blocked = (
            _OPS.binary_conv2d_packed,
            self.weight.words,
            self.shape.arguments,
            self.blocked,
        )
        x, channels = self.bits, self.shape.channels
        run = lambda: op(x, words, channels, *how, blocked=blocked)[0]  # noqa: E731
        return gated(run, lambda output: self.compare(output.permute(0, 3, 1, 2)))

    def floats(self, dtype: torch.dtype, layout: torch.memory_format) -> Prepared:
        x, weight = (t.to(dtype).contiguous(memory_format=layout) for t in (self.signs, self.dense))
        how = self.shape.arguments[:4]

        def compare(output: Tensor) -> str:
            if dtype == torch.float32:
                return self.compare(output)
            return rounded(output[-CHECKED_IMAGES:], self.expected, dtype)

        return gated(lambda: F.conv2d(x, weight, None, *how), compare)

    def int8(self, build: Callable[..., Prepared]) -> Prepared:
        full = F.conv2d(self.signs, self.dense, None, *self.shape.arguments[:4])
        return build(self.shape, self.signs, self.dense, full)

    def int_mm(self) -> Prepared:
        """On operands cut into columns beforehand: no convolution, im2col would come on top."""
        s = self.shape
        columns = F.unfold(self.signs[:1], s.kernel, s.dilation, s.padding, s.stride)[0].T.contiguous()
        return int8.int_mm(columns.repeat(s.batch, 1), self.dense.flatten(1).T.contiguous(), None)

    def larq(self) -> Prepared:
        """Its fast path pads with +1, so its result is compared with the specification's for that padding."""
        how = (*self.shape.arguments[:4], 1)
        expected = reference.binary_conv2d(self.x, self.weight.words, *how, False)[0]
        return larq_adapter.convolution(self.shape, self.x, self.dense, expected)


def _contenders(shape: ConvShape) -> list[Contender]:
    it, macs = Operands(shape), shape.macs
    ours = partial(Contender, operations=macs, bounded_by=roofline.REGISTER, needed=shape.needed_macs)
    theirs = partial(Contender, role=BASELINE, operations=macs)
    result = [
        ours(PACKED, OURS, it.ours, shape.traffic),
        Contender(BOTH_THREADS, VARIANT, it.ours, shape.traffic, macs, threads=ALL_THREADS),
        ours(MODULE, VARIANT, it.module, shape.traffic),
        ours(TRAINING, VARIANT, partial(it.ours, ste_clip=True)),
        ours(BITS, VARIANT, it.from_bits),
    ]
    for names, dtype in ((FP32, torch.float32), (BF16, torch.bfloat16)):
        for name, layout in zip(names, (torch.contiguous_format, torch.channels_last), strict=True):
            result.append(theirs(name, make=partial(it.floats, dtype, layout)))
    for name, build in zip(INT8, int8.CONVOLUTIONS, strict=True):
        result.append(theirs(name, make=partial(it.int8, build)))
    if shape.groups == 1:
        result.append(theirs(INT_MM, make=it.int_mm))
    if shape.batch == 1 and shape.groups == 1 and shape.weight_words < LARQ_WORDS:
        result.append(theirs(LARQ, make=it.larq, slow=True))
    return [*result, roofline.register_contender()]


def _is_stage(record: Mapping[str, Any]) -> bool:
    return bool({GOAL, LARGE_BATCH} & set(record["tags"]))


def _goal(what: str, aim: float, *theirs: str) -> Goal:
    name = f"{STAGE_GOALS}, 1 thread: against {what}"
    return goal("conv", name, aim, over(*theirs), tag=GOAL)


SUITE = Suite(
    cases,
    families={"fp32": FP32, "bf16": BF16, "int8": INT8, "Larq": (LARQ,)},
    goals=(
        _goal("fp32", 20, *FP32),
        _goal("bf16", 9, *BF16),
        _goal("int8", 4.5, *INT8),
        _goal("Larq Compute Engine 0.16", 60, LARQ),
        goal("conv", f"{STAGE_GOALS}: 2 threads against 1", 1.8, faster(BOTH_THREADS), tag=GOAL),
    ),
    pictures=(
        Picture("conv", "3x3 convolutions of a ResNet-18's stages: time of others over bop2nd's", _is_stage),
        Picture(
            "conv_networks",
            "Convolutions of BinaryNet, XNOR-Net, Bi-Real-Net and others",
            lambda record: not _is_stage(record) and INNER not in record["tags"],
        ),
    ),
    summary=lambda record: GOAL in record["tags"],
)
