"""Suite ``train_step``: forward, backward and optimizer step of BinaryNet, in time and in memory.

The baseline is the same network as most people write it: fp32 latent weights (``bf.nn.LatentConv2d``: signs
with a straight-through estimator, ``F.conv2d``), torch's pooling, Adam. Memory is measured in a process of
its own: ``python -m benchmarks.suites.train_step NAME WIDTH BATCH IMAGE_SIZE THREADS``.
"""

from __future__ import annotations

import gc
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bop2nd_fast as bf

from .. import memory
from ..float_network import torch_pools
from ..goals import Formula, Goal, goal, memory_over, over
from ..gpu_operators import Setting
from ..networks import BINARYNET
from ..registry import BASELINE, OURS, VARIANT, Case, Contender, GateError, Picture, Prepared, Suite
from ..timing import captured

PACKED, PACKED_BF16 = "bop2nd", "bop2nd, bf16 moments"
PACKED_LEAN = "bop2nd, bf16 moments, step in backward"
ALL_PACKED = (PACKED, PACKED_BF16, PACKED_LEAN)
LATENT, LATENT_FUSED = "latent weights, Adam", "latent weights, Adam(fused=True)"
LATENT_COMPILED = "latent weights, torch.compile, Adam(fused=True)"
GPU_OURS, GPU_FAKE, GPU_GRAPH = "ours, eager", "fake-quantized, eager", "ours, CUDA graph"
SEED = 11


def cases(quick: bool) -> list[Case]:
    width, batch, image = sizes = (16, 4, 16) if quick else (128, 50, 32)
    shapes = {"width": width, "batch": batch, "image_size": image}
    name = f"BinaryNet width {width}, batch {batch}, {image}x{image}"
    make = partial(_contenders, *sizes, quick)
    return [Case("train_step", "train_step", name, shapes, "1/s", make, threads=None, networks=(BINARYNET,))]


def _contenders(width: int, batch: int, image: int, quick: bool) -> list[Contender]:
    baselines = (LATENT, LATENT_FUSED, LATENT_COMPILED)
    roles = {PACKED: OURS, PACKED_BF16: VARIANT, PACKED_LEAN: VARIANT} | dict.fromkeys(baselines, BASELINE)
    make = partial(_make, width=width, batch=batch, image=image, quick=quick)
    entry = partial(Contender, items=batch)
    return [entry(n, role, partial(make, n), slow=n == LATENT_COMPILED) for n, role in roles.items()]


# ------------------------------------------------------------------------------------ a training loop


@dataclass
class Training:
    """A network with its optimizers and one batch; ``step`` runs one training step."""

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    x: Tensor
    labels: Tensor
    forward: Callable[[Tensor], Tensor]
    amp: bool = False

    def step(self) -> Tensor:
        with torch.enable_grad():
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            with torch.autocast(self.x.device.type, dtype=torch.bfloat16, enabled=self.amp):
                loss = F.cross_entropy(self.forward(self.x).float(), self.labels)
            loss.backward()
            for optimizer in self.optimizers:
                optimizer.step()
        return loss.detach()

    def packed(self) -> list[bf.BinaryTensor]:
        return [p for p in self.model.parameters() if isinstance(p, bf.BinaryTensor)]


def training(
    name: str, width: int, batch: int, image: int, device: str = "cpu", amp: bool = False
) -> Training:
    """Contender ``name``, from one seed: all start from the same signs and see the same batch."""
    torch.manual_seed(SEED)
    model: nn.Module = bf.models.BinaryNet(width=width, image_size=image, weights="latent")
    x = torch.randn(batch, 3, image, image).to(device)
    labels = torch.randint(0, 10, (batch,)).to(device)
    graphs = device == "cuda"  # a step may be captured
    if name in ALL_PACKED:
        model = bf.nn.binarized(model).to(device)
        binary, real = bf.optim.split_parameters(model)
        moments = torch.float32 if name == PACKED else torch.bfloat16
        bop = bf.optim.Bop2ndOrder(binary, moment_dtype=moments, capturable=graphs)
        adam = torch.optim.Adam(real, lr=0.01, fused=True, capturable=graphs)
        if name == PACKED_LEAN:
            bf.optim.step_in_backward(model, bop)
        optimizers: list[torch.optim.Optimizer] = [adam] if name == PACKED_LEAN else [bop, adam]
    else:
        model = torch_pools(model).to(device)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizers = [torch.optim.Adam(trained, lr=0.01, fused=True if name != LATENT else None)]
    forward: Any = torch.compile(model, dynamic=False) if name == LATENT_COMPILED else model
    return Training(model, optimizers, x, labels, forward, amp)


def steps(name: str, width: int, batch: int, image_size: int, n: int) -> Training:
    """Build a contender and run ``n`` steps; what ``main`` measures."""
    it = training(name, width, batch, image_size)
    for _ in range(n):
        it.step()
    return it


# -------------------------------------------------------------------------------------------- gates


def _make(name: str, width: int, batch: int, image: int, quick: bool) -> Prepared:
    it = training(name, width, batch, image)
    check = partial(_check_packed, name) if name in ALL_PACKED else partial(_check_latent, name)

    def measure_memory() -> dict[str, int]:
        sizes = (width, batch, image, torch.get_num_threads())
        peaks = memory.in_own_process("benchmarks.suites.train_step", name, *sizes)
        return peaks | {"saved_for_backward": memory.saved_for_backward(it.model, it.x)}

    # Compiling once more in another process would take longer than everything else.
    without = quick or name == LATENT_COMPILED
    return Prepared(check, it.step, memory=None if without else measure_memory)


