"""Which operators lie between two signs and can become thresholds: the rules of fusion.

A chain starts at a product of signs and ends where every reader is again a product that takes the sign. In
between: channel-wise functions that torch rounds the same way in every memory format, at most one max-pool,
flattening from image to row, and axes of length 1 that come and go. Anything else is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx

from .fold import Folded, Stage, fold, fold_reals
from .image_bytes import Normalisation
from .signed_nodes import signed_image, signed_rows
from .trace import Traced

_aten = torch.ops.aten
CONVOLUTION = torch.ops.bop2nd.binary_conv2d.default
IMAGES = (CONVOLUTION, signed_image)

# Operators whose result is one correctly rounded operation, or a choice, for each element by itself: the same
# bits wherever an element lies. (tanh, say, may round by its position in a vector.)
_ELEMENTWISE = {
    getattr(getattr(_aten, name), overload)
    for name, overload in (
        entry.split(".")
        for entry in [
            "abs.default",
            "add.Scalar",
            "add.Tensor",
            "ceil.default",
            "clamp.default",
            "clamp.Tensor",
            "clamp_max.default",
            "clamp_max.Tensor",
            "clamp_min.default",
            "clamp_min.Tensor",
            "div.Scalar",
            "div.Tensor",
            "floor.default",
            "fmax.default",
            "fmin.default",
            "hardtanh.default",
            "leaky_relu.default",
            "maximum.default",
            "minimum.default",
            "mul.Scalar",
            "mul.Tensor",
            "neg.default",
            "prelu.default",
            "_prelu_kernel.default",
            "relu.default",
            "relu6.default",
            "round.default",
            "rsub.Scalar",
            "rsub.Tensor",
            "sign.default",
            "sub.Scalar",
            "sub.Tensor",
            "threshold.default",
            "trunc.default",
            "_to_copy.default",
        ]
    )
}
# Of these and batch norm each result is monotone in the first operand, rounding included (a sum and a product
# in both).
MONOTONE = {
    overload
    for name in ("add", "clamp", "clamp_max", "clamp_min", "div", "hardtanh", "maximum", "minimum", "mul")
    + ("neg", "relu", "relu6", "rsub", "sub")
    for overload in _ELEMENTWISE
    if overload._opname == name
}
_COMMUTE = {_aten.add.Tensor, _aten.mul.Tensor, _aten.maximum.default, _aten.minimum.default}
_UNIT_AXES = (_aten.squeeze.dim, _aten.squeeze.dims, _aten.unsqueeze.default, _aten.select.int)
_POOL = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")


@dataclass
class Epilogue:
    """What becomes of a product's dots, and the nodes that this stands for.

    Either ``folded`` (with pool and flattening): sign words only; or ``act(clamp(dot, low, high) * scale +
    shift + residual) + post_shift`` (fp64 ``[C]``, applied in fp32), whose values, signs (with ``sign_shift``
    added before, which ``sign_node`` did) or both are emitted; or the dots, with a ``bias``.
    """

    source: fx.Node
    nodes: list[fx.Node] = field(default_factory=list)
    folded: Folded | None = None
    pool: dict[str, Any] | None = None
    flatten: bool = False
    bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    residual: fx.Node | None = None
    low: int | None = None
    high: int | None = None
    relu: bool = False
    slope: Tensor | None = None
    post_shift: Tensor | None = None
    sign_shift: Tensor | None = None
    sign_node: fx.Node | None = None
    signs: bool = False
    values: bool = True

    @property
    def end(self) -> fx.Node:
        return self.nodes[-1] if self.nodes else self.source


def channels_of(traced: Traced, source: fx.Node) -> int:
    return traced.info[source].shape[1 if source.target in IMAGES else -1]


def reach_of(traced: Traced, source: fx.Node) -> int:
    """The largest dot of a product."""
    args: Any = source.args
    value, words = traced.info[args[0]], traced.tensor(args[1])
    assert words is not None  # a product of images has its groups in the same place, of signs or not
    if source.target not in IMAGES:
        return value.shape[-1]
    return value.shape[1] // int(args[5]) * words.shape[1] * words.shape[2]


def find_chain(traced: Traced, source: fx.Node, bytes: Normalisation | None = None) -> Epilogue | None:
    """Thresholds for a product, or None where its result is needed as real values.

    ``bytes``: what the bytes stand for that a product of signs and images reads; the thresholds are then of
    its sums of integers. Without, those of a product of signs and real numbers are fp32.
    """
    info = traced.info[source]
    real = source.target in (signed_image, signed_rows) and bytes is None
    if real and info.dtype != torch.float32:
        return None
    chain = Epilogue(source, values=False, signs=True)
    before: list[Stage] = []
    after: list[Stage] = []
    while not _read_as_signs(traced, chain):
        readers = list(chain.end.users)
        if len(readers) != 1:
            return None
        node, value = readers[0], chain.end
        rank = len(traced.info[value].shape)
        if node not in traced.info or (node.args[:1] != (value,) and node.target in _UNIT_AXES):
            return None
        if source.target in IMAGES and is_flatten(traced, node):
            chain.flatten |= rank > 2
        elif source.target in IMAGES and _is_unit_axis(traced, node):
            pass
        elif (pool := max_pool(node)) is not None:
            if chain.pool is not None or rank != 4 or source.target not in IMAGES or real:
                return None
            chain.pool = pool
        elif real and not (_is_monotone(node, value) and traced.info[node].dtype == torch.float32):
            return None
        elif (stage := stage_of(traced, node, value, source)) is not None:
            (before if chain.pool is None else after).append(stage)
        else:
            return None
        chain.nodes.append(node)
    channels = channels_of(traced, source)
    if real:
        chain.folded = fold_reals(channels, info.device, before)
        return None if chain.folded is None else chain
    pooled = chain.pool is not None
    reach = reach_of(traced, source)
    if bytes is not None:
        reach *= bytes.largest
        before.insert(0, Stage(bytes.real, "rows"))
    chain.folded = fold(channels, reach, info.dtype, info.device, before, after, pooled)
    return None if chain.folded is None else chain


def _read_as_signs(traced: Traced, chain: Epilogue) -> bool:
    """Whether every reader takes the sign along the axis that the chain's bits are packed on."""
    value = chain.end
    image = chain.source.target in IMAGES
    wanted = 4 if image and not chain.flatten else 2 if image else None
    if wanted is not None and len(traced.info[value].shape) != wanted:
        return False
    return bool(value.users) and all(
        traced.product(reader) and _reads(reader, value) and (reader.target is CONVOLUTION) == (wanted == 4)
        for reader in value.users
    )


