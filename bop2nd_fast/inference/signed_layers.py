"""Layers whose inputs are real numbers or 8-bit integers and whose weights are signs; rows as int8."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..binary_tensor import BinaryTensor
from ..kernels.geometry import Geometry
from ..kernels.signed_operands import INTEGERS, MULTIPLIER_LIMIT
from .graph import dtype_name
from .layers import (
    _DTYPE,
    _EMITS,
    _FP32_BYTES,
    _LEFT_OUT,
    _geometry_text,
    _PackedProduct,
    check_images,
)
from .packed_layer import PackedLayer, integer, one_of

_INPUTS = {dtype_name(t): t for t in INTEGERS}
_NUMBERS = {
    "input": one_of(("real", *_INPUTS)),
    "multiplier": integer(1, 1, MULTIPLIER_LIMIT + 1),
    "zero_point": integer(-(2**31), 0),
}


class _SignedProduct(_PackedProduct):
    """``sum +-x`` of real numbers, or of integers ``sum +-(multiplier * x - zero_point)``, times the scale of
    a row or image where one is given; then as the layers with words in.

    Raises:
        ValueError: thresholds for real inputs, integers out of range or beyond int32.
    """

    operands = ("input", "input_scale")

    def __init__(self, weight: BinaryTensor, **kwargs: Any) -> None:
        super().__init__(weight, **kwargs)
        kind = self.config["input"]
        multiplier, zero_point = self.config["multiplier"], self.config["zero_point"]
        if kind == "real":
            if self.threshold is not None or (multiplier, zero_point) != (1, 0):
                raise ValueError(f"{self.kind}: thresholds, multiplier and zero_point belong to integers")
            return
        low, high = (multiplier * limit for limit in INTEGERS[_INPUTS[kind]])
        if not low <= zero_point <= high:
            raise ValueError(f"{self.kind}: zero_point must be {low} to {high}, got {zero_point}")
        products = weight.shape[1:].numel()
        if products * max(zero_point - low, high - zero_point) >= 2**31:
            raise ValueError(f"{self.kind}: {products} products exceed int32")

    def _check_input(self, input: Tensor) -> None:
        wanted = self.config["input"]
        fits = input.is_floating_point() if wanted == "real" else input.dtype == _INPUTS[wanted]
        if not fits:
            raise ValueError(f"{self.kind} takes {wanted} inputs, got {input.dtype}")

    def _asked(self, input_scale: Tensor | None) -> dict[str, Any]:
        numbers = {name: self.config[name] for name in ("multiplier", "zero_point")}
        return numbers | self._outputs(None) | {"input_scale": input_scale}

    def memory(self, *args: Tensor) -> int:
        # Inputs widened, and as tables of 16 sums of four; the results, and for every pixel what a zero point
        # adds where an image ends, in whole vectors (CPU's ``plan_corrections``).
        return 24 * args[0].numel() + 4 * 3 * self._out_pixels(args[0]) * (self.weight.shape[0] + 32)

    def _out_pixels(self, input: Tensor) -> int:
        raise NotImplementedError


class SignedConv2d(_SignedProduct):
    """Images ``[N, C, H, W]`` -> real ``[N, O, Ho, Wo]``, or words ``[N, Ho, Wo, words(O)]``.

    Raises:
        ValueError: another number of channels or dtype, or an image smaller than the kernel.
    """

    kind = "signed_conv2d"
    attributes: ClassVar = {**_LEFT_OUT, **_NUMBERS, **_DTYPE, **_EMITS, **_FP32_BYTES}
    n_axes = 4

    def _check(self, input: Tensor) -> Geometry:
        geometry = check_images(input, self.weight.shape, self.config)
        self._check_input(input)
        return geometry

    def _out_pixels(self, input: Tensor) -> int:
        return self._check(input).pixels(input.shape[0])

    def forward(self, input: Tensor, input_scale: Tensor | None = None) -> Any:
        self._check(input)
        c = self.config
        values, signs = torch.ops.bop2nd.signed_conv2d(
            input,
            self.weight.memory.words,
            list(c["stride"]),
            list(c["padding"]),
            list(c["dilation"]),
            c["groups"],
            **self._asked(input_scale),
            blocked=self.weight.blocked_words(c["groups"]),
        )
        if self._emits == "signs":
            return signs
        image = self._real(values).permute(0, 3, 1, 2)
        return (image, signs) if self._emits == "both" else image

    def describe(self) -> str:
        o, i, kh, kw = self.weight.shape
        text = f"{i * self.config['groups']} -> {o}, {kh}x{kw}{_geometry_text(self.config)}"
        return f"{text}, {self.config['input']} to {self._to()}"


class SignedLinear(_SignedProduct):
    """Rows ``[..., K]`` -> real ``[..., O]``, or words ``[..., words(O)]``.

    Raises:
        ValueError: another number of features or dtype.
    """

    kind = "signed_linear"
    attributes: ClassVar = {**_NUMBERS, **_DTYPE, **_EMITS, **_FP32_BYTES}
    n_axes = 2

    def _out_pixels(self, input: Tensor) -> int:
        return input.shape[:-1].numel()

    def forward(self, input: Tensor, input_scale: Tensor | None = None) -> Any:
        if input.dim() < 1 or input.shape[-1] != self.weight.shape[1]:
            raise ValueError(
                f"a dense layer of {self.weight.shape[1]} features takes [..., {self.weight.shape[1]}], got "
                f"{tuple(input.shape)}"
            )
        self._check_input(input)
        values, signs = torch.ops.bop2nd.signed_linear(
            input, self.weight.memory.words, **self._asked(input_scale), blocked=self.weight.blocked_words()
        )
        if self._emits == "signs":
            return signs
        return (self._real(values), signs) if self._emits == "both" else self._real(values)

    def describe(self) -> str:
        o, k = self.weight.shape
        return f"{k} -> {o}, {self.config['input']} to {self._to()}"


class QuantizeRows(PackedLayer):
    """Real rows ``[..., K]`` -> int8 of the same shape, fp32 scales ``[...]`` (or ``[1]``)."""

    kind = "quantize_rows"
    operands = ("input",)
    attributes: ClassVar = {"per_row": one_of((True, False))}

    def memory(self, *args: Tensor) -> int:
        return 16 * args[0].numel()

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        q, scale = torch.ops.bop2nd.quantize_rows(input, self.config["per_row"])
        return q, scale

    def describe(self) -> str:
        return "int8 with a scale for each row" if self.config["per_row"] else "int8 with one scale"
