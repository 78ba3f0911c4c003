"""CIFAR-10 from a folder the user names; nothing is ever downloaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .dataset import Dataset

TRAIN_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST_FILES = ("test_batch.bin",)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
RECORD_BYTES = 1 + 3 * 32 * 32  # one label byte, then the red, green and blue planes row by row


def cifar10(root: str | Path) -> Dataset:
    """Read the binary version of CIFAR-10.

    Args:
        root: the folder with ``data_batch_1.bin`` .. ``data_batch_5.bin`` and ``test_batch.bin``, or its
            parent (the archive unpacks to ``cifar-10-batches-bin``).

    Returns:
        A `Dataset` with images fp32 ``[N, 3, 32, 32]`` in [-1, 1]; N is what the files hold.

    Raises:
        FileNotFoundError: a file is missing; the message names every missing one.
        ValueError: a file is truncated (not a whole number of records) or holds a label above 9.
    """
    folder = Path(root)
    if not (folder / TRAIN_FILES[0]).exists() and (folder / "cifar-10-batches-bin").is_dir():
        folder = folder / "cifar-10-batches-bin"
    missing = [name for name in TRAIN_FILES + TEST_FILES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"cifar10: {folder} lacks {', '.join(missing)}; it must hold the unpacked binary version of "
            f"CIFAR-10 (cifar-10-batches-bin), which this package does not download"
        )
    train = _read([folder / name for name in TRAIN_FILES])
    test = _read([folder / name for name in TEST_FILES])
    return Dataset("cifar10", CLASSES, *train, *test)


def _read(paths: list[Path]) -> tuple[Tensor, Tensor]:
    images, labels = [], []
    for path in paths:
        raw = np.fromfile(path, dtype=np.uint8)
        if raw.size == 0 or raw.size % RECORD_BYTES:
            raise ValueError(
                f"cifar10: {path} has {raw.size} bytes, which is not a whole number of records of "
                f"{RECORD_BYTES} bytes; the file is truncated or not the binary version"
            )
        records = torch.from_numpy(raw).view(-1, RECORD_BYTES)
        if int(records[:, 0].max()) > 9:
            raise ValueError(f"cifar10: {path} holds label {int(records[:, 0].max())}, labels are 0 to 9")
        labels.append(records[:, 0].to(torch.int64))
        images.append(records[:, 1:].reshape(-1, 3, 32, 32).float().div_(127.5).sub_(1.0))
    return torch.cat(images), torch.cat(labels)
