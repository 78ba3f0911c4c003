"""Real values after a product of signs: scale, shift and residual of the layer's own kernel.

A tail takes in channel-wise affine functions (bias, batch norm, constants added and multiplied) and at most
one addition of another value, as in residual networks. The packed operator computes
``dot * scale + shift + residual`` and the sign words of the result, which the next products read, in one
pass over memory. It rounds differently from the trained model's operators, so :func:`convert` takes tails
only with ``exact=False``. A bias alone is added to the same bits, in both modes.
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
    stages: list[Stage] = []
    channels, reach = channels_of(traced, source), reach_of(traced, source)
    fitted = fit(channels, reach, info.dtype, info.device, stages)
    assert fitted is not None
    tail = Epilogue(source, scale=fitted[0], shift=fitted[1])
    while len(tail.end.users) == 1:
        (node,) = tail.end.users
        stage = None if node in taken else stage_of(traced, node, tail.end, source)
        longer = None
        if stage is not None and traced.info[node].dtype == torch.float32:
            longer = fit(channels, reach, info.dtype, info.device, [*stages, stage])
        if stage is None or longer is None:
            break
        stages.append(stage)
        tail.nodes.append(node)
        tail.scale, tail.shift = longer
    _add_residual(traced, tail, taken)
    _ask_for_outputs(traced, tail)
    return tail if tail.nodes or tail.signs else None


def fit(
    channels: int, reach: int, dtype: torch.dtype, device: torch.device, stages: Sequence[Stage]
) -> tuple[Tensor, Tensor] | None:
    """(scale, shift), fp64 ``[C]``, of the function that ``stages`` make of a dot in ``[-reach, reach]``.

    None where it is not affine in some channel, or not finite.
    """
    dots = torch.linspace(-reach, reach, min(SAMPLES, 2 * reach + 1), dtype=torch.float64).round()
    dots = dots.to(device)
    table = dots.to(dtype)[:, None].expand(-1, channels)
    for stage in stages:
        table = stage(table)
    value = table.double()
    scale = (value[-1] - value[0]) / max(1, 2 * reach)
    shift = (value[-1] + value[0]) / 2
    error = (scale * dots[:, None] + shift - value).abs().amax(0)
    allowed = TOLERANCE * torch.finfo(dtype).eps * value.abs().amax(0)
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


def _ask_for_outputs(traced: Traced, tail: Epilogue) -> None:
    """Signs are emitted along the channels: for readers of the same kind."""
    of_signs = [r for r in sign_readers(traced, tail.end) if r.target is tail.source.target]
    tail.signs = bool(of_signs)
    tail.values = len(of_signs) < len(tail.end.users)
