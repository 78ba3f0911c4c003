"""The training step of suite ``gpu``: BinaryNet in bf16 autocast, eager and as a CUDA graph, and its twin."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator

import torch

import bop2nd_fast as bf

from . import registry
from .gpu_operators import Setting
from .registry import Contender, GateError, Prepared, Unavailable
from .suites import train_step
from .suites.train_step import LATENT_FUSED, PACKED, Training
from .timing import captured

OURS, FAKE, GRAPH = "ours, eager", "fake-quantized, eager", "ours, CUDA graph"


def training(s: Setting, name: str) -> Training:
    """BinaryNet with Bop2ndOrder, or with latent weights and fused Adam."""
    sizes = (s.size(128, 4), s.size(50, 2), s.size(32, 10))
    return train_step.training(name, *sizes, device=s.device, amp=True)


def contenders(s: Setting) -> Iterator[Contender]:
    batch = s.size(50, 2)
    yield Contender(OURS, registry.OURS, lambda: _eager(s, PACKED), items=batch)
    yield Contender(FAKE, registry.BASELINE, lambda: _eager(s, LATENT_FUSED), items=batch)
    yield Contender(GRAPH, registry.VARIANT, lambda: _graph(s), items=batch)


def _eager(s: Setting, name: str) -> Prepared:
    it = training(s, name)
    check = (lambda: _like_reference(s)) if name == PACKED else (lambda: _finite(it))
    memory = (lambda: {"peak": _peak_bytes(s, name)}) if s.device == "cuda" else None
    return Prepared(check, it.step, memory=memory)


def _like_reference(s: Setting) -> str:
    losses = {}
    for backend in (bf.backends.active("cuda") if s.device == "cuda" else "triton", "reference"):
        with bf.backends.use(backend):
            it = training(s, PACKED)
            losses[backend] = [float(it.step()) for _ in range(s.size(2, 1))]
    if not all(abs(a - b) < 0.05 for a, b in zip(*losses.values(), strict=True)):
        raise GateError(f"losses {losses}")
    return f"losses {losses}"


def _finite(it: Training) -> str:
    if not math.isfinite(float(it.step())):
        raise GateError("the loss is not finite")
    return "a finite loss"


def _graph(s: Setting) -> Prepared:
    if s.device != "cuda":
        raise Unavailable("an interpreter has no CUDA graphs")
    replayed, eager = training(s, PACKED), training(s, PACKED)
    replay = captured(replayed.step)

    def check() -> str:
        for _ in range(3):
            eager.step()
        for _ in range(2):
            losses = (float(replay()), float(eager.step()))
        words = [_words(it) for it in (replayed, eager)]
        differ = sum(int((a != b).sum()) for a, b in zip(*words, strict=True))
        if differ > 0.02 * sum(w.numel() for w in words[0]) or abs(losses[0] - losses[1]) > 0.1:
            raise GateError(f"{differ} words, losses {losses} differ")
        return f"the eager loss; {differ} words differ"

    return Prepared(check, replay)


def _words(it: Training) -> list[torch.Tensor]:
    return [p.words for p in it.model.parameters() if isinstance(p, bf.BinaryTensor)]


def _peak_bytes(s: Setting, name: str) -> int:
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    it = training(s, name)
    it.step()
    torch.cuda.reset_peak_memory_stats()
    it.step()
    return torch.cuda.max_memory_allocated() - before
