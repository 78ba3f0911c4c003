"""Tensors and text in one safetensors file, with a checksum: bytes in, bytes out, nothing of models.

The layout is that of safetensors: the header's length as a little-endian uint64, a JSON header, the tensors'
bytes one after another. ``docs/packed_file.md`` says what a packed model adds. A reader trusts nothing: the
header has to describe the bytes of the file exactly, and only then is a tensor made.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_LIMIT = 2**24  # bytes: a header of every network we know is below one hundredth of it
TEXT_LIMIT = 256  # characters of a name, or of a text argument
_ALIGNMENT = 8


class PackedFileError(ValueError):
    """The file is not a packed model, is damaged, or is of a format version this package does not read."""


def printable(text: object) -> str:
    """Text that may come from a file, for a message: short, and nothing in it moves a terminal's cursor."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text)[:600])
    return shown + (" ..." if len(str(text)) > 600 else "")


def checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over version, profile, graph and every tensor, as ``docs/packed_file.md`` spells it out."""
    digest = hashlib.sha256()
    for key in ("version", "profile", "graph"):
        digest.update(metadata.get(key, "").encode() + b"\0")
    for name in sorted(tensors, key=str.encode):
        tensor = tensors[name]
        digest.update(name.encode() + b"\0" + _NAMES[tensor.dtype].encode() + b"\0")
        for number in (tensor.dim(), *tensor.shape):
            digest.update(number.to_bytes(8, "little"))
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def write(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> bytes:
    """The file's bytes. The same content always gives the same bytes.

    Raises:
        ValueError: a dtype that a file cannot hold, or a header above ``HEADER_LIMIT``.
    """
    fields: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    parts, at = [], 0
    for name in sorted(tensors, key=lambda n: (-tensors[n].element_size(), n.encode())):
        tensor = tensors[name]
        end = at + tensor.numel() * tensor.element_size()
        fields[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, end],
        }
        parts.append(_bytes(tensor))
        at = end
    header = json.dumps(fields, separators=(",", ":"), allow_nan=False).encode()
    header += b" " * (-len(header) % _ALIGNMENT)  # tensors start on 8 bytes
    if len(header) > HEADER_LIMIT:
        raise ValueError(f"the graph needs {len(header):,} bytes, a file holds {HEADER_LIMIT:,}")
    return b"".join([len(header).to_bytes(8, "little"), header, *parts])


def known(tensor: Tensor) -> bool:
    """Whether a file can hold a tensor of that dtype."""
    return tensor.dtype in _NAMES


def read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors; the checksum is not looked at.

    Raises:
        OSError: the file is missing or unreadable.
        PackedFileError: no regular file, or not exactly what its header says.
    """
    data = _contents(path)
    size = len(data)
    length = int.from_bytes(data[:8], "little")
    if size < 8 or length > size - 8:
        raise PackedFileError("damaged or not a packed model: it ends inside its header")
    if length > HEADER_LIMIT:
        raise PackedFileError(f"not a packed model: a header of {length:,} bytes, {HEADER_LIMIT:,} allowed")
    header = parse_json(bytes(data[8 : 8 + length]))
    if not isinstance(header, dict):
        raise PackedFileError("damaged or not a packed model: its header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise PackedFileError("damaged or not a packed model: its metadata is no text")
    body = memoryview(data)[8 + length :]
    return metadata, _tensors(header, body)


def parse_json(text: str | bytes) -> Any:
    """JSON of a file. Refused: keys twice, NaN, numbers beyond int64 or float64, deep nesting.

    Raises:
        PackedFileError
    """
    try:
        return json.loads(
            text, object_pairs_hook=_unique, parse_int=_int64, parse_float=_finite, parse_constant=_finite
        )
    except RecursionError:
        raise PackedFileError("damaged or not a packed model: nested too deeply") from None
    except ValueError as error:  # also what is no UTF-8
        raise PackedFileError(f"damaged or not a packed model: {error}") from None


# ------------------------------------------------------------------------------------------- parts


def _bytes(tensor: Tensor) -> bytes:
    """Not through NumPy: torch would take the memory for NumPy's ever after (``binary_tensor/memory.py``)."""
    tensor = tensor.contiguous()
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes) if tensor.numel() else b""


def _contents(path: Path) -> bytearray:
    """The file at once, so that nothing changes while it is looked at. Special files would never end."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise PackedFileError("not a regular file")
    with os.fdopen(handle, "rb") as file:
        data = bytearray(status.st_size)
        if file.readinto(data) != status.st_size or file.read(1):
            raise PackedFileError("damaged or not a packed model: it changed while it was read")
    return data


def _tensors(header: dict[str, Any], body: memoryview) -> dict[str, Tensor]:
    places = {name: _place(name, entry, len(body)) for name, entry in header.items()}
    at = 0
    for name, (_, _, begin, end) in sorted(places.items(), key=lambda item: item[1][2:]):
        if begin != at:
            raise PackedFileError(f"damaged: tensor {name!r} starts at byte {begin}, {at} was expected")
        at = end
    if at != len(body):
        raise PackedFileError(f"damaged or not a packed model: {len(body)} bytes of tensors, {at} described")
    tensors = {}
    for name, (dtype, shape, begin, end) in places.items():
        flat = torch.empty(end - begin, dtype=torch.uint8)  # memory of its own, aligned as torch aligns it
        if end > begin:
            flat.copy_(torch.frombuffer(body, dtype=torch.uint8, count=end - begin, offset=begin))
        if dtype == torch.bool and bool((flat > 1).any()):
            raise PackedFileError(f"tensor {name!r} has truth values other than 0 and 1")
        tensors[name] = flat.view(dtype).reshape(shape)
    return tensors


def _place(name: str, entry: Any, size: int) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """Dtype, shape, first byte and end of a tensor, which fit each other and the file."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise PackedFileError(f"damaged: tensor {name!r} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise PackedFileError(f"tensor {name!r} is of unknown dtype {dtype!r}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or any(type(n) is not int or n < 0 for n in numbers):
            raise PackedFileError(f"damaged: tensor {name!r} has sizes that are no list of integers >= 0")
    n_bytes = math.prod(shape) * DTYPES[dtype].itemsize
    if len(shape) > 16 or max(shape, default=0) >= 2**48:
        raise PackedFileError(f"tensor {name!r} has the impossible shape {shape}")
    if len(offsets) != 2 or offsets[1] - offsets[0] != n_bytes or offsets[1] > size:
        raise PackedFileError(f"damaged: tensor {name!r} of {n_bytes} bytes cannot lie at bytes {offsets}")
    return DTYPES[dtype], tuple(shape), offsets[0], offsets[1]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return result


def _int64(digits: str) -> int:
    value = int(digits) if len(digits) <= 20 else 2**64
    if not -(2**63) <= value < 2**63:
        raise ValueError("an integer beyond 64 bits")
    return value


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:20]} is no finite one")
    return value
