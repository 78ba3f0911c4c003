"""Max-pooling in a packed model: on words, and on real images where torch's own loop is slow."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .packed_layer import PackedLayer, one_of, pair

_WINDOW = {
    "kernel_size": pair(1),
    "stride": pair(1),
    "padding": pair(0),
    "dilation": pair(1),
    "ceil_mode": one_of((False, True)),
}


class _Pool(PackedLayer):
    attributes = _WINDOW

    def _check_padding(self) -> None:
        for axis in (0, 1):
            if 2 * self.config["padding"][axis] > self.config["kernel_size"][axis]:
                raise ValueError(f"{self.kind}: the padding is at most half the window, got {self.config}")

    def memory(self, *args: Tensor) -> int:
        n, *image = args[0].shape
        return 3 * 8 * n * math.prod(size + 1 for size in image)

    def describe(self) -> str:
        return f"max over {'x'.join(map(str, self.config['kernel_size']))}"


class PoolBits(_Pool):
    """Max-pool on words ``[N, H, W, W_c]``: a maximum is negative iff every bit of the window is 1 (AND).

    Where what follows the pool decreases, the largest pooled value has the smallest result, which is negative
    iff any of the window's results is: OR. ``decreasing`` (words ``[W_c]``, or None) says in which channels.
    """

    kind = "pool_bits"
    tensors = ("decreasing",)
    operands = ("words",)
    decreasing: Tensor | None

    def __init__(self, decreasing: Tensor | None = None, **config: Any) -> None:
        super().__init__(**config)
        self._check_padding()
        n_words = 0 if decreasing is None else decreasing.numel()
        self._tensor("decreasing", decreasing, torch.int32, (n_words,))

    def forward(self, words: Tensor) -> Tensor:
        if words.dim() != 4:
            raise ValueError(f"pooling takes words [N, H, W, words], got {tuple(words.shape)}")
        if self.decreasing is not None and words.shape[-1] != self.decreasing.shape[0]:
            raise ValueError(f"pooling words of {self.decreasing.shape[0]} per pixel, got {words.shape[-1]}")
        axes = [_PoolAxis(words.shape[1 + i], i, self.config) for i in (0, 1)]
        if self.decreasing is None:
            return _and_over_windows(words, axes)
        return _and_over_windows(words ^ self.decreasing, axes) ^ self.decreasing  # a | b = ~(~a & ~b)

    def describe(self) -> str:
        return super().describe() + ("" if self.decreasing is None else ", both directions")


class _PoolAxis:
    """Output size and padding of one axis, as torch.nn.MaxPool2d defines them.

    Raises:
        ValueError: the image is smaller than the window, or a window could lie beside it.
    """

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
        if padding and size < dilation:
            raise ValueError(f"in an image of {size}, windows with dilation {dilation} may meet no pixel")
        self.size, self.kernel, self.stride, self.padding, self.dilation = (
            size, kernel, stride, padding, dilation,
        )  # fmt: skip

    def taps(self) -> Iterator[tuple[slice, slice]]:
        """For every tap that meets a pixel: the outputs whose windows have it there, and these pixels."""
        last = (self.out - 1) * self.stride - self.padding  # where the last window starts
        for tap in range(max(0, -(last // self.dilation)), self.kernel):
            start = tap * self.dilation - self.padding  # the pixel that output 0 meets
            if start >= self.size:
                return
            low = max(0, -(start // self.stride))
            high = min(self.out, (self.size - 1 - start) // self.stride + 1)
            if low < high:
                first = start + low * self.stride
                end = first + (high - low - 1) * self.stride + 1
                yield slice(low, high), slice(first, end, self.stride)


def _and_over_windows(words: Tensor, axes: list[_PoolAxis]) -> Tensor:
    for dim, axis in enumerate(axes, 1):
        whole = slice(0, axis.out)
        taps = sorted(axis.taps(), key=lambda tap: tap[0] != whole)  # first those that every window has
        result: Tensor | None = None
        own = False  # whether it is no view of the caller's words
        if taps[0][0] != whole:
            shape = [*words.shape]
            shape[dim] = axis.out
            result, own = words.new_full(shape, -1), True  # all ones: neutral
        for outputs, pixels in taps:
            view = words[_along(dim, pixels)]
            if result is None:
                result = view
            elif outputs == whole:
                result, own = result & view, True
            else:
                result, own = result if own else result.clone(), True
                result[_along(dim, outputs)] &= view
        assert result is not None
        words = result
    return words.contiguous()


def _along(dim: int, part: slice) -> tuple[slice, ...]:
    return (slice(None),) * dim + (part,)


class MaxPool(_Pool):
    """Max-pool of a real image, to torch's bits and strides.

    On CPUs torch's loop over channels-last memory is vectorised, the one over contiguous memory is not; what
    it saves is more than the copies there and back cost.
    """

    kind = "max_pool"
    operands = ("input",)

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self._check_padding()

    def forward(self, input: Tensor) -> Tensor:
        last = torch.channels_last
        slow = input.device.type == "cpu" and input.dim() == 4 and input.is_contiguous()
        detour = slow and not input.is_contiguous(memory_format=last)
        image = input.contiguous(memory_format=last) if detour else input
        pooled = F.max_pool2d(image, **self.config)
        return pooled.contiguous() if detour else pooled
