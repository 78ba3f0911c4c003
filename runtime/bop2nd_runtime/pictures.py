"""Pictures and ``.npy`` files as inputs of a network, by the rule of ``bop2nd predict``: in [-1, 1]."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

GREY, COLOUR = ("1", "L", "LA"), ("P", "PA", "RGB", "RGBX", "RGBA", "YCbCr", "CMYK")


def read_array(path: str | os.PathLike[str]) -> NDArray[Any]:
    """The array of a ``.npy`` file; never one of Python objects.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is no ``.npy`` file of numbers, or damaged.
    """
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a .npy file of numbers, or it is damaged ({error})") from error


def read_picture(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """One picture, uint8 ``[1, C, H, W]``: C is 1 for grey, 3 for colours; what is transparent lies on white.

    Raises:
        OSError: there is no such file, or it is damaged.
        ValueError: a kind of picture that does not say the range of its values, or several frames.
        ModuleNotFoundError: Pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "pictures need Pillow: pip install 'bop2nd-runtime[images]'; .npy files do not"
        ) from error
    with Image.open(path) as picture:
        if picture.mode not in (*GREY, *COLOUR) or getattr(picture, "n_frames", 1) > 1:
            raise ValueError(f"{path} is no single picture of 8 bits: give a .npy file of floats in [-1, 1]")
        grey = picture.mode in GREY
        clear = picture.mode in ("LA", "PA", "RGBA") or "transparency" in picture.info
        upright = ImageOps.exif_transpose(picture)
        if clear:
            white = Image.new("RGBA", upright.size, "white")
            upright = Image.alpha_composite(white, upright.convert("RGBA"))
        pixels = np.asarray(upright.convert("L" if grey else "RGB"))
    return np.ascontiguousarray(pixels.reshape(1, *pixels.shape[:2], -1).transpose(0, 3, 1, 2))


def as_input(values: NDArray[Any], dtype: np.dtype[Any], n_axes: int) -> NDArray[Any]:
    """``values`` as an input of this dtype and number of axes.

    uint8 becomes ``v / 127.5 - 1`` where the input is float32, floats become float32; a batch axis, and
    one of channels, is added where axes are missing. Other dtypes stay, and the network refuses them.
    """
    if dtype == np.float32 and values.dtype == np.uint8:
        values = values.astype(np.float32) / np.float32(127.5) - np.float32(1)
    elif dtype == np.float32 and np.issubdtype(values.dtype, np.floating):
        values = values.astype(np.float32)
    if values.ndim == n_axes - 2:
        values = values[None, None]
    elif values.ndim == n_axes - 1:
        values = values[:, None] if n_axes == 4 else values[None]
    return values
