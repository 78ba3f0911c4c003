"""Writing the steps of a packed model: decisions about products become layers, all else operators."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Iterator
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..binary_tensor import BinaryTensor, Layout, pack
from ..kernels.geometry import words_for
from ..kernels.outputs import PER_OUTPUT
from . import operators
from .chains import CONVOLUTION, Epilogue, channels_of, find_chain, max_pool
from .conditions import Conditions
from .examples import ConversionError
from .formats import Formats
from .graph import InputSpec, Ref, Step, dtype_name, map_leaves
from .image_bytes import LAYOUTS, Normalisation
from .layers import FlattenBits, Pack, PackedConv2d, PackedLinear, RealConv2d, RealLinear, Regroup
from .names import Names
from .packed_layer import PackedLayer
from .pooling import MaxPool, PoolBits
from .signed_layers import QuantizeRows, SignedConv2d, SignedLinear
from .signed_nodes import arguments_of, plain_but, signed_image, signed_rows
from .tails import find_bias, find_tail
from .trace import Traced, line_of

_aten = torch.ops.aten
_NUMBERS: dict[Any, str] = {
    operator.add: "add", operator.sub: "sub", operator.mul: "mul", operator.neg: "neg", operator.mod: "mod",
    operator.floordiv: "floordiv", operator.truediv: "truediv", operator.abs: "abs", operator.pow: "pow",
    torch.sym_max: "max", torch.sym_min: "min", torch.sym_float: "of", torch.sym_int: "trunc",
    torch.sym_sqrt: "sqrt", max: "max", min: "min", abs: "abs",
}  # fmt: skip


class Bits:
    """Words that exist already: the step that makes them, and the image they were flattened from."""

    def __init__(self, step: str, channels: int, pixels: int) -> None:
        self.step, self.channels, self.pixels = step, channels, pixels


class Read:
    """What a product reads: the step that makes the words, and which sign is where in them."""

    def __init__(self, step: str, channels: int, pixels: int, groups: int, image: bool) -> None:
        self.step, self.channels, self.pixels, self.groups, self.image = step, channels, pixels, groups, image

    def signs(self, words: Tensor, value: Tensor) -> Tensor:
        """+1 / -1 of the shape and dtype of ``value``, of which ``words`` are the signs."""
        unpack = torch.ops.bop2nd.unpack_bits
        if self.pixels > 1:
            lanes = unpack(words.unflatten(-1, (self.pixels, -1)), self.channels, dtype=value.dtype)
            return lanes.transpose(-1, -2).flatten(1)
        parts = unpack(
            words.unflatten(-1, (self.groups, -1)), self.channels // self.groups, dtype=value.dtype
        )
        signs = parts.flatten(-2)
        return signs.permute(0, 3, 1, 2) if self.image else signs


class Writer:
    """Writes the steps of the packed model in the order of the traced nodes.

    Attributes (results of :meth:`write`): ``steps``, ``layers``, ``constants``; ``decisions``, what became of
    each product; ``bits``, the words of every value that some product reads as signs.
    """

    def __init__(self, traced: Traced, exact: bool, bytes: Normalisation | None = None) -> None:
        self.traced, self.exact, self.bytes = traced, exact, bytes
        self.steps: list[Step] = []
        self.layers: dict[str, nn.Module] = {}
        self.constants: dict[str, Tensor] = {}
        self.decisions: dict[fx.Node, Epilogue] = {}  # by source
        self.bits: dict[fx.Node, Bits] = {}
        self.packed: dict[tuple[fx.Node, int], str] = {}  # by value and groups
        self.written: dict[fx.Node, Any] = {}  # a Ref, or a number
        self.made: dict[fx.Node, PackedLayer] = {}  # the layers of products
        self.read: dict[fx.Node, Read] = {}  # what products read
        self.convolutions: dict[
            fx.Node, tuple[fx.Node, Callable[[Tensor], Tensor]]
        ] = {}  # and their last node
        self._names = Names(traced.leaves)
        self._ends: dict[fx.Node, Epilogue] = {}
        self._inside: set[fx.Node] = set()  # nodes that a layer stands for
        self._held: dict[str, str] = {}  # layers by what they hold
        self._formats = Formats(traced, exact, self._ref, self._names, self.steps)

    def write(self) -> None:
        self.inputs = [self._names.new(node.name) for node in self.traced.inputs]
        for node, name in zip(self.traced.inputs, self.inputs, strict=True):
            self.steps.append(Step(name, "input"))
            self.written[node] = Ref(name)
        Conditions(self.traced, self.inputs, self._names, self.steps).write()
        for node in self.traced.graph.nodes:
            if node in self._ends:
                self._tail(self._ends[node])
            elif (
                node.op == "call_function" and node not in self._inside and node not in self.traced.constants
            ):
                self._node(node)
            elif (
                node.op not in ("call_function", "placeholder", "output")
                and node not in self.traced.constants
            ):
                raise ConversionError(f"{node.format_node()} cannot be packed{line_of(node)}")
        output = map_leaves(
            self.traced.output,
            lambda leaf: self._formats.as_model(leaf) if isinstance(leaf, fx.Node) else leaf,
        )
        self.steps.append(Step(self._names.new("output"), "output", args=(output,)))

    def specs(self, examples: list[Tensor]) -> list[InputSpec]:
        return [
            InputSpec(tuple(x.shape), x.dtype, tuple(isinstance(s, sympy.Symbol) for s in sizes))
            for x, sizes in zip(examples, self.traced.sizes, strict=True)
        ]

    # --------------------------------------------------------------------------------------- operators

    def _node(self, node: fx.Node) -> None:
        if self.traced.product(node):
            self._product(node)
        elif node.target in (signed_image, signed_rows):
            self._signed_product(node)
        elif self._formats.any_will_do(node):
            self.written[node] = self._ref(node.args[0])
        elif node.target is torch.ops.bop2nd.quantize_rows.default:
            layer = QuantizeRows(per_row=_schema_arguments(node)["per_row"])
            self.written[node] = self._layer(self._names.of(node), layer, self._ref(node.args[0]))
        elif (pool := max_pool(node)) is not None and len(self.traced.info[node].shape) == 4:
            image = self._formats.reader(node)(node.args[0])
            self.written[node] = self._layer(self._names.of(node), MaxPool(**pool), image)
        elif node.target in (_aten.conv2d.default, _aten.linear.default) and self._is_unpacked(node.args[1]):
            self._real_product(node)
        elif not self.exact and self._is_real_convolution(node):
            self._convolution(node)
        elif node.target is not torch.ops.bop2nd.unpack_bits.default:
            self.written[node] = self._operator(node)

    def _operator(self, node: fx.Node) -> Any:
        args, kwargs = self._arguments(node)
        kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "layout", "pin_memory")}
        name = _name_of(node)
        try:
            args, kwargs = _explicit(operators.check(name, args, kwargs), args, kwargs)
        except ValueError as error:
            raise ConversionError(f"{error}{line_of(node)}") from error
        step = self._names.of(node)
        self.steps.append(Step(step, "operator", name, args, kwargs))
        return Ref(step)

    def _arguments(self, node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        refs: Any = self._formats.reader(node)  # fx wants nodes or constants; a Ref is neither
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), refs)
        return tuple(map_leaves(args, lambda leaf: leaf)), dict(kwargs)

    def _ref(self, node: Any) -> Any:
        """A value for the arguments of a step: a reference, or a number that is known."""
        if node not in self.written:
            value = self.traced.constants[node]
            if not isinstance(value, Tensor):
                return value
            name = self._names.of_constant(node)
            self.constants[name] = value.detach().clone()
            self.written[node] = Ref(name)
        return self.written[node]

    def _layer(self, wanted: str, layer: PackedLayer, *args: Any) -> Ref:
        """A step that calls a layer; one that holds the same as an earlier one is that one."""
        key = _content(layer)
        name = self._held.setdefault(key, wanted) if key else wanted
        if name == wanted:
            self.layers[name] = layer
        self.steps.append(Step(wanted, "layer", name, args))
        return Ref(wanted)

    # --------------------------------------------------------------------------------------- real products

    def _is_unpacked(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and node.target is torch.ops.bop2nd.unpack_bits.default

    def _real_product(self, node: fx.Node) -> None:
        """A first layer: real inputs and 1-bit weights."""
        unpack: Any = node.args[1]
        words = self.traced.tensor(unpack.args[0])
        assert words is not None
        given = _schema_arguments(node)
        bias = None if given["bias"] is None else self.traced.tensor(given["bias"])
        value = unpack.meta["val"]
        weight = BinaryTensor(words.clone(), Layout(tuple(value.shape), 1, value.dtype))
        config: dict[str, Any] = {"fp32_bytes": 4 * (value.numel() + (0 if bias is None else bias.numel()))}
        bias = None if bias is None else bias.clone()
        name = self._names.of_product(node)
        if node.target is _aten.linear.default:
            layer: PackedLayer = RealLinear(weight, bias=bias, **config)
            self.written[node] = self._layer(name, layer, self._ref(node.args[0]))
            return
        sizes: dict[str, Any] = {key: _pair(given[key]) for key in _SIZES}
        layer = RealConv2d(weight, bias=bias, **config, **sizes, groups=given["groups"], padding_value=0)
        self._emit(node, self._layer(name, layer, self._image(node)))

    def _signed_product(self, node: fx.Node) -> None:
        """Signs times real numbers or 8-bit integers, with thresholds where only signs are read."""
        given = arguments_of(node)
        words, value = self.traced.tensor(given["weight"]), self.traced.info[given["input"]]
        if words is None or plain_but(given):
            raise ConversionError(f"{node.format_node()} cannot be packed{line_of(node)}")
        image = node.target is signed_image
        bytes = self.bytes if self._is_input(given["input"]) else None
        made = find_chain(self.traced, node, bytes)
        if bytes is not None and made is None:
            raise ConversionError(
                "image_bytes: the values of the first layer are read as real numbers, or change their "
                f"sign more than once; only what ends in signs can be folded{line_of(node)}"
            )
        channels = value.shape[1] // given["groups"] if image else value.shape[-1]
        shape = (words.shape[0], channels, *words.shape[1:-1])
        weight = BinaryTensor(words.clone(), Layout(shape, 1, given["dtype"]))
        config: dict[str, Any] = {
            "dtype": dtype_name(given["dtype"]),
            "input": "real" if value.dtype.is_floating_point else dtype_name(value.dtype),
            "multiplier": given["multiplier"],
            "zero_point": given["zero_point"],
            "fp32_bytes": self._bytes_fp32(weight.numel(), [] if made is None else made.nodes),
        }
        if made is not None and made.folded is not None:
            weight, threshold = _flip(weight, made.folded.flip), made.folded.threshold
            if bytes is not None:
                config |= {"threshold": threshold, **bytes.attributes}
            else:  # a difference of two floats has the sign of their comparison
                config |= {"emits": "signs", "sign_shift": -threshold}
            self.decisions[node] = made
            self._inside.update(made.nodes)
        if image:
            config |= {key: _pair(given[key]) for key in _SIZES} | {"groups": given["groups"]}
        layer = (SignedConv2d if image else SignedLinear)(weight, **config)
        scale = [] if given["input_scale"] is None else [self._ref(given["input_scale"])]
        name = self._names.of_product(node)
        step = self._layer(name, layer, self._ref(given["input"]), *scale)
        self.made[node] = layer
        if made is None:
            self._emit(node, step)
        else:
            self._behind_thresholds(made, step, name)

    def _is_input(self, value: fx.Node) -> bool:
        """Whether a value is the model's input, in whatever shape and memory format."""
        while str(value.target) in LAYOUTS:
            value = value.args[0]  # type: ignore[assignment]
        return value in self.traced.inputs

    def _is_real_convolution(self, node: fx.Node) -> bool:
        if node.target is not _aten.conv2d.default or self.traced.info[node].dtype != torch.float32:
            return False
        weights = [a for a in node.args[1:3] if a is not None]
        return len(self.traced.info[node].shape) == 4 and all(
            self.traced.tensor(w) is not None for w in weights
        )

    def _convolution(self, node: fx.Node) -> None:
        """A real convolution where rounding is free: on channels-last images, with its batch norm."""
        given = _schema_arguments(node)
        weight, bias = (
            None if given[k] is None else self.traced.tensor(given[k]) for k in ("weight", "bias")
        )
        assert weight is not None
        end, name = node, self._names.of(node)
        readers = list(node.users)
        if len(readers) == 1 and readers[0].target is _aten.batch_norm.default and readers[0].args[0] is node:
            norm = [a if a is None else self.traced.tensor(a) for a in readers[0].args[1:5]]
            scale, shift, mean, var = norm
            if mean is not None and var is not None and readers[0].args[5] is False:
                eps: Any = readers[0].args[7]
                fused = fuse_conv_bn_weights(weight, bias, mean, var, eps, scale, shift)
                weight, bias, end = fused[0].detach(), fused[1].detach(), readers[0]
        held = [Ref(self._constant(f"{name}_weight", weight))]
        held += [Ref(self._constant(f"{name}_bias", bias))] if bias is not None else []
        sizes = [_pair(given[k]) for k in _SIZES]
        args = (self._image(node), held[0], held[1] if bias is not None else None, *sizes, given["groups"])
        self.steps.append(Step(name, "operator", "aten.conv2d.default", args))
        self._inside.update({node, end})
        self._emit(end, Ref(name))

        def run(x: Tensor) -> Tensor:
            result: Tensor = _aten.conv2d.default(x, weight, bias, *sizes, given["groups"])
            return result

        self.convolutions[node] = (end, run)

    def _image(self, node: fx.Node) -> Any:
        """What a convolution of real inputs reads: where rounding is free, channels-last images."""
        return self._formats.as_model(node.args[0]) if self.exact else self._formats.last(node.args[0])

    def _emit(self, node: fx.Node, value: Ref) -> None:
        """Values of a layer or of a convolution, which writes its images channels-last."""
        self.written[node] = value
        self._formats.note(node)

    def _constant(self, wanted: str, value: Tensor) -> str:
        name = self._names.new(wanted)
        self.constants[name] = value.clone()
        return name

    # ------------------------------------------------------------------------------- products of signs

    def _product(self, node: fx.Node) -> None:
        made = find_chain(self.traced, node)
        if made is None and not self.exact:
            made = find_tail(self.traced, node, self._inside)
        if made is None:
            made = find_bias(self.traced, node, self._inside)
        self.decisions[node] = made
        self._inside.update(made.nodes if made.sign_node is None else [*made.nodes, made.sign_node])
        if made.folded is not None:
            self._thresholds(made)
        elif made.residual is None:
            self._tail(made)
        else:
            self._ends[made.end] = made

    def _thresholds(self, made: Epilogue) -> None:
        source, folded = made.source, made.folded
        assert folded is not None
        name = self._names.of_product(source)
        words, weight, padding_bits = self._operands(source, name, folded.flip)
        threshold = (folded.threshold + padding_bits).to(torch.int32)
        layer = self._packed(made, weight, padding_bits, threshold=threshold)
        step = self._layer(name, layer, words)
        self.made[source] = layer
        self._behind_thresholds(made, step, name)

    def _behind_thresholds(self, made: Epilogue, step: Ref, name: str) -> None:
        """Pooling and flattening of the words that a step makes."""
        folded = made.folded
        assert folded is not None
        channels, pixels = channels_of(self.traced, made.source), 1
        if made.pool is not None:
            mask = None
            if bool(folded.pool_any.any()):
                mask = torch.ops.bop2nd.pack_bits(0.5 - folded.pool_any.float())
            step = self._layer(self._names.new(f"{name}_pool"), PoolBits(mask, **made.pool), step)
        if made.flatten:
            pixels = self.traced.info[made.end].shape[1] // channels
            step = self._layer(self._names.new(f"{name}_flatten"), FlattenBits(), step)
        self.bits[made.end] = Bits(step.name, channels, pixels)

    def _tail(self, made: Epilogue) -> None:
        """A layer that emits dots, or scaled, shifted, added values, their sign words, or both."""
        name = self._names.of_product(made.source)
        words, weight, padding_bits = self._operands(made.source, name)
        if made.scale is None or made.shift is None:
            bias = None if made.bias is None else made.bias.clone()
            layer = self._packed(made, weight, padding_bits, bias=bias)
        else:
            per_output = {k: t.float() for k in PER_OUTPUT if (t := getattr(made, k)) is not None}
            per_output["shift"] = (made.shift - padding_bits * made.scale).float()
            emits = "both" if made.values and made.signs else "signs" if made.signs else "values"
            layer = self._packed(
                made, weight, padding_bits, emits=emits,
                low=None if made.low is None else made.low + padding_bits,
                high=None if made.high is None else made.high + padding_bits,
                relu=made.relu or None, **per_output,
            )  # fmt: skip
        residual = () if made.residual is None else (self._ref(made.residual),)
        self.made[made.source] = layer
        if layer.config.get("emits") == "both":
            both = self._layer(self._names.new(f"{name}_both"), layer, words, *residual)
            signs = self._names.new(f"{name}_signs")
            self.steps.append(Step(name, "operator", "getitem", (both, 0)))
            self.steps.append(Step(signs, "operator", "getitem", (both, 1)))
        else:
            signs = self._layer(name, layer, words, *residual).name
        if made.values:
            self._emit(made.end, Ref(name))
        if made.signs:
            self.bits[made.sign_node or made.end] = Bits(signs, channels_of(self.traced, made.source), 1)

    def _packed(
        self, made: Epilogue, weight: BinaryTensor, padding_bits: int, **rest: Any
    ) -> PackedConv2d | PackedLinear:
        source = made.source
        rest |= {
            "dtype": dtype_name(self.traced.info[source].dtype),
            "fp32_bytes": self._bytes_fp32(self._layout(source).numel, made.nodes),
        }
        if source.target is not CONVOLUTION:
            return PackedLinear(weight, padding_bits=padding_bits, **rest)
        stride, padding, dilation, groups, padding_value = source.args[2:7]
        sizes = {"stride": _pair(stride), "padding": _pair(padding), "dilation": _pair(dilation)}
        return PackedConv2d(weight, **sizes, groups=groups, padding_value=padding_value, **rest)

    def _bytes_fp32(self, n_weights: int, replaced: list[fx.Node]) -> int:
        """Bytes in fp32 of a layer's weights and of the tensors that the nodes it stands for read."""
        read = {a for node in replaced for a in node.all_input_nodes}
        tensors = [t for t in map(self.traced.tensor, read) if t is not None and t.is_floating_point()]
        return 4 * (n_weights + sum(t.numel() for t in tensors))

    def _layout(self, source: fx.Node) -> Any:
        """Shape of a product's weight, from its words and its input."""
        words, value = self.traced.tensor(source.args[1]), self.traced.info[source.args[0]]  # type: ignore[index]
        assert words is not None
        if source.target is CONVOLUTION:
            groups: Any = source.args[5]
            shape = (words.shape[0], value.shape[1] // groups, *words.shape[1:3])
        else:
            shape = (words.shape[0], value.shape[-1])
        return _Weight(words, Layout(shape, 1, value.dtype))

    def _operands(
        self, source: fx.Node, name: str, flip: Tensor | None = None
    ) -> tuple[Ref, BinaryTensor, int]:
        """The step that makes the input words, the weight in their order, and its padding bits."""
        layout = self._layout(source)
        weight = BinaryTensor(layout.words.clone(), layout.layout)
        if flip is not None:
            weight = _flip(weight, flip)
        value: Any = source.args[0]
        groups: Any = source.args[5] if source.target is CONVOLUTION else 1
        whole = groups == 1 or not (weight.shape[1] % 32)
        bits = self.bits.get(value)
        channels = self.traced.info[value].shape[1 if source.target is CONVOLUTION else -1]
        if bits is None:
            words = self._pack(value, name, source, 1 if whole else groups)
            self._reads(source, words, channels, 1, 1 if whole else groups)
            return words, weight, 0
        if not whole:
            key = (value, groups)
            if key not in self.packed:
                layer = Regroup(length=bits.channels, groups=groups)
                self.packed[key] = self._layer(self._names.new(f"{name}_regroup"), layer, Ref(bits.step)).name
            self._reads(source, Ref(self.packed[key]), channels, 1, groups)
            return Ref(self.packed[key]), weight, 0
        self._reads(source, Ref(bits.step), bits.channels, bits.pixels, 1)
        if bits.pixels > 1:
            return Ref(bits.step), *_by_pixel(weight, bits.channels, bits.pixels)
        return Ref(bits.step), weight, 0

    def _reads(self, source: fx.Node, words: Ref, channels: int, pixels: int, groups: int) -> None:
        self.read[source] = Read(words.name, channels, pixels, groups, source.target is CONVOLUTION)

    def _pack(self, value: fx.Node, name: str, source: fx.Node, groups: int) -> Ref:
        """The signs of a real value, packed once for all its readers along one axis."""
        image = source.target is CONVOLUTION
        key = (value, groups if image else 0)
        if key not in self.packed:
            length = self.traced.info[value].shape[1 if image else -1]
            layer = Pack(dim=1 if image else -1, length=length, groups=groups)
            self.packed[key] = self._layer(self._names.new(f"{name}_pack"), layer, self._ref(value)).name
        return Ref(self.packed[key])


class _Weight:
    def __init__(self, words: Tensor, layout: Layout) -> None:
        self.words, self.layout = words, layout
        self.numel = 1
        for size in layout.shape:
            self.numel *= size


_SIZES = ("stride", "padding", "dilation")


def _pair(sizes: Any) -> list[int]:
    values = [sizes] if isinstance(sizes, int) else list(sizes)
    return values * 2 if len(values) == 1 else values


def _schema_arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of an operator by their names, defaults included."""
    schema: Any = node.target._schema  # type: ignore[union-attr]
    named = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    return named | dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | node.kwargs


def _explicit(
    found: operators.Operator, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments as a file would give them back."""
    if found.schema is None:
        return args, kwargs
    return operators.unbind(found, operators.explicit(found, operators.bind(found, args, kwargs)))


def _name_of(node: fx.Node) -> str:
    """An operator's name in the list of ``operators``."""
    target: Any = node.target
    if target is operator.getitem:
        return "getitem"
    if target in _NUMBERS:
        kind = "float" if isinstance(node.meta.get("val"), (torch.SymFloat, float)) else "int"
        return f"{kind}.{_NUMBERS[target]}"
    if getattr(target, "__module__", "") == "math":
        return f"int.{target.__name__}"
    return str(target)


def _content(layer: PackedLayer) -> str:
    """A key that two layers share if they hold the same tensors and settings; empty without tensors."""
    digest = hashlib.sha256()
    found = False
    for name, tensor in _tensors(layer):
        found = True
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        copied = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)  # NumPy leaves its mark
        digest.update(copied.view(torch.uint8).numpy().tobytes())
    return f"{layer.kind} {layer.config} {digest.hexdigest()}" if found else ""


def _tensors(layer: PackedLayer) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in layer.named_buffers():
        yield name, tensor.words if isinstance(tensor, BinaryTensor) else tensor


def _by_pixel(weight: BinaryTensor, channels: int, pixels: int) -> tuple[BinaryTensor, int]:
    """A dense weight over flattened NCHW features, in the order of flattened NHWC words.

    Every pixel's channels fill whole words; the bits that are left over are 0 in weight and activation.
    """
    values = weight.unpack().unflatten(1, (channels, pixels)).transpose(1, 2)
    words = torch.ops.bop2nd.pack_bits(values.contiguous()).flatten(1)
    length = words.shape[1] * 32
    padding_bits = pixels * (words_for(channels) * 32 - channels)
    return BinaryTensor(words, Layout((weight.shape[0], length), 1, weight.dtype)), padding_bits


def _flip(weight: BinaryTensor, flip: Tensor) -> BinaryTensor:
    """Negate the weights of some outputs."""
    if not bool(flip.any()):
        return weight
    values = weight.unpack()
    mask = flip.view(-1, *[1] * (values.dim() - 1))
    return pack(torch.where(mask, -values, values), dim=1)
