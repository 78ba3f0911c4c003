"""Pictures from files, as the networks of this package expect them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def read_images(path: str | Path) -> Tensor:
    """Read one picture (any format Pillow knows) or a NumPy file of pictures.

    ``.npy``: ``[H, W]`` grey, ``[N, H, W]`` grey or ``[N, C, H, W]``; uint8 in 0..255 or floats already in
    [-1, 1]. A picture is read as grey if it is grey, else as red, green, blue.

    Returns:
        fp32 ``[N, C, H, W]`` in [-1, 1].

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another number of dimensions, another dtype, floats outside [-1, 1], not a picture.
        ModuleNotFoundError: Pillow (extra ``[cli]``) is needed and not installed.
    """
    if Path(path).suffix == ".npy":
        array = np.load(path, allow_pickle=False)
    else:
        array = _decode(path)
    if not 2 <= array.ndim <= 4:
        raise ValueError(f"{path} has shape {array.shape}; allowed are [H, W], [N, H, W] and [N, C, H, W]")
    if array.dtype != np.uint8 and not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{path} holds {array.dtype}; allowed are uint8 (0 to 255) and floats in [-1, 1]")
    images = torch.from_numpy(array).float()
    if array.dtype == np.uint8:
        images = images / 127.5 - 1
    elif not bool((images.abs() <= 1).all()):
        raise ValueError(f"{path} holds floats outside [-1, 1]; scale them first")
    if images.ndim == 2:
        images = images.unsqueeze(0)
    return images if images.ndim == 4 else images.unsqueeze(1)


def _decode(path: str | Path) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            grey = picture.mode in ("1", "L", "LA", "I;16")
            array = np.array(picture.convert("L" if grey else "RGB"))  # a copy: torch wants to own it
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not a picture that Pillow can read, nor a .npy file") from error
    return array if grey else array.transpose(2, 0, 1)[None]
