"""Networks of the Bop papers."""

from .binarynet import BinaryNet

__all__ = ["BinaryNet"]
