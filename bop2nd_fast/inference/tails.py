"""Real values after a binary layer: scale, shift and residual of the layer's own kernel.

A tail starts at a binary layer with binary inputs and takes in channel-wise affine functions (bias, batch
norm in eval mode, constants added and multiplied) and at most one addition of another value, as in residual
networks. The packed operator computes ``dot * scale + shift + residual`` and the sign words of the result,
which the next binary layers read, in one pass over memory. It rounds differently from the trained model's
modules, so :func:`convert` takes tails only with ``exact=False``.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from ..nn import BinaryConv2d
from .chains import Chain, Traced
from .fold import Stage

SAMPLES = 1025  # dots a function is tried on; an affine one is known by two
TOLERANCE = 8  # units in the last place of the largest result


@dataclass
class Tail:
    """The nodes after a binary layer that its kernel takes over, and what they are made into."""

    source: fx.Node
    scale: Tensor
    shift: Tensor
    nodes: list[fx.Node] = field(default_factory=list)
    residual: fx.Node | None = None
    signs: bool = False  # whether binary layers read the signs of the end
    values: bool = True  # whether anything reads its values

    @property
    def end(self) -> fx.Node:
        return self.nodes[-1] if self.nodes else self.source


def find_tail(traced: Traced, source: fx.Node, taken: set[fx.Node]) -> Tail | None:
    """The longest tail of a binary layer; None where the layer's values are not fp32 images or rows.

    ``taken``: nodes that are part of another tail.
    """
    layer, info = traced.binary(source), traced.info.get(source)
    rank = 4 if isinstance(layer, BinaryConv2d) else 2
    if layer is None or info is None or info.form is None or len(info.shape) != rank:
        return None
    if info.dtype != torch.float32:  # coarser values do not tell scale and shift well enough
        return None
    stages: list[Stage] = []
    if layer.bias is not None:
        bias = layer.bias.detach()
        shaped = bias[:, None, None] if rank == 4 else bias
        stages.append(Stage(lambda x: x + shaped, info.form))
    reach = layer.weight[0].numel()
    fitted = fit(info.shape[1], reach, info.dtype, info.device, stages)
    if fitted is None:
        return None
    tail = Tail(source, *fitted)
    while len(tail.end.users) == 1:
        (node,) = tail.end.users
        stage = None if node in taken else traced.stage(node, tail.end, Chain(source))
        longer = None
        if stage is not None:
            longer = fit(info.shape[1], reach, info.dtype, info.device, [*stages, stage])
        if stage is None or longer is None:
            break
        stages.append(stage)
        tail.nodes.append(node)
        tail.scale, tail.shift = longer
    _add_residual(traced, tail, taken)
    _ask_for_outputs(traced, tail)
    return tail


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


def _add_residual(traced: Traced, tail: Tail, taken: set[fx.Node]) -> None:
    if len(tail.end.users) != 1:
        return
    (node,) = tail.end.users
    add = node.op == "call_function" and node.target in (operator.add, torch.add)
    in_place = node.op == "call_function" and node.target is operator.iadd and node.args[0] is tail.end
    if node in taken or not (add or in_place) or node.kwargs or len(node.args) != 2:
        return
    others = [a for a in node.args if a is not tail.end]
    if len(others) != 1 or not isinstance(others[0], fx.Node) or others[0] not in traced.info:
        return
    if node not in traced.info:
        return
    ours, other, result = (traced.info[n] for n in (tail.end, others[0], node))
    if other.shape == ours.shape == result.shape and other.dtype == ours.dtype == result.dtype:
        tail.residual = others[0]
        tail.nodes.append(node)


def _ask_for_outputs(traced: Traced, tail: Tail) -> None:
    kind = type(traced.binary(tail.source))
    readers = list(tail.end.users)
    of_signs = [reader for reader in readers if type(traced.binary(reader)) is kind]
    tail.signs = bool(of_signs)
    tail.values = len(of_signs) < len(readers)
