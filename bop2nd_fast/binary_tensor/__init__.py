"""The 1-bit tensor: layout, memory and the gate to it, the tensor, and what torch's operators do to it."""

from . import collectives, rows, torch_ops  # they fill tensor.HANDLERS
from .layout import LAYOUT_VERSION, WORD_BITS, Layout
from .tensor import BinaryTensor, check_plus_minus_one, pack

__all__ = ["LAYOUT_VERSION", "WORD_BITS", "BinaryTensor", "Layout", "check_plus_minus_one", "pack"]
del collectives, rows, torch_ops
