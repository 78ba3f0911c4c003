"""The layers a packed model is made of: words in, words or real values out.

They hold no trainable parameter. Activations between packed layers are words: ``[N, H, W, words(C)]`` after a
convolution, ``[N, words(K)]`` after a dense layer; bit 1 means -1. With thresholds a layer emits
``bit = dot < threshold``, which stands for everything the trained model did between two signs.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..binary_tensor import BinaryTensor
from ..kernels.geometry import PADDING_VALUES, Arguments, Geometry, words_for
from ..kernels.outputs import PER_OUTPUT
from .graph import dtype_name
from .packed_layer import Attribute, PackedLayer, integer, one_of, pair

DTYPES = {dtype_name(t): t for t in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
_FP32_BYTES = {"fp32_bytes": integer(0, 0, 2**63)}  # for reports: what the trained parameters would take
_GEOMETRY = {
    "stride": pair(1),
    "padding": pair(0),
    "dilation": pair(1),
    "groups": integer(1),
    "padding_value": one_of(PADDING_VALUES),
}
_LEFT_OUT = {**_GEOMETRY, "padding_value": one_of((0,), 0)}  # padded taps of real and 8-bit images
_DTYPE = {"dtype": one_of(tuple(DTYPES))}
_DOT = integer(-(2**24), limit=2**24 + 1)
_LIMIT = Attribute(f"null or {_DOT.allowed}", lambda v: v is None or _DOT.test(v), None)
_EMITS = {
    "emits": one_of((None, "values", "signs", "both"), None),
    "low": _LIMIT,
    "high": _LIMIT,
    "relu": one_of((None, True), None),
}


class _WeightLayer(PackedLayer):
    """Packed weight; int32 thresholds ``[out]``, or real outputs with an optional bias ``[out]``."""

    weight: BinaryTensor
    threshold: Tensor | None
    bias: Tensor | None
    n_axes: int
    tensors: ClassVar[tuple[str, ...]] = ("weight", "threshold", "bias")

    def __init__(
        self, weight: BinaryTensor, threshold: Tensor | None = None, bias: Tensor | None = None, **config: Any
    ) -> None:
        super().__init__(**config)
        if not isinstance(weight, BinaryTensor):
            raise ValueError(f"{self.kind}: the weight must be a BinaryTensor, got {type(weight).__name__}")
        layout = weight.bit_layout
        groups = self.config.get("groups", 1)
        if layout.dim != 1 or len(layout.shape) != self.n_axes or layout.shape[0] % groups:
            wanted = "convolution" if self.n_axes == 4 else "dense layer"
            raise ValueError(f"{self.kind}: not the weight of a {wanted} with {groups} groups: {layout}")
        if bias is not None and not bias.is_floating_point():
            raise ValueError(f"{self.kind}: a bias is real, got {bias.dtype}")
        n_out = layout.shape[0]
        self._tensor("weight", weight)
        self._tensor("threshold", threshold, torch.int32, (n_out,))
        self._tensor("bias", bias, bias.dtype if bias is not None else None, (n_out,))


class _PackedProduct(_WeightLayer):
    """A layer with words in: thresholds, or real values, or the tail of a residual network.

    ``config["emits"]`` (tails only): values ``act(clamp(dot, low, high) * scale + shift + residual) +
    post_shift``, their sign words (of the value ``+ sign_shift``), or both. ``act`` is ReLU (``relu``), PReLU
    (``slope``), or nothing.
    """

    tensors = ("weight", "threshold", "bias", *PER_OUTPUT)
    operands = ("words", "residual")

    def __init__(self, weight: BinaryTensor, **kwargs: Any) -> None:
        tail = {name: kwargs.pop(name, None) for name in PER_OUTPUT}
        super().__init__(weight, **kwargs)
        for name, factor in tail.items():
            self._tensor(name, factor, torch.float32, (weight.shape[0],))
        self._tail = "emits" in self.config
        self._emits: str = self.config.get("emits") or ("values" if self.threshold is None else "signs")
        if self.threshold is not None and (self._tail or self.bias is not None):
            raise ValueError(f"{self.kind}: thresholds stand alone, without bias and emits")
        self._settings = {name: self.config[name] for name in ("low", "high", "relu") if name in self.config}
        if not self._tail and (self._settings or any(t is not None for t in tail.values())):
            raise ValueError(
                f"{self.kind}: {', '.join(PER_OUTPUT)}, low, high and relu belong to a layer with emits"
            )
        if "relu" in self._settings and tail["slope"] is not None:
            raise ValueError(f"{self.kind}: relu and slope exclude each other")
        if self._settings.get("low", -(2**24)) > self._settings.get("high", 2**24):
            raise ValueError(f"{self.kind}: low is above high")
        if self._emits == "values" and tail["sign_shift"] is not None:
            raise ValueError(f"{self.kind}: sign_shift belongs to a layer that emits signs")
        if self._tail and self.bias is not None:
            raise ValueError(f"{self.kind}: a layer with emits has its bias in the shift")

    def _adds_bias(self) -> bool:
        """Whether the operator itself adds the bias, to the same bits: in fp32, right after the dot."""
        plain = self.bias is not None and self.bias.dtype == torch.float32
        return plain and self.config["dtype"] == "float32" and not self.config.get("padding_bits")

    def _outputs(self, residual: Tensor | None) -> dict[str, Any]:
        """What the packed operator is to emit."""
        asked: dict[str, Any] = {"values": self._emits != "signs", "signs": self._emits != "values"}
        if self.threshold is not None:
            return asked | {"threshold": self.threshold}
        if self._tail:
            held = {name: self._buffers[name] for name in PER_OUTPUT if self._buffers[name] is not None}
            asked |= {"residual": residual, "dtype": DTYPES[self.config["dtype"]]}
            return asked | held | self._settings
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
    attributes = {**_GEOMETRY, **_DTYPE, **_EMITS, **_FP32_BYTES}
    n_axes = 4

    def __init__(self, weight: BinaryTensor, **kwargs: Any) -> None:
        super().__init__(weight, **kwargs)
        c = self.config
        self._geometry = [list(c[k]) if isinstance(c[k], tuple) else c[k] for k in Arguments._fields]
        self._in_channels: int = weight.shape[1] * c["groups"]
        self._in_words: int = words_for(weight.shape[1]) * c["groups"]
        self._checked: Any = None  # the shape of words whose sizes have been looked at

    def _check(self, shape: torch.Size) -> Geometry:
        if len(shape) != 4 or shape[-1] != self._in_words:
            raise ValueError(
                f"a packed convolution of {self._in_channels} channels takes words "
                f"[N, H, W, {self._in_words}], got {tuple(shape)}"
            )
        geometry = check_image(shape[1:3], self.weight.shape, self.config, shape[0])
        self._checked = shape
        return geometry

    def memory(self, *args: Tensor) -> int:
        shape = args[0].shape
        geometry = self._check(shape)
        height, width = (s + 2 * p for s, p in zip(geometry.image, geometry.padding, strict=True))
        padded = 4 * shape[0] * height * width * shape[3]
        return padded + 3 * 8 * geometry.pixels(shape[0]) * self.weight.shape[0]

    def forward(self, words: Tensor, residual: Tensor | None = None) -> Any:
        if words.shape != self._checked:
            self._check(words.shape)
        values, signs = torch.ops.bop2nd.binary_conv2d_packed(
            words,
            self.weight.memory.words,
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
    attributes = {"padding_bits": integer(0, 0), **_DTYPE, **_EMITS, **_FP32_BYTES}
    n_axes = 2

    def __init__(self, weight: BinaryTensor, **kwargs: Any) -> None:
        super().__init__(weight, **kwargs)
        if self.config["padding_bits"] > weight.shape[1]:
            raise ValueError(f"{self.kind}: more padding bits than the weight's {weight.shape[1]} bits")
        self._n_words = words_for(weight.shape[1])

    def memory(self, *args: Tensor) -> int:
        return 3 * 8 * args[0].shape[:-1].numel() * (self.weight.shape[0] + 32)

    def forward(self, words: Tensor, residual: Tensor | None = None) -> Any:
        if words.shape[-1] != self._n_words:
            n_features = self.weight.shape[1] - self.config["padding_bits"]
            raise ValueError(
                f"a packed dense layer of {n_features} features takes {self._n_words} words per row, got "
                f"{words.shape[-1]}: is the image of another size than the one given to convert()?"
            )
        values, signs = torch.ops.bop2nd.binary_linear_packed(
            words.reshape(-1, self._n_words),
            self.weight.memory.words,
            self.weight.shape[1],
            **self._outputs(None if residual is None else residual.reshape(-1, residual.shape[-1])),
            blocked=self.weight.blocked_words(),
        )
        signs = signs.reshape(*words.shape[:-1], signs.shape[-1]) if self._emits != "values" else signs
        if self._emits == "signs":
            return signs
        values = values.reshape(*words.shape[:-1], values.shape[-1])
        if self.config["padding_bits"] and not self._tail:
            values = values - self.config["padding_bits"]
        return (self._real(values), signs) if self._emits == "both" else self._real(values)

    def describe(self) -> str:
        o, k = self.weight.shape
        return f"{k - self.config['padding_bits']} -> {o}, to {self._to()}"


class _RealInput(_WeightLayer):
    """A first layer: real inputs, so torch's own product on the unpacked weight, which its memory keeps."""

    tensors = ("weight", "bias")
    operands = ("input",)

    def _unpacked(self, dtype: torch.dtype) -> Tensor:
        return self.weight.memory.unpacked(self.weight.bit_layout, dtype)


