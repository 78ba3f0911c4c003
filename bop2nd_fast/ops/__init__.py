"""The operators ``torch.ops.bop2nd.*``: one file each, with schema, fake, autograd and checked function."""

from . import bop_step, pack_bits, prepack_weight
from .binary_conv2d import binary_conv2d
from .binary_linear import binary_linear

__all__ = ["binary_conv2d", "binary_linear", "bop_step", "pack_bits", "prepack_weight"]
