"""Random generators that follow from numbers: a seed, an epoch, the number of a picture."""

from __future__ import annotations

import torch


def generator_of(*numbers: int) -> torch.Generator:
    """A CPU generator of its own for every tuple of numbers (mixed as splitmix64 mixes its counter)."""
    state = 0
    for number in numbers:
        state = (state + (number & (2**64 - 1)) + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return torch.Generator().manual_seed(state - 2**63)
