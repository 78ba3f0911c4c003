"""What the trainer and the command line know about a data set."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Dataset:
    """Images and labels in memory, split into training and test.

    ``*_images`` are fp32 ``[N, C, H, W]`` in [-1, 1] (square), ``*_labels`` int64 ``[N]``.
    """

    name: str
    classes: tuple[str, ...]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def in_channels(self) -> int:
        return self.train_images.shape[1]

    @property
    def image_size(self) -> int:
        return self.train_images.shape[-1]
