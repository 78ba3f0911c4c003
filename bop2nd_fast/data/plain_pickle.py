"""Pickles that hold plain data, read without running anything that a pickle can name.

Only dicts, lists, tuples, numbers, strings, bytes and numeric NumPy arrays come through: what the Python
layout of CIFAR consists of. Every other name in the file is refused. The few names that are let through stand
for objects of this module, not for NumPy's, and check what they are given.
"""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

_DTYPES = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8")


class PlainPickleError(ValueError):
    """Not a pickle of plain data; the message names the file and what was found."""


class _Fixed:
    """Pickles can set the attributes of what they name; these have none to set."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> NoReturn:
        raise pickle.UnpicklingError("state for an object that has none")


class _Dtype:
    """Stands for ``numpy.dtype``."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any) -> None:
        self.code = code.decode("ascii") if isinstance(code, bytes) else code
        self.order = "|"
        if self.code not in _DTYPES:
            raise pickle.UnpicklingError(f"an array of {self.code!r}; allowed are {', '.join(_DTYPES)}")

    def __setstate__(self, state: Any) -> None:
        order = state[1].decode("ascii") if isinstance(state[1], bytes) else state[1]
        if order not in ("|", "<", ">", "="):
            raise pickle.UnpicklingError(f"an array in byte order {order!r}")
        self.order = order


class _Array:
    """Stands for ``numpy.ndarray``; ``value`` is the array once its state is there."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, columns_first, data = state
        plain = isinstance(dtype, _Dtype) and isinstance(data, bytes) and isinstance(shape, tuple)
        if not plain or not all(type(n) is int and n >= 0 for n in shape):
            raise pickle.UnpicklingError("an array of something else than numbers")
        kind = np.dtype(dtype.order + dtype.code)
        if math.prod(shape) * kind.itemsize != len(data):
            raise pickle.UnpicklingError(f"an array of shape {shape} in {len(data)} bytes")
        flat = np.frombuffer(data, kind).astype(kind.newbyteorder("="))
        self.value = flat.reshape(shape[::-1]).T if columns_first else flat.reshape(shape)


class _Name(_Fixed):
    """``numpy.ndarray`` as an argument: nothing can be done with it."""

    __slots__ = ()


class _MakeDtype(_Fixed):
    __slots__ = ()

    def __call__(self, code: Any, *_: Any) -> _Dtype:
        return _Dtype(code)


class _MakeArray(_Fixed):
    __slots__ = ()

    def __call__(self, *_: Any) -> _Array:
        return _Array()


class _MakeBytes(_Fixed):
    """``_codecs.encode(text, "latin1")`` and ``bytes()``: how Python 3 writes bytes for Python 2."""

    __slots__ = ()

    def __call__(self, text: Any = "", encoding: Any = "latin1") -> bytes:
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
            raise pickle.UnpicklingError("bytes in an unknown encoding")
        return text.encode("latin1")


_NAMES: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _MakeArray(),
    ("numpy._core.multiarray", "_reconstruct"): _MakeArray(),
    ("numpy", "ndarray"): _Name(),
    ("numpy", "dtype"): _MakeDtype(),
    ("_codecs", "encode"): _MakeBytes(),
    ("__builtin__", "bytes"): _MakeBytes(),
}


class _Reader(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        found = _NAMES.get((module_name, global_name))
        if found is None:
            raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, which is not plain data")
        return found


def load(path: str | Path) -> Any:
    """The content of a pickle of plain data; text of Python 2 comes as bytes.

    Raises:
        OSError: the file cannot be read.
        PlainPickleError: it is no pickle, is truncated, or names anything that is not plain data.
    """
    with Path(path).open("rb") as file:
        try:
            return _plain(_Reader(file, encoding="bytes").load())
        except (
            pickle.UnpicklingError,
            EOFError,
            ValueError,
            TypeError,
            AttributeError,
            IndexError,
            KeyError,
            OverflowError,
            MemoryError,
            RecursionError,
        ) as error:
            reason = str(error) or type(error).__name__
            raise PlainPickleError(f"{path} is not a pickle of plain data: {reason}") from error


def _plain(tree: Any) -> Any:
    if isinstance(tree, _Array):
        if tree.value is None:
            raise pickle.UnpicklingError("an array without content")
        return tree.value
    if isinstance(tree, dict):
        return {_plain(k): _plain(v) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_plain(v) for v in tree)
    if tree is None or isinstance(tree, (bool, int, float, str, bytes)):
        return tree
    raise pickle.UnpicklingError(f"a {type(tree).__name__.strip('_').lower()} by itself")
