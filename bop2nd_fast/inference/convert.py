"""convert(model, example_input): trace, find what lies between signs, write the packed graph."""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from ..binary_tensor import BinaryTensor, Layout, pack
from ..kernels.geometry import words_for
from ..nn import BinaryConv2d, BinaryLinear
from .chains import IDENTITIES, Chain, Traced, ValueInfo, attribute, is_plain, max_pool
from .fold import Folded, fold
from .layers import (
    Constant,
    FlattenBits,
    Pack,
    PackedConv2d,
    PackedLinear,
    RealConv2d,
    RealLinear,
    Regroup,
    dtype_name,
)
from .packed_model import InputSpec, PackedModel, Ref, Step, fp32_bytes, map_leaves
from .pooling import MaxPool, PoolBits
from .real_convolutions import real_convolution, take_in_norm
from .tails import Tail, find_tail


class ConversionError(ValueError):
    """The model cannot be traced, or the packed model did not reproduce its result on the example."""


@torch.inference_mode(False)
@torch.no_grad()
def convert(
    model: nn.Module,
    example_input: Tensor | Sequence[Tensor],
    leaves: Sequence[type[nn.Module]] = (),
    exact: bool = True,
) -> PackedModel:
    """A packed copy of a model, for inference: the same predictions bit for bit, bits between binary layers.

    The model is copied and the copy put in eval mode, so a model in training mode may be given; it is not
    changed. Chains of binary layers (with max-pool, batch norm, clipping, flattening between them) are fused
    into XNOR-popcount layers with one threshold per channel; every other module runs as torch runs it. A
    module that a file cannot hold is converted too: then ``PackedModel.save`` raises and names it.

    Args:
        model: traceable by ``torch.fx``. Modules of torch and of this package are not looked into.
        example_input: one tensor, or one for every argument, of the shape, dtype and device to be predicted
            on. Batch and image size may differ later.
        leaves: more module classes not to look into (say, because their control flow cannot be traced).
        exact: False lets a layer whose real values are needed (in residual networks: every layer) compute
            batch norm, residual addition and the next signs in its own kernel, and real convolutions take in
            batch norm and run on channels-last images. That is faster, and rounds differently: a value near
            0 may take the other sign.

    Raises:
        ConversionError: the model cannot be traced, or (a defect of this package) the packed model's
            result differs on the example.
    """
    examples = (example_input,) if isinstance(example_input, Tensor) else tuple(example_input)
    traced, expected = _trace(model, examples, tuple(leaves))
    packed = _Writer(traced, examples, exact).write()
    result = packed(*_clones(examples))
    if not (_same(result, expected) if exact else _alike(result, expected)):
        raise ConversionError(
            "the packed model differs from the trained one on the example input; please report this"
        )
    return packed.prepare()


# ------------------------------------------------------------------------------------------- tracing


class _Tracer(fx.Tracer):
    def __init__(self, leaves: tuple[type[nn.Module], ...]) -> None:
        super().__init__()
        self._leaves = (BinaryConv2d, BinaryLinear, *leaves)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = type(m).__module__.startswith("bop2nd_fast.nn.")
        return isinstance(m, self._leaves) or ours or super().is_leaf_module(m, module_qualified_name)


