"""One way to say a thing: exported graphs, rewritten so that the rules of fusion see few operators.

What depends on no input becomes a constant. Checks and operators that change nothing go. Batch norm is one
operator, so is flattening; a view is a reshape (which works on any strides); our products, and operators of
which only the first result is read, stand for that result.
"""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from . import operators
from .signed_nodes import SIGNED, signed_value

_aten = torch.ops.aten
_bop2nd = torch.ops.bop2nd
_PRODUCTS = (_bop2nd.binary_conv2d.default, _bop2nd.binary_linear.default)
_VIEWS = (_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default, _aten.view_copy.default)
_COPIES = (_aten.clone.default, _aten.contiguous.default)
_UNCHANGED = (
    _aten.alias.default, _aten.alias_copy.default, _aten.detach.default, _aten.detach_copy.default,
    _aten.lift_fresh.default, _aten.lift_fresh_copy.default, _aten.lift.default, _aten.positive.default,
)  # fmt: skip
_CUTS = (_aten.expand.default, _aten.slice.Tensor)
_FIRST_ONLY = {_aten.max_pool2d_with_indices.default: _aten.max_pool2d.default}
GROWTH = 4096  # values that a constant may have more than four times what it is made from


class Canonical:
    """Rewrites a graph in place. ``constants`` gets the values that depend on no input."""

    def __init__(self, graph: fx.Graph, constants: dict[fx.Node, Any]) -> None:
        self.graph, self.constants = graph, constants

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.op == "call_function":
                self._node(node)
        for node in reversed(list(self.graph.nodes)):
            if not node.users and node.op not in ("output", "placeholder"):
                self.graph.erase_node(node)
                self.constants.pop(node, None)

    def _node(self, node: fx.Node) -> None:
        target = node.target
        name = str(target)
        if "_assert" in name or "sym_constrain" in name:
            self.graph.erase_node(node)
        elif target is operator.getitem and node.args[1] == 0 and self._is_first(node.args[0]):
            self._replace(node, node.args[0])
        elif target in SIGNED:
            signed_value(node)
        elif target is _aten._native_batch_norm_legit_no_training.default:
            self._batch_norm(node)
        elif self._foldable(node):
            self._fold(node)
        elif target in _UNCHANGED or (target is _aten.dropout.default and node.args[2] is False):
            self._replace(node, node.args[0])
        elif target in _COPIES:
            self._copy(node)
        elif target is _aten._to_copy.default:
            self._cast(node)
        elif target in _VIEWS:
            self._view(node)
        elif target in _CUTS and sizes_of(node) == sizes_of(node.args[0]):
            self._replace(node, node.args[0])
        elif target in _FIRST_ONLY and all(_reads_first(user) for user in node.users):
            node.target = _FIRST_ONLY[target]

    def _replace(self, node: fx.Node, value: Any) -> None:
        node.replace_all_uses_with(value)
        self.graph.erase_node(node)

    def _is_first(self, source: Any) -> bool:
        """Whether the node now stands for its first result."""
        if source.target in _PRODUCTS:
            source.meta["val"] = source.meta["val"][0] if _several(source) else source.meta["val"]
            return True
        return source.target in (*_FIRST_ONLY.values(), _aten.batch_norm.default)

    def _batch_norm(self, node: fx.Node) -> None:
        value, weight, bias, mean, var, momentum, eps = node.args
        node.target = _aten.batch_norm.default
        node.args = (value, weight, bias, mean, var, False, momentum, eps, True)
        node.meta["val"] = node.meta["val"][0]

    # ------------------------------------------------------------------------------------- constants

    def _foldable(self, node: fx.Node) -> bool:
        if not all(a in self.constants for a in node.all_input_nodes):
            return False
        if node.target is _bop2nd.unpack_bits.default:  # weights of a real product stay packed
            return not all(self._is_weight_of(user, node) for user in node.users)
        name = str(node.target)
        ours = name.startswith("bop2nd.")
        return ours or name in operators.NAMES or node.target is operator.getitem

    def _is_weight_of(self, user: fx.Node, weight: fx.Node) -> bool:
        """Whether ``user`` is a product with this weight, packed along axis 1, and a constant bias."""
        real = user.target in (_aten.conv2d.default, _aten.linear.default)
        bias = [a for a in user.args[2:3] if a is not None]
        packed = len(weight.args) > 2 and bool(weight.args[2] == 1)
        return real and packed and user.args[1] is weight and all(a in self.constants for a in bias)

    def _fold(self, node: fx.Node) -> None:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.constants.__getitem__)
        value = node.target(*args, **kwargs)  # type: ignore[operator]
        if node.target in _PRODUCTS:
            value = value[0]
        if isinstance(value, Tensor):
            read = sum(t.numel() for t in self._read(node))
            if value.numel() > 4 * read + GROWTH:
                return
            if value.numel() < value.untyped_storage().nbytes() // value.element_size():
                value = value.clone()  # a part does not keep the whole
        self.constants[node] = value

    def _read(self, node: fx.Node) -> list[Tensor]:
        values = (self.constants[a] for a in node.all_input_nodes)
        return [v for v in values if isinstance(v, Tensor)]

    # ------------------------------------------------------------------------------------- copies and views

    def _copy(self, node: fx.Node) -> None:
        layout = node.kwargs.get("memory_format", torch.preserve_format)
        if node.target is _aten.contiguous.default:
            layout = node.kwargs.get("memory_format", torch.contiguous_format)
        if layout is torch.preserve_format:
            self._replace(node, node.args[0])
            return
        node.target = _aten.contiguous.default
        node.kwargs = {} if layout is torch.contiguous_format else {"memory_format": layout}

    def _cast(self, node: fx.Node) -> None:
        source: Any = node.args[0]
        kwargs = {k: v for k, v in node.kwargs.items() if k in ("dtype", "memory_format")}
        if kwargs.get("memory_format") is torch.preserve_format:
            del kwargs["memory_format"]
        if kwargs.get("dtype") is source.meta["val"].dtype:
            del kwargs["dtype"]
        if kwargs:
            node.kwargs = kwargs
        else:
            self._replace(node, node.args[0])

    def _view(self, node: fx.Node) -> None:
        source: Any = node.args[0]
        before, after = sizes_of(source), sizes_of(node)
        if before == after:
            self._replace(node, source)
            return
        if source.target is _aten.contiguous.default and not source.kwargs:
            node.args = (source.args[0], *node.args[1:])  # a reshape makes the copy where it needs one
            source = node.args[0]
        node.target = _aten.reshape.default
        flat = _flattened(before, after)
        if flat is not None:
            node.target, node.args = _aten.flatten.using_ints, (source, *flat)
            return
        asked = list(node.args[1])  # type: ignore[arg-type]
        open_axes = [i for i, size in enumerate(asked) if isinstance(size, fx.Node)]
        if (
            open_axes and -1 not in asked
        ):  # one size follows from the others: the one that takes most to compute
            computed = [i for i in open_axes if not isinstance(after[i], sympy.Symbol)]
            asked[(computed or open_axes)[-1]] = -1
        node.args = (source, asked)


def sizes_of(node: Any) -> tuple[Any, ...]:
    """Sizes of a value as integers and expressions of the inputs' sizes."""
    return tuple(getattr(getattr(s, "node", s), "expr", s) for s in node.meta["val"].shape)


def _flattened(before: tuple[Any, ...], after: tuple[Any, ...]) -> tuple[int, int] | None:
    """The first and last axis that a view makes one, or None if it does anything else."""
    joined = len(before) - len(after)
    if joined < 1:
        return None
    for first in range(len(after)):
        last = first + joined
        if before[:first] == after[:first] and before[last + 1 :] == after[first + 1 :]:
            product = sympy.Integer(1)
            for size in before[first : last + 1]:
                product *= size
            if sympy.expand(product - after[first]) == 0:
                return first, last
    return None


def _several(node: fx.Node) -> bool:
    return isinstance(node.meta["val"], (tuple, list))


def _reads_first(user: fx.Node) -> bool:
    return user.target is operator.getitem and bool(user.args[1] == 0)
