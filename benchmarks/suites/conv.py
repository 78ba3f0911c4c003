"""Suite ``conv``: binary convolution, float in to float out, against fp32, bf16, int8 and Larq.

Ours binarizes and packs a real-valued input inside the measured time; the others get their input already in
the type and the memory format they like best.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bop2nd_fast as bf
from bop2nd_fast import reference

from .. import int8, larq_adapter, roofline
from ..gates import equal, rounded
from ..goals import Goal, faster, mean, over
from ..networks import CONVOLUTIONS, OTHERS, STAGES, ConvShape, networks_with
from ..registry import ALL_THREADS, BASELINE, OURS, VARIANT, Case, Contender, Picture, Prepared, Suite, gated

GOAL, LARGE_BATCH, INNER = "stage", "stage, batch 64", "inner loop"

PACKED, BOTH_THREADS, MODULE = "bop2nd", "bop2nd, all threads", "bf.nn.BinaryConv2d"
BITS, TRAINING = "bop2nd, bits in", "bop2nd, with the mask for training"
FP32 = ("F.conv2d fp32", "F.conv2d fp32, channels-last")
BF16 = ("F.conv2d bf16", "F.conv2d bf16, channels-last")
INT8 = ("int8 onednn::qconv2d", "int8 quantized::conv2d (x86)", "int8 quantized::conv2d (fbgemm)")
INT_MM = "int8 matrix product alone"
LARQ = "Larq Compute Engine"
CHECKED_IMAGES = 2
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
    return [
        Case(
            suite="conv",
            op="binary_conv2d",
            name=shape.name,
            shapes=shape.to_dict(),
            unit="GMAC/s",
            contenders=partial(_contenders, shape),
            networks=networks_with(shape),
            tags=tags,
            inference=True,
        )
        for shape, tags in chosen
    ]


class _Data:
    """Input, weights and the exact result of one case; each made when first asked for."""

    def __init__(self, shape: ConvShape) -> None:
        self.shape = shape
        generator = torch.Generator().manual_seed(1906)
        s = shape
        x = torch.empty(s.batch, s.channels, s.side, s.side).normal_(generator=generator)
        self.x = x.contiguous(memory_format=torch.channels_last)
        weight = torch.empty(s.outputs, s.channels // s.groups, s.kernel, s.kernel).normal_(
            generator=generator
        )
        self.weight = bf.pack(weight, dim=1)
        self.geometry = ([s.stride] * 2, [s.padding] * 2, [s.dilation] * 2, s.groups)

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
        return reference.binary_conv2d(x, self.weight.words, *self.geometry, 0, False)[0]

    def compare(self, output: Tensor) -> str:
        """Exact comparison of the last images; a channels-last or a plain output alike."""
        equal(output[-CHECKED_IMAGES:].float(), self.expected, "output")
        return f"equal to the reference (last {len(self.expected)} images)"


def _contenders(shape: ConvShape) -> list[Contender]:
    data = _Data(shape)
    traffic = 4 * (shape.input_elements + shape.output_elements + shape.weight_words)

    def entry(
        name: str, role: str, make: partial[Prepared], n_bytes: int | None = None, **more: Any
    ) -> Contender:
        one = role in (OURS, VARIANT) and "threads" not in more
        bound: dict[str, Any] = {"bounded_by": roofline.REGISTER, "needed": shape.needed_macs} if one else {}
        return Contender(name, role, make, bytes=n_bytes, operations=shape.macs, **bound, **more)

    result = [
        entry(PACKED, OURS, partial(_make_ours, data), traffic),
        entry(BOTH_THREADS, VARIANT, partial(_make_ours, data), traffic, threads=ALL_THREADS),
        entry(MODULE, VARIANT, partial(_make_module, data), traffic),
        entry(TRAINING, VARIANT, partial(_make_ours, data, ste_clip=True)),
        entry(BITS, VARIANT, partial(_make_bits, data)),
    ]
    for names, dtype in ((FP32, torch.float32), (BF16, torch.bfloat16)):
        for name, memory_format in zip(names, (torch.contiguous_format, torch.channels_last), strict=True):
            result.append(entry(name, BASELINE, partial(_make_float, data, dtype, memory_format)))
    result.append(entry(INT8[0], BASELINE, partial(_int8, int8.onednn_conv, data)))
    for name, engine in zip(INT8[1:], int8.CONV_ENGINES, strict=True):
        result.append(entry(name, BASELINE, partial(_int8, partial(int8.quantized_conv, engine), data)))
    if shape.groups == 1:
        result.append(entry(INT_MM, BASELINE, partial(_make_int_mm, data)))
    if shape.batch == 1 and shape.groups == 1 and shape.weight_words < LARQ_WORDS:
        result.append(entry(LARQ, BASELINE, partial(_make_larq, data), slow=True))
    return [*result, roofline.register_contender()]


def _make_ours(data: _Data, ste_clip: bool = False) -> Prepared:
    words, groups = data.weight.words, data.shape.groups
    blocked = torch.ops.bop2nd.prepack_weight(words, groups) if bf.backends.wants_blocked() else None

    op = torch.ops.bop2nd.binary_conv2d
    return gated(lambda: op(data.x, words, *data.geometry, 0, ste_clip, blocked=blocked)[0], data.compare)


def _make_module(data: _Data) -> Prepared:
    s = data.shape
    module = bf.nn.BinaryConv2d(
        s.channels,
        s.outputs,
        s.kernel,
        stride=s.stride,
        padding=s.padding,
        dilation=s.dilation,
        groups=s.groups,
    )
    module.weight.copy_(data.weight)
    return gated(lambda: module(data.x), data.compare)


def _make_bits(data: _Data) -> Prepared:
    words, groups = data.weight.words, data.shape.groups
    blocked = torch.ops.bop2nd.prepack_weight(words, groups) if bf.backends.wants_blocked() else None
    x = torch.ops.bop2nd.pack_bits_ste(data.x, 1, groups)[0]

    op, channels = torch.ops.bop2nd.binary_conv2d_packed, data.shape.channels
    run = lambda: op(x, words, channels, *data.geometry, 0, blocked=blocked)[0]  # noqa: E731
    return gated(run, lambda output: data.compare(output.permute(0, 3, 1, 2)))


def _make_float(data: _Data, dtype: torch.dtype, memory_format: torch.memory_format) -> Prepared:
    x = data.signs.to(dtype).contiguous(memory_format=memory_format)
    weight = data.dense.to(dtype).contiguous(memory_format=memory_format)

    def compare(output: Tensor) -> str:
        if dtype == torch.float32:
            return data.compare(output)
        return rounded(output[-CHECKED_IMAGES:], data.expected, dtype)

    return gated(lambda: F.conv2d(x, weight, None, *data.geometry), compare)


def _int8(build: Callable[..., Prepared], data: _Data) -> Prepared:
    full = F.conv2d(data.signs, data.dense, None, *data.geometry)
    return build(data.shape, data.signs, data.dense, full)


def _make_int_mm(data: _Data) -> Prepared:
    """On operands cut into columns beforehand: no convolution, im2col would come on top."""
    s = data.shape
    columns = F.unfold(data.signs[:1], s.kernel, s.dilation, s.padding, s.stride)[0].T.contiguous()
    a = columns if s.batch == 1 else columns.repeat(s.batch, 1)
    return int8.int_mm(a, data.dense.flatten(1).T.contiguous(), None)


def _make_larq(data: _Data) -> Prepared:
    """Its fast path pads with +1, so its result is compared with the specification's for that padding."""
    words = data.weight.words
    expected = reference.binary_conv2d(data.x, words, *data.geometry, 1, False)[0]
    return larq_adapter.convolution(data.shape, data.x, data.dense, expected)


def _is_stage(record: Mapping[str, Any]) -> bool:
    return bool({GOAL, LARGE_BATCH} & set(record["tags"]))


def _goal(what: str, aim: float, *theirs: str) -> Goal:
    name = f"3x3 convolution, 4 stages, batch 1, 1 thread: against {what}"
    return Goal(name, aim, mean("conv", over(*theirs), tag=GOAL))


SUITE = Suite(
    cases,
    families={"fp32": FP32, "bf16": BF16, "int8": INT8, "Larq": (LARQ,)},
    goals=(
        _goal("fp32", 20, *FP32),
        _goal("bf16", 9, *BF16),
        _goal("int8", 4.5, *INT8),
        _goal("Larq Compute Engine 0.16", 60, LARQ),
        Goal(
            "3x3 convolution, 4 stages, batch 1: 2 threads against 1",
            1.8,
            mean("conv", faster(BOTH_THREADS), tag=GOAL),
        ),
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
