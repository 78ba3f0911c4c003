"""Max-pooling that keeps one byte per output for the backward pass.

torch keeps the input of a max-pool (4 bytes per element in fp32) and int64 positions (8 per output). With
2x2 windows that is 24 bytes per output, where one says which element of its window was the largest. In a
binarized network, whose convolutions keep 2 bits per activation, it would be half of all that is kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.geometry import pair

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


class _Positions(torch.autograd.Function):
    """Max-pool of windows that lie side by side; keeps each maximum's position in its window as a byte."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, rows: int, columns: int) -> Tensor:
        output, index = F.max_pool2d(input, (rows, columns), return_indices=True)
        width = input.shape[3]
        first = torch.arange(output.shape[2], device=input.device)[:, None] * (rows * width)
        first = first + torch.arange(output.shape[3], device=input.device) * columns
        position = torch.zeros_like(index, dtype=torch.uint8)
        for k in range(1, rows * columns):
            here = index == first + (k // columns * width + k % columns)
            position.add_(here.view(torch.uint8), alpha=k)
        ctx.window, ctx.shape = (rows, columns), input.shape
        ctx.save_for_backward(position)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (position,) = ctx.saved_tensors
        result: Tensor = _Spread.apply(grad, position, ctx.window, ctx.shape)
        return result, None, None


class _Spread(torch.autograd.Function):
    """What the maxima receive goes to where they were, elsewhere 0. Its own gradient collects it again."""

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, position: Tensor, window: tuple[int, int], shape: torch.Size
    ) -> Tensor:
        ctx.window = window
        ctx.save_for_backward(position)
        rows, columns = window
        height, width = grad.shape[2] * rows, grad.shape[3] * columns
        last = position.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        result = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout)
        result[:, :, height:].zero_()  # what no window covers
        result[:, :, :, width:].zero_()
        # As integers, all bits of which are kept or none: several times as fast as torch.where on CPUs.
        bits, result_bits = (t.view(_INTEGERS[grad.element_size()]) for t in (grad, result))
        for i in range(rows):
            for j in range(columns):
                chosen = (position == i * columns + j).to(bits.dtype).neg_()
                result_bits[:, :, i:height:rows, j:width:columns] = chosen.bitwise_and_(bits)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (position,) = ctx.saved_tensors
        rows, columns = ctx.window
        height, width = position.shape[2] * rows, position.shape[3] * columns
        collected = torch.zeros_like(position, dtype=grad.dtype)
        for k in range(rows * columns):
            of_this_place = grad[:, :, k // columns : height : rows, k % columns : width : columns]
            collected = collected + torch.where(position == k, of_this_place, 0)
        return collected, None, None, None


class MaxPool2d(nn.MaxPool2d):
    """``torch.nn.MaxPool2d``, the same values and gradients, with less kept for the backward pass.

    Windows that lie side by side (stride equal to the kernel, no padding, no dilation, at most 256 elements)
    keep 1 byte per output; other geometries keep what torch keeps.

    Shapes: ``[N, C, H, W] -> [N, C, H // kH, W // kW]``, any floating dtype.
    """

    def forward(self, input: Tensor) -> Tensor:
        rows, columns = pair(self.kernel_size, "kernel_size", 1)
        beside = self.stride in (self.kernel_size, (rows, columns))
        plain = self.padding in (0, (0, 0)) and self.dilation in (1, (1, 1)) and not self.ceil_mode
        fits = rows * columns <= 256 and input.dim() == 4 and not self.return_indices
        if not (beside and plain and fits and input.requires_grad and torch.is_grad_enabled()):
            return super().forward(input)
        output: Tensor = _Positions.apply(input, rows, columns)
        return output
