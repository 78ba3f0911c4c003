"""BinaryLinear, BinaryConv1d and BinaryConv2d: layers whose only weights are sign bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..binary_tensor import BinaryTensor, pack
from ..kernels.geometry import Arguments, pair
from ..ops.product import geometry_of
from .quantizers import Int8, Quantizer, positive_integer, quantizer


def _random_signs(*shape: int, device: torch.device | str | None, dtype: torch.dtype | None) -> Any:
    """A parameter with a fair coin for every weight, packed along axis 1."""
    values = torch.randint(0, 2, shape, device=device).to(dtype or torch.get_default_dtype())
    return nn.Parameter(pack(values.mul_(2).sub_(1), dim=1))


class BinaryLinear(nn.Module):
    """``y = sign(x) @ W.T (+ bias)`` with packed weights in {-1, +1} and no latent ones.

    Args:
        in_features, out_features: sizes.
        bias: add a real-valued bias.
        input_quantizer: a module of ``nn.quantizers`` or the name of one (``"ste_sign"``, ``"approx_sign"``,
            ``"swish_sign"``), None for real-valued inputs (a first layer, or only weights of one bit), or
            ``"int8"`` for inputs of 8 bits with a scale for each row. Weights stay packed in any case.

    Shapes: ``[..., in_features] -> [..., out_features]``.

    Raises:
        ValueError: sizes that are not positive, an unknown quantizer.
    """

    weight: BinaryTensor
    input_quantizer: Quantizer | None
    _new_weight = staticmethod(_random_signs)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        input_quantizer: str | Quantizer | None = "ste_sign",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_features = positive_integer(in_features, "in_features")
        out_features = positive_integer(out_features, "out_features")
        geometry_of(1, (1, 1), in_features, out_features, (1, 1))
        self.in_features, self.out_features = in_features, out_features
        self.register_module("input_quantizer", quantizer(input_quantizer))
        self.weight = self._new_weight(out_features, in_features, device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        chosen: Any = self._modules["input_quantizer"]  # half a microsecond less than by the attribute
        if chosen is None:
            output = ops.signed_linear(input, self.weight)
        elif type(chosen) is Int8:
            q, scale = chosen.quantized(input, -1)
            output = ops.signed_linear(q, self.weight, **_of_8_bits(input, scale))
        else:
            x, clip = chosen.surrogate(input, -1)
            output = ops.binary_linear(x, self.weight, ste_clip=clip)
        return output if self.bias is None else output + self.bias

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}{_real(self.input_quantizer)}"
        )


def _of_8_bits(input: Tensor, scale: Tensor) -> dict[str, Any]:
    """How a product takes the numbers that ``input`` was quantized to."""
    through = input if torch.is_grad_enabled() and input.requires_grad else None
    return {"input_scale": scale, "straight_through": through, "dtype": input.dtype}


def _real(chosen: Quantizer | None) -> str:
    return ", input_quantizer=None" if chosen is None else ""  # a module stands in the lines below


def _same_padding(kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    """Padding that keeps an image's size.

    Raises:
        ValueError: a stride, or a kernel that would need more on one side than on the other.
    """
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if any(s != 1 for s in stride) or any(r % 2 for r in reach):
        raise ValueError(
            f"padding='same' needs stride 1 and as much padding on either side: kernel_size {tuple(kernel)}, "
            f"stride {tuple(stride)}, dilation {tuple(dilation)} has none. Give numbers"
        )
    return tuple(r // 2 for r in reach)


class _Convolution(nn.Module):
    """What both convolutions are, in two axes; a 1-d one has images of height 1."""

    weight: BinaryTensor
    input_quantizer: Quantizer | None
    _new_weight = staticmethod(_random_signs)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        arguments: tuple[Any, ...],  # Arguments, whose padding may be a word
        bias: bool,
        input_quantizer: str | Quantizer | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        stride, padding, dilation, groups, padding_value = arguments
        in_channels = positive_integer(in_channels, "in_channels")
        out_channels, groups = (
            positive_integer(out_channels, "out_channels"),
            positive_integer(groups, "groups"),
        )
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups={groups} must divide {in_channels} input and {out_channels} output channels"
            )
        if isinstance(padding, str):
            if padding not in ("same", "valid"):
                raise ValueError(f"padding must be numbers, 'same' or 'valid', got {padding!r}")
            padding = _same_padding(kernel_size, stride, dilation) if padding == "same" else (0, 0)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation
        self.padding = pair(padding, "padding", 0)
        smallest = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        arguments = Arguments(self.stride, (0, 0), self.dilation, groups, padding_value)
        geometry_of(1, smallest, in_channels, out_channels, self.kernel_size, arguments)
        self.padding_value = int(padding_value)
        self.register_module("input_quantizer", quantizer(input_quantizer))
        if self.padding_value != 0 and (input_quantizer is None or isinstance(self.input_quantizer, Int8)):
            raise ValueError("real-valued and 8-bit inputs are padded with 0: padding_value must be 0")
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        self.weight = self._new_weight(*shape, device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.zeros(out_channels, device=device, dtype=dtype)) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        chosen: Any = self._modules["input_quantizer"]
        if chosen is None:
            output = ops.signed_conv2d(input, self.weight, *geometry)
        elif type(chosen) is Int8:
            q, scale = chosen.quantized(input, 1)
            output = ops.signed_conv2d(q, self.weight, *geometry, **_of_8_bits(input, scale))
        else:
            x, clip = chosen.surrogate(input, 1)
            output = ops.binary_conv2d(
                x, self.weight, *geometry, padding_value=self.padding_value, ste_clip=clip
            )
        return output if self.bias is None else output + self.bias[:, None, None]

    def _settings(self, first_axis: int) -> str:
        """For ``extra_repr``: of a 1-d convolution, only what is said of its axis."""
        axes = ("kernel_size", "stride", "padding", "dilation")
        sizes = {name: getattr(self, name)[first_axis:] for name in axes}
        text = ", ".join(f"{name}={v if len(v) > 1 else v[0]}" for name, v in sizes.items())
        return (
            f"{self.in_channels}, {self.out_channels}, {text}, groups={self.groups}, "
            f"padding_value={self.padding_value}, bias={self.bias is not None}{_real(self.input_quantizer)}"
        )


class BinaryConv2d(_Convolution):
    """2-d convolution of ``sign(x)`` with packed weights in {-1, +1} and no latent ones.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups: as ``torch.nn.Conv2d``;
            ``padding="same"`` where it needs as much on either side.
        padding_value: what a padded tap counts as: 0 (left out), +1 or -1; 0 only for real-valued inputs.
        bias: add a real-valued bias.
        input_quantizer: a module of ``nn.quantizers`` or the name of one, or None for real-valued inputs.

    Shapes: ``[N, in_channels, H, W] -> [N, out_channels, Ho, Wo]`` in the memory format of the input, as are
    the gradients in that of theirs.
    Channels-last is the fast format, which kernels read and write and torch pools 15 times as fast on CPUs:
    give a network ``x.to(memory_format=torch.channels_last)`` once, at its entrance.

    Raises:
        ValueError: sizes beyond the limits of ``kernels.geometry``, groups that do not divide the channels,
            an unknown quantizer or padding value.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        padding_value: int = 0,
        bias: bool = False,
        input_quantizer: str | Quantizer | None = "ste_sign",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            pair(kernel_size, "kernel_size", 1),
            (
                pair(stride, "stride", 1),
                padding if isinstance(padding, str) else pair(padding, "padding", 0),
                pair(dilation, "dilation", 1),
                groups,
                padding_value,
            ),
            bias,
            input_quantizer,
            device,
            dtype,
        )

    def extra_repr(self) -> str:
        return self._settings(0)


