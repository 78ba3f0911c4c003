"""Layers with packed binary weights and the quantizers of their inputs."""

from .layers import BinaryConv2d, BinaryLinear
from .quantizers import QUANTIZERS

__all__ = ["QUANTIZERS", "BinaryConv2d", "BinaryLinear"]
