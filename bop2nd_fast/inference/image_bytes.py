"""Images of bytes: a normalisation as integers, ``(multiplier * byte - zero_point) * scale``.

Then the first layer's sums are ``scale`` times sums of integers, which are exact, and everything behind them
up to the next signs is a function of an integer, as between two layers of signs (``fold.py``). That takes the
same normalisation for all channels (else a sum has several scales), affine in the byte, and an exact zero:
padding is zero behind the normalisation. ``x / 127.5 - 1`` is ``(2 byte - 255) / 255``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from ..kernels.signed_operands import MULTIPLIER_LIMIT
from .examples import ConversionError
from .graph import Step, references

# Operators that give the numbers they get: of bytes as well.
LAYOUTS = frozenset(
    f"aten.{name}"
    for name in (
        "contiguous.default",
        "flatten.using_ints",
        "permute.default",
        "reshape.default",
        "view.default",
    )
)
TOLERANCE = 2.0  # units in the last place of the largest value: a division and a subtraction in fp32


def _from_minus_one_to_one(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


@dataclass(frozen=True)
class Normalisation:
    """What a byte stands for, and the function that says so."""

    function: Callable[[Tensor], Tensor]
    multiplier: int
    zero_point: int
    scale: float

    @classmethod
    def of(cls, asked: Any, examples: Sequence[Tensor]) -> Normalisation:
        """From ``convert``'s argument and the example.

        Raises:
            ConversionError: no single batch of uint8 images; a normalisation that cannot be folded, and why.
        """
        if len(examples) != 1 or examples[0].dtype != torch.uint8 or examples[0].dim() != 4:
            got = ", ".join(f"{t.dtype} {list(t.shape)}" for t in examples)
            raise ConversionError(f"image_bytes: the example must be one uint8 [N, C, H, W], got {got}")
        function = _from_minus_one_to_one if asked is True else asked
        channels = examples[0].shape[1]
        bytes = torch.arange(256, dtype=torch.uint8, device=examples[0].device)[:, None, None, None]
        values = function(bytes.expand(-1, channels, 1, 1).contiguous())
        if values.shape != (256, channels, 1, 1) or values.dtype != torch.float32:
            raise ConversionError("image_bytes: a normalisation gives float32 images of its input's size")
        table = values[:, :, 0, 0].double().cpu()
        if not bool((table == table[:, :1]).all()):
            raise ConversionError(
                "image_bytes: the channels are normalised differently, so that a sum over them is no integer "
                f"times one scale (byte 255 becomes {table[255].tolist()})"
            )
        return cls(function, *_integers(table[:, 0]))

    @property
    def attributes(self) -> dict[str, Any]:
        return {"input": "uint8", "multiplier": self.multiplier, "zero_point": self.zero_point}

    @property
    def largest(self) -> int:
        """The largest magnitude of ``multiplier * byte - zero_point``."""
        return max(self.zero_point, 255 * self.multiplier - self.zero_point)

    def real(self, sums: Tensor) -> Tensor:
        """What sums of integers stand for, in their dtype."""
        return (sums.double() * self.scale).to(sums.dtype)

    def images(self, bytes: Tensor) -> Tensor:
        return self.function(bytes)


def check_readers(steps: Sequence[Step], layers: Mapping[str, Any]) -> None:
    """Raises ConversionError where something that cannot takes the images as bytes."""
    bytes = {step.name for step in steps if step.kind == "input"}
    for step in steps:
        if references(step).isdisjoint(bytes):
            continue
        if step.kind == "operator" and str(step.target) in LAYOUTS:
            bytes.add(step.name)
            continue
        config = getattr(layers[str(step.target)], "config", {}) if step.kind == "layer" else {}
        if config.get("input") != "uint8":
            what = step.name if step.kind == "output" else f"{step.name} ({step.target})"
            raise ConversionError(
                f"image_bytes: {what} reads the images as real numbers; bytes are for products with signs "
                "alone (bf.nn.BinaryConv2d and BinaryLinear with input_quantizer=None)"
            )


def _integers(values: Tensor) -> tuple[int, int, float]:
    """Multiplier, zero point and scale of the values of the 256 bytes, fp64."""
    slope = float(values[255] - values[0]) / 255
    allowed = TOLERANCE * torch.finfo(torch.float32).eps * float(values.abs().max())
    bytes = torch.arange(256, dtype=torch.float64)
    if not slope > 0 or bool(((values[0] + slope * bytes - values).abs() > allowed).any()):
        raise ConversionError("image_bytes: the normalisation is no increasing affine function of the byte")
    zero = -float(values[0]) / slope
    limit = 1
    while limit <= MULTIPLIER_LIMIT:
        near = Fraction(zero).limit_denominator(limit)
        multiplier, zero_point = near.denominator, near.numerator
        scale = slope / multiplier
        if bool(((bytes * multiplier - zero_point) * scale - values).abs().max() <= allowed):
            if not 0 <= zero_point <= 255 * multiplier:
                raise ConversionError(f"image_bytes: zero is byte {zero:g}, which lies outside of 0 to 255")
            return multiplier, zero_point, scale
        limit *= 2
    raise ConversionError(
        f"image_bytes: zero is byte {zero!r}, no fraction with a denominator of at most {MULTIPLIER_LIMIT}"
    )
