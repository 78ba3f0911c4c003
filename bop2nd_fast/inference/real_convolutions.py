"""What ``convert(exact=False)`` makes of real convolutions: they take in the batch norm that follows.

Their images are channels-last, as those of packed layers are: torch then turns none around for pooling,
packing, or the next residual addition. Both change the order of sums, hence the rounding.
"""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .chains import Traced, is_plain


def real_convolution(traced: Traced, node: fx.Node) -> nn.Conv2d | None:
    """The module of a node that is an fp32 convolution of one value, as its class says."""
    layer = traced.layer(node)
    if type(layer) is not nn.Conv2d or not is_plain(layer) or len(node.args) != 1 or node.kwargs:
        return None
    return layer if layer.weight.dtype == torch.float32 else None


def take_in_norm(traced: Traced, node: fx.Node, layer: nn.Conv2d) -> tuple[fx.Node, nn.Conv2d]:
    """The convolution's own node, or that of the batch norm which alone reads it, and the layer for both."""
    readers = list(node.users)
    norm = traced.layer(readers[0]) if len(readers) == 1 else None
    if type(norm) is not nn.BatchNorm2d or not is_plain(norm) or norm.running_mean is None:
        return node, layer
    return readers[0], fuse_conv_bn_eval(layer, norm)
