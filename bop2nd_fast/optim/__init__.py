"""Latent-free optimizers for binary weights."""

from .bop import Bop, Bop2ndOrder, FlipCounts
from .split import split_parameters

__all__ = ["Bop", "Bop2ndOrder", "FlipCounts", "split_parameters"]
