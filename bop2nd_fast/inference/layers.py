"""The layers a packed model is made of: words in, words or real values out.

They hold no trainable parameter. Activations between packed layers are words: ``[N, H, W, words(C)]`` after a
convolution, ``[N, words(K)]`` after a dense layer; bit 1 means -1. With thresholds a layer emits
``bit = dot < threshold``, which stands for everything the trained model did between two signs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..binary_tensor import BinaryTensor
from ..ops.binary_conv2d import output_size
from ..ops.pack_bits import words_for
from .packed_layer import PackedLayer
from .pooling import MaxPool, PoolBits


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


DTYPES = {dtype_name(t): t for t in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}


class _WeightLayer(PackedLayer):
    """Packed weight; int32 thresholds ``[out]``, or real outputs with an optional bias ``[out]``."""

    weight: BinaryTensor
    threshold: Tensor | None
    bias: Tensor | None

    def __init__(
        self, weight: BinaryTensor, threshold: Tensor | None = None, bias: Tensor | None = None, **config: Any
    ) -> None:
        super().__init__(**config)
        n_out = weight.shape[0]
        if threshold is not None and (threshold.dtype != torch.int32 or tuple(threshold.shape) != (n_out,)):
            got = f"{threshold.dtype} {tuple(threshold.shape)}"
            raise ValueError(f"thresholds must be int32 [{n_out}], got {got}")
        if bias is not None and tuple(bias.shape) != (n_out,):
            raise ValueError(f"a bias for {n_out} outputs cannot have shape {tuple(bias.shape)}")
        self._tensor("weight", weight)
        self._tensor("threshold", threshold)
        self._tensor("bias", bias)


class _PackedProduct(_WeightLayer):
    """A layer with words in: thresholds, or real values, or the tail of a residual network.

    ``config["emits"]`` (tails only): values ``dot * scale + shift + residual``, their sign words, or both.
    """

    scale: Tensor | None
    shift: Tensor | None

    def __init__(
        self, weight: BinaryTensor, scale: Tensor | None = None, shift: Tensor | None = None, **kwargs: Any
    ) -> None:
        super().__init__(weight, **kwargs)
        n_out = weight.shape[0]
        for name, factor in (("scale", scale), ("shift", shift)):
            if factor is not None and (factor.dtype != torch.float32 or tuple(factor.shape) != (n_out,)):
                raise ValueError(f"{name} must be fp32 [{n_out}], got {factor.dtype} {tuple(factor.shape)}")
            self._tensor(name, factor)
        self._emits: str = self.config.get("emits", "values" if self.threshold is None else "signs")
        if self._emits not in ("values", "signs", "both"):
            raise ValueError(f"a layer emits values, signs or both, not {self._emits!r}")

    def _adds_bias(self) -> bool:
        """Whether the operator itself adds the bias, to the same bits: in fp32, right after the dot."""
        plain = self.bias is not None and self.bias.dtype == torch.float32
        return plain and self.config["dtype"] == "float32" and not self.config.get("padding_bits")

    def _outputs(self, residual: Tensor | None) -> dict[str, Any]:
        """What the packed operator is to emit."""
        asked: dict[str, Any] = {"values": self._emits != "signs", "signs": self._emits != "values"}
        if self.threshold is not None:
            return asked | {"threshold": self.threshold}
        if "emits" in self.config:
            dtype = DTYPES[self.config["dtype"]]
            return asked | {"scale": self.scale, "shift": self.shift, "residual": residual, "dtype": dtype}
        return {"shift": self.bias} if self._adds_bias() else {}

    def _real(self, dots: Tensor) -> Tensor:
        """Exact dots as the trained layer returns them."""
        output = dots.to(DTYPES[self.config["dtype"]])
        return output if self.bias is None or self._adds_bias() else output + self.bias

    def _to(self) -> str:
        real = self.config.get("dtype", "real")
        return {"values": real, "signs": "bits", "both": f"{real} and bits"}[self._emits]


class PackedConv2d(_PackedProduct):
    """Words ``[N, H, W, groups * words(C / groups)]`` -> words ``[N, Ho, Wo, words(O)]``, with thresholds.

    Without: real ``[N, O, Ho, Wo]`` (channels-last strides) in ``config["dtype"]``. A tail may emit both, and
    takes a residual like the values.

    Raises:
        ValueError: words of another channel count, or an image smaller than the kernel.
    """

    kind = "packed_conv2d"

    def __init__(self, weight: BinaryTensor, **kwargs: Any) -> None:
        super().__init__(weight, **kwargs)
        c = self.config
        sizes = (list(c["stride"]), list(c["padding"]), list(c["dilation"]))
        self._geometry = (*sizes, c["groups"], c["padding_value"])
        self._in_channels: int = weight.shape[1] * c["groups"]
        self._in_words: int = words_for(weight.shape[1]) * c["groups"]
        if weight.dim() != 4 or weight.bit_layout.dim != 1 or weight.shape[0] % c["groups"]:
            raise ValueError(f"no weight of a convolution with {c['groups']} groups: {weight.bit_layout}")

    def forward(self, words: Tensor, residual: Tensor | None = None) -> Any:
        if words.dim() != 4 or words.shape[-1] != self._in_words:
            raise ValueError(
                f"a packed convolution of {self._in_channels} channels takes words "
                f"[N, H, W, {self._in_words}], got {tuple(words.shape)}"
            )
        check_image(words.shape[1:3], self.weight.shape[2:], *self._geometry[:3])
        values, signs = torch.ops.bop2nd.binary_conv2d_packed(
            words,
            self.weight.words,
            self._in_channels,
            *self._geometry,
            **self._outputs(None if residual is None else residual.permute(0, 2, 3, 1)),
            blocked=self.weight.blocked_words(self.config["groups"]),
        )
        if self._emits == "signs":
            return signs
        image = self._real(values).permute(0, 3, 1, 2)
        return (image, signs) if self._emits == "both" else image

    def describe(self) -> str:
        o, _, kh, kw = self.weight.shape
        return f"{self._in_channels} -> {o}, {kh}x{kw}{_geometry_text(self.config)}, to {self._to()}"


class PackedLinear(_PackedProduct):
    """Words ``[..., W]`` -> words ``[..., words(O)]`` with thresholds, else real ``[..., O]``.

    After a flattened convolution every pixel's channels fill whole words, so the weight has
    ``config["padding_bits"]`` bits more than the layer has features. They are 0 on both sides and add +1 each
    to the dot: thresholds and shifts already contain them, from plain dots they are subtracted (exact, below
    2^24).

    Raises:
        ValueError: words that do not fit the features.
    """

    kind = "packed_linear"

    def __init__(self, weight: BinaryTensor, **kwargs: Any) -> None:
        super().__init__(weight, **kwargs)
        if weight.dim() != 2 or weight.bit_layout.dim != 1:
            raise ValueError(f"not the weight of a dense layer: {weight.bit_layout}")
        self._n_words = words_for(weight.shape[1])

    def forward(self, words: Tensor, residual: Tensor | None = None) -> Any:
        if words.shape[-1] != self._n_words:
            n_features = self.weight.shape[1] - self.config["padding_bits"]
            raise ValueError(
                f"a packed dense layer of {n_features} features takes {self._n_words} words per row, got "
                f"{words.shape[-1]}: is the image of another size than the one given to convert()?"
            )
        values, signs = torch.ops.bop2nd.binary_linear_packed(
            words.reshape(-1, self._n_words),
            self.weight.words,
            self.weight.shape[1],
            **self._outputs(None if residual is None else residual.reshape(-1, residual.shape[-1])),
            blocked=self.weight.blocked_words(),
        )
        signs = signs.reshape(*words.shape[:-1], signs.shape[-1]) if self._emits != "values" else signs
        if self._emits == "signs":
            return signs
        values = values.reshape(*words.shape[:-1], values.shape[-1])
        if self.config["padding_bits"] and "emits" not in self.config:
            values = values - self.config["padding_bits"]
        return (self._real(values), signs) if self._emits == "both" else self._real(values)

    def describe(self) -> str:
        o, k = self.weight.shape
        return f"{k - self.config['padding_bits']} -> {o}, to {self._to()}"


class _RealInput(_WeightLayer):
    """A first layer: real inputs, so torch's own product on the unpacked weight, which is kept as a cache."""

    def __init__(self, weight: BinaryTensor, **kwargs: Any) -> None:
        super().__init__(weight, **kwargs)
        self._dense: tuple[tuple[Any, ...], Tensor] | None = None

    def _unpacked(self, dtype: torch.dtype) -> Tensor:
        words = self.weight.words
        key = (words.data_ptr(), words.device, dtype, None if words.is_inference() else words._version)
        if self._dense is None or self._dense[0] != key:
            self._dense = (key, self.weight.unpack(dtype))
        return self._dense[1]


