"""Real values after a product of signs: what the layer's own kernel computes of them.

A tail takes in a clamp of the dots, channel-wise affine functions (bias, batch norm, constants added and
multiplied), at most one addition of another value, as in residual networks, constants added behind it, a ReLU
or PReLU, and constants added behind that or before the next signs. The packed operator computes all of it and
the sign words, which the next products read, in one pass over memory. It rounds differently from the trained
model's operators, so :func:`convert` takes tails only with ``exact=False``. A bias alone is added to the same
bits, in both modes.

What a function does is found by running it on samples, whatever the model's operators are called.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from .chains import Epilogue, channels_of, reach_of, sign_readers, stage_of
from .fold import Stage
from .trace import Traced

_ADD = torch.ops.aten.add.Tensor
SAMPLES = 1025  # dots a function is tried on; an affine one is known by two
DOTS = 2**24  # the largest that limits may be
EPS = torch.finfo(torch.float32).eps
TOLERANCE = 8  # units in the last place of the largest result


def find_bias(traced: Traced, source: fx.Node, taken: set[fx.Node]) -> Epilogue:
    """The dots as real values, with the bias that alone reads them."""
    plain = Epilogue(source)
    (reader, *others) = [*source.users, None]
    if reader is None or others != [None] or reader.target is not _ADD or reader in taken or reader.kwargs:
        return plain
    if stage_of(traced, reader, source, source) is None or reader.args[0] is not source:
        return plain
    bias = traced.tensor(reader.args[1])
    fits = bias is not None and bias.numel() == channels_of(traced, source)
    if bias is not None and fits and bias.dtype == traced.info[source].dtype:
        plain.bias = bias.reshape(-1)
        plain.nodes.append(reader)
    return plain


def find_tail(traced: Traced, source: fx.Node, taken: set[fx.Node]) -> Epilogue | None:
    """The longest tail of a product, or None if there is nothing to take in, or the values are not fp32.

    ``taken``: nodes that are part of another tail.
    """
    info = traced.info[source]
    if info.form is None or info.dtype != torch.float32:  # coarser values do not tell scale and shift
        return None
    tail = Epilogue(source)
    _take_affine(traced, tail, taken, _take_clamp(traced, tail, taken))
    _add_residual(traced, tail, taken)
    _take_activation(traced, tail, taken)
    _ask_for_outputs(traced, tail, taken)
    return tail if tail.nodes or tail.signs else None


def _next(traced: Traced, tail: Epilogue, taken: set[fx.Node]) -> tuple[fx.Node, Stage] | None:
    """The only reader of a tail's end, as a function of each channel, or None."""
    if len(tail.end.users) != 1:
        return None
    (node,) = tail.end.users
    if node in taken or node not in traced.info or traced.info[node].dtype != torch.float32:
        return None
    stage = stage_of(traced, node, tail.end, tail.source)
    return None if stage is None else (node, stage)


def _samples(traced: Traced, source: fx.Node, low: int, high: int) -> Tensor:
    """Whole numbers from ``low`` to ``high``, ``[M]`` in fp64."""
    count = min(SAMPLES, high - low + 1)
    device = traced.info[source].device
    return torch.linspace(low, high, count, dtype=torch.float64).round().to(device)


def _run(traced: Traced, source: fx.Node, samples: Tensor, stages: Sequence[Stage]) -> Tensor:
    """``[M, C]`` in fp64: what the stages make of samples."""
    table = samples.float()[:, None].expand(-1, channels_of(traced, source))
    for stage in stages:
        table = stage(table)
    return table.double()


def _take_clamp(traced: Traced, tail: Epilogue, taken: set[fx.Node]) -> Tensor:
    """Limits of the dots, the same for all channels (a ReLU right behind a product); returns dots to try."""
    reach = reach_of(traced, tail.source)
    dots = _samples(traced, tail.source, -reach, reach)
    found = _next(traced, tail, taken)
    if found is None or reach > DOTS:
        return dots
    value = _run(traced, tail.source, dots, [found[1]])
    low, high = float(value.min()), float(value.max())
    limited = -reach < low or high < reach
    clamped = dots.clamp(low, high)[:, None].expand_as(value)
    if limited and low % 1 == high % 1 == 0 and torch.equal(value, clamped):
        tail.low = int(low) if low > -reach else None
        tail.high = int(high) if high < reach else None
        tail.nodes.append(found[0])
        return _samples(traced, tail.source, int(low), int(high))
    return dots


