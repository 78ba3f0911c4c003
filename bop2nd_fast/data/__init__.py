"""Data sets by name, from this machine alone, and batches made from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .batches import Batches, augment_crop_flip
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
NAMES = ("digits", *FOLDERS)


def get(name: str, folder: str | Path | None = None) -> Dataset:
    """The data set of that name.

    Args:
        name: one of ``NAMES``. ``digits`` needs no folder; every other one does.
        folder: where its files are (or the folder around theirs). Nothing is ever downloaded.

    Raises:
        ValueError: an unknown name, a folder missing or too many, damaged files.
        FileNotFoundError: the folder lacks files; the message names them.
    """
    if name == "digits":
        if folder is not None:
            raise ValueError("digits come with scikit-learn; they take no folder")
        return digits()
    if name not in FOLDERS:
        raise ValueError(f"there is no data set {name!r}; there are {', '.join(NAMES)}")
    read, holds = FOLDERS[name]
    if folder is None:
        raise ValueError(f"{name} needs --data-dir, a folder that holds {holds}")
    return read(folder)


__all__ = [
    "FOLDERS",
    "NAMES",
    "Batches",
    "Dataset",
    "ImageFolder",
    "augment_crop_flip",
    "cifar10",
    "cifar100",
    "digits",
    "fashion_mnist",
    "get",
    "mnist",
    "read_images",
]
