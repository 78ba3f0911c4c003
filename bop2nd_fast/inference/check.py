"""What conversion is compared with: the model itself, also on other sizes; and every rounding allowed.

Bounds for ``exact=False``, on the example's own activations:

* a layer with scale, shift and residual: ``16 eps (|scale| reach + |shift|) + 4 eps |residual|`` per value,
  times a slope above 1, and ``4 eps`` of what is added behind it and of the result;
* a convolution that took in batch norm: 1e-4 of its largest value;
* a sign may differ from the unfused operators' only where the value is below 1e-4 of the largest;
* outputs: 1e-3 of the largest value, given the signs that the packed model saw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import sympy
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from .chains import CONVOLUTION, Epilogue, reach_of
from .conditions import fix
from .examples import ConversionError, Example, plain
from .graph import Ref, Step
from .layers import PackedConv2d
from .packed_model import PackedModel
from .trace import Traced, line_of

if TYPE_CHECKING:
    from .write import Writer

# What a model may raise on sizes it does not take.
CALL_ERRORS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)
EPS = torch.finfo(torch.float32).eps
LAYER, RESIDUAL = 16 * EPS, 4 * EPS
CONVOLUTIONS = 1e-4
SIGNS = 1e-4
OUTPUTS = 1e-3
WHOLE_NUMBERS = 0.01  # share of whole numbers (classes, masks) that may differ


def call(model: nn.Module, example: Example) -> Any:
    """The model's result, as plain tuples, lists and dicts; the example is not changed."""
    copied = example.clone()
    return plain(model(*copied.args, **copied.kwargs))


def same(a: Any, b: Any, exact: bool = True) -> bool:
    """Equal in structure, shapes, dtypes and bits of value (NaN equals NaN); or nearly so."""
    (left, spec), (right, other) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    if spec != other:
        return False
    for x, y in zip(left, right, strict=True):
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            if type(x) is not type(y) or (x != y and x == x):
                return False
        elif x.shape != y.shape or x.dtype != y.dtype:
            return False
        elif not torch.equal(x, y):
            if not exact and x.is_floating_point():
                allowed = SIGNS * float(y.abs().nan_to_num(0, 0).amax())
                if not torch.allclose(x, y, 0, allowed, equal_nan=True):
                    return False
            elif not (x.is_floating_point() and torch.allclose(x, y, 0, 0, equal_nan=True)):
                return False
    return True


# ----------------------------------------------------------------------------------------- other sizes


