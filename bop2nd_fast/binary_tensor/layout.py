"""Layout: how the elements of a logical tensor lie in words. Travels with the tensor and with the file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

WORD_BITS = 32
LAYOUT_VERSION = 1


@dataclass(frozen=True)
class Layout:
    """How the elements of a logical tensor lie in words. Travels with the tensor and with the file.

    Element ``e`` along the packed axis ``dim`` is bit ``e % 32`` (least significant first) of word
    ``e // 32``; bit 1 means -1; tail bits are 0. Words are stored contiguously, packed axis last.
    """

    shape: tuple[int, ...]
    dim: int
    dtype: torch.dtype
    version: int = LAYOUT_VERSION

    def __post_init__(self) -> None:
        if self.version != LAYOUT_VERSION:
            raise ValueError(
                f"layout version {self.version} is not known; this package reads {LAYOUT_VERSION}"
            )
        if not 0 <= self.dim < len(self.shape):
            raise ValueError(f"packed axis {self.dim} is not an axis of shape {self.shape}")
        if not self.dtype.is_floating_point:
            raise ValueError(f"a BinaryTensor has a floating dtype, not {self.dtype}")

    @property
    def length(self) -> int:
        """Elements along the packed axis."""
        return self.shape[self.dim]

    @property
    def words_shape(self) -> tuple[int, ...]:
        """Shape of the words: the other axes in order, then ``ceil(length / 32)``."""
        rest = self.shape[: self.dim] + self.shape[self.dim + 1 :]
        return (*rest, -(-self.length // WORD_BITS))

    @property
    def strides(self) -> tuple[int, ...]:
        """Logical strides with the packed axis innermost (channels-last for a convolution weight)."""
        order = [d for d in range(len(self.shape)) if d != self.dim] + [self.dim]
        strides, step = [0] * len(self.shape), 1
        for d in reversed(order):
            strides[d] = step
            step *= max(self.shape[d], 1)
        return tuple(strides)

    def with_dtype(self, dtype: torch.dtype) -> Layout:
        return Layout(self.shape, self.dim, dtype, self.version)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a file."""
        return {
            "version": self.version,
            "shape": list(self.shape),
            "dim": self.dim,
            "length": self.length,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Layout:
        """Inverse of :meth:`to_dict`; raises ``ValueError`` on unknown or contradicting values."""
        dtype = getattr(torch, str(values.get("dtype")), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"unknown dtype {values.get('dtype')!r} in a layout")
        layout = Layout(tuple(values["shape"]), int(values["dim"]), dtype, int(values["version"]))
        if layout.length != values["length"]:
            raise ValueError(f"length {values['length']} contradicts shape {layout.shape}, axis {layout.dim}")
        return layout