def _reads(product: fx.Node, value: fx.Node) -> bool:
    return product.args[0] is value and product.args[1] is not value


def sign_readers(traced: Traced, value: fx.Node) -> list[fx.Node]:
    return [reader for reader in value.users if traced.product(reader) and _reads(reader, value)]


# ----------------------------------------------------------------------------------------- single operators


def stage_of(traced: Traced, node: fx.Node, value: fx.Node, source: fx.Node) -> Stage | None:
    """A node as a function of each channel of the values that a product's dots have become, or None."""
    info, image = traced.info[value], source.target in IMAGES
    channels = channels_of(traced, source)
    form = info.form if image else "rows" if info.form is not None and info.form != "channels_last" else None
    if (
        form is None
        or sum(a is value for a in node.args) != 1
        or any(a is value for a in node.kwargs.values())
    ):
        return None
    axis = 1 if image else len(info.shape) - 1
    if node.target is _aten.batch_norm.default:
        arguments = _norm_arguments(traced, node, value, channels, axis, len(info.shape))
    elif is_elementwise(node):
        arguments = [
            a if a is value else _per_channel(traced, node, a, info.shape, axis, form) for a in node.args
        ]
    else:
        return None
    if arguments is None or any(a is _UNKNOWN for a in arguments):
        return None
    if info.shape[axis] != channels and any(isinstance(a, Tensor) and a.numel() > 1 for a in arguments):
        return None  # after flattening, a function of single features
    return Stage(_bind(node, value, arguments), form)


def is_elementwise(node: fx.Node) -> bool:
    """Whether an operator makes the same bits of an element wherever it lies."""
    return node.target in _ELEMENTWISE and not _rounds_otherwise(node)


def _is_monotone(node: fx.Node, value: fx.Node) -> bool:
    if node.target is _aten.batch_norm.default:
        return True
    return node.target in MONOTONE and (node.args[0] is value or node.target in _COMMUTE)


