"""Layers with packed binary weights, the quantizers of their inputs, and what stands between them."""

from .activations import ChannelScale, RPReLU
from .latent import LatentConv2d, LatentLinear, binarized, latent_weights
from .layers import BinaryConv1d, BinaryConv2d, BinaryLinear
from .norms import LayerNorm2d
from .pooling import MaxPool2d
from .quantizers import QUANTIZERS, ApproxSign, Int8, Quantizer, RSign, SteSign, SwishSign

__all__ = [
    "QUANTIZERS",
    "ApproxSign",
    "BinaryConv1d",
    "BinaryConv2d",
    "BinaryLinear",
    "ChannelScale",
    "Int8",
    "LatentConv2d",
    "LatentLinear",
    "LayerNorm2d",
    "MaxPool2d",
    "Quantizer",
    "RPReLU",
    "RSign",
    "SteSign",
    "SwishSign",
    "binarized",
    "latent_weights",
]
