"""What every layer of a packed model is: plain settings and tensors, from which a file can rebuild it."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn


class PackedLayer(nn.Module):
    """A layer that a file can hold: plain ``config`` values and tensors, from which it can be rebuilt."""

    kind: ClassVar[str]

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = config

    def describe(self) -> str:
        """One short phrase for ``repr`` and reports."""
        return "pixel after pixel"

    def _tensor(self, name: str, tensor: Tensor | None) -> None:
        self.register_buffer(name, tensor)
