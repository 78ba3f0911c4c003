"""Latent-free optimizers for binary weights, their schedules, presets, telemetry and controls."""

from . import courses, presets
from .bop import Bop, Bop2ndOrder
from .distributed import ReplicaMismatchError, broadcast_parameters, check_replicas
from .flip_tracker import FlipTracker, TrackedFlips
from .in_backward import StepInBackward, step_in_backward
from .latent import LatentAdam, from_latent
from .loggers import JsonLinesLogger, TensorBoardLogger
from .mixed import MixedOptimizer
from .schedules import Knob, linear, schedule
from .split import split_parameters
from .telemetry import FlipCounts, LayerReport

__all__ = [
    "Bop",
    "Bop2ndOrder",
    "FlipCounts",
    "FlipTracker",
    "JsonLinesLogger",
    "Knob",
    "LatentAdam",
    "LayerReport",
    "MixedOptimizer",
    "ReplicaMismatchError",
    "StepInBackward",
    "TensorBoardLogger",
    "TrackedFlips",
    "broadcast_parameters",
    "check_replicas",
    "courses",
    "from_latent",
    "linear",
    "presets",
    "schedule",
    "split_parameters",
    "step_in_backward",
]
