"""FlipTracker: which weights oscillate and which never move; on request, because it looks at every weight."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from operator import index

import torch
from torch import Tensor

from ..binary_tensor import BinaryTensor
from .base import BopBase
from .distributed import local_tensor
from .mixed import MixedOptimizer


@dataclass(frozen=True)
class TrackedFlips:
    """One parameter since tracking began.

    ``oscillations``: flips of the last step that took back one of the ``window`` steps before it;
    ``total_oscillations``, ``total_flips``: sums over all steps; ``never_flipped``: share of its weights.
    """

    name: str
    numel: int
    oscillations: int
    total_oscillations: int
    total_flips: int
    never_flipped: float


class FlipTracker:
    """Watch every flip of an optimizer from now on.

    >>> tracker = bf.optim.FlipTracker(optimizer, window=10)
    >>> ...                                # train
    >>> for row in tracker.read():
    ...     print(row.name, row.never_flipped, row.total_oscillations)
    >>> tracker.close()

    Costs a copy of the words before each step, ``window + 1`` further copies of them, and a few passes. Steps
    that run inside compiled code or a CUDA graph are not seen.

    Args:
        optimizer: Bop, Bop2ndOrder, or a MixedOptimizer with one of them.
        window: a weight that flips back within this many steps oscillates.

    Raises:
        ValueError: ``window`` is not positive.
    """

    def __init__(self, optimizer: BopBase | MixedOptimizer, window: int = 10) -> None:
        window = index(window)
        if window < 1:
            raise ValueError(f"window must be at least 1 step, got {window}")
        self._optimizer = optimizer if isinstance(optimizer, BopBase) else optimizer._bop()
        self._window = window
        self._before: dict[Tensor, Tensor] = {}
        self._recent: dict[Tensor, deque[Tensor]] = {}
        self._ever: dict[Tensor, Tensor] = {}
        self._counts: dict[Tensor, Tensor] = {}
        self._optimizer._observers.append(self)

    def close(self) -> None:
        """Stop watching."""
        self._optimizer._observers.remove(self)

    def before(self, params: list[Tensor]) -> None:
        """Called by the optimizer before it steps ``params``."""
        self._before = {p: _words(p) for p in params}

    def after(self, params: list[Tensor]) -> None:
        """Called by the optimizer after it stepped ``params``."""
        for p in params:
            flips = self._before[p] ^ _words(p)
            recent = self._recent.setdefault(p, deque(maxlen=self._window))
            earlier = torch.zeros_like(flips)
            for words in recent:
                earlier |= words
            back = _popcount(flips & earlier)
            recent.append(flips)
            self._ever[p] = self._ever.get(p, torch.zeros_like(flips)) | flips
            new = torch.stack([back, back, _popcount(flips)])
            old = self._counts.get(p, torch.zeros_like(new))
            self._counts[p] = torch.stack([new[0], old[1] + new[1], old[2] + new[2]])
        self._before = {}

    def read(self) -> list[TrackedFlips]:
        """One row per parameter that has stepped, in the order of the groups. Synchronises."""
        rows = []
        for g, plan in enumerate(self._optimizer._plans):
            for i, p in enumerate(plan.params):
                if p in self._counts:
                    now, total, flips = self._counts[p].tolist()
                    never = 1 - int(_popcount(self._ever[p])) / max(1, local_tensor(p).numel())
                    rows.append(
                        TrackedFlips(plan.name_of(g, i), local_tensor(p).numel(), now, total, flips, never)
                    )
        return rows


def _words(p: Tensor) -> Tensor:
    """A copy of a parameter's sign bits (of its local block, if it is sharded)."""
    p = local_tensor(p)
    if isinstance(p, BinaryTensor):
        return p.words.clone()
    words: Tensor = torch.ops.bop2nd.pack_bits(p.detach().reshape(1, -1), 1)
    return words


def _popcount(words: Tensor) -> Tensor:
    """Set bits of int32 words, as one int64 scalar."""
    x = words.to(torch.int64) & 0xFFFFFFFF
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (((x * 0x01010101) & 0xFFFFFFFF) >> 24).sum()
