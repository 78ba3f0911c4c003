"""Memory: the words that a BinaryTensor and its aliases share, and the one gate to them.

CPU kernels read weights whose words are re-laid (``bop2nd::prepack_weight``). They are kept beside the words
for as long as nobody can have changed these, whoever it was and whatever torch knows of it:

* **Our own writes** are made through this object and end in :meth:`Memory.changed`, which raises the words'
  version. It is raised *after* a write, and read *before* words are re-laid: what a thread re-lays beside a
  write is not found again.
* **Everybody else** (``t.words``, rows, NumPy, DLPack, collectives in flight, pickles on their way to another
  process) gets at the memory through an alias that :meth:`Memory.lend` makes. Lending ends what was kept, and
  while an alias lives, the storage has another user and nothing is kept.
* **Memory of others** is never trusted: shared between processes, mapped from a file, or NumPy's (storages
  that torch may not resize).
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor

from .. import backends
from .layout import Layout


class Memory:
    """Words that nobody but this object's holders can reach.

    Args:
        words: int32; an alias of them is held, so that whoever still has ``words`` counts as a user.
    """

    __slots__ = ("_kept", "_loans", "_storage", "words")

    def __init__(self, words: Tensor) -> None:
        self._kept: tuple[tuple[Any, ...], Tensor] | None = None
        self._loans = 0
        self._storage: Any = None
        if type(words) is not Tensor:  # inside a compiler's trace
            self.words = words
            return
        if words.is_inference():
            with torch.inference_mode(False):
                words = words.clone()  # an inference tensor could never be trained again
        self.words = _alias(words)
        if not (words.is_meta or self.is_traced):
            self._storage = words.untyped_storage()

    @property
    def is_traced(self) -> bool:
        return type(self.words) is not Tensor

    # ---------------------------------------------------------------- the gate

    def write(self, source: Tensor) -> None:
        """Overwrite the words."""
        try:
            self.words.copy_(source)
        finally:
            self.changed()

    def changed(self) -> None:
        """The words have just been written: torch raises no version inside ``__torch_dispatch__``."""
        if not self.is_traced:
            torch.autograd.graph.increment_version(self.words)

    def lend(self) -> Tensor:
        """An alias of the words for somebody who may write them unseen, now or later."""
        alias = self.words if self.is_traced else _alias(self.words)
        self._loans += 1  # after the alias exists: whoever reads the new number also sees the new user
        return alias

    def lend_rows(self, start: int, end: int) -> Tensor:
        """As :meth:`lend`, of rows ``start`` to ``end`` (axis 0)."""
        rows = self.words[start:end]
        self._loans += 1
        return rows

    # ---------------------------------------------------------------- what is kept beside them

    def blocked(self, groups: int = 1) -> Tensor | None:
        """Words re-laid for the CPU kernels; None where they would not be used or could go stale."""
        kept, key = self._kept, (self.words._version, self._loans, groups)
        if kept is not None and kept[0] == key:
            return kept[1]  # nobody has had a way to the words since it was made
        if not (self.words.is_cpu and backends.wants_blocked() and self._is_private()):
            return None
        blocked: Tensor = torch.ops.bop2nd.prepack_weight(self.words, groups)
        self._kept = (key, blocked)
        return blocked

    def unpacked(self, layout: Layout, dtype: torch.dtype) -> Tensor:
        """The dense values of ``layout`` in ``dtype``, to read only: kept beside the words, or made anew."""
        kept, key = self._kept, (self.words._version, self._loans, dtype)
        if kept is not None and kept[0] == key:
            return kept[1]
        with torch.inference_mode(False):
            dense: Tensor = torch.ops.bop2nd.unpack_bits(self.words, layout.length, layout.dim, dtype=dtype)
        if self._is_private():
            self._kept = (key, dense)
        return dense

    def _is_private(self) -> bool:
        if self._storage is None or torch.compiler.is_compiling():
            return False
        if self._users() != _alone() or not self._storage.resizable():
            return False
        return not (self.words.is_cpu and self._storage.is_shared())  # torch calls all CUDA memory shared

    def _users(self) -> tuple[int, int]:
        """How many tensors lie in the storage, and how many Python names it has."""
        return torch._C._storage_Use_Count(self._storage._cdata), sys.getrefcount(self._storage)


def _alias(words: Tensor) -> Tensor:
    with torch._C._DisableTorchDispatch():  # a compiler that asks for the words wants these, not fake ones
        return words.detach()


@functools.cache
def _alone() -> tuple[int, int]:
    """What :meth:`Memory._users` says of words that only their Memory holds: torch's own count too."""
    return Memory(torch.zeros(1, dtype=torch.int32))._users()
