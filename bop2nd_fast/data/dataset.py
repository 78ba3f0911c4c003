"""What the trainer and the command line know about a data set."""

from __future__ import annotations

from collections.abc import Iterator
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

    def test_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The test images and their labels in order; the last batch may be smaller."""
        yield from zip(self.test_images.split(batch_size), self.test_labels.split(batch_size), strict=True)
