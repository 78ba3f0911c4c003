"""MNIST and Fashion-MNIST from a folder of the four idx files, gzipped or not; nothing is downloaded."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .dataset import Dataset

DIGITS = tuple(str(i) for i in range(10))
CLOTHES = (
    *("T-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
FILES = tuple((f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte") for part in ("train", "t10k"))


def mnist(root: str | Path) -> Dataset:
    """Read MNIST.

    Args:
        root: the folder with ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``,
            ``t10k-images-idx3-ubyte`` and ``t10k-labels-idx1-ubyte``, each with or without ``.gz``; or a
            folder that holds them as torchvision lays them (``MNIST/raw``).

    Returns:
        A `Dataset` with images fp32 ``[N, 1, 28, 28]`` in [-1, 1].

    Raises:
        FileNotFoundError: a file is missing; the message names every missing one.
        ValueError: a file is truncated, damaged, or no idx file of bytes.
    """
    return _read("mnist", "MNIST", DIGITS, Path(root))


def fashion_mnist(root: str | Path) -> Dataset:
    """Read Fashion-MNIST: the same files as :func:`mnist`."""
    return _read("fashion_mnist", "FashionMNIST", CLOTHES, Path(root))


def _read(name: str, archive: str, classes: tuple[str, ...], root: Path) -> Dataset:
    folders = (root, root / "raw", root / archive / "raw", root / archive)
    folder = next((f for f in folders if any(_find(f, n) for pair in FILES for n in pair)), root)
    missing = [n for pair in FILES for n in pair if _find(folder, n) is None]
    if missing:
        raise FileNotFoundError(
            f"{name}: {folder} lacks {', '.join(missing)} (each may end in .gz); this package downloads "
            "nothing"
        )
    parts: list[Tensor] = []
    for image_file, label_file in FILES:
        images, labels = _idx(folder, image_file, 3), _idx(folder, label_file, 1)
        if len(images) != len(labels):
            raise ValueError(
                f"{name}: {image_file} has {len(images)} images, {label_file} {len(labels)} labels"
            )
        if labels.max() > 9:
            raise ValueError(f"{name}: {label_file} holds label {labels.max()}, labels are 0 to 9")
        pixels = torch.from_numpy(images).float().div_(127.5).sub_(1.0)
        parts += [pixels.unsqueeze(1), torch.from_numpy(labels.astype(np.int64))]
    return Dataset(name, classes, *parts)


def _find(folder: Path, name: str) -> Path | None:
    return next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)


def _idx(folder: Path, name: str, rank: int) -> np.ndarray:
    """An idx file of bytes: two zero bytes, 8 (bytes), the rank, big-endian sizes, the data."""
    path = _find(folder, name)
    assert path is not None
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(4 + 4 * rank)
            if len(head) < 4 + 4 * rank or head[:4] != bytes((0, 0, 8, rank)):
                raise ValueError(f"{path} is no idx file of bytes with {rank} axes")
            sizes = [int.from_bytes(head[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank)]
            wanted = math.prod(sizes)
            if wanted == 0 or wanted > 1 << 31:
                raise ValueError(f"{path} says it has sizes {sizes}; that is no set of pictures")
            data = file.read(wanted + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if len(data) != wanted:
        extent = "more" if len(data) > wanted else f"only {len(data)}"
        raise ValueError(f"{path} says it has {wanted} bytes of data (sizes {sizes}), it has {extent}")
    return np.frombuffer(data, np.uint8).reshape(sizes).copy()
