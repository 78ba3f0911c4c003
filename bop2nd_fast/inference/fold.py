"""Everything between two binary layers as one integer threshold per channel, exactly.

A binary layer's dot is an integer in ``[-K, K]``. What follows up to the next sign (bias, batch norm,
clipping) is a function of that integer for each channel. Here it is not folded by algebra, which rounds
differently: the trained model's own modules are run on every possible dot, and the place where the result's
sign changes is the threshold. So ``bit = dot < threshold`` says what the trained model would have said,
whatever the rounding.

Measured on torch 2.13, CPU: batch norm in eval mode gives the same bits for contiguous, channels-last and 2-d
inputs of any size, and other bits for inputs of other strides (another formula; in bf16 even other signs).
The table therefore has the memory format the value has in the model, and odd strides are not folded.

Cost: (2K + 1) * C values in slices of 16 MiB; 4.7 million for a 3x3 convolution of 512 to 512 channels.

A sum of real numbers times signs has too many values to try them all. Where every function behind it is
monotone whatever it rounds (``chains.MONOTONE``), the same place is found by bisection over all fp32 numbers
(:func:`fold_reals`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Form = Literal["rows", "pixel", "channels_last", "series", "series_last"]
SLICE_VALUES = 1 << 22


def form_of(value: Tensor) -> Form | None:
    """How a value lies in memory, if it is one of the ways that folding knows."""
    if value.dim() == 4:
        if value.is_contiguous():
            return "pixel"
        return "channels_last" if value.is_contiguous(memory_format=torch.channels_last) else None
    if value.dim() == 3 and not value.is_contiguous():
        return "series_last" if value.transpose(1, 2).is_contiguous() else None
    if value.dim() < 2 or not value.is_contiguous():
        return None
    return "series" if value.dim() == 3 else "rows"


@dataclass(frozen=True)
class Stage:
    """One elementwise function of a chain, and the memory format of its input in the model."""

    function: Callable[[Tensor], Tensor]
    form: Form

    def __call__(self, table: Tensor) -> Tensor:
        """``[M, C]`` dots -> ``[M, C]`` values."""
        if self.form == "rows":
            return self.function(table.clone())  # a copy: the function may work in place
        if self.form == "pixel":
            return self.function(table[:, :, None, None].clone())[:, :, 0, 0]
        if self.form == "series":
            return self.function(table[:, :, None].clone())[:, :, 0]
        if self.form == "series_last":
            return self.function(table[None].clone().transpose(1, 2))[0].T
        image = table[None, :, None, :].clone().permute(0, 3, 1, 2)  # [1, C, M, 1], channels-last
        return self.function(image)[0, :, :, 0].T


@dataclass(frozen=True)
class Folded:
    """The rule ``bit = dot < threshold`` for each channel.

    threshold: int32 ``[C]``, in ``[-K, K + 1]`` (the ends for channels that never change sign). Of real sums
        fp32, with infinities as the ends.
    flip: bool ``[C]``, channels whose weight bits must be inverted because the function decreases.
    pool_any: bool ``[C]``, channels whose max-pool is an OR of bits (else AND).
    """

    threshold: Tensor
    flip: Tensor
    pool_any: Tensor


@torch.no_grad()
def fold(
    channels: int,
    reach: int,
    dtype: torch.dtype,
    device: torch.device,
    before_pool: Sequence[Stage],
    after_pool: Sequence[Stage],
    pooled: bool,
) -> Folded | None:
    """Thresholds of ``after_pool(max(before_pool(dot))) < 0`` over dots in ``[-reach, reach]``.

    ``dtype`` is that of the dots in the trained model. None where no threshold says the same: a function
    whose sign changes more than once, or (with a pool) one that is not monotone, or yields NaN, before it.
    """
    count = torch.zeros(channels, dtype=torch.int64, device=device)
    changes = torch.zeros_like(count)
    up, down = torch.zeros_like(count, dtype=torch.bool), torch.zeros_like(count, dtype=torch.bool)
    first: Tensor | None = None
    last_negative = last_value = None
    step = max(1, SLICE_VALUES // channels)
    for start in range(-reach, reach + 1, step):
        dots = torch.arange(start, min(start + step, reach + 1), device=device).to(dtype)
        value = _run(before_pool, dots[:, None].expand(-1, channels))
        if pooled and bool(value.isnan().any()):
            return None
        negative = _run(after_pool, value) < 0
        count += negative.sum(0)
        if last_negative is not None and last_value is not None:  # the seam between two slices
            negative, value = torch.cat([last_negative, negative]), torch.cat([last_value, value])
        changes += (negative[1:] != negative[:-1]).sum(0)
        up |= (value[1:] > value[:-1]).any(0)
        down |= (value[1:] < value[:-1]).any(0)
        first = negative[0] if first is None else first
        last_negative, last_value = negative[-1:], value[-1:]
    assert first is not None and last_negative is not None
    if bool((changes > 1).any()) or (pooled and bool((up & down).any())):
        return None
    falling = ~first & last_negative[0]
    # Rising: negative below t = count - reach. Falling: negative from t = reach + 1 - count on, so
    # -dot < 1 - t = count - reach: the same number once the weights are flipped.
    return Folded((count - reach).to(torch.int32), falling, falling ^ down)


@torch.no_grad()
def fold_reals(channels: int, device: torch.device, stages: Sequence[Stage]) -> Folded | None:
    """Thresholds of ``stages(sum) < 0`` over all finite fp32 sums; every stage is monotone in each channel.

    None where the rule does not say the same at 4096 numbers of all magnitudes and next to the thresholds.
    """
    low = torch.full((channels,), -_LARGEST, dtype=torch.int64, device=device)
    high = -low

    def negative(place: Tensor) -> Tensor:
        return _run(stages, _number_at(place)) < 0

    first, last = negative(low[None])[0], negative(high[None])[0]
    while bool((high - low > 1).any()):
        middle = (low + high).div(2, rounding_mode="floor")
        below = negative(middle[None])[0] == first
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    # Rising: negative below the number at `high`. Falling: negative from there on, or -sum < -that at `low`.
    falling = ~first & last
    threshold = torch.where(falling, -_number_at(low), _number_at(high))
    threshold[first & last], threshold[~first & ~last] = torch.inf, -torch.inf
    places = torch.linspace(-_LARGEST, _LARGEST, 4096, dtype=torch.float64, device=device).long()
    places = torch.cat([places[:, None].expand(-1, channels), torch.stack([low - 1, low, high, high + 1])])
    numbers = _number_at(places.clamp(-_LARGEST, _LARGEST))
    rule = torch.where(falling, -numbers, numbers) < threshold
    if not torch.equal(_run(stages, numbers) < 0, rule):
        return None
    return Folded(threshold, falling, torch.zeros_like(falling))


_LARGEST = 0x7F7FFFFF  # the place of the largest finite number


def _number_at(place: Tensor) -> Tensor:
    """fp32 numbers in their order, the smallest positive one at place 1; 0 at 0."""
    number = place.abs().to(torch.int32).view(torch.float32)
    return torch.where(place < 0, -number, number)


def _run(stages: Sequence[Stage], table: Tensor) -> Tensor:
    for stage in stages:
        table = stage(table)
    return table
