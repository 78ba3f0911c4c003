"""Which contenders compete in one class: a table or a picture shows the best of each class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .results import contender
from .suites import backward, conv, inference, linear, pack, step, train_step

# suite -> class -> contenders; the order is that of the pictures.
FAMILIES: dict[str, dict[str, tuple[str, ...]]] = {
    "step": {
        "careful eager, compiled": (step.COMPILED,),
        "Adam, fused": (step.ADAM,),
        "careful eager": (step.CAREFUL,),
        "eager as published": (step.PUBLISHED,),
    },
    "conv": {"fp32": conv.FP32, "bf16": conv.BF16, "int8": conv.INT8, "Larq": (conv.LARQ,)},
    "linear": {"fp32": (linear.FP32,), "bf16": (linear.BF16,), "int8": linear.INT8},
    "pack": {"eager torch": (pack.EAGER,), "numpy.packbits": (pack.NUMPY,), "torch.sign": (pack.SIGN,)},
    "backward": {"torch, signs as fp32": backward.TORCH, "torch, unpacked tiles": (backward.TILES,)},
    "train_step": {
        "latent weights, Adam": (train_step.LATENT,),
        "latent weights, fused Adam": (train_step.LATENT_FUSED,),
        "latent weights, compiled": (train_step.LATENT_COMPILED,),
    },
    "inference": {
        "fp32": (inference.FP32, inference.FP32_LAST),
        "bf16": (inference.BF16,),
        "fp32, compiled": (inference.COMPILED,),
    },
}


def best(record: dict[str, Any], names: Sequence[str]) -> float | None:
    """Time of the fastest of ``names`` over ours; None if none of them has a number."""
    found = [e["ratio"]["median"] for n in names if (e := contender(record, n)) and "ratio" in e]
    return min(found) if found else None