class RealConv2d(_RealInput):
    """Real ``[N, C, H, W]`` -> real ``[N, O, Ho, Wo]`` with binary weights.

    Raises:
        ValueError: another number of channels, or an image smaller than the kernel.
    """

    kind = "real_conv2d"

    def memory(self, *args: Tensor) -> int:
        image, weight = args[0], self.weight
        geometry = self._check(image)
        patches = geometry.taps * geometry.channels * geometry.groups + 2 * weight.shape[0]
        height, width = (s + 2 * p for s, p in zip(geometry.image, geometry.padding, strict=True))
        elements = geometry.pixels(image.shape[0]) * patches + image.shape[:2].numel() * height * width
        return 8 * (elements + weight.numel())

    attributes = {**_LEFT_OUT, **_FP32_BYTES}
    n_axes = 4

    def _check(self, input: Tensor) -> Geometry:
        return check_images(input, self.weight.shape, self.config)

    def forward(self, input: Tensor) -> Tensor:
        self._check(input)
        c = self.config
        geometry = (c["stride"], c["padding"], c["dilation"])
        return F.conv2d(input, self._unpacked(input.dtype), self.bias, *geometry, c["groups"])

    def describe(self) -> str:
        o, i, kh, kw = self.weight.shape
        return f"{i * self.config['groups']} -> {o}, {kh}x{kw}{_geometry_text(self.config)}, real to real"


