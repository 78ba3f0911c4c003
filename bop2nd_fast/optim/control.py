"""Feedback control of the threshold: hold each layer at a wanted flip rate."""

from __future__ import annotations

from torch import Tensor

# One step multiplies the threshold by at most exp(4 * GAIN) = 1.22 and at least exp(-GAIN) = 0.95: three
# orders of magnitude take some 35 steps up and 140 down, and a layer too small to flip every step is
# averaged over 1 / GAIN = 20 steps.
GAIN = 0.05
STRONGEST = 4.0


def adapt_threshold(scale: Tensor, flips: Tensor, numel: int, target: float, adapting: Tensor) -> None:
    """Multiply ``scale`` (fp64, 0-dim, in place) by ``exp(GAIN * (rate / target - 1))``.

    At rest the mean of ``rate / target - 1`` is 0, so the flip rate is the target. ``adapting`` is 0 where
    this step must not count (a skipped step, warm-up). All on the device; nothing is read back.
    """
    error = (flips.double() / (numel * target) - 1).clamp(max=STRONGEST)
    scale.mul_((GAIN * adapting * error).exp())
