"""Suite ``backward``: both gradients of a binary convolution, from what its forward pass keeps.

The baseline is torch's own backward convolution of signs that lie there as floats, as they do in a network
with latent weights: unpacking and the straight-through estimator's mask come for free.
"""

from __future__ import annotations

from functools import cached_property, partial

import torch
from torch import Tensor

from bop2nd_fast import reference
from bop2nd_fast.ops.binary_conv2d import _backward as unpacked_tiles

from ..networks import BINARYNET, CONVOLUTIONS, STAGES, ConvShape, networks_with
from ..registry import BASELINE, OURS, VARIANT, Case, Contender, GateError, Picture, Prepared, Suite, gated

PACKED, ONE_THREAD = "bop2nd", "bop2nd, 1 thread"
INPUT, WEIGHT, BF16 = "bop2nd, of the input alone", "bop2nd, of the weight alone", "bop2nd, bf16 gradient"
TILES = "torch on signs unpacked tile by tile"
TORCH = ("torch, signs as fp32", "torch, signs as fp32, channels-last")
BATCH = 50
WORST = 1e-5  # of the largest gradient


def cases(quick: bool) -> list[Case]:
    shapes = [ConvShape(2, 33, 6, 20, 3, padding=1)] if quick else []
    if not quick:
        shapes += [s.with_batch(BATCH) for s in CONVOLUTIONS[BINARYNET]]
        shapes += [STAGES[0].with_batch(16), ConvShape(16, 64, 56, 128, 3, stride=2, padding=1)]
    return [
        Case(
            suite="backward",
            op="binary_conv2d_backward",
            name=shape.name,
            shapes=shape.to_dict(),
            unit="GMAC/s",
            contenders=partial(_contenders, shape),
            threads=None,
            networks=networks_with(shape),
        )
        for shape in shapes
    ]


class _Data:
    """What a backward pass starts from, and its gradients in float64; made when first asked for."""

    def __init__(self, shape: ConvShape) -> None:
        s, generator = shape, torch.Generator().manual_seed(2005)

        def normal(*size: int) -> Tensor:
            return torch.empty(size).normal_(generator=generator)

        self.shape = shape
        self.signs, self.mask = reference.pack_bits_ste(normal(s.batch, s.channels, s.side, s.side), 1)
        self.words = reference.pack_bits(normal(s.outputs, s.channels, s.kernel, s.kernel), 1)
        self.geometry = ([s.stride] * 2, [s.padding] * 2, [s.dilation] * 2)
        grad = normal(s.batch, s.outputs, s.out_side, s.out_side)
        self.grad = grad.contiguous(memory_format=torch.channels_last)
        self.x = reference.unpack_bits(self.signs, s.channels, 1)
        self.weight = reference.unpack_bits(self.words, s.channels, 1)
        self.inside = reference.unpack_bits(self.mask, s.channels, 1) < 0  # a set bit unpacks to -1

    def of_floats(self, grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        stride, padding, dilation = self.geometry
        grads = torch.ops.aten.convolution_backward(
            grad, x, weight, None, stride, padding, dilation, False, [0, 0], 1, [True, True, False]
        )
        return grads[0], grads[1]

    @cached_property
    def expected(self) -> tuple[Tensor, Tensor]:
        grad_x, grad_w = self.of_floats(self.grad.double(), self.x.double(), self.weight.double())
        return grad_x, grad_w

    def compare(self, got: tuple[Tensor, Tensor], masked: bool, worst: float = WORST) -> str:
        """Relative to the largest gradient; gradients that were not asked for are empty."""
        errors = []
        for i, (ours, want) in enumerate(zip(got, self.expected, strict=True)):
            wanted = want * self.inside if masked and i == 0 else want
            if ours.numel():
                errors.append(float((ours.double() - wanted).abs().max() / wanted.abs().max()))
        if max(errors) > worst:
            raise GateError(f"off by {max(errors):.2g} of the largest gradient")
        return f"within {max(errors):.1g} of the largest gradient in float64"


def _contenders(shape: ConvShape) -> list[Contender]:
    data = _Data(shape)

    def entry(
        name: str, role: str, make: partial[Prepared], products: int = 2, threads: int | None = None
    ) -> Contender:
        return Contender(name, role, make, operations=products * shape.macs, threads=threads)

    ours = partial(_make_packed, data, torch.ops.bop2nd.binary_conv2d_backward)
    return [
        entry(PACKED, OURS, partial(ours, data.grad)),
        entry(ONE_THREAD, VARIANT, partial(ours, data.grad), threads=1),
        entry(INPUT, VARIANT, partial(ours, data.grad, (True, False)), 1),
        entry(WEIGHT, VARIANT, partial(ours, data.grad, (False, True)), 1),
        entry(BF16, VARIANT, partial(ours, data.grad.bfloat16(), worst=2.0**-7)),
        entry(TILES, BASELINE, partial(_make_packed, data, unpacked_tiles, data.grad)),
        *(
            entry(name, BASELINE, partial(_make_floats, data, memory_format))
            for name, memory_format in zip(TORCH, (torch.contiguous_format, torch.channels_last), strict=True)
        ),
    ]


def _make_packed(
    data: _Data, op: object, grad: Tensor, needs: tuple[bool, bool] = (True, True), worst: float = WORST
) -> Prepared:
    def run() -> tuple[Tensor, Tensor]:
        gradients: tuple[Tensor, Tensor] = op(  # type: ignore[operator]
            grad, data.signs, data.mask, data.words, data.shape.channels, *data.geometry, 1, 0, *needs
        )
        return gradients

    return gated(run, lambda got: data.compare(got, masked=True, worst=worst))


def _make_floats(data: _Data, memory_format: torch.memory_format) -> Prepared:
    operands = [t.contiguous(memory_format=memory_format) for t in (data.grad, data.x, data.weight)]

    return gated(lambda: data.of_floats(*operands), lambda got: data.compare(got, masked=False))


SUITE = Suite(
    cases,
    families={"torch, signs as fp32": TORCH, "torch, unpacked tiles": (TILES,)},
    pictures=(Picture("backward", "Both gradients of a convolution: time of others over bop2nd's"),),
)