class RealConv2d(_RealInput):
    """Real ``[N, C, H, W]`` -> real ``[N, O, Ho, Wo]`` with binary weights.

    Raises:
        ValueError: another number of channels, or an image smaller than the kernel.
    """

    kind = "real_conv2d"

    def forward(self, input: Tensor) -> Tensor:
        c = self.config
        channels = self.weight.shape[1] * c["groups"]
        if input.dim() != 4 or input.shape[1] != channels:
            wanted = f"[N, {channels}, H, W]"
            raise ValueError(f"a convolution of {channels} channels takes {wanted}, got {tuple(input.shape)}")
        geometry = (tuple(c["stride"]), tuple(c["padding"]), tuple(c["dilation"]))
        check_image(input.shape[2:], self.weight.shape[2:], *geometry)
        return F.conv2d(input, self._unpacked(input.dtype), self.bias, *geometry, c["groups"])

    def describe(self) -> str:
        o, i, kh, kw = self.weight.shape
        return f"{i * self.config['groups']} -> {o}, {kh}x{kw}{_geometry_text(self.config)}, real to real"


class RealLinear(_RealInput):
    """Real ``[..., K]`` -> real ``[..., O]`` with binary weights."""

    kind = "real_linear"

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self._unpacked(input.dtype), self.bias)

    def describe(self) -> str:
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}, real to real"