def _take_affine(traced: Traced, tail: Epilogue, taken: set[fx.Node], dots: Tensor) -> None:
    """Scale and shift of as many nodes as make an affine function of the dots."""
    stages: list[Stage] = []
    fitted = fit(dots, _run(traced, tail.source, dots, stages))
    assert fitted is not None
    tail.scale, tail.shift = fitted
    while (found := _next(traced, tail, taken)) is not None:
        longer = fit(dots, _run(traced, tail.source, dots, [*stages, found[1]]))
        if longer is None:
            break
        stages.append(found[1])
        tail.nodes.append(found[0])
        tail.scale, tail.shift = longer


def fit(dots: Tensor, value: Tensor) -> tuple[Tensor, Tensor] | None:
    """(scale, shift), fp64 ``[C]``, of the function that has ``value`` ``[M, C]`` at ``dots`` ``[M]``.

    None where it is not affine in some channel, or not finite.
    """
    scale = (value[-1] - value[0]) / max(1.0, float(dots[-1] - dots[0]))
    shift = value[0] - scale * dots[0]
    error = (scale * dots[:, None] + shift - value).abs().amax(0)
    allowed = TOLERANCE * EPS * value.abs().amax(0)
    return (scale, shift) if bool((error <= allowed).all()) else None  # NaN and infinity compare as false


def _add_residual(traced: Traced, tail: Epilogue, taken: set[fx.Node]) -> None:
    if len(tail.end.users) != 1:
        return
    (node,) = tail.end.users
    if node in taken or node.target is not _ADD or node.kwargs or node not in traced.info:
        return
    others = [a for a in node.args if a is not tail.end]
    if len(others) != 1 or not isinstance(others[0], fx.Node) or others[0] not in traced.info:
        return
    ours, other, result = (traced.info[n] for n in (tail.end, others[0], node))
    if other.shape == ours.shape == result.shape and other.dtype == ours.dtype == result.dtype:
        tail.residual = others[0]
        tail.nodes.append(node)


def _take_activation(traced: Traced, tail: Epilogue, taken: set[fx.Node]) -> None:
    """Constants added behind the residual, a ReLU or PReLU, constants added behind it."""
    while (found := _next(traced, tail, taken)) is not None:
        added = addend(traced, tail.source, found[1])
        slope = None if added is not None else slope_of(traced, tail.source, found[1])
        active = tail.relu or tail.slope is not None
        if added is not None and active:
            tail.post_shift = added if tail.post_shift is None else tail.post_shift + added
        elif added is not None:
            assert tail.shift is not None
            tail.shift = tail.shift + added
        elif slope is not None and not active:
            tail.relu = bool((slope == 0).all())
            tail.slope = None if tail.relu else slope
        else:
            return
        tail.nodes.append(found[0])


def _tries(traced: Traced, source: fx.Node, stage: Stage) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers, their values ``[M, C]``, and what rounding may do to these."""
    powers = (*range(-6, 7, 2), -40, -20, 10, 20, 40, 80, 120)
    x = torch.tensor([0.0, *(s * 2.0**k for k in powers for s in (-1.0, 1.0))], dtype=torch.float64)
    x = x.to(traced.info[source].device)
    value = _run(traced, source, x, [stage])
    return x[:, None], value, TOLERANCE * EPS * (x.abs()[:, None] + value.abs())


def addend(traced: Traced, source: fx.Node, stage: Stage) -> Tensor | None:
    """fp64 ``[C]``: what a stage adds to every value; None if it does anything else."""
    x, value, allowed = _tries(traced, source, stage)
    return value[0] if bool(((x + value[0] - value).abs() <= allowed).all()) else None


def slope_of(traced: Traced, source: fx.Node, stage: Stage) -> Tensor | None:
    """fp64 ``[C]``: by what a stage multiplies negative values, and no others; else None."""
    x, value, allowed = _tries(traced, source, stage)
    slope = -value[x[:, 0].tolist().index(-1.0)]
    expected = torch.where(x < 0, slope * x, x)
    return slope if bool(((expected - value).abs() <= allowed).all()) else None


def _ask_for_outputs(traced: Traced, tail: Epilogue, taken: set[fx.Node]) -> None:
    """Signs are emitted along the channels: for readers of the same kind, of the values or of what one node
    that nobody else reads adds to them."""

    def readers(value: fx.Node) -> list[fx.Node]:
        return [r for r in sign_readers(traced, value) if r.target is tail.source.target]

    of_signs = readers(tail.end)
    for node in () if of_signs else list(tail.end.users):
        if node in taken or node not in traced.info or not 0 < len(node.users) == len(readers(node)):
            continue
        stage = stage_of(traced, node, tail.end, tail.source)
        added = None if stage is None else addend(traced, tail.source, stage)
        if added is not None and traced.info[node].dtype == torch.float32:
            tail.sign_shift, tail.sign_node = added, node
            of_signs = [node]
            break
    tail.signs = bool(of_signs)
    tail.values = len(of_signs) < len(tail.end.users)
