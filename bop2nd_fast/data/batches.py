"""Batches for training and testing, from images in memory or from a folder of pictures.

Order and augmentation follow from (seed, epoch) alone, so an epoch can be entered at any batch, and nothing
of a loader has to be saved for a run to be resumed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .dataset import Dataset
from .folder import ImageFolder
from .seeds import generator_of

PAD = 4  # of crop_flip; CIFAR-10's in arXiv 2104.05124: pad to 40, crop 32, mirror
TEST_BATCH = 500  # images at a time when testing in memory


class Loader(Protocol):
    """What the training loop asks for. All batches of an epoch have the same size: a remainder is left for
    the next shuffle (batch norm dislikes a batch of one, and equal shapes never recompile)."""

    steps_per_epoch: int

    def train(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches ``first``, ``first + 1``, ... of an epoch: images fp32 ``[n, C, H, W]`` in [-1, 1] and
        labels int64 ``[n]``, on the device."""

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The test images, in order; the last batch may be smaller."""


def loader(
    dataset: Dataset | ImageFolder,
    batch_size: int,
    seed: int,
    augmentation: str = "none",
    device: str | torch.device = "cpu",
    share: tuple[int, int] = (0, 1),
    workers: int = 0,
) -> Loader:
    """Batches of ``dataset``: images in memory move to the device once and are augmented there.

    Args:
        batch_size: of all processes together.
        seed: of order and augmentation.
        augmentation: ``none``, ``flip`` or ``crop_flip`` for images in memory, ``resized_crop`` for folders.
        share: (rank, number of processes): each gets every so-manieth image of a batch.
        workers: processes that decode the pictures of a folder; batches do not depend on it.

    Raises:
        ValueError: an impossible batch size, an augmentation that the data set does not allow.
    """
    if batch_size % share[1]:
        raise ValueError(f"batch_size is {batch_size}, it must be a multiple of the {share[1]} processes")
    allowed = ("resized_crop",) if isinstance(dataset, ImageFolder) else ("none", "flip", "crop_flip")
    if augmentation not in allowed:
        raise ValueError(
            f"{dataset.name} cannot be augmented by {augmentation!r}; allowed is {' or '.join(allowed)}"
        )
    if isinstance(dataset, ImageFolder):
        return _Folder(dataset, batch_size, seed, torch.device(device), share, workers)
    return _InMemory(dataset, batch_size, seed, augmentation, torch.device(device), share)


class _InMemory:
    """Images on the device."""

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seed: int,
        augmentation: str,
        device: torch.device,
        share: tuple[int, int],
    ) -> None:
        _check_sizes(batch_size, len(dataset.train_images))
        self.images, self.labels = dataset.train_images.to(device), dataset.train_labels.to(device)
        self.batch_size, self.seed, self.augmentation = batch_size, seed, augmentation
        self.rank, self.world = share
        self.tests = [
            (images[self.rank :: self.world].to(device), labels[self.rank :: self.world].to(device))
            for images, labels in dataset.test_batches(TEST_BATCH)
        ]
        self.steps_per_epoch = len(self.images) // batch_size

    def train(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        n, device = len(self.images), self.images.device
        generator = generator_of(self.seed, epoch)
        order = torch.randperm(n, generator=generator).to(device)
        # Drawn for a whole epoch: one transfer, and a step waits for nothing.
        draws = None
        if self.augmentation != "none":
            draws = draw_crop_flip(n, generator, crop=self.augmentation == "crop_flip").to(device)
        for step in range(first, self.steps_per_epoch):
            chosen = slice(step * self.batch_size + self.rank, (step + 1) * self.batch_size, self.world)
            index = order[chosen]
            images = self.images[index]
            if draws is not None:
                images = crop_flip(images, draws[:, chosen])
            yield images, self.labels[index]

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from (batch for batch in self.tests if len(batch[1]))


class _Folder:
    """Pictures decoded while training."""

    def __init__(
        self,
        folder: ImageFolder,
        batch_size: int,
        seed: int,
        device: torch.device,
        share: tuple[int, int],
        workers: int,
    ) -> None:
        _check_sizes(batch_size, len(folder.train_pictures))
        self.folder, self.batch_size, self.seed, self.device = folder, batch_size, seed, device
        self.share, self.workers = share, workers
        self.steps_per_epoch = len(folder.train_pictures) // batch_size

    def train(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        batches = self.folder.train_batches(
            self.batch_size, self.seed, epoch, first, self.workers, self.share
        )
        yield from ((x.to(self.device), y.to(self.device)) for x, y in batches)

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = self.folder.test_batches(min(self.batch_size, 256), self.workers, self.share)
        yield from ((x.to(self.device), y.to(self.device)) for x, y in batches)


def _check_sizes(batch_size: int, n: int) -> None:
    if not 1 <= batch_size <= n:
        raise ValueError(f"batch_size is {batch_size}, allowed is 1 to {n}")


def draw_crop_flip(n: int, generator: torch.Generator, crop: bool = True) -> Tensor:
    """int64 ``[3, n]``: of every image the crop's top and left in the padded image, and whether to mirror.

    Without ``crop`` every crop is the image itself.
    """
    corners = torch.full((2, n), PAD)
    if crop:
        corners = torch.randint(0, 2 * PAD + 1, (2, n), generator=generator)
    return torch.cat([corners, torch.randint(0, 2, (1, n), generator=generator)])


def crop_flip(images: Tensor, draws: Tensor) -> Tensor:
    """Pad ``[N, C, H, W]`` by ``PAD`` zeros, crop the original size, mirror; ``draws`` is ``[3, N]``."""
    n, channels, height, width = images.shape
    padded = F.pad(images, (PAD,) * 4)
    top, left, mirror = draws[0, :, None], draws[1, :, None], draws[2, :, None]
    rows = top + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    columns = left + torch.where(mirror == 1, width - 1 - columns, columns)
    index = (rows * padded.shape[3])[:, :, None] + columns[:, None, :]
    pixels = index.view(n, 1, height * width).expand(-1, channels, -1)
    return padded.view(n, channels, -1).gather(2, pixels).view(n, channels, height, width)
