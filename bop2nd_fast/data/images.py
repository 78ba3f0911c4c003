"""Pictures from files, as the networks of this package expect them: one rule, and the rest is refused.

==================================  ====================================================================
what the file holds                 what it becomes
==================================  ====================================================================
black and white, grey of 8 bits     1 channel, ``v / 127.5 - 1``
grey of 16 bits                     1 channel, ``v / 32767.5 - 1``: white is white at any depth
RGB, palette, YCbCr, CMYK           red, green, blue; ``v / 127.5 - 1``. Pillow converts, without colour
                                    profiles; of colours of 16 bits it keeps the upper 8
EXIF orientation                    is followed: the picture as a viewer shows it
alpha or a transparent colour       laid on white, as on paper, or on the ``background`` asked for; refused
                                    where nothing can be seen on white and none was asked for
32-bit integers, floats, Lab, HSV   refused: the file does not say their range
several frames                      refused
more than ``MAX_PIXELS`` pixels     refused before anything is decoded
==================================  ====================================================================
"""

from __future__ import annotations

import os
import stat
import struct
import tokenize
import warnings
import zlib
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

BACKGROUNDS = {"black": 0.0, "white": 1.0}
MAX_PIXELS = 2**26  # 8192x8192, 800 MB as fp32 RGB
_GREY, _COLOUR = ("1", "L", "LA"), ("P", "PA", "RGB", "RGBX", "RGBA", "YCbCr", "CMYK")
_GREY16 = ("I;16", "I;16L", "I;16B", "I;16N")
# What Pillow's decoders raise for damaged files, apart from errors of the file system.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, struct.error, zlib.error)


def read_images(path: str | Path, background: str | None = None) -> Tensor:
    """Read one picture (any format Pillow knows, see above) or a NumPy file of pictures.

    ``.npy``: ``[H, W]`` grey, ``[N, H, W]`` grey or ``[N, C, H, W]``; uint8 in 0..255 or floats already in
    [-1, 1].

    Args:
        path: the file.
        background: "black" or "white", on which transparent pixels are laid; None is white, see above.

    Returns:
        fp32 ``[N, C, H, W]`` in [-1, 1].

    Raises:
        OSError: there is no such file, it is a folder, no permission.
        ValueError: not a picture, damaged, or one that the rule refuses; the message names the file.
        ModuleNotFoundError: Pillow (extra ``[cli]``) is needed and not installed.
    """
    if background is not None and background not in BACKGROUNDS:
        raise ValueError(f"background is {background!r}, allowed are {', '.join(BACKGROUNDS)}")
    if not stat.S_ISREG(os.stat(path).st_mode) and not os.path.isdir(path):
        raise ValueError(f"{path} is not a regular file")
    with open(path, "rb") as file:
        if not file.read(1):
            raise ValueError(f"{path} is empty")
        file.seek(0)
        if Path(path).suffix.lower() == ".npy":
            return _from_array(path)
        return _from_picture(path, file, background)


def _from_array(path: str | Path) -> Tensor:
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # mapped: a header cannot ask for memory
    except (ValueError, EOFError, OverflowError, SyntaxError, TypeError, tokenize.TokenError) as error:
        raise ValueError(f"{path} is not a .npy file of numbers, or it is damaged ({error})") from error
    if not 2 <= array.ndim <= 4 or (array.ndim == 3 and array.shape[-1] in (3, 4)):
        raise ValueError(f"{path} has shape {array.shape}; allowed are [H, W], [N, H, W] and [N, C, H, W]")
    if array.size == 0:
        raise ValueError(f"{path} has shape {array.shape}: it holds no pixels")
    if array.dtype == np.uint8:
        images = torch.from_numpy(array.astype(np.float32)) / 127.5 - 1
    elif not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{path} holds {array.dtype}; allowed are uint8 (0 to 255) and floats in [-1, 1]")
    elif not bool((np.abs(array) <= 1).all()):
        raise ValueError(f"{path} holds floats outside [-1, 1]; scale them first")
    else:
        images = torch.from_numpy(array.astype(np.float32))
    if images.ndim == 2:
        images = images.unsqueeze(0)
    return images if images.ndim == 4 else images.unsqueeze(1)


def _from_picture(path: str | Path, file: IO[bytes], background: str | None) -> Tensor:
    from PIL import Image, ImageOps, UnidentifiedImageError

    bombs = (Image.DecompressionBombError, Image.DecompressionBombWarning)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(file) as picture:
                _check_kind(path, picture)
                picture.load()
                return _pixels(path, ImageOps.exif_transpose(picture), background)
        except UnidentifiedImageError as error:
            raise ValueError(f"{path} is not a picture that Pillow can read, nor a .npy file") from error
        except bombs as error:
            raise ValueError(f"{path} is too large: {error}") from error
        except _Refused:
            raise
        except _DAMAGED as error:
            raise ValueError(f"{path} is damaged: {error}") from error


class _Refused(ValueError):
    """A sound picture that the rule refuses."""


def _check_kind(path: str | Path, picture: Image.Image) -> None:
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise _Refused(f"{path} has {width}x{height} pixels; allowed are {MAX_PIXELS} in all")
    if picture.mode not in (*_GREY, *_COLOUR, *_GREY16) and not _is_16_bit(picture):
        raise _Refused(
            f"{path} has pixels of Pillow's mode {picture.mode!r}; allowed are black and white, grey of 8 "
            f"and 16 bits, palettes, RGB, YCbCr and CMYK. Others can come as a .npy file of floats in [-1, 1]"
        )
    # A camera's MPO holds previews of the same picture behind the first.
    n_frames = getattr(picture, "n_frames", 1)
    if n_frames > 1 and picture.format != "MPO":
        raise _Refused(f"{path} has {n_frames} frames; allowed is one picture per file")


def _is_16_bit(picture: Image.Image) -> bool:
    """Older Pillows read grey PNG and PGM of 16 bits as 32-bit integers; these formats have no wider ones."""
    return picture.mode == "I" and picture.format in ("PNG", "PPM")


def _pixels(path: str | Path, picture: Image.Image, background: str | None) -> Tensor:
    """fp32 ``[1, C, H, W]``."""
    transparent = picture.info.get("transparency")
    if picture.mode in _GREY or picture.mode in _COLOUR:
        kind = "L" if picture.mode in _GREY else "RGB"
        has_alpha = picture.mode in ("LA", "PA", "RGBA") or transparent is not None
        if has_alpha:
            kind = {"L": "LA", "RGB": "RGBA"}[kind]
        values = np.asarray(picture.convert(kind), np.float32) / 127.5 - 1
        values = values.reshape(*values.shape[:2], -1)
        colours, alpha = (values[..., :-1], (values[..., -1:] + 1) / 2) if has_alpha else (values, None)
    else:
        raw = np.asarray(picture)[..., None]
        colours = raw.astype(np.float32) / 32767.5 - 1
        alpha = None if transparent is None else (raw != transparent).astype(np.float32)
    if alpha is not None and bool((alpha < 1).any()):
        ground = 2 * BACKGROUNDS[background or "white"] - 1
        colours = ground + (colours - ground) * alpha
        if background is None and bool((colours == ground).all()):
            raise _Refused(
                f"{path} is transparent, and nothing of it can be seen on white; say on which background "
                f"it is to be laid: {' or '.join(BACKGROUNDS)}"
            )
    return torch.from_numpy(np.ascontiguousarray(colours.transpose(2, 0, 1)[None]))