def allow_sizes(traced: Traced, model: nn.Module, example: Example, exact: bool) -> None:
    """Fix the axes on which the graph does otherwise than the model at another size."""
    tensors = example.tensors()
    present: dict[Any, int] = {}
    for tensor, sizes in zip(tensors, traced.sizes, strict=True):
        for size, symbol in zip(tensor.shape, sizes, strict=True):
            if isinstance(symbol, sympy.Symbol):
                present.setdefault(symbol, size)
    batch = {sizes[0] for sizes in traced.sizes if sizes and isinstance(sizes[0], sympy.Symbol)}
    rest = present.keys() - batch
    for one in (1, 3):
        _try_sizes(traced, model, example, present, dict.fromkeys(batch, one), exact)
    few = dict.fromkeys(batch, 2)
    _try_sizes(
        traced, model, example, present, few | {s: present[s] + present[s] // 2 + 1 for s in rest}, exact
    )
    _try_sizes(traced, model, example, present, few | {s: 2 * present[s] for s in rest}, exact)


def _try_sizes(
    traced: Traced,
    model: nn.Module,
    example: Example,
    present: dict[Any, int],
    new: dict[Any, int],
    exact: bool,
) -> None:
    changed = {s for s, size in new.items() if size != present[s]}
    substituted = [c.subs(present | new) for c in traced.conditions]
    if not changed or any(c == sympy.false for c in substituted):
        return  # nothing else, or what the packed model refuses
    tensors = []
    for tensor, sizes in zip(example.tensors(), traced.sizes, strict=True):
        for axis, symbol in enumerate(sizes):
            if symbol in changed:
                index = torch.arange(new[symbol], device=tensor.device) % tensor.shape[axis]
                tensor = tensor.index_select(axis, index)
        tensors.append(tensor)
    other = example.with_tensors(tensors)
    try:
        expected = call(model, other)
    except CALL_ERRORS:
        return  # the model takes no such size
    try:
        result = traced.run(other.clone().tensors())
    except CALL_ERRORS:
        result = None
    if not same(result, expected, exact):
        fix(traced, changed)


# ----------------------------------------------------------------------------------------- rounding


def check_rounding(
    traced: Traced, writer: Writer, packed: PackedModel, tensors: Sequence[Tensor], result: Any
) -> None:
    """Compare every fused layer, every sign and the outputs with the unfused operators.

    The unfused graph runs with the signs that the packed model saw (which may differ near 0 only): a sign
    that rounding has turned neither hides nor excuses anything after it.

    Raises:
        ConversionError: a difference beyond the bounds.
    """
    words = _words(writer, packed, tensors)
    tails = [made for made in writer.decisions.values() if made.scale is not None]
    ends = {made.end: made for made in tails}
    additions = {n: made for made in tails for n in made.nodes if made.residual in n.args}
    residuals: dict[fx.Node, Tensor] = {}  # by source: they may be gone when the tail ends

    def product(node: fx.Node, args: tuple[Any, ...]) -> Any:
        read = writer.read.get(node)
        if read is None:
            return node.target(*args)  # type: ignore[operator]
        signs = read.signs(words[node], args[0])
        value = args[0]
        wrong = (value < 0) != (signs < 0)
        if bool(wrong.any()):
            largest = float(value.abs().nan_to_num(0, 0).amax())
            _within(float(value[wrong].abs().amax()), SIGNS * largest, "signs", node)
        return node.target(signs, *args[1:])  # type: ignore[operator]

    alive: dict[fx.Node, Any] = {}
    convolved: dict[fx.Node, Tensor] = {}  # results still to be compared, by the last node they stand for
    for node, value, alive in traced.values(tensors, product):
        if (made := additions.get(node)) is not None and made.residual is not None:
            residuals[made.source] = alive[made.residual]
        if (made := ends.get(node)) is not None:
            residual = residuals.pop(made.source, None)
            _compare_layer(traced, writer, made, words[made.source], value, residual)
        if node in writer.convolutions:
            end, run = writer.convolutions[node]
            convolved[end] = run(alive[cast("fx.Node", node.args[0])])
        if node in convolved and value.numel():
            error = float((convolved.pop(node) - value).abs().amax())
            _within(error, CONVOLUTIONS * float(value.abs().amax()), "a convolution", node)
    expected = pytree.tree_map_only(fx.Node, alive.__getitem__, traced.output)
    (left, spec), (right, other) = pytree.tree_flatten(result), pytree.tree_flatten(expected)
    if spec != other or [_kind(x) for x in left] != [_kind(x) for x in right]:
        raise ConversionError("the packed model's result has another structure than the trained one's")
    for x, y in zip(left, right, strict=True):
        if isinstance(x, Tensor) and x.numel():
            _compare_output(x, y)


def _kind(value: Any) -> Any:
    return (value.shape, value.dtype) if isinstance(value, Tensor) else value


def _compare_output(x: Tensor, y: Tensor) -> None:
    if not x.is_floating_point():
        _within(float((x != y).float().mean()), WHOLE_NUMBERS, "whole numbers of an output", None)
        return
    finite = y.isfinite()
    if not torch.equal(x[~finite].nan_to_num(), y[~finite].nan_to_num()):
        raise ConversionError(
            "an output of the packed model is infinite or NaN elsewhere than the trained one's"
        )
    if bool(finite.any()):
        allowed = OUTPUTS * float(y[finite].abs().amax())
        _within(float((x[finite] - y[finite]).abs().amax()), allowed, "an output", None)


def _within(error: float, allowed: float, what: str, node: fx.Node | None) -> None:
    if not error <= allowed:
        raise ConversionError(
            f"exact=False: {what} of the packed model differs by {error:.3g}, more than the {allowed:.3g} "
            f"that rounding may do{line_of(node) if node is not None else ''}; please report this"
        )


def _words(writer: Writer, packed: PackedModel, tensors: Sequence[Tensor]) -> dict[fx.Node, Tensor]:
    """The words that every product reads, by product."""
    wanted = {node.name: Ref(read.step) for node, read in writer.read.items()}
    steps = [*writer.steps[:-1], Step("words", "output", args=(wanted,))]
    spied = PackedModel(steps, dict(packed.layers.items()), packed.inputs, dict(packed.constants.items()))
    found = spied(*(t.clone() for t in tensors))
    return {node: found[node.name] for node in writer.read}


def _compare_layer(
    traced: Traced, writer: Writer, made: Epilogue, words: Tensor, value: Tensor, residual: Tensor | None
) -> None:
    layer = writer.made[made.source]
    result = layer(words) if residual is None else layer(words, residual)
    assert made.scale is not None and made.shift is not None
    image = made.source.target is CONVOLUTION
    bound = LAYER * (made.scale.abs() * reach_of(traced, made.source) + made.shift.abs()).float()

    def shaped(channels: Tensor) -> Tensor:
        return channels.float()[:, None, None] if image else channels.float()

    allowed = shaped(bound).expand_as(value)
    if residual is not None:
        allowed = allowed + RESIDUAL * residual.abs()
    if made.slope is not None:
        allowed = allowed * shaped(made.slope.abs().clamp_min(1))
    if made.post_shift is not None:
        allowed = allowed + RESIDUAL * (shaped(made.post_shift.abs()) + value.abs())
    emits = layer.config["emits"]
    values, signs = result if emits == "both" else (result, result)
    if emits != "signs":
        excess = (values - value).abs() - allowed
        _within(float(excess.nan_to_num(0).amax()) if value.numel() else 0.0, 0.0, "a layer", made.end)
    if emits != "values":
        axis = 1 if isinstance(layer, PackedConv2d) else -1
        if made.sign_shift is not None:
            value = value + shaped(made.sign_shift)
            allowed = allowed + RESIDUAL * (shaped(made.sign_shift.abs()) + value.abs())
        bits = torch.ops.bop2nd.unpack_bits(signs, value.shape[axis]).movedim(-1, axis)
        wrong = ((bits < 0) != (value < 0)) & (value.abs() > allowed)
        _within(float(wrong.sum()), 0.0, "signs of a layer", made.end)
