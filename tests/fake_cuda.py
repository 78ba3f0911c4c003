"""CUDA without a GPU, as far as tables and launches can tell: streams, captures, graphs and pinned memory.

Tensors are CPU tensors that say they are on ``cuda:0``. An asynchronous copy is carried out when its stream
is synchronised; in a capture it becomes a node that runs at every replay and reads its source where that was:
a source that nobody keeps reads as rubbish. Device memory is rubbish until it is written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

RUBBISH = 0x5A
DEVICE = torch.device("cuda", 0)


class OnCuda(torch.Tensor):
    """A CPU tensor that says it is on ``cuda:0``; so do the views and results made of it."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE


def on_cuda(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(OnCuda)


def on_cpu(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(torch.Tensor)


def _bytes(tensor: Tensor) -> Tensor:
    return on_cpu(tensor).reshape(-1).view(torch.uint8)


@dataclass
class Copy:
    """One asynchronous copy: bytes of device memory, of its pinned source, and whether anybody keeps that."""

    target: Tensor
    source: Tensor
    kept: Callable[[], bool]

    def run(self) -> None:
        if not self.kept():
            self.source.fill_(RUBBISH)
        self.target.copy_(self.source)


@dataclass
class Graph:
    copies: list[Copy] = field(default_factory=list)

    def replay(self) -> None:
        for copy in self.copies:
            copy.run()


@dataclass
class Stream:
    cuda_stream: int
    pending: list[Copy] = field(default_factory=list)

    def synchronize(self) -> None:
        for copy in self.pending:
            copy.run()
        self.pending.clear()


class FakeCuda:
    """Put in the place of torch's CUDA for one test."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.stream = Stream(1)
        self.graph: Graph | None = None
        self.recorded: list[tuple[Tensor, Stream]] = []  # of Tensor.record_stream
        self._pinned: list[Tensor] = []  # the bytes of all pinned memory
        self._our_views: Counter[int] = Counter()  # of each of them that copies hold, by address
        true_empty, true_empty_like, true_to = torch.empty, torch.empty_like, Tensor.to

        def pinned(tensor: Tensor) -> Tensor:
            assert self.graph is None, "pinned memory cannot be allocated in a capture"
            self._pinned.append(_bytes(tensor))
            return tensor

        def placed(make: Any) -> Any:
            def empty(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
                there = kwargs.get("device") == DEVICE
                tensor = make(*args, **{**kwargs, "device": None} if there else kwargs)
                return pinned(tensor) if pin_memory else on_cuda(tensor) if there else tensor

            return empty

        def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if args != (DEVICE,):
                return true_to(tensor, *args, **kwargs)
            target = true_empty(tensor.shape, dtype=tensor.dtype)
            _bytes(target).fill_(RUBBISH)
            whole = self._pinned_memory_of(tensor)
            self._our_views[whole.data_ptr()] += 1
            if self.graph is None:  # torch's allocator keeps freed pinned memory until the copy is done
                self.stream.pending.append(Copy(_bytes(target), _bytes(tensor), lambda: True))
            else:
                kept = lambda: self._is_kept(whole)  # noqa: E731
                self.graph.copies.append(Copy(_bytes(target), _bytes(tensor), kept))
            return on_cuda(target)

        patch.setattr(torch, "empty", placed(true_empty))
        patch.setattr(torch, "empty_like", placed(true_empty_like))
        patch.setattr(Tensor, "pin_memory", lambda tensor: pinned(tensor.clone()))
        patch.setattr(Tensor, "to", to)
        patch.setattr(Tensor, "record_stream", lambda tensor, stream: self.recorded.append((tensor, stream)))
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.graph is not None)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: self.stream)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        raw = lambda index: self.stream.cuda_stream  # noqa: E731
        patch.setattr(torch._C, "_cuda_getCurrentRawStream", raw, raising=False)

    def _pinned_memory_of(self, tensor: Tensor) -> Tensor:
        for whole in self._pinned:
            if 0 <= tensor.data_ptr() - whole.data_ptr() < whole.numel():
                return whole
        raise AssertionError("an asynchronous copy from memory that is not pinned")

    def _is_kept(self, whole: Tensor) -> bool:
        """Whether a tensor besides our own still lies in this pinned memory."""
        uses = torch._C._storage_Use_Count(whole.untyped_storage()._cdata)  # one is that storage object's
        return uses - 2 > self._our_views[whole.data_ptr()]

    @contextmanager
    def capture(self) -> Iterator[Graph]:
        """Everything inside becomes nodes of a graph, on a stream of its own; waits before, as torch does."""
        before = self.stream
        before.synchronize()
        self.graph, self.stream = Graph(), Stream(99)
        try:
            yield self.graph
        finally:
            self.graph, self.stream = None, before

    @contextmanager
    def on_stream(self, stream: Stream) -> Iterator[Stream]:
        before, self.stream = self.stream, stream
        try:
            yield stream
        finally:
            self.stream = before