def _check_packed(name: str) -> str:
    """A small network, one step on the backend in use and on the reference: same loss, same sign bits.

    Not all of them: many gradients are sums that would be 0 in exact arithmetic (a channel of one sign, under
    batch norm), so that rounding decides. A second step would start from other signs and say nothing.
    """
    results = []
    for backend in (bf.backends.forced() or "auto", "reference"):
        with bf.backends.use(backend):
            it = training(name, 16, 6, 16)
            loss = it.step().item()
            results.append((loss, torch.cat([p.unpack().detach().flatten() for p in it.packed()])))
    (loss, signs), (want_loss, want_signs) = results
    total, differ = signs.numel(), int((signs != want_signs).sum())
    if abs(loss - want_loss) > 1e-3 or differ > 0.01 * total:
        raise GateError(f"loss {loss}, reference {want_loss}; {differ} of {total} signs differ")
    return f"the reference's loss; {differ} of {total} signs differ (order of sums)"


def _check_latent(name: str) -> str:
    """The twin computes the loss and the weight gradients of our network."""
    ours = training(PACKED, 16, 6, 16)
    other = training(LATENT if name == LATENT_COMPILED else name, 16, 6, 16)
    losses = [t.step().item() for t in (ours, other)]
    gradients = [
        [p.grad for m in t.model.modules() if (p := getattr(m, "weight", None)) is not None and p.dim() > 1]
        for t in (ours, other)
    ]
    worst = max(float((a - b).norm() / b.norm()) for a, b in zip(*gradients, strict=True))
    if abs(losses[0] - losses[1]) > 1e-3 or worst > 1e-2:
        raise GateError(f"losses {losses}; weight gradients differ by {worst:.2g} of their norm")
    return f"same loss and weight gradients as ours (within {worst:.1e} of their norm)"


# ------------------------------------------------------------------------------------------ on a GPU


def gpu_contenders(s: Setting) -> Iterator[Contender]:
    """BinaryNet in bf16 autocast with Bop2ndOrder, eager and as a CUDA graph, and with latent weights."""
    width, batch, image = s.size(128, 4), s.size(50, 2), s.size(32, 10)

    def build(name: str) -> Training:
        return training(name, width, batch, image, s.device, amp=True)

    def eager(name: str, check: Callable[[Training], str]) -> Prepared:
        it = build(name)
        memory = (lambda: {"peak": _peak_bytes(lambda: build(name))}) if s.device == "cuda" else None
        return Prepared(lambda: check(it), it.step, memory=memory)

    def like_reference(_: Training) -> str:
        losses = {}
        for backend in (bf.backends.active("cuda") if s.device == "cuda" else "triton", "reference"):
            with bf.backends.use(backend):
                it = build(PACKED)
                losses[backend] = [float(it.step()) for _ in range(s.size(2, 1))]
        if not all(abs(a - b) < 0.05 for a, b in zip(*losses.values(), strict=True)):
            raise GateError(f"losses {losses}")
        return f"losses {losses}"

    def finite(it: Training) -> str:
        if not math.isfinite(float(it.step())):
            raise GateError("the loss is not finite")
        return "a finite loss"

    yield Contender(GPU_OURS, OURS, partial(eager, PACKED, like_reference), items=batch)
    yield Contender(GPU_FAKE, BASELINE, partial(eager, LATENT_FUSED, finite), items=batch)
    yield Contender(GPU_GRAPH, VARIANT, lambda: _replayed(build(PACKED), build(PACKED)), items=batch)


def _replayed(replayed: Training, eager: Training) -> Prepared:
    """One of two equal trainings as a CUDA graph, compared with the other."""
    replay = captured(replayed.step)

    def check() -> str:
        for _ in range(3):
            eager.step()
        for _ in range(2):
            losses = (float(replay()), float(eager.step()))
        words = [[p.words for p in it.packed()] for it in (replayed, eager)]
        differ = sum(int((a != b).sum()) for a, b in zip(*words, strict=True))
        if differ > 0.02 * sum(w.numel() for w in words[0]) or abs(losses[0] - losses[1]) > 0.1:
            raise GateError(f"{differ} words, losses {losses} differ")
        return f"the eager loss; {differ} words differ"

    return Prepared(check, replay)


def _peak_bytes(build: Callable[[], Training]) -> int:
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    it = build()
    it.step()
    torch.cuda.reset_peak_memory_stats()
    it.step()
    return torch.cuda.max_memory_allocated() - before


def _goal(what: str, aim: float, formula: Formula) -> Goal:
    return goal("train_step", f"BinaryNet training step: {what}", aim, formula)


_memory = partial(memory_over, LATENT, PACKED)
SUITE = Suite(
    cases,
    families={
        "latent weights, Adam": (LATENT,),
        "latent weights, fused Adam": (LATENT_FUSED,),
        "latent weights, compiled": (LATENT_COMPILED,),
    },
    goals=(
        _goal("against latent weights and Adam", 1.5, over(LATENT)),
        _goal(
            "peak of torch's allocator, latent over ours", 2, memory_over(LATENT, PACKED, "allocator_peak")
        ),
        _goal("growth of the resident set, latent over ours", 2, memory_over(LATENT, PACKED, "rss_growth")),
    ),
    pictures=(Picture("train_step", "Training step", kind="training"),),
    summary=lambda record: True,
)


def main(arguments: list[str]) -> None:
    """``NAME WIDTH BATCH IMAGE_SIZE THREADS``: print the peaks of a network and its three steps as JSON."""
    name = arguments[0]
    width, batch, image_size, threads = map(int, arguments[1:])
    torch.set_num_threads(threads)
    steps(name, 8, 2, 10, 2)  # the libraries' first-use allocations are not the step's
    print(json.dumps(memory.peaks(partial(steps, name, width, batch, image_size, 3))))


if __name__ == "__main__":
    main(sys.argv[1:])