def _rounds_otherwise(node: fx.Node) -> bool:
    """add(alpha=...) may fuse multiply and add; casts may leave the floating types."""
    if node.target is _aten._to_copy.default:
        return not node.kwargs.get("dtype", torch.float32).is_floating_point or len(node.kwargs) != 1  # type: ignore[union-attr]
    return bool(node.kwargs) and dict(node.kwargs) != {"alpha": 1}


_UNKNOWN: Any = object()


def _per_channel(
    traced: Traced, node: fx.Node, argument: Any, shape: tuple[int, ...], axis: int, form: str
) -> Any:
    """A number, or a constant tensor that varies with the channel only."""
    if not isinstance(argument, fx.Node):
        return argument if isinstance(argument, (int, float, bool, type(None))) else _UNKNOWN
    tensor = traced.tensor(argument)
    if tensor is None:
        return _UNKNOWN
    if node.target is _aten.prelu.default:
        return tensor if tensor.numel() == 1 or axis == 1 else _UNKNOWN
    if tensor.dim() > len(shape):
        return _UNKNOWN
    padded = (1,) * (len(shape) - tensor.dim()) + tuple(tensor.shape)
    if not all(size == 1 or (i == axis and size == shape[i]) for i, size in enumerate(padded)):
        return _UNKNOWN
    return tensor.reshape(-1) if form == "rows" and tensor.dim() > 1 else tensor


def _norm_arguments(
    traced: Traced, node: fx.Node, value: fx.Node, channels: int, axis: int, rank: int
) -> list[Any] | None:
    statistics = [a if a is None else traced.tensor(a) for a in node.args[1:5]]
    missing = any(a is not None and t is None for a, t in zip(node.args[1:5], statistics, strict=True))
    if node.args[0] is not value or node.args[5] is not False or axis != 1 or missing:
        return None
    if rank not in (2, 3, 4) or any(t is not None and t.shape != (channels,) for t in statistics):
        return None
    return [value, *statistics, *node.args[5:]]


def _bind(node: fx.Node, value: fx.Node, arguments: list[Any]) -> Callable[[Tensor], Tensor]:
    target, kwargs = node.target, dict(node.kwargs)
    place = next(i for i, a in enumerate(arguments) if a is value)

    def call(x: Tensor) -> Tensor:
        result: Tensor = target(*arguments[:place], x, *arguments[place + 1 :], **kwargs)  # type: ignore[operator]
        return result

    return call


def is_flatten(traced: Traced, node: fx.Node) -> bool:
    """Whether a node flattens all axes but the first."""
    if node.target is not _aten.flatten.using_ints:
        return False
    value, first, last = cast("Any", (*node.args, *(0, -1)[len(node.args) - 1 :]))
    return first == 1 and last in (-1, len(traced.info[value].shape) - 1)


def _is_unit_axis(traced: Traced, node: fx.Node) -> bool:
    """Whether a node takes or gives axis 2, of length 1: between an image of one row and a series."""
    if node.target not in _UNIT_AXES:
        return False
    axes = node.args[1] if isinstance(node.args[1], (list, tuple)) else [node.args[1]]
    before, after = traced.info[node.args[0]].shape, traced.info[node].shape  # type: ignore[index]
    image, series = (after, before) if node.target is _aten.unsqueeze.default else (before, after)
    return len(image) == 4 and len(series) == 3 and image[2] == 1 and [a % 4 for a in axes] == [2]  # type: ignore[operator]


def max_pool(node: fx.Node) -> dict[str, Any] | None:
    """The geometry of a 2-d max-pool, both axes written out, or None if the node is none."""
    if node.target is not _aten.max_pool2d.default:
        return None
    given = dict(zip(_POOL, node.args[1:], strict=False)) | node.kwargs
    kernel = _pair(given["kernel_size"])
    return {
        "kernel_size": kernel,
        "stride": _pair(given.get("stride") or kernel),
        "padding": _pair(given.get("padding", 0)),
        "dilation": _pair(given.get("dilation", 1)),
        "ceil_mode": bool(given.get("ceil_mode", False)),
    }


def _pair(size: Any) -> list[int]:
    sizes = [size] if isinstance(size, int) else list(size)
    return sizes * 2 if len(sizes) == 1 else sizes