class RealLinear(_RealInput):
    """Real ``[..., K]`` -> real ``[..., O]`` with binary weights."""

    kind = "real_linear"

    def memory(self, *args: Tensor) -> int:
        return 8 * (args[0].shape[:-1].numel() * self.weight.shape[0] + self.weight.numel())

    attributes = _FP32_BYTES
    n_axes = 2

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
    operands = ("input",)
    attributes = {"dim": one_of((1, -1)), "length": integer(0), "groups": integer(1)}

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        if self.config["length"] % self.config["groups"] or (
            self.config["dim"] == -1 and config["groups"] > 1
        ):
            raise ValueError(f"{self.kind}: so many groups do not divide the axis: {config}")

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
    operands = ("words",)
    attributes = {"length": integer(1), "groups": integer(1)}

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        if self.config["length"] % self.config["groups"]:
            raise ValueError(
                f"{self.kind}: {config['groups']} groups do not divide {config['length']} channels"
            )

    def memory(self, *args: Tensor) -> int:
        return 4 * 3 * 32 * args[0].numel() + 4 * args[0].numel() * self.config["groups"]

    def forward(self, words: Tensor) -> Tensor:
        if words.shape[-1] != words_for(self.config["length"]):
            wanted = words_for(self.config["length"])
            raise ValueError(f"{self.config['length']} channels take {wanted} words, got {words.shape[-1]}")
        values = torch.ops.bop2nd.unpack_bits(words, self.config["length"])
        return torch.ops.bop2nd.pack_bits(values.unflatten(-1, (self.config["groups"], -1))).flatten(-2)

    def describe(self) -> str:
        return f"{self.config['length']} channels in {self.config['groups']} groups"


class FlattenBits(PackedLayer):
    """Words ``[N, H, W, W_c]`` -> ``[N, H * W * W_c]``: pixel after pixel, each in whole words."""

    kind = "flatten_bits"
    operands = ("words",)

    def forward(self, words: Tensor) -> Tensor:
        return words.flatten(1)


class Constant(PackedLayer):
    """A parameter or buffer that the traced ``forward`` used by itself."""

    kind = "constant"
    tensors = ("value",)
    value: Tensor

    def __init__(self, value: Tensor, **config: Any) -> None:
        super().__init__(**config)
        self._tensor("value", value)

    def forward(self) -> Tensor:
        return self.value

    def describe(self) -> str:
        return f"{list(self.value.shape)} {dtype_name(self.value.dtype)}"


def check_image(size: Any, weight: Any, config: dict[str, Any], batch: int) -> Geometry:
    """The geometry on images of that size; raises ``ValueError`` where the limits of kernels are not kept."""
    arguments = Arguments(*(config[name] for name in Arguments._fields))
    channels = weight[1] * arguments.groups
    return Geometry.of(tuple(size), tuple(weight[2:]), channels, weight[0], arguments).check(batch)


def check_images(input: Tensor, weight: Any, config: dict[str, Any]) -> Geometry:
    """The geometry on real or 8-bit images; raises ``ValueError`` as well where the channels do not fit."""
    channels = weight[1] * config["groups"]
    if input.dim() != 4 or input.shape[1] != channels:
        wanted = f"[N, {channels}, H, W]"
        raise ValueError(f"a convolution of {channels} channels takes {wanted}, got {tuple(input.shape)}")
    return check_image(input.shape[2:], weight, config, input.shape[0])


def _geometry_text(config: dict[str, Any]) -> str:
    text = "".join(
        f", {key} {'x'.join(map(str, config[key]))}"
        for key, default in (("stride", 1), ("padding", 0), ("dilation", 1))
        if any(v != default for v in config[key])
    )
    if any(config["padding"]):
        text += f" of {config['padding_value']:+d}".replace("+0", "0")
    return text + (f", {config['groups']} groups" if config["groups"] != 1 else "")
