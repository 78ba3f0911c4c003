"""Which traced nodes lie between two signs and can become thresholds: the rules of fusion.

A chain starts at a binary layer with binary inputs and ends where every reader is again a binary layer that
takes the sign. In between: channel-wise functions that torch rounds the same way in every memory format, at
most one max-pool, and flattening from image to row. Anything else is left as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..nn import ApproxSign, BinaryConv2d, BinaryLinear, MaxPool2d, SteSign, SwishSign
from .fold import Form, Stage

IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_NORMS: dict[type[nn.Module], int] = {nn.BatchNorm1d: 2, nn.BatchNorm2d: 4}
_ELEMENTWISE = (nn.Hardtanh, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU)
_CLIPS: tuple[Any, ...] = (
    F.hardtanh, F.relu, F.relu6, F.leaky_relu, torch.relu, torch.clamp, torch.neg, operator.neg,
)  # fmt: skip
_CLIP_METHODS = ("relu", "relu_", "clamp", "clamp_", "neg")
_ARITHMETIC: tuple[Any, ...] = (
    operator.add, operator.sub, operator.mul, operator.iadd, operator.isub, operator.imul,
    torch.add, torch.sub, torch.mul,
)  # fmt: skip
_ARITHMETIC_METHODS = ("add", "sub", "mul", "add_", "sub_", "mul_")


@dataclass(frozen=True)
class ValueInfo:
    """What the example input made of one traced value."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    form: Form | None  # None: strides that are neither contiguous nor channels-last, or another rank

    @staticmethod
    def of(value: Tensor) -> ValueInfo:
        form: Form | None = None
        if value.dim() == 2 and value.is_contiguous():
            form = "rows"
        elif value.dim() == 4 and value.is_contiguous():
            form = "pixel"
        elif value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last):
            form = "channels_last"
        return ValueInfo(tuple(value.shape), value.dtype, value.device, form)


@dataclass
class Chain:
    """The nodes from a binary layer to the value whose sign its readers take."""

    source: fx.Node
    nodes: list[fx.Node] = field(default_factory=list)
    before: list[Stage] = field(default_factory=list)
    after: list[Stage] = field(default_factory=list)
    pool: dict[str, Any] | None = None
    flatten: bool = False

    @property
    def end(self) -> fx.Node:
        return self.nodes[-1] if self.nodes else self.source


class Traced:
    """A traced model in eval mode with what is known about each value."""

    def __init__(self, module: fx.GraphModule, info: dict[fx.Node, ValueInfo]) -> None:
        self.module = module
        self.info = info

    def layer(self, node: Any) -> nn.Module | None:
        """The module a node calls, or None."""
        if isinstance(node, fx.Node) and node.op == "call_module":
            return self.module.get_submodule(str(node.target))
        return None

    def binary(self, node: Any, quantized: bool = True) -> BinaryConv2d | BinaryLinear | None:
        """The binary layer a node calls on one value, if it takes signs (``quantized``) or real values."""
        layer = self.layer(node)
        if not isinstance(layer, (BinaryConv2d, BinaryLinear)) or not is_plain(layer):
            return None
        takes_signs = layer.input_quantizer is not None
        if takes_signs and type(layer.input_quantizer) not in (SteSign, ApproxSign, SwishSign):
            return None  # it adds something before the sign
        return layer if takes_signs == quantized and len(node.all_input_nodes) == 1 else None

    def chain(self, source: fx.Node) -> Chain | None:
        """The chain that starts at a binary layer, or None where its result is needed as real values."""
        layer, info = self.binary(source), self.info.get(source)
        if layer is None or info is None or len(info.shape) != (4 if isinstance(layer, BinaryConv2d) else 2):
            return None
        chain = Chain(source)
        if layer.bias is not None:
            bias = layer.bias.detach()
            shaped = bias[:, None, None] if isinstance(layer, BinaryConv2d) else bias
            if info.form is None:
                return None
            chain.before.append(Stage(lambda x: x + shaped, info.form))
        while not self._read_as_signs(chain):
            readers = list(chain.end.users)
            if len(readers) != 1 or not self._extend(chain, readers[0]):
                return None
        return chain

    def _read_as_signs(self, chain: Chain) -> bool:
        """Whether every reader takes the sign along the axis that the chain's bits are packed on."""
        readers = [self.binary(user) for user in chain.end.users]
        images = len(self.info[chain.end].shape) == 4
        kind = BinaryConv2d if images else BinaryLinear
        return bool(readers) and all(isinstance(reader, kind) for reader in readers)

    def _extend(self, chain: Chain, node: fx.Node) -> bool:
        value = chain.end
        if node not in self.info:
            return False
        if is_flatten(node, self.layer(node)):
            chain.flatten |= len(self.info[value].shape) == 4
        elif (pool := max_pool(node, self.layer(node))) is not None:
            if chain.pool is not None or len(self.info[value].shape) != 4:
                return False
            chain.pool = pool
        else:
            stage = self.stage(node, value, chain)
            if stage is None:
                return False
            (chain.before if chain.pool is None else chain.after).append(stage)
        chain.nodes.append(node)
        return True

    def stage(self, node: fx.Node, value: fx.Node, chain: Chain) -> Stage | None:
        """A node as a channel-wise function, or None."""
        info = self.info[value]
        if info.form is None:
            return None
        channels = self.info[chain.source].shape[1]
        layer = self.layer(node)
        if layer is not None:
            norm = _is_norm(layer, len(info.shape))
            known = norm or type(layer) in IDENTITIES or type(layer) in _ELEMENTWISE
            if not known or not is_plain(layer) or len(node.all_input_nodes) != 1:
                return None
            per_channel = norm or any(p.numel() > 1 for p in layer.parameters())
            function: Callable[[Tensor], Tensor] = layer
        else:
            arguments = self._arguments(node, value, len(info.shape), channels)
            if arguments is None:
                return None
            per_channel = any(isinstance(a, Tensor) and a.numel() > 1 for a in arguments)
            function = _bind(node, value, arguments)
        if per_channel and info.shape[1] != channels:
            return None  # after flattening, a function of single features
        return Stage(function, info.form)

    def _arguments(self, node: fx.Node, value: fx.Node, rank: int, channels: int) -> list[Any] | None:
        """The arguments of a known function of one value and constants, or None."""
        names = (_CLIPS, _ARITHMETIC) if node.op == "call_function" else (_CLIP_METHODS, _ARITHMETIC_METHODS)
        clips, arithmetic = (node.target in known for known in names)
        if not clips and not (arithmetic and not node.kwargs):  # add(alpha=...) may fuse multiply and add
            return None
        if any(isinstance(v, fx.Node) for v in node.kwargs.values()):
            return None
        arguments = [a if a is value else self._constant(a, rank, channels) for a in node.args]
        known_all = all(a is not None for a in arguments) and sum(a is value for a in arguments) == 1
        fits = known_all and (node.op == "call_function" or arguments[0] is value)
        return arguments if fits else None

    def _constant(self, argument: Any, rank: int, channels: int) -> Any:
        """A number, or a parameter that varies with the channel only; None for anything else."""
        if isinstance(argument, (int, float)) and not isinstance(argument, bool):
            return argument
        if not isinstance(argument, fx.Node) or argument.op != "get_attr":
            return None
        tensor = attribute(self.module, str(argument.target)).detach()
        shape = (1,) * (rank - tensor.dim()) + tuple(tensor.shape)
        wanted = (1, channels, 1, 1)[:rank]
        fits = len(shape) == rank and all(s in (1, w) for s, w in zip(shape, wanted, strict=True))
        return tensor if fits else None


