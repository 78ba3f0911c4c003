"""Shuffled batches and augmentation, seeded and vectorised."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

Augment = Callable[[Tensor, torch.Generator], Tensor]


class Batches:
    """Batches of one epoch: every call of ``iter`` reshuffles.

    The order depends on ``generator`` alone, so restoring its state resumes the sequence. Batches have
    exactly ``batch_size`` examples; a remainder is left for the next shuffle (batch norm dislikes a batch
    of one, and equal shapes never recompile).

    Args:
        images: ``[N, C, H, W]``; labels: ``[N]``.
        batch_size: 1 to N.
        generator: a CPU generator for order and augmentation.
        augment: maps a batch and the generator to a batch of the same shape; None for none.

    Raises:
        ValueError: for lengths that differ or an impossible batch size.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        generator: torch.Generator,
        augment: Augment | None = None,
    ) -> None:
        if len(images) != len(labels):
            raise ValueError(f"Batches: {len(images)} images but {len(labels)} labels")
        if not 1 <= batch_size <= len(images):
            raise ValueError(f"Batches: batch_size is {batch_size}, allowed is 1 to {len(images)}")
        self.images, self.labels = images, labels
        self.batch_size, self.generator, self.augment = batch_size, generator, augment

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.images), generator=self.generator).to(self.images.device)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            index = order[start : start + self.batch_size]
            images = self.images[index]
            if self.augment is not None:
                images = self.augment(images, self.generator)
            yield images, self.labels[index]


def augment_crop_flip(images: Tensor, generator: torch.Generator, pad: int = 4) -> Tensor:
    """Pad by ``pad`` zeros, crop the original size at random, mirror half of the images.

    ``images`` is ``[N, C, H, W]``; every image has its own offset and coin. CIFAR-10's augmentation in
    arXiv 2104.05124 (pad to 40, crop 32, horizontal flip).
    """
    n, channels, height, width = images.shape
    padded = F.pad(images, (pad, pad, pad, pad))
    offsets = torch.randint(0, 2 * pad + 1, (2, n, 1), generator=generator)
    mirror = torch.randint(0, 2, (n, 1), generator=generator).bool()
    rows = offsets[0] + torch.arange(height)
    columns = torch.arange(width).expand(n, width)
    columns = offsets[1] + torch.where(mirror, columns.flip(1), columns)
    rows, columns = rows.to(images.device), columns.to(images.device)
    example = torch.arange(n, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[None, :, None, None]
    return padded[example, channel, rows[:, None, :, None], columns[:, None, None, :]]
