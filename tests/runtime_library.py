"""The runtime's C library through ctypes: what tests and benchmarks share."""

from __future__ import annotations

import ctypes as c
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "build" / "cmake" / "libbop2nd_runtime.so"
DTYPES = [np.dtype(np.float32), np.dtype(np.int32), np.dtype(np.int64)]
MAX_AXES = 16


class Array(c.Structure):
    _fields_ = [
        ("data", c.c_void_p),
        ("dtype", c.c_int),
        ("n_axes", c.c_int32),
        ("shape", c.c_int64 * MAX_AXES),
        ("strides", c.POINTER(c.c_int64)),
    ]


class StepProfile(c.Structure):
    _fields_ = [
        ("name", c.c_char_p),
        ("kind", c.c_char_p),
        ("seconds", c.c_double),
        ("products", c.c_double),
    ]


class Network:
    """A network and one context of it. Errors are ``ValueError``s."""

    def __init__(self, path: Path, threads: int = 1, library: Path = LIBRARY) -> None:
        self.lib = c.CDLL(str(library))
        self.lib.bop2nd_last_error.restype = c.c_char_p
        self.network, self.context = c.c_void_p(), c.c_void_p()
        self._check(self.lib.bop2nd_load_file(str(path).encode(), None, c.byref(self.network)))
        self._check(self.lib.bop2nd_context_new(self.network, threads, c.byref(self.context)))

    def _check(self, status: int) -> None:
        if status:
            raise ValueError(self.lib.bop2nd_last_error().decode())

    @staticmethod
    def _inputs(arrays: tuple[Any, ...]) -> Any:
        given = (Array * len(arrays))()
        for to, array in zip(given, arrays, strict=True):
            strides = (c.c_int64 * MAX_AXES)(*(s // array.itemsize for s in array.strides))
            to.data, to.dtype, to.n_axes = array.ctypes.data, DTYPES.index(array.dtype), array.ndim
            to.shape[: array.ndim], to.strides = array.shape, strides
        return given

    def __call__(self, *arrays: Any) -> list[Any]:
        given = self._inputs(arrays)
        n = self.lib.bop2nd_n_outputs(self.network)
        outputs = (Array * n)()
        self._check(self.lib.bop2nd_run(self.context, given, len(arrays), outputs, n))
        results = []
        for output in outputs:
            dtype, shape = DTYPES[output.dtype], tuple(output.shape[: output.n_axes])
            size = int(np.prod(shape)) * dtype.itemsize
            results.append(np.frombuffer(c.string_at(output.data, size), dtype).reshape(shape))
        return results

    def profile(self, *arrays: Any) -> list[tuple[str, str, float, float]]:
        """Name, kind, seconds and multiply-accumulates of every operation."""
        steps, n = (StepProfile * 4096)(), c.c_int32()
        given = self._inputs(arrays)
        self._check(self.lib.bop2nd_profile(self.context, given, len(arrays), steps, 4096, c.byref(n)))
        return [(s.name.decode(), s.kind.decode(), s.seconds, s.products) for s in steps[: n.value]]

    def close(self) -> None:
        self.lib.bop2nd_context_free(self.context)
        self.lib.bop2nd_free(self.network)
