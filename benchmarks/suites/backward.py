"""Suite ``backward``: both gradients of a binary convolution, from what its forward pass keeps.

The baseline is torch's own backward convolution of signs that lie there as floats, as they do in a network
with latent weights: unpacking and the straight-through estimator's mask come for free.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from bop2nd_fast import reference
from bop2nd_fast.ops.binary_conv2d import _backward as unpacked_tiles

from ..gates import gated
from ..networks import BINARYNET, CONVOLUTIONS, STAGES, ConvShape, networks_with
from ..registry import BASELINE, OURS, VARIANT, Case, Contender, GateError, Picture, Prepared, Suite

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
    case = partial(Case, "backward", "binary_conv2d_backward", unit="GMAC/s", threads=None)
    return [
        case(s.name, asdict(s), contenders=partial(_contenders, s), networks=networks_with(s)) for s in shapes
    ]


class _Data:
    """What a backward pass starts from, and its gradients in float64; made when first asked for."""

    def __init__(self, shape: ConvShape) -> None:
        generator = torch.Generator().manual_seed(2005)
        normal = lambda *size: torch.empty(size).normal_(generator=generator)  # noqa: E731
        self.shape, channels, side = shape, shape.channels, shape.geometry.out[0]
        self._how = (*shape.arguments[:3], False, [0, 0], 1, [True, True, False])
        self.signs, self.mask = reference.pack_bits_ste(normal(*shape.input_size), 1)
        self.words = reference.pack_bits(normal(*shape.weight_size), 1)
        grad = normal(shape.batch, shape.outputs, side, side)
        self.grad = grad.contiguous(memory_format=torch.channels_last)
        self.x, self.weight = (reference.unpack_bits(t, channels, 1) for t in (self.signs, self.words))
        self.inside = reference.unpack_bits(self.mask, channels, 1) < 0  # a set bit unpacks to -1

    def of_floats(self, grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        grads = torch.ops.aten.convolution_backward(grad, x, weight, None, *self._how)
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

    def packed(
        self, op: Any, grad: Tensor, needs: tuple[bool, bool] = (True, True), worst: float = WORST
    ) -> Prepared:
        how = (self.shape.channels, *self.shape.arguments, *needs)
        run = lambda: op(grad, self.signs, self.mask, self.words, *how)  # noqa: E731
        return gated(run, partial(self.compare, masked=True, worst=worst))

    def floats(self, layout: torch.memory_format) -> Prepared:
        operands = [t.contiguous(memory_format=layout) for t in (self.grad, self.x, self.weight)]
        return gated(lambda: self.of_floats(*operands), partial(self.compare, masked=False))


def _contenders(shape: ConvShape) -> list[Contender]:
    data = _Data(shape)

    ours = partial(data.packed, torch.ops.bop2nd.binary_conv2d_backward)
    both = partial(Contender, operations=2 * shape.macs)
    one = partial(Contender, operations=shape.macs)
    layouts = zip(TORCH, (torch.contiguous_format, torch.channels_last), strict=True)
    return [
        both(PACKED, OURS, partial(ours, data.grad)),
        both(ONE_THREAD, VARIANT, partial(ours, data.grad), threads=1),
        one(INPUT, VARIANT, partial(ours, data.grad, (True, False))),
        one(WEIGHT, VARIANT, partial(ours, data.grad, (False, True))),
        both(BF16, VARIANT, partial(ours, data.grad.bfloat16(), worst=2.0**-7)),
        both(TILES, BASELINE, partial(data.packed, unpacked_tiles, data.grad)),
        *(both(name, BASELINE, partial(data.floats, layout)) for name, layout in layouts),
    ]


SUITE = Suite(
    cases,
    families={"torch, signs as fp32": TORCH, "torch, unpacked tiles": (TILES,)},
    pictures=(Picture("backward", "Both gradients of a convolution: time of others over bop2nd's"),),
)
