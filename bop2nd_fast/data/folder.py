"""An ImageNet-style folder, ``train/<class>/*`` and ``val/<class>/*``: pictures decoded while training.

What a picture becomes in an epoch follows from (seed, epoch, its number) alone, and the order from (seed,
epoch). So batches are the same whatever the number of worker processes, and an epoch can be entered at any
batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as MapDataset

from .images import read_images
from .seeds import generator_of

AREA = (0.08, 1.0)  # of the picture, that a training crop covers
RATIO = (3 / 4, 4 / 3)  # of a training crop's sides
TEST_MARGIN = 256 / 224  # the shorter side before the centre crop, over the crop's

Picture = tuple[Path, int]  # with its label


class ImageFolder:
    """Pictures in folders named after their classes.

    Args:
        root: holds ``train/<class>/*`` and ``val/<class>/*``. Files whose names start with a dot are left
            out; every other file must be a picture (see `read_images`).
        image_size: height and width of what networks get.
        name: of the data set, for reports.

    Training pictures: a crop of 8 to 100 % of the area with sides 3:4 to 4:3, resized, mirrored or not. Test
    pictures: the shorter side resized to 256/224 of ``image_size``, the centre cropped. Grey pictures become
    three equal channels.

    Raises:
        FileNotFoundError: there is no such folder, or a split or all classes are missing.
        ValueError: a class without pictures, a class in ``val`` that is not in ``train``, an impossible size.
    """

    in_channels = 3

    def __init__(self, root: str | Path, image_size: int = 224, name: str = "folder") -> None:
        if image_size < 1:
            raise ValueError(f"image_size is {image_size}, it must be at least 1")
        self.root, self.image_size, self.name = Path(root), image_size, name
        for split in ("train", "val"):
            if not (self.root / split).is_dir():
                raise FileNotFoundError(
                    f"{self.root} lacks the folder {split}; it must hold train/<class>/* and val/<class>/*"
                )
        self.classes = tuple(_folders(self.root / "train"))
        if not self.classes:
            raise FileNotFoundError(f"{self.root / 'train'} holds no folder; every class is a folder there")
        if extra := sorted({*_folders(self.root / "val")} - {*self.classes}):
            raise ValueError(f"{self.root}: {', '.join(extra)} in val, but not in train")
        self.train_pictures = self._pictures("train", self.classes)
        self.test_pictures = self._pictures("val", _folders(self.root / "val"))

    def _pictures(self, split: str, classes: Sequence[str]) -> list[Picture]:
        found: list[Picture] = []
        for name in classes:
            folder = self.root / split / name
            files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
            if not files:
                raise ValueError(f"{folder} holds no pictures")
            found += [(path, self.classes.index(name)) for path in files]
        if not found:
            raise ValueError(f"{self.root / split} holds no pictures")
        return found

    def train_batches(
        self,
        batch_size: int,
        seed: int,
        epoch: int,
        first: int = 0,
        workers: int = 0,
        share: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches ``first``, ``first + 1``, ... of an epoch; a remainder is left for the next shuffle.
        ``share`` is (rank, number of processes): each gets every so-manieth picture of a batch.

        Yields:
            images fp32 ``[batch_size, 3, image_size, image_size]`` in [-1, 1], labels int64 ``[batch_size]``.

        Raises:
            ValueError: an impossible batch size; a picture that cannot be read (the message names it).
        """
        n = len(self.train_pictures)
        if not 1 <= batch_size <= n:
            raise ValueError(f"batch_size is {batch_size}, allowed is 1 to {n}")
        order = torch.randperm(n, generator=generator_of(seed, epoch)).tolist()
        starts = range(first * batch_size, n // batch_size * batch_size, batch_size)
        batches = [order[start + share[0] : start + batch_size : share[1]] for start in starts]
        yield from _load(_Train(self.train_pictures, self.image_size, seed, epoch), batches, workers)

    def test_batches(
        self, batch_size: int, workers: int = 0, share: tuple[int, int] = (0, 1)
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The test pictures in order; the last batch may be smaller. ``share`` and what is raised: as
        :meth:`train_batches`."""
        own = range(share[0], len(self.test_pictures), share[1])
        batches = [list(own[start : start + batch_size]) for start in range(0, len(own), batch_size)]
        yield from _load(_Test(self.test_pictures, self.image_size), batches, workers)


def _folders(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


class _Pictures(MapDataset[tuple[Tensor, int] | str]):
    """One split; an item is an image and its label, or the message of a picture that cannot be read."""

    def __init__(self, pictures: list[Picture], size: int) -> None:
        self.pictures, self.size = pictures, size

    def __getitem__(self, index: int) -> tuple[Tensor, int] | str:
        path, label = self.pictures[index]
        try:
            image = read_images(path)
        except (ValueError, OSError) as error:  # a worker's traceback would bury the file's name
            return str(error)
        if len(image) != 1:
            return f"{path} holds {len(image)} pictures; here a file is one"
        return self.transform(image.expand(-1, 3, -1, -1), index)[0].clamp(-1, 1), label

    def transform(self, image: Tensor, index: int) -> Tensor:
        raise NotImplementedError


class _Train(_Pictures):
    def __init__(self, pictures: list[Picture], size: int, seed: int, epoch: int) -> None:
        super().__init__(pictures, size)
        self.seed, self.epoch = seed, epoch

    def transform(self, image: Tensor, index: int) -> Tensor:
        generator = generator_of(self.seed, self.epoch, index)
        top, left, height, width = _random_crop(image.shape[2], image.shape[3], generator)
        image = _resize(image[:, :, top : top + height, left : left + width], self.size, self.size)
        return image.flip(3) if bool(torch.randint(0, 2, (), generator=generator)) else image


class _Test(_Pictures):
    def transform(self, image: Tensor, index: int) -> Tensor:
        height, width = image.shape[2:]
        scale = round(self.size * TEST_MARGIN) / min(height, width)
        height, width = (max(self.size, round(side * scale)) for side in (height, width))
        top, left = (height - self.size) // 2, (width - self.size) // 2
        return _resize(image, height, width)[:, :, top : top + self.size, left : left + self.size]


def _random_crop(height: int, width: int, generator: torch.Generator) -> tuple[int, int, int, int]:
    """(top, left, height, width); after ten tries that do not fit, the largest centre crop that does."""
    for _ in range(10):
        area, shape = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        area = height * width * (AREA[0] + area * (AREA[1] - AREA[0]))
        low, high = map(math.log, RATIO)
        ratio = math.exp(low + shape * (high - low))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(0, height - h + 1, (), generator=generator))
            left = int(torch.randint(0, width - w + 1, (), generator=generator))
            return top, left, h, w
    h = min(height, max(1, round(width / RATIO[0])))
    w = min(width, max(1, round(height * RATIO[1])))
    return (height - h) // 2, (width - w) // 2, h, w


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(image, (height, width), mode="bilinear", align_corners=False, antialias=True)


def _collate(items: list[tuple[Tensor, int] | str]) -> tuple[Tensor, Tensor] | str:
    good: list[tuple[Tensor, int]] = []
    for item in items:
        if isinstance(item, str):
            return item
        good.append(item)
    return torch.stack([image for image, _ in good]), torch.tensor([label for _, label in good])


def _load(pictures: _Pictures, batches: list[list[int]], workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    loader = DataLoader(pictures, batch_sampler=batches, num_workers=workers, collate_fn=_collate)
    for batch in loader:
        if isinstance(batch, str):
            raise ValueError(batch)
        yield batch
