"""A training step as a CUDA graph: captured once, then replayed without the host's part of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .binary_tensor import BinaryTensor

Step = Callable[[Tensor, Tensor], Tensor]
WARM_UP = 3  # steps before the capture: kernels are loaded and states made at their first


class CapturedStep:
    """Calls like ``step(images, labels)``, by replaying a capture of it from the call after ``WARM_UP``.

    Every call takes one training step. Hyperparameters may change between calls: those of Bop and Bop2ndOrder
    lie on the device anyway, and the learning rates of the others are written to a tensor that was captured.

    Args:
        step: forward, backward and optimizer step, without anything that waits for the device; its result is
            one tensor. Images and labels have the same shapes at every call.
        optimizer: the one that steps, made with ``capturable=True``.
        capture: called with a function of no arguments; returns a function that replays its work.
    """

    def __init__(
        self,
        step: Step,
        optimizer: Optimizer,
        capture: Callable[[Callable[[], None]], Callable[[], None]] | None = None,
    ) -> None:
        self.step, self.capture, self.calls = step, capture or _cuda_capture, 0
        groups = optimizer.param_groups
        self.groups = [group for group in groups if isinstance(group.get("lr"), float)]
        parameters = [p for group in groups for p in group["params"]]
        self.words = [p.words for p in parameters if isinstance(p, BinaryTensor)]
        self.replay: Callable[[], None] | None = None

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        if self.calls <= WARM_UP:
            return self._warm_up(images, labels)
        if self.replay is None:
            self._capture(images, labels)
        assert self.replay is not None
        self.images.copy_(images)
        self.labels.copy_(labels)
        for lr, group in zip(self.rates, self.groups, strict=True):
            lr.fill_(group["lr"])
        self.replay()
        torch.autograd.graph.increment_version(self.words)  # the host has not seen that they were written
        return self.result

    def _warm_up(self, images: Tensor, labels: Tensor) -> Tensor:
        """On another stream, as torch asks for before a capture of backward passes."""
        if not images.is_cuda:
            return self.step(images, labels)
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            result = self.step(images, labels)
        current.wait_stream(side)
        return result

    def _capture(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images.clone(), labels.clone()
        floats = [group["lr"] for group in self.groups]
        self.rates = [torch.full((), lr, device=images.device) for lr in floats]
        self.result = torch.zeros(0, device=images.device)

        def whole() -> None:
            self.result = self.step(self.images, self.labels)

        for group, lr in zip(self.groups, self.rates, strict=True):
            group["lr"] = lr
        try:
            self.replay = self.capture(whole)
        finally:  # schedulers and checkpoints go on with numbers
            for group, value in zip(self.groups, floats, strict=True):
                group["lr"] = value


def _cuda_capture(work: Callable[[], None]) -> Callable[[], None]:
    torch.cuda.synchronize()
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    replay: Callable[[], None] = graph.replay
    return replay
