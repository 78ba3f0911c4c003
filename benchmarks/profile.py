"""Where the time of a convolution and of a training step goes: ``python -m benchmarks.profile [--quick]``.

Three tables, under a minute in all:

* the 3x3 convolutions of the goals, one thread: the whole call against its parts, each timed by itself and in
  turns with the others: a call without an image, packing, the product with bits out, writing real outputs;
* a BinaryNet training step, ours and with latent weights: torch.profiler's own time of every operator, summed
  by what it does;
* the bytes that either network keeps for its backward pass, by kind of layer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from rich.console import Console
from rich.table import Table

from . import memory
from .networks import STAGES, ConvShape
from .suites import conv, train_step
from .tables import byte_count, duration
from .timing import FULL, QUICK, Plan, cpu_sampler, measure

CALL, PACK, PRODUCT, OUTPUT, REST = "call", "packing", "product", "real output", "rest"
CONTENDERS = {train_step.PACKED: "ours", train_step.LATENT: "latent weights"}
STEPS = 3

# What an operator does, by the first of these that its name contains.
GROUPS = {
    "convolution and product, backward (torch)": ("convolution_backward", "aten::mm", "aten::addmm"),
    "binary layers, backward": ("binary_conv2d_backward", "binary_linear_backward"),
    "binary layers, forward": ("bop2nd::binary_conv2d", "bop2nd::binary_linear", "prepack_weight"),
    "convolution and product, forward (torch)": ("convolution", "conv2d", "linear", "matmul"),
    "batch norm": ("batch_norm",),
    "pooling": ("max_pool",),
    "optimizer step": (
        *("bop_step_", "Optimizer.step", "adam", "addc", "lerp", "sqrt", "aten::div", "aten::mul_"),
    ),
    "sign with a straight-through estimator": ("sign", "aten::le", "aten::abs", "aten::mul"),
    "copies, sums, fills": ("copy_", "contiguous", "clone", "add_", "zero", "fill_", "cat", "empty"),
}
OTHER = "other"


def convolution_parts(shape: ConvShape, plan: Plan) -> dict[str, float]:
    """Seconds, the least of all rounds, of one convolution (``"whole"``) and of its parts, on torch's
    current threads.

    ``rest`` is what the parts leave of the whole; it is negative where a part is faster as part of the whole.
    """
    it, op, how = conv.Operands(shape), torch.ops.bop2nd, shape.arguments
    x, words, blocked = it.x.contiguous(), it.weight.words, it.blocked
    from_bits = partial(op.binary_conv2d_packed, it.bits, words, shape.channels, *how, blocked=blocked)
    threshold = torch.zeros(shape.outputs, dtype=torch.int32)
    runs: dict[str, Callable[[], object]] = {
        "whole": partial(op.binary_conv2d, x, words, *how, False, blocked=blocked),
        CALL: partial(op.binary_conv2d, x[:0], words, *how, False, blocked=blocked),
        PACK: partial(op.pack_bits, x, 1),
        "no packing": partial(op.pack_bits, x[:0], 1),
        PRODUCT: partial(from_bits, values=False, signs=True, threshold=threshold),
        OUTPUT: from_bits,
    }
    with torch.inference_mode():
        series = measure({name: cpu_sampler(run) for name, run in runs.items()}, plan)
    seconds = {name: min(s.by_round.values()) for name, s in series.items()}
    parts = {
        CALL: seconds[CALL],
        PACK: seconds[PACK] - seconds["no packing"],
        PRODUCT: seconds[PRODUCT] - seconds[CALL],
        OUTPUT: seconds[OUTPUT] - seconds[PRODUCT],
    }
    return {"whole": seconds["whole"], **parts, REST: seconds["whole"] - sum(parts.values())}


def group_of(operator: str) -> str:
    """The group of :data:`GROUPS` that an operator of this name belongs to."""
    return next((g for g, parts in GROUPS.items() if any(p in operator for p in parts)), OTHER)


def step_groups(name: str, width: int, batch: int, image_size: int, steps: int = STEPS) -> dict[str, float]:
    """Seconds of the fastest of some training steps of contender ``name``, by group of operators."""
    it = train_step.training(name, width, batch, image_size)
    it.step()
    found: list[dict[str, float]] = []
    for _ in range(steps):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as prof:
            it.step()
        found.append({})
        for event in prof.key_averages():
            group = group_of(event.key)
            found[-1][group] = found[-1].get(group, 0.0) + event.self_cpu_time_total * 1e-6
    return min(found, key=lambda groups: sum(groups.values()))


def saved_bytes(name: str, width: int, batch: int, image_size: int) -> dict[str, int]:
    """Bytes that one forward pass of contender ``name`` keeps, by kind of layer."""
    it = train_step.training(name, width, batch, image_size)
    return memory.saved_by_kind(it.model, it.x)


def convolution_table(shapes: Sequence[ConvShape], plan: Plan) -> Table:
    names = ("whole", CALL, PACK, PRODUCT, OUTPUT, REST)
    table = Table("convolution", *names, title="3x3 convolutions, float in, float out, 1 thread")
    for shape in shapes:
        parts = convolution_parts(shape, plan)
        table.add_row(shape.name, *(("-" if parts[n] < 0 else "") + duration(abs(parts[n])) for n in names))
    return table


def comparison_table(
    title: str, columns: Mapping[str, Mapping[str, float]], text: Callable[[float], str]
) -> Table:
    """Groups as rows, each column with its share of the column's sum."""
    table = Table("", *columns, title=title)
    sums = [sum(values.values()) for values in columns.values()]
    rows = {group: [c.get(group, 0) for c in columns.values()] for c in columns.values() for group in c}
    for group, values in sorted(rows.items(), key=lambda row: -max(row[1])):
        table.add_row(group, *(f"{text(v)} ({v / s:.0%})" for v, s in zip(values, sums, strict=True)))
    table.add_section()
    table.add_row("sum", *map(text, sums))
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to check that everything runs")
    quick = parser.parse_args(arguments).quick
    console = Console(width=None if sys.stdout.isatty() else 130)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    shapes = [ConvShape(1, 64, 8, 64, 3, padding=1)] if quick else STAGES
    console.print(convolution_table(shapes, QUICK if quick else FULL))
    torch.set_num_threads(threads)
    sizes = (16, 4, 16) if quick else (128, 50, 32)
    what = "BinaryNet width {}, batch {}, {}x{}".format(*sizes, sizes[-1])
    groups = {title: step_groups(name, *sizes) for name, title in CONTENDERS.items()}
    console.print(comparison_table(f"training step, {what}, {threads} threads", groups, duration))
    saved = {title: dict(saved_bytes(name, *sizes)) for name, title in CONTENDERS.items()}
    console.print(comparison_table(f"kept for the backward pass, {what}", saved, byte_count))
    return 0


if __name__ == "__main__":
    sys.exit(main())
