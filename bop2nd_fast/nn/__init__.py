"""Layers with packed binary weights, the quantizers of their inputs, and what stands between them."""

from .activations import RPReLU
from .layers import BinaryConv1d, BinaryConv2d, BinaryLinear
from .pooling import MaxPool2d
from .quantizers import QUANTIZERS, ApproxSign, Quantizer, RSign, SteSign, SwishSign

__all__ = [
    "QUANTIZERS",
    "ApproxSign",
    "BinaryConv1d",
    "BinaryConv2d",
    "BinaryLinear",
    "MaxPool2d",
    "Quantizer",
    "RPReLU",
    "RSign",
    "SteSign",
    "SwishSign",
]