class _Recorder(fx.Interpreter):
    """Runs the traced model on the example and notes every tensor's shape, dtype and memory format."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.info: dict[fx.Node, ValueInfo] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.info[n] = ValueInfo.of(result)
        return result


def _trace(
    model: nn.Module, examples: tuple[Tensor, ...], leaves: tuple[type[nn.Module], ...]
) -> tuple[Traced, Any]:
    tracer = _Tracer(leaves)
    root = copy.deepcopy(model).eval()
    if tracer.is_leaf_module(root, ""):
        root = nn.Sequential(root)
    try:
        graph = tracer.trace(root)
    except (fx.proxy.TraceError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ConversionError(
            f"torch.fx cannot trace {type(model).__name__}: {error}. Name the class of the module at fault "
            "in `leaves` to keep it as it is"
        ) from error
    module = fx.GraphModule(root, graph)
    recorder = _Recorder(module)
    expected = map_leaves(recorder.run(*_clones(examples)), lambda leaf: leaf)  # fx's containers are its own
    _flatten_reshapes(module.graph, recorder.info)
    return Traced(module, recorder.info), expected


def _flatten_reshapes(graph: fx.Graph, info: dict[fx.Node, ValueInfo]) -> None:
    """Write ``x.view(x.size(0), -1)`` and ``x.reshape(x.shape[0], -1)`` as ``torch.flatten(x, 1)``."""
    for node in list(graph.nodes):
        if node.op != "call_method" or node.target not in ("view", "reshape") or len(node.args) != 3:
            continue
        value, rows, rest = node.args
        if rest == -1 and value in info and _is_batch_size(rows, value):
            with graph.inserting_before(node):
                flat = graph.call_function(torch.flatten, (value, 1))
            info[flat] = info[node]
            node.replace_all_uses_with(flat)
            graph.erase_node(node)
    for node in reversed(list(graph.nodes)):  # sizes nobody reads any more
        reads_size = node.target in ("size", getattr, operator.getitem)
        if reads_size and node.op in ("call_method", "call_function") and not node.users:
            graph.erase_node(node)


def _is_batch_size(node: Any, value: fx.Node) -> bool:
    if not isinstance(node, fx.Node):
        return False
    if node.op == "call_method" and node.target == "size":
        return node.args == (value, 0)
    if node.target is not operator.getitem or node.args[1] != 0:
        return False
    source = node.args[0]
    shape = isinstance(source, fx.Node) and source.target is getattr and source.args == (value, "shape")
    return shape or (isinstance(source, fx.Node) and source.target == "size" and source.args == (value,))


def _clones(examples: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.clone() for x in examples)


def _same(a: Any, b: Any) -> bool:
    """Equal in structure and bits of value (NaN equals NaN)."""
    (left, spec), (right, other) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    return spec == other and all(
        torch.equal(x.nan_to_num(0), y.nan_to_num(0)) and torch.equal(x.isnan(), y.isnan())
        if isinstance(x, Tensor) and isinstance(y, Tensor) and x.is_floating_point()
        else bool((x == y).all())
        if isinstance(x, Tensor)
        else x == y
        for x, y in zip(left, right, strict=True)
    )


def _alike(a: Any, b: Any) -> bool:
    """Equal in structure, shapes and dtypes."""
    (left, spec), (right, other) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    kinds = ([(x.shape, x.dtype) if isinstance(x, Tensor) else x for x in leaves] for leaves in (left, right))
    return spec == other and next(kinds) == next(kinds)


# ------------------------------------------------------------------------------------------- writing


class _Bits:
    """The words a chain ends in: the step that makes them, and the image they were flattened from."""

    def __init__(self, step: str, channels: int, pixels: int) -> None:
        self.step, self.channels, self.pixels = step, channels, pixels


class _Writer:
    """Writes the steps of the packed model in the order of the traced nodes."""

    def __init__(self, traced: Traced, examples: tuple[Tensor, ...], exact: bool) -> None:
        self.traced = traced
        self.examples = examples
        self.exact = exact
        self.tails: dict[fx.Node, Tail] = {}  # by their last node, where they are written
        self.steps: list[Step] = []
        self.layers: dict[str, nn.Module] = {}
        self.names: dict[fx.Node, str] = {}
        self.bits: dict[fx.Node, _Bits] = {}
        self.fused: set[fx.Node] = set()

    def write(self) -> PackedModel:
        for node in self.traced.module.graph.nodes:
            if node in self.tails:
                self._tail(self.tails[node])
            elif node not in self.fused:
                self._node(node)
        inputs = [InputSpec(tuple(x.shape), x.dtype) for x in self.examples]
        return PackedModel(self.steps, self.layers, inputs)

    def _node(self, node: fx.Node) -> None:
        self.names[node] = node.name
        if node.op == "placeholder":
            self.steps.append(Step(node.name, "input"))
        elif node.op == "get_attr":
            value = attribute(self.traced.module, str(node.target)).detach()
            self._layer(node.name, Constant(value), ())
        elif (pool := max_pool(node, self.traced.layer(node))) is not None and node in self.traced.info:
            self._layer(node.name, MaxPool(**pool), (self._ref(node.all_input_nodes[0]),))
        elif node.op == "call_module":
            self._module(node)
        elif node.target is getattr and node.args[1] == "shape":  # a file holds methods, not attributes
            self.steps.append(Step(node.name, "method", "size", (self._ref(node.all_input_nodes[0]),)))
        else:
            kind: Any = {"call_function": "function", "call_method": "method", "output": "output"}[node.op]
            target = "" if kind == "output" else node.target
            args, kwargs = self._arguments(node)
            of_sizes = not any(isinstance(a, torch.dtype) for a in (*args, *kwargs.values()))
            if not self.exact and kind == "method" and target == "view" and of_sizes:
                target = "reshape"  # of channels-last images, which no view can flatten
            self.steps.append(Step(node.name, kind, target, args, kwargs))

    def _ref(self, node: fx.Node) -> Ref:
        return Ref(self.names[node])

    def _arguments(self, node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        refs: Any = self._ref  # fx wants nodes or constants; a Ref is neither
        return tuple(fx.node.map_arg(node.args, refs)), dict(fx.node.map_arg(dict(node.kwargs), refs))

    def _layer(self, name: str, layer: nn.Module, args: tuple[Any, ...], **kwargs: Any) -> str:
        key = f"{name}_" if hasattr(nn.ModuleDict, name) else name  # such as "update"
        self.layers[key] = layer
        self.steps.append(Step(name, "layer", key, args, kwargs))
        return name

    def _module(self, node: fx.Node) -> None:
        layer = self.traced.layer(node)
        assert layer is not None
        if type(layer) in IDENTITIES and is_plain(layer) and len(node.all_input_nodes) == 1:
            self.names[node] = self.names[node.all_input_nodes[0]]
        elif self.traced.binary(node) is not None:
            self._binary(node)
        elif self.traced.binary(node, quantized=False) is not None:
            self._real_input(node)
        elif not self.exact and (convolution := real_convolution(self.traced, node)) is not None:
            end, folded = take_in_norm(self.traced, node, convolution)
            self._layer(node.name, folded, (self._image(node),))
            self.names[end] = node.name
            self.fused.add(end)
        else:
            args, kwargs = self._arguments(node)
            self._layer(node.name, layer, args, **kwargs)

    def _real_input(self, node: fx.Node) -> None:
        layer = self.traced.binary(node, quantized=False)
        assert layer is not None
        config: dict[str, Any] = {"fp32_bytes": fp32_bytes(layer)}
        cls: type[RealConv2d | RealLinear] = RealLinear
        if isinstance(layer, BinaryConv2d):
            cls = RealConv2d
            config |= _geometry(layer)
        packed = cls(_weight(layer), bias=_detached(layer.bias), **config)
        image = isinstance(layer, BinaryConv2d)
        value = self._image(node) if image else self._ref(node.all_input_nodes[0])
        self._layer(node.name, packed, (value,))

    def _image(self, node: fx.Node) -> Ref:
        """What a convolution of real inputs reads: where rounding is free, channels-last images."""
        value = node.all_input_nodes[0]
        if self.exact or self.traced.info[value].form != "pixel":
            return self._ref(value)
        last = f"{node.name}_last"
        self.steps.append(
            Step(last, "method", "contiguous", (self._ref(value),), {"memory_format": torch.channels_last})
        )
        return Ref(last)

    def _binary(self, node: fx.Node) -> None:
        layer = self.traced.binary(node)
        assert layer is not None
        chain = self.traced.chain(node)
        folded = None if chain is None else self._fold(layer, chain)
        if folded is None and not self.exact:
            tail = find_tail(self.traced, node, self.fused)
            if tail is not None and (tail.nodes or tail.signs):
                self.fused.update(tail.nodes)
                self.tails[tail.end] = tail
                if tail.end is node:
                    self._tail(tail)
                return
        dtype = dtype_name(self.traced.info[node].dtype)
        config: dict[str, Any] = {"dtype": dtype, "fp32_bytes": fp32_bytes(layer)}
        weight = _weight(layer)
        if folded is not None:
            weight = _flip(weight, folded.flip)
        words, weight, padding_bits = self._words_for(node, layer, weight)
        tensors: dict[str, Any] = {"bias": _detached(layer.bias)}
        if chain is not None and folded is not None:
            tensors = {"threshold": (folded.threshold + padding_bits).to(torch.int32)}
            folded_layers = (self.traced.layer(n) for n in chain.nodes)
            config["fp32_bytes"] += sum(fp32_bytes(m) for m in folded_layers if m is not None)
        packed: PackedConv2d | PackedLinear
        if isinstance(layer, BinaryConv2d):
            packed = PackedConv2d(weight, **tensors, **config, **_geometry(layer))
        else:
            packed = PackedLinear(weight, **tensors, **config, padding_bits=padding_bits)
        step = self._layer(node.name, packed, (Ref(words),))
        if chain is not None and folded is not None:
            self._finish_chain(chain, folded, step)

    def _tail(self, tail: Tail) -> None:
        """A layer that emits scaled, shifted, added values, their sign words, or both."""
        layer = self.traced.binary(tail.source)
        assert layer is not None
        words, weight, padding_bits = self._words_for(tail.source, layer, _weight(layer))
        fused = (self.traced.layer(n) for n in tail.nodes)
        config: dict[str, Any] = {
            "dtype": dtype_name(self.traced.info[tail.source].dtype),
            "fp32_bytes": fp32_bytes(layer) + sum(fp32_bytes(m) for m in fused if m is not None),
            "emits": "both" if tail.values and tail.signs else "signs" if tail.signs else "values",
        }
        shift = tail.shift - padding_bits * tail.scale
        tensors = {"scale": tail.scale.float(), "shift": shift.float()}
        packed: PackedConv2d | PackedLinear
        if isinstance(layer, BinaryConv2d):
            packed = PackedConv2d(weight, **tensors, **config, **_geometry(layer))
        else:
            packed = PackedLinear(weight, **tensors, **config, padding_bits=padding_bits)
        residual = () if tail.residual is None else (self._ref(tail.residual),)
        name = self.names[tail.end] = tail.end.name
        if config["emits"] == "both":
            both, signs = f"{name}_both", f"{name}_signs"
            self._layer(both, packed, (Ref(words), *residual))
            self.steps.append(Step(name, "function", operator.getitem, (Ref(both), 0)))
            self.steps.append(Step(signs, "function", operator.getitem, (Ref(both), 1)))
        else:
            signs = self._layer(name, packed, (Ref(words), *residual))
        if tail.signs:
            self.bits[tail.end] = _Bits(signs, self.traced.info[tail.end].shape[1], 1)

    def _fold(self, layer: BinaryConv2d | BinaryLinear, chain: Chain) -> Folded | None:
        info = self.traced.info[chain.source]
        reach = layer.weight[0].numel()
        pooled = chain.pool is not None
        return fold(info.shape[1], reach, info.dtype, info.device, chain.before, chain.after, pooled)

    def _finish_chain(self, chain: Chain, folded: Folded, step: str) -> None:
        """The steps between the layer's bits and those its readers take."""
        channels, pixels = self.traced.info[chain.source].shape[1], 1
        if chain.pool is not None:
            mask = None
            if bool(folded.pool_any.any()):
                mask = torch.ops.bop2nd.pack_bits(0.5 - folded.pool_any.float())
            step = self._layer(f"{chain.source.name}_pool", PoolBits(mask, **chain.pool), (Ref(step),))
        if chain.flatten:
            pixels = self.traced.info[chain.end].shape[1] // channels
            step = self._layer(f"{chain.source.name}_flatten", FlattenBits(), (Ref(step),))
        self.fused.update(chain.nodes)
        self.bits[chain.end] = _Bits(step, channels, pixels)

    def _words_for(
        self, node: fx.Node, layer: BinaryConv2d | BinaryLinear, weight: BinaryTensor
    ) -> tuple[str, BinaryTensor, int]:
        """The step that makes the layer's input words, the weight in their order, and its padding bits."""
        value = node.all_input_nodes[0]
        groups = layer.groups if isinstance(layer, BinaryConv2d) else 1
        bits = self.bits.get(value)
        if bits is None:
            conv = isinstance(layer, BinaryConv2d)
            signs = Pack(dim=1 if conv else -1, length=groups * weight.shape[1], groups=groups)
            return self._layer(f"{node.name}_pack", signs, (self._ref(value),)), weight, 0
        if groups > 1 and (bits.channels // groups) % 32:
            regroup = Regroup(length=bits.channels, groups=groups)
            return self._layer(f"{node.name}_regroup", regroup, (Ref(bits.step),)), weight, 0
        if bits.pixels > 1:
            return bits.step, *_by_pixel(weight, bits.channels, bits.pixels)
        return bits.step, weight, 0


def _geometry(layer: BinaryConv2d) -> dict[str, Any]:
    return {
        "stride": list(layer.stride),
        "padding": list(layer.padding),
        "dilation": list(layer.dilation),
        "groups": layer.groups,
        "padding_value": layer.padding_value,
    }


def _weight(layer: BinaryConv2d | BinaryLinear) -> BinaryTensor:
    return layer.weight.sharing()


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


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
