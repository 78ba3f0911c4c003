"""Networks of the Bop papers."""

from .binarynet import BinaryNet
from .birealnet import BiRealNet18
from .xnornet import XNORNet

__all__ = ["BiRealNet18", "BinaryNet", "XNORNet"]
