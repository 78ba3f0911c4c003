"""A packed network as a function of NumPy arrays."""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bop2nd_runtime import _native

Array = NDArray[np.generic]


class TensorInfo(NamedTuple):
    """An input or an output.

    ``shape`` is that of the example the network was converted with; an input may have another size along the
    axes that ``free`` marks. ``name`` of an output is its place in the result (``"logits"``, ``"pair.1"``).
    """

    name: str
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    free: tuple[bool, ...]


class StepTime(NamedTuple):
    """One operation of a run: its time in seconds and its multiply-accumulates, 0 if it has none."""

    name: str
    kind: str
    seconds: float
    products: float

    @property
    def rate(self) -> float:
        """Multiply-accumulates a second."""
        return self.products / self.seconds if self.seconds > 0 else 0.0


class Network:
    """A loaded network; :func:`load` makes one. Threads may call it at the same time."""

    def __init__(self, native: _native.Network) -> None:
        self._native = native
        self.inputs = tuple(TensorInfo(*info) for info in native.inputs())
        self.outputs = tuple(TensorInfo(*info) for info in native.outputs())

    def __call__(self, *arrays: Array, **named: Array) -> Array | tuple[Array, ...]:
        """Run the network once. Other threads of Python go on meanwhile.

        Args:
            arrays: the inputs in order, of exactly the dtypes and number of axes of ``inputs``; any strides.
            named: inputs by name.

        Returns:
            The output, or a tuple of all outputs in the order of ``outputs`` if there are several.

        Raises:
            TypeError: too few or too many inputs, or one of another dtype.
            ValueError: a shape that the network cannot take.
            LimitError: the run would take more memory or work than the limits of :func:`load` allow.
        """
        results = self._native.run(self._in_order(arrays, named))
        return results[0] if len(results) == 1 else tuple(results)

    def profile(self, *arrays: Array, **named: Array) -> list[StepTime]:
        """Run once and time every operation; arguments and errors are those of a call."""
        return [StepTime(*row) for row in self._native.profile(self._in_order(arrays, named))]

    def describe(self) -> str:
        """Inputs, layers and outputs as a text of several lines."""
        return self._native.describe()

    def _in_order(self, arrays: tuple[Array, ...], named: dict[str, Array]) -> list[Array]:
        names = [info.name for info in self.inputs]
        given = dict(zip(names, arrays, strict=False))
        wrong = [name for name in named if name not in names or name in given]
        given |= named
        if wrong or len(arrays) > len(names) or len(given) < len(names):
            raise TypeError(
                f"the network takes {', '.join(names) or 'nothing'}; given were {len(arrays)} inputs in "
                f"order and {', '.join(named) or 'none'} by name"
            )
        return [_prepared(given[info.name], info) for info in self.inputs]


def _prepared(value: Array, info: TensorInfo) -> Array:
    if not isinstance(value, np.ndarray) or value.dtype != info.dtype:
        got = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
        raise TypeError(f"input {info.name} is {got}; it must be a NumPy array of {info.dtype}")
    if value.ndim != len(info.shape):
        raise ValueError(f"input {info.name} has shape {value.shape}; it must have {len(info.shape)} axes")
    whole = value.flags.aligned and all(s >= 0 and s % value.itemsize == 0 for s in value.strides)
    return value if whole else np.ascontiguousarray(value)


def load(
    source: str | os.PathLike[str] | bytes,
    threads: int = 1,
    *,
    max_file_bytes: int = 0,
    max_run_bytes: int = 0,
    max_run_products: int = 0,
) -> Network:
    """Load a packed file.

    Args:
        source: its path, or its bytes. A file is mapped into memory and must not change while it is in use.
        threads: how many compute a run, 1 to 1024.
        max_file_bytes: the largest file taken; 0 is 2^32 bytes.
        max_run_bytes: what all results held at one time may take; 0 is 2^30 bytes and 4096 for every
            byte of input.
        max_run_products: multiply-accumulates and operations of a run; 0 is 2^50.

    Raises:
        OSError: there is no such file, or it cannot be read.
        PackedFileError: it is no packed file, damaged, of a newer version, or of profile ``torch``.
        LimitError: it is larger than the limits allow.
        ValueError: a number of threads or a limit that makes no sense.
    """
    limits = {"max_file_bytes": max_file_bytes, "max_run_bytes": max_run_bytes}
    limits["max_run_products"] = max_run_products
    for name, value in {"threads": threads, **limits}.items():
        if not 0 <= value < 2**63 or (name == "threads" and not 1 <= value <= 1024):
            raise ValueError(f"{name} is {value}; allowed are 1 to 1024 threads and limits from 0 on")
    path = "" if isinstance(source, bytes) else os.fspath(source)
    if not isinstance(source, bytes):
        os.stat(path)  # says which file is not there
    content = source if isinstance(source, bytes) else None
    native = _native.Network(path, content, threads, max_file_bytes, max_run_bytes, max_run_products)
    return Network(native)