class Pack(PackedLayer):
    """Signs of real values: ``[N, C, H, W]`` along C (``config["dim"]`` 1), or ``[..., K]`` along K (-1).

    Raises:
        ValueError: another length along that axis than ``config["length"]``, or no floating values.
    """

    kind = "pack"

    def forward(self, input: Tensor) -> Tensor:
        dim, length, groups = self.config["dim"], self.config["length"], self.config["groups"]
        if not input.is_floating_point() or (dim == 1 and input.dim() != 4) or input.shape[dim] != length:
            got = f"{tuple(input.shape)} of {input.dtype}"
            raise ValueError(f"packing takes floating values with {length} along axis {dim}, got {got}")
        if groups == 1:
            return torch.ops.bop2nd.pack_bits(input, dim)
        return torch.ops.bop2nd.pack_bits_ste(input, dim, groups)[0]

    def describe(self) -> str:
        return f"signs of {self.config['length']} {'channels' if self.config['dim'] == 1 else 'features'}"


class Regroup(PackedLayer):
    """Words of C channels -> words in which each of ``groups`` groups starts on a word of its own."""

    kind = "regroup"

    def forward(self, words: Tensor) -> Tensor:
        values = torch.ops.bop2nd.unpack_bits(words, self.config["length"])
        return torch.ops.bop2nd.pack_bits(values.unflatten(-1, (self.config["groups"], -1))).flatten(-2)

    def describe(self) -> str:
        return f"{self.config['length']} channels in {self.config['groups']} groups"


class FlattenBits(PackedLayer):
    """Words ``[N, H, W, W_c]`` -> ``[N, H * W * W_c]``: pixel after pixel, each in whole words."""

    kind = "flatten_bits"

    def forward(self, words: Tensor) -> Tensor:
        return words.flatten(1)


class Constant(PackedLayer):
    """A parameter or buffer that the traced ``forward`` used by itself."""

    kind = "constant"
    value: Tensor

    def __init__(self, value: Tensor, **config: Any) -> None:
        super().__init__(**config)
        self._tensor("value", value)

    def forward(self) -> Tensor:
        return self.value

    def describe(self) -> str:
        return f"{list(self.value.shape)} {dtype_name(self.value.dtype)}"


def check_image(size: Any, kernel: Any, stride: Any, padding: Any, dilation: Any) -> None:
    """Raise ``ValueError`` where the image is smaller than the kernel with its dilation."""
    for axis in (0, 1):
        if output_size(size[axis], kernel[axis], stride[axis], padding[axis], dilation[axis]) < 1:
            image, window = "x".join(map(str, size)), "x".join(map(str, kernel))
            raise ValueError(f"an image of {image} is smaller than the {window} kernel with its dilation")


def _geometry_text(config: dict[str, Any]) -> str:
    text = "".join(
        f", {key} {'x'.join(map(str, config[key]))}"
        for key, default in (("stride", 1), ("padding", 0), ("dilation", 1))
        if any(v != default for v in config[key])
    )
    if any(config["padding"]):
        text += f" of {config['padding_value']:+d}".replace("+0", "0")
    return text + (f", {config['groups']} groups" if config["groups"] != 1 else "")


LAYERS: dict[str, type[PackedLayer]] = {
    cls.kind: cls
    for cls in (
        PackedConv2d,
        PackedLinear,
        RealConv2d,
        RealLinear,
        Pack,
        Regroup,
        FlattenBits,
        PoolBits,
        MaxPool,
        Constant,
    )
}
