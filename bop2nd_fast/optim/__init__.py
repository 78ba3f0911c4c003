"""Latent-free optimizers for binary weights, their schedules, presets and telemetry."""

from .bop import Bop, Bop2ndOrder
from .split import split_parameters
from .telemetry import FlipCounts, JsonLinesLogger, LayerReport, TensorBoardLogger

__all__ = [
    "Bop",
    "Bop2ndOrder",
    "FlipCounts",
    "JsonLinesLogger",
    "LayerReport",
    "TensorBoardLogger",
    "split_parameters",
]
