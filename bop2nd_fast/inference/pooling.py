"""Max-pooling in a packed model: on words, and on real images where torch's own loop is slow."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .packed_layer import PackedLayer


class PoolBits(PackedLayer):
    """Max-pool on words ``[N, H, W, W_c]``: a maximum is negative iff every bit of the window is 1 (AND).

    Where what follows the pool decreases, the largest pooled value has the smallest result, which is negative
    iff any of the window's results is: OR. ``decreasing`` (words ``[W_c]``, or None) says in which channels.
    """

    kind = "pool_bits"
    decreasing: Tensor | None

    def __init__(self, decreasing: Tensor | None = None, **config: Any) -> None:
        super().__init__(**config)
        self._tensor("decreasing", decreasing)

    def forward(self, words: Tensor) -> Tensor:
        if self.decreasing is not None and words.shape[-1] != self.decreasing.shape[0]:
            raise ValueError(f"pooling words of {self.decreasing.shape[0]} per pixel, got {words.shape[-1]}")
        axes = [_PoolAxis(words.shape[1 + i], i, self.config) for i in (0, 1)]
        if self.decreasing is None:
            return _and_over_windows(words, axes)
        return _and_over_windows(words ^ self.decreasing, axes) ^ self.decreasing  # a | b = ~(~a & ~b)

    def describe(self) -> str:
        mixed = "" if self.decreasing is None else ", both directions"
        return f"max over {'x'.join(map(str, self.config['kernel_size']))}{mixed}"


class _PoolAxis:
    """Output size and padding of one axis, as torch.nn.MaxPool2d defines them."""

    def __init__(self, size: int, axis: int, config: dict[str, Any]) -> None:
        kernel, stride, padding, dilation = (
            config[key][axis] for key in ("kernel_size", "stride", "padding", "dilation")
        )
        ceil_mode = config["ceil_mode"]
        span = size + 2 * padding - dilation * (kernel - 1) - 1
        self.out = (span + (stride - 1 if ceil_mode else 0)) // stride + 1
        if ceil_mode and (self.out - 1) * stride >= size + padding:
            self.out -= 1  # the last window must start inside the image or its left padding
        if self.out < 1:
            raise ValueError(f"an image of {size} is smaller than the pooling window of {kernel}")
        self.kernel, self.stride, self.dilation, self.before = kernel, stride, dilation, padding
        self.after = max(0, (self.out - 1) * stride + dilation * (kernel - 1) + 1 - size - padding)

    def taps(self) -> list[slice]:
        """For every tap of the window, the (padded) positions it visits."""
        starts = (k * self.dilation for k in range(self.kernel))
        return [slice(start, start + (self.out - 1) * self.stride + 1, self.stride) for start in starts]


def _and_over_windows(words: Tensor, axes: list[_PoolAxis]) -> Tensor:
    rows, columns = axes
    padding = (0, 0, columns.before, columns.after, rows.before, rows.after)
    if any(padding):
        words = F.pad(words, padding, value=-1)  # all ones: neutral
    for dim, axis in ((1, rows), (2, columns)):
        index: list[Any] = [slice(None)] * 4
        result: Tensor | None = None
        for tap in axis.taps():
            index[dim] = tap
            view = words[tuple(index)]
            result = view if result is None else result & view
        assert result is not None
        words = result
    return words.contiguous()


class MaxPool(PackedLayer):
    """Max-pool of a real image, to torch's bits and strides.

    On CPUs torch's loop over channels-last memory is vectorised, the one over contiguous memory is not; what
    it saves is more than the copies there and back cost.
    """

    kind = "max_pool"

    def forward(self, input: Tensor) -> Tensor:
        last = torch.channels_last
        slow = input.device.type == "cpu" and input.dim() == 4 and input.is_contiguous()
        detour = slow and not input.is_contiguous(memory_format=last)
        image = input.contiguous(memory_format=last) if detour else input
        pooled = F.max_pool2d(image, **self.config)
        return pooled.contiguous() if detour else pooled

    def describe(self) -> str:
        return f"max over {'x'.join(map(str, self.config['kernel_size']))}"
