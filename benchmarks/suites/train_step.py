"""Suite ``train_step``: forward, backward and optimizer step of a network, in time and in memory.

BinaryNet, and a perceptron of signs times real numbers (``BinaryLinear(input_quantizer=None)``). The baseline
is the same network as most people write it: fp32 latent weights (``bf.nn.LatentConv2d``: signs with a
straight-through estimator, ``F.conv2d``), torch's pooling, Adam. Memory is measured in a process of its own:
``python -m benchmarks.suites.train_step NAME WIDTH BATCH IMAGE_SIZE THREADS NETWORK``.
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
PERCEPTRON = "perceptron"  # real inputs: features, four times as many hidden units, as many outputs
Sizes = tuple[int, int, int]  # width, batch and image size; features, batch and nothing


def cases(quick: bool) -> list[Case]:
    width, batch, image = sizes = (16, 4, 16) if quick else (128, 50, 32)
    shapes = {"width": width, "batch": batch, "image_size": image}
    name = f"BinaryNet width {width}, batch {batch}, {image}x{image}"
    case = partial(Case, "train_step", "train_step", unit="1/s", threads=None)
    make = partial(_contenders, BINARYNET, sizes, quick)
    result = [case(name, shapes, contenders=make, networks=(BINARYNET,))]
    features, batch, _ = sizes = (16, 4, 0) if quick else (1024, 256, 0)
    name = f"{PERCEPTRON} {features}-{4 * features}-{features} of real numbers, batch {batch}"
    make = partial(_contenders, PERCEPTRON, sizes, quick)
    return [*result, case(name, {"features": features, "batch": batch}, contenders=make)]


def _contenders(network: str, sizes: Sizes, quick: bool) -> list[Contender]:
    baselines = (LATENT, LATENT_FUSED, LATENT_COMPILED)
    roles = {PACKED: OURS, PACKED_BF16: VARIANT, PACKED_LEAN: VARIANT} | dict.fromkeys(baselines, BASELINE)
    make, batch = partial(_make, network=network, sizes=sizes, quick=quick), sizes[1]
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


def _perceptron(features: int) -> nn.Module:
    dense = partial(bf.nn.LatentLinear, input_quantizer=None)
    return nn.Sequential(dense(features, 4 * features), nn.ReLU(), dense(4 * features, features))


def training(
    name: str,
    width: int,
    batch: int,
    image: int,
    device: str = "cpu",
    amp: bool = False,
    network: str = BINARYNET,
) -> Training:
    """Contender ``name``, from one seed: all start from the same signs and see the same batch."""
    torch.manual_seed(SEED)
    if network == PERCEPTRON:
        model, x, n_classes = _perceptron(width), torch.randn(batch, width).to(device), width
    else:
        model = bf.models.BinaryNet(width=width, image_size=image, weights="latent")
        x, n_classes = torch.randn(batch, 3, image, image).to(device), 10
    labels = torch.randint(0, n_classes, (batch,)).to(device)
    graphs = device == "cuda"  # a step may be captured
    if name in ALL_PACKED:
        model = bf.nn.binarized(model).to(device)
        binary, real = bf.optim.split_parameters(model)
        moments = torch.float32 if name == PACKED else torch.bfloat16
        bop = bf.optim.Bop2ndOrder(binary, moment_dtype=moments, capturable=graphs)
        optimizers: list[torch.optim.Optimizer] = []
        if real := list(real):
            optimizers = [torch.optim.Adam(real, lr=0.01, fused=True, capturable=graphs)]
        if name == PACKED_LEAN:
            bf.optim.step_in_backward(model, bop)
        else:
            optimizers.insert(0, bop)
    else:
        model = torch_pools(model).to(device)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizers = [torch.optim.Adam(trained, lr=0.01, fused=True if name != LATENT else None)]
    forward: Any = torch.compile(model, dynamic=False) if name == LATENT_COMPILED else model
    return Training(model, optimizers, x, labels, forward, amp)


def steps(name: str, sizes: Sizes, network: str, n: int) -> Training:
    """Build a contender and run ``n`` steps; what ``main`` measures."""
    it = training(name, *sizes, network=network)
    for _ in range(n):
        it.step()
    return it


# -------------------------------------------------------------------------------------------- gates


def _make(name: str, network: str, sizes: Sizes, quick: bool) -> Prepared:
    it = training(name, *sizes, network=network)
    check = partial(_check_packed if name in ALL_PACKED else _check_latent, name, network)

    def measure_memory() -> dict[str, int]:
        arguments = (name, *sizes, torch.get_num_threads(), network)
        peaks = memory.in_own_process("benchmarks.suites.train_step", *arguments)
        return peaks | {"saved_for_backward": memory.saved_for_backward(it.model, it.x)}

    # Compiling once more in another process would take longer than everything else.
    without = quick or name == LATENT_COMPILED
    return Prepared(check, it.step, memory=None if without else measure_memory)


def _check_packed(name: str, network: str) -> str:
    """A small network, one step on the backend in use and on the reference: same loss, same sign bits.

    Not all of them: many gradients are sums that would be 0 in exact arithmetic (a channel of one sign, under
    batch norm), so that rounding decides. A second step would start from other signs and say nothing.
    """
    results = []
    for backend in (bf.backends.forced() or "auto", "reference"):
        with bf.backends.use(backend):
            it = training(name, 16, 6, 16, network=network)
            loss = it.step().item()
            results.append((loss, torch.cat([p.unpack().detach().flatten() for p in it.packed()])))
    (loss, signs), (want_loss, want_signs) = results
    total, differ = signs.numel(), int((signs != want_signs).sum())
    if abs(loss - want_loss) > 1e-3 or differ > 0.01 * total:
        raise GateError(f"loss {loss}, reference {want_loss}; {differ} of {total} signs differ")
    return f"the reference's loss; {differ} of {total} signs differ (order of sums)"


def _check_latent(name: str, network: str) -> str:
    """The twin computes the loss and the weight gradients of our network."""
    names = (PACKED, LATENT if name == LATENT_COMPILED else name)
    ours, other = (training(n, 16, 6, 16, network=network) for n in names)
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


def _goal(what: str, aim: float, formula: Formula, network: str = BINARYNET) -> Goal:
    return goal("train_step", f"{network} training step: {what}", aim, formula, start=network)


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
        _goal("peak of torch's allocator, latent over ours", 2, _memory("allocator_peak")),
        _goal("growth of the resident set, latent over ours", 2, _memory("rss_growth")),
        _goal("against latent weights and fused Adam", 2, over(LATENT_FUSED), PERCEPTRON),
        _goal(
            "peak of torch's allocator, latent over ours",
            2,
            memory_over(LATENT_FUSED, PACKED, "allocator_peak"),
            PERCEPTRON,
        ),
    ),
    pictures=(Picture("train_step", "Training step", kind="training"),),
    summary=lambda record: True,
)


def main(arguments: list[str]) -> None:
    """Print the peaks of a network and its three steps as JSON; arguments as above."""
    name, *numbers, network = arguments
    width, batch, image_size, threads = map(int, numbers)
    torch.set_num_threads(threads)
    steps(name, (8, 2, 10), network, 2)  # the libraries' first-use allocations are not the step's
    print(json.dumps(memory.peaks(partial(steps, name, (width, batch, image_size), network, 3))))


if __name__ == "__main__":
    main(sys.argv[1:])