def attribute(module: nn.Module, path: str) -> Tensor:
    """A parameter or buffer by its dotted path."""
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)


def is_plain(module: nn.Module) -> bool:
    """Whether a module does what its class says: the class's ``forward``, no hooks, no parametrization."""
    cls = type(module)
    for base in (BinaryConv2d, BinaryLinear):
        if isinstance(module, base) and cls.forward is not base.forward:
            return False
    hooks = module._forward_hooks or module._forward_pre_hooks
    return not hooks and not hasattr(module, "parametrizations") and "forward" not in vars(module)


def is_flatten(node: fx.Node, layer: nn.Module | None) -> bool:
    """Whether a node flattens all axes but the first."""
    if layer is not None:
        return type(layer) is nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1) and is_plain(layer)
    if node.target is torch.flatten or (node.op == "call_method" and node.target == "flatten"):
        start, end = _bound(node, ("start_dim", "end_dim"), (0, -1))
        return (start, end) == (1, -1)
    return False


def max_pool(node: fx.Node, layer: nn.Module | None) -> dict[str, Any] | None:
    """The geometry of a 2-d max-pool, both axes written out, or None if the node is none."""
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    if layer is not None:
        if type(layer) not in (nn.MaxPool2d, MaxPool2d) or not is_plain(layer):
            return None
        values = [getattr(layer, name) for name in names]
    elif node.target in (F.max_pool2d, torch.max_pool2d):
        values = list(_bound(node, names, (None, None, 0, 1, False, False)))
    else:
        return None
    kernel, stride, padding, dilation, ceil_mode, indices = values
    sizes = [kernel, kernel if stride is None or stride == [] else stride, padding, dilation]
    pairs = [[s, s] if isinstance(s, int) else s for s in sizes]
    if indices or not isinstance(ceil_mode, bool):
        return None
    if not all(isinstance(p, (list, tuple)) and len(p) == 2 and isinstance(p[0], int) for p in pairs):
        return None
    return {**dict(zip(names, map(list, pairs), strict=False)), "ceil_mode": ceil_mode}


def _bound(node: fx.Node, names: tuple[str, ...], defaults: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments after the first, by position or keyword."""
    given = dict(zip(names, node.args[1:], strict=False)) | node.kwargs
    return tuple(given.get(name, default) for name, default in zip(names, defaults, strict=True))


def _is_norm(layer: nn.Module, rank: int) -> bool:
    return (
        isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d))
        and _NORMS.get(type(layer)) == rank
        and layer.running_mean is not None
    )


def _bind(node: fx.Node, value: fx.Node, arguments: list[Any]) -> Callable[[Tensor], Tensor]:
    target, kwargs = node.target, dict(node.kwargs)

    def call(x: Tensor) -> Tensor:
        args = [x if a is value else a for a in arguments]
        if isinstance(target, str):
            return getattr(args[0], target)(*args[1:], **kwargs)
        assert callable(target)
        return target(*args, **kwargs)

    return call
