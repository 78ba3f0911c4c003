"""Products of signs with real numbers and 8-bit integers in a traced graph, each as one node with one value.

``ops.signed_conv2d`` calls its operator, takes the first result, moves the channels to the front and copies
contiguous images: three or four nodes, which become a :func:`signed_image`; ``ops.signed_linear`` becomes
:func:`signed_rows`.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from ..ops.product import image_like
from ..ops.signed_product import OUTPUT_DEFAULTS

_bop2nd = torch.ops.bop2nd
_COPIES = (torch.ops.aten.clone.default, torch.ops.aten.contiguous.default)
SIGNED = (_bop2nd.signed_conv2d.default, _bop2nd.signed_linear.default)


def signed_image(*args: Any, **kwargs: Any) -> Tensor:
    """Values ``[N, O, Ho, Wo]`` of a convolution, in the memory format of its input."""
    values: Tensor = _bop2nd.signed_conv2d.default(*args, **kwargs)[0]
    return image_like(args[0], values)


def signed_rows(*args: Any, **kwargs: Any) -> Tensor:
    """Values ``[..., O]`` of a dense layer."""
    values: Tensor = _bop2nd.signed_linear.default(*args, **kwargs)[0]
    return values


def signed_value(node: fx.Node) -> None:
    """Let the operator's node stand for its values, where nothing else of it is read."""
    results = list(node.users)
    if len(results) != 1 or results[0].target is not operator.getitem or results[0].args[1] != 0:
        return
    (end,) = results
    image = node.target is SIGNED[0]
    if image:
        if len(end.users) != 1:
            return
        (end,) = end.users
        if end.target is not torch.ops.aten.permute.default or list(end.args[1]) != [0, 3, 1, 2]:  # type: ignore[arg-type]
            return
        copies = [user for user in end.users if user.target in _COPIES]
        if len(copies) == len(end.users) == 1:
            (end,) = copies
    node.meta["val"] = end.meta["val"]
    node.target = signed_image if image else signed_rows
    end.replace_all_uses_with(node)


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """By their names, defaults included."""
    op = SIGNED[0] if node.target is signed_image else SIGNED[1]
    schema = op._schema.arguments
    named = {a.name: a.default_value for a in schema if a.has_default_value()}
    named |= dict(zip((a.name for a in schema), node.args, strict=False)) | node.kwargs
    if not isinstance(named["dtype"], torch.dtype):
        named["dtype"] = torch.float32  # the default, which a schema holds as a number
    return named


def plain_but(given: dict[str, Any]) -> list[str]:
    """Names of what is asked of a product besides its values: layers do not take it from a graph."""
    return [k for k, v in OUTPUT_DEFAULTS.items() if k != "dtype" and given[k] is not v]