class BinaryConv1d(_Convolution):
    """1-d convolution of ``sign(x)`` with packed weights in {-1, +1}: that of images of height 1.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups: as ``torch.nn.Conv1d``;
            ``padding="same"`` where it needs as much on either side.
        padding_value, bias, input_quantizer: as for :class:`BinaryConv2d`.

    Shapes: ``[N, in_channels, L] -> [N, out_channels, Lo]``; the weight is
    ``[out_channels, in_channels / groups, 1, kernel_size]``.

    Raises:
        ValueError: as :class:`BinaryConv2d`; when called, an input of another rank.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int | str = 0,
        dilation: int = 1,
        groups: int = 1,
        padding_value: int = 0,
        bias: bool = False,
        input_quantizer: str | Quantizer | None = "ste_sign",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            (1, _whole(kernel_size, "kernel_size", 1)),
            (
                (1, _whole(stride, "stride", 1)),
                padding if isinstance(padding, str) else (0, _whole(padding, "padding", 0)),
                (1, _whole(dilation, "dilation", 1)),
                groups,
                padding_value,
            ),
            bias,
            input_quantizer,
            device,
            dtype,
        )

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() != 3:
            raise ValueError(f"input must be [N, {self.in_channels}, L], got shape {tuple(input.shape)}")
        return super().forward(input.unsqueeze(2)).squeeze(2)

    def extra_repr(self) -> str:
        return self._settings(1)


def _whole(value: int, name: str, least: int) -> int:
    """A 1-d convolution's number; raises ``ValueError`` below ``least``."""
    return pair(value, name, least)[1]
