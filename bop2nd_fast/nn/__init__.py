"""Layers with packed binary weights, the quantizers of their inputs, and a max-pool that keeps little."""

from .layers import BinaryConv2d, BinaryLinear
from .pooling import MaxPool2d
from .quantizers import QUANTIZERS

__all__ = ["QUANTIZERS", "BinaryConv2d", "BinaryLinear", "MaxPool2d"]
