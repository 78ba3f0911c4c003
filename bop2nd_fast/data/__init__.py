"""Data sets by name, from this machine alone, and batches made from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .batches import Loader, loader
from .cifar import cifar10, cifar100
from .dataset import Dataset
from .digits import digits
from .folder import ImageFolder
from .images import read_images
from .mnist import fashion_mnist, mnist

FOLDERS: dict[str, tuple[Callable[[Any], Dataset], str]] = {
    "cifar10": (cifar10, "cifar-10-batches-bin or cifar-10-batches-py"),
    "cifar100": (cifar100, "cifar-100-binary or cifar-100-python"),
    "mnist": (mnist, "train-images-idx3-ubyte and the other three, gzipped or not"),
    "fashion_mnist": (fashion_mnist, "train-images-idx3-ubyte and the other three, gzipped or not"),
}
# Classes, channels, height and width of the images, known before any file is read.
SHAPES = {
    "digits": (10, 1, 8),
    "cifar10": (10, 3, 32),
    "cifar100": (100, 3, 32),
    "mnist": (10, 1, 28),
    "fashion_mnist": (10, 1, 28),
    "imagenet": (1000, 3, 224),
}
NAMES = ("digits", *FOLDERS, "imagenet")


def get(name: str, folder: str | Path | None = None, image_size: int | None = None) -> Dataset | ImageFolder:
    """The data set of that name.

    Args:
        name: one of ``NAMES``. ``digits`` needs no folder; every other one does. ``imagenet`` is any folder
            with ``train/<class>/*`` and ``val/<class>/*``.
        folder: where its files are (or the folder around theirs). Nothing is ever downloaded.
        image_size: height and width that the pictures of ``imagenet`` are brought to; 224 if not given.

    Raises:
        ValueError: an unknown name, a folder missing or too many, damaged files.
        FileNotFoundError: the folder lacks files; the message names them.
    """
    if image_size is not None and name != "imagenet":
        raise ValueError(f"{name} has images of one size; only those of imagenet can be brought to another")
    if name == "digits":
        if folder is not None:
            raise ValueError("digits come with scikit-learn; they take no folder")
        return digits()
    if name not in NAMES:
        raise ValueError(f"there is no data set {name!r}; there are {', '.join(NAMES)}")
    if folder is None:
        holds = FOLDERS[name][1] if name in FOLDERS else "train/<class>/* and val/<class>/*"
        raise ValueError(f"{name} needs --data-dir, a folder that holds {holds}")
    if name == "imagenet":
        return ImageFolder(folder, 224 if image_size is None else image_size, name)
    return FOLDERS[name][0](folder)


__all__ = [
    "FOLDERS",
    "NAMES",
    "SHAPES",
    "Dataset",
    "ImageFolder",
    "Loader",
    "cifar10",
    "cifar100",
    "digits",
    "fashion_mnist",
    "get",
    "loader",
    "mnist",
    "read_images",
]
