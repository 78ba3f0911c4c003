"""CIFAR-10 and CIFAR-100 from a folder the user names, in the binary or the Python layout; no downloads.

The Python layout is the one torchvision leaves behind. Its files are pickles; they are read as plain data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import plain_pickle
from .dataset import Dataset

CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
PIXEL_BYTES = 3 * 32 * 32  # the red, green and blue planes, row by row
_TEN = [f"data_batch_{i}" for i in range(1, 6)]


@dataclass(frozen=True)
class _Layout:
    """Where a layout keeps its records: a folder's name, its files, and the labels of one record.

    Binary: a record starts with ``label_bytes`` bytes, of which ``label_byte`` is the label. Python: the
    labels are under ``label_key``.
    """

    folder: str
    train: Sequence[str]
    test: Sequence[str]
    names: str
    label_bytes: int = 0
    label_byte: int = 0
    label_key: str = ""

    def read(self, path: Path, n_classes: int) -> tuple[Tensor, Tensor]:
        """Images uint8 ``[N, 3, 32, 32]`` and labels int64 ``[N]`` of one file."""
        pixels, labels = self._binary(path) if self.label_bytes else self._pickled(path)
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < n_classes:
            found = f"{int(labels.min())} to {int(labels.max())}"
            raise ValueError(f"{path} holds labels {found}; labels are 0 to {n_classes - 1}")
        return torch.from_numpy(pixels).reshape(-1, 3, 32, 32), torch.from_numpy(labels)

    def _binary(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        record = self.label_bytes + PIXEL_BYTES
        raw = np.fromfile(path, dtype=np.uint8)
        if raw.size == 0 or raw.size % record:
            raise ValueError(
                f"{path} has {raw.size} bytes, which is not a whole number of records of {record} bytes; the "
                "file is truncated or not the binary version"
            )
        records = raw.reshape(-1, record)
        return records[:, self.label_bytes :].copy(), records[:, self.label_byte].astype(np.int64)

    def _pickled(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        content = plain_pickle.load(path)
        found = content if isinstance(content, dict) else {}
        pixels, labels = (found.get(k, found.get(k.encode())) for k in ("data", self.label_key))
        if (
            not isinstance(pixels, np.ndarray)
            or pixels.dtype != np.uint8
            or pixels.shape[1:] != (PIXEL_BYTES,)
        ):
            raise ValueError(f"{path} has no 'data' of uint8 [N, {PIXEL_BYTES}]")
        if (
            not isinstance(labels, list)
            or len(labels) != len(pixels)
            or any(type(v) is not int for v in labels)
        ):
            raise ValueError(f"{path} has no {self.label_key!r}: a list of {len(pixels)} whole numbers")
        return pixels.copy(), np.array(labels, dtype=np.int64)


_CIFAR10 = (
    _Layout(
        "cifar-10-batches-bin",
        [f"{n}.bin" for n in _TEN],
        ["test_batch.bin"],
        "batches.meta.txt",
        label_bytes=1,
    ),
    _Layout("cifar-10-batches-py", _TEN, ["test_batch"], "batches.meta", label_key="labels"),
)
_CIFAR100 = (
    # each record: a coarse label, the fine label
    _Layout(
        "cifar-100-binary", ["train.bin"], ["test.bin"], "fine_label_names.txt", label_bytes=2, label_byte=1
    ),
    _Layout("cifar-100-python", ["train"], ["test"], "meta", label_key="fine_labels"),
)


def cifar10(root: str | Path) -> Dataset:
    """Read CIFAR-10.

    Args:
        root: the unpacked folder (``cifar-10-batches-bin`` or ``cifar-10-batches-py``), or its parent.

    Returns:
        A `Dataset` with images fp32 ``[N, 3, 32, 32]`` in [-1, 1]; N is what the files hold.

    Raises:
        FileNotFoundError: a file is missing; the message names every missing one.
        ValueError: a file is truncated, damaged, not plain data, or holds a label above 9.
    """
    return _read("cifar10", _CIFAR10, Path(root), 10, lambda layout, folder: CIFAR10_CLASSES)


def cifar100(root: str | Path) -> Dataset:
    """Read CIFAR-100 with its 100 fine labels; otherwise as :func:`cifar10`.

    Args:
        root: the unpacked folder (``cifar-100-binary`` or ``cifar-100-python``), or its parent.
    """
    return _read("cifar100", _CIFAR100, Path(root), 100, _fine_names)


def _fine_names(layout: _Layout, folder: Path) -> tuple[str, ...]:
    """The names of the fine labels, where the folder has them; else their numbers."""
    path = folder / layout.names
    names: Sequence[object] = ()
    if path.is_file() and layout.label_bytes:
        names = path.read_text("utf-8").split()
    elif path.is_file():
        content = plain_pickle.load(path)
        names = content.get(b"fine_label_names", content.get("fine_label_names", ()))
    texts = tuple(n.decode() if isinstance(n, bytes) else str(n) for n in names)
    return texts if len(texts) == 100 else tuple(str(i) for i in range(100))


def _read(
    name: str,
    layouts: Sequence[_Layout],
    root: Path,
    n_classes: int,
    names: Callable[[_Layout, Path], tuple[str, ...]],
) -> Dataset:
    layout, folder = _find(name, layouts, root)
    parts = []
    for files in (layout.train, layout.test):
        read = [layout.read(folder / file, n_classes) for file in files]
        images = torch.cat([r[0] for r in read]).float().div_(127.5).sub_(1.0)
        parts += [images, torch.cat([r[1] for r in read])]
    return Dataset(name, names(layout, folder), *parts)


def _find(name: str, layouts: Sequence[_Layout], root: Path) -> tuple[_Layout, Path]:
    """The layout that ``root``, or a folder of the archive's name in it, has."""
    for layout in layouts:
        for folder in (root, root / layout.folder):
            present = [file for file in (*layout.train, *layout.test) if (folder / file).is_file()]
            missing = [file for file in (*layout.train, *layout.test) if file not in present]
            if present and missing:
                raise FileNotFoundError(f"{name}: {folder} lacks {', '.join(missing)}")
            if present:
                return layout, folder
    wanted = " or ".join(f"{v.folder} ({', '.join([*v.train, *v.test])})" for v in layouts)
    raise FileNotFoundError(
        f"{name}: {root} holds no {name}; it must be, or hold, the unpacked {wanted}. This package downloads "
        "nothing"
    )
