"""The operators ``torch.ops.bop2nd.*``: one file each, with schema, fake, autograd and checked function."""

from . import bop_step, pack_bits, prepack_weight
from .binary_conv2d import binary_conv2d
from .binary_linear import binary_linear
from .quantize_rows import quantize_rows
from .signed_conv2d import signed_conv2d
from .signed_linear import signed_linear

__all__ = [
    "binary_conv2d",
    "binary_linear",
    "bop_step",
    "pack_bits",
    "prepack_weight",
    "quantize_rows",
    "signed_conv2d",
    "signed_linear",
]
