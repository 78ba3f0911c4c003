"""BinaryLinear and BinaryConv2d: layers whose only weights are sign bits."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..binary_tensor import BinaryTensor, pack
from ..kernels.geometry import pair
from ..ops.product import geometry_of
from .quantizers import check_quantizer, surrogate


def _random_signs(*shape: int, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Parameter:
    """A fair coin for every weight, packed along axis 1."""
    values = torch.randint(0, 2, shape, device=device).to(dtype or torch.get_default_dtype())
    return nn.Parameter(pack(values.mul_(2).sub_(1), dim=1))


def _positive(value: int, name: str) -> int:
    """Any kind of integer (NumPy's too) as Python's; raises ValueError below 1."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or operator.index(value) < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return operator.index(value)


class BinaryLinear(nn.Module):
    """``y = sign(x) @ W.T (+ bias)`` with packed weights in {-1, +1} and no latent ones.

    Args:
        in_features, out_features: sizes.
        bias: add a real-valued bias.
        input_quantizer: ``"ste_sign"``, ``"approx_sign"``, ``"swish_sign"`` (see ``nn.quantizers``), or None
            for real-valued inputs (a first layer): then the product runs on unpacked weights.

    Shapes: ``[..., in_features] -> [..., out_features]``.

    Raises:
        ValueError: sizes that are not positive, an unknown quantizer.
    """

    weight: BinaryTensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        input_quantizer: str | None = "ste_sign",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_features = _positive(in_features, "in_features")
        out_features = _positive(out_features, "out_features")
        geometry_of(1, (1, 1), in_features, out_features, (1, 1))
        self.in_features, self.out_features = in_features, out_features
        self.input_quantizer = check_quantizer(input_quantizer)
        self.weight = _random_signs(out_features, in_features, device=device, dtype=dtype)  # type: ignore[assignment]
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        if self.input_quantizer is None:
            return F.linear(input, self.weight.unpack(input.dtype), self.bias)
        x, clip = surrogate(input, self.input_quantizer)
        output = ops.binary_linear(x, self.weight, ste_clip=clip)
        return output if self.bias is None else output + self.bias

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, input_quantizer={self.input_quantizer!r}"
        )


class BinaryConv2d(nn.Module):
    """2-d convolution of ``sign(x)`` with packed weights in {-1, +1} and no latent ones.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups: as ``torch.nn.Conv2d``.
        padding_value: what a padded tap counts as: 0 (left out), +1 or -1; 0 only for real-valued inputs.
        bias: add a real-valued bias.
        input_quantizer: ``"ste_sign"``, ``"approx_sign"``, ``"swish_sign"``, or None for real-valued inputs.

    Shapes: ``[N, in_channels, H, W] -> [N, out_channels, Ho, Wo]`` (channels-last strides).

    Raises:
        ValueError: sizes beyond the limits of ``kernels.geometry``, groups that do not divide the channels,
            an unknown quantizer or padding value.
    """

    weight: BinaryTensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        padding_value: int = 0,
        bias: bool = False,
        input_quantizer: str | None = "ste_sign",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_channels = _positive(in_channels, "in_channels")
        out_channels, groups = _positive(out_channels, "out_channels"), _positive(groups, "groups")
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups={groups} must divide {in_channels} input and {out_channels} output channels"
            )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = pair(kernel_size, "kernel_size", 1)
        self.stride, self.dilation = pair(stride, "stride", 1), pair(dilation, "dilation", 1)
        self.padding = pair(padding, "padding", 0)
        smallest = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        arguments = (self.stride, (0, 0), self.dilation, groups, padding_value)
        geometry_of(1, smallest, in_channels, out_channels, self.kernel_size, *arguments)
        self.padding_value = int(padding_value)
        self.input_quantizer = check_quantizer(input_quantizer)
        if input_quantizer is None and self.padding_value != 0:
            raise ValueError("real-valued inputs are padded with 0: padding_value must be 0")
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        self.weight = _random_signs(*shape, device=device, dtype=dtype)  # type: ignore[assignment]
        self.bias = nn.Parameter(torch.zeros(out_channels, device=device, dtype=dtype)) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        if self.input_quantizer is None:
            return F.conv2d(input, self.weight.unpack(input.dtype), self.bias, *geometry)
        x, clip = surrogate(input, self.input_quantizer)
        output = ops.binary_conv2d(x, self.weight, *geometry, padding_value=self.padding_value, ste_clip=clip)
        return output if self.bias is None else output + self.bias[:, None, None]

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, "
            f"padding_value={self.padding_value}, bias={self.bias is not None}, "
            f"input_quantizer={self.input_quantizer!r}"
        )
