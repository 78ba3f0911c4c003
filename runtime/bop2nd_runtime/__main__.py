"""``bop2nd-run``: a packed network from the command line, without PyTorch."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import bop2nd_runtime
from bop2nd_runtime import Network
from bop2nd_runtime.pictures import as_input, read_array, read_picture


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bop2nd-run", description=__doc__)
    parser.add_argument("model", help="a packed file: bop2nd pack, or PackedModel.save")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--images", nargs="+", metavar="FILE", help="pictures to classify (needs Pillow)")
    what.add_argument("--npy", metavar="FILE", help="an array of inputs; uint8 or floats in [-1, 1]")
    what.add_argument("--bench", action="store_true", help="time per layer on the example's shape")
    parser.add_argument("--output", "-o", metavar="FILE", help="write the output as .npy")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--version", action="version", version=bop2nd_runtime.__version__)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 2 after an error that was the user's."""
    options = _parser().parse_args(arguments)
    try:
        net = bop2nd_runtime.load(options.model, threads=options.threads)
        if options.output and not (options.images or options.npy):
            raise ValueError("--output belongs to --images and --npy")
        if options.images or options.npy:
            return _predict(net, options)
        if options.bench:
            return _bench(net)
        print(net.describe())
    except (OSError, ValueError, TypeError, ModuleNotFoundError) as error:
        print(f"bop2nd-run: {error}", file=sys.stderr)
        return 2
    return 0


def _only_input(net: Network) -> bop2nd_runtime.TensorInfo:
    if len(net.inputs) != 1 or len(net.outputs) != 1:
        raise ValueError(
            f"the network has {len(net.inputs)} inputs and {len(net.outputs)} outputs; use Python"
        )
    return net.inputs[0]


def _predict(net: Network, options: argparse.Namespace) -> int:
    info = _only_input(net)
    sources: list[tuple[str, NDArray[Any]]] = [(path, read_picture(path)) for path in options.images or []]
    if options.npy:
        sources.append((options.npy, read_array(options.npy)))
    outputs = []
    for path, values in sources:
        output = net(as_input(values, info.dtype, len(info.shape)))
        assert isinstance(output, np.ndarray)
        outputs.append(output)
        if not options.output:
            _print_classes(path, output)
    if options.output:
        np.save(options.output, np.concatenate(outputs))
    return 0


def _print_classes(path: str, output: NDArray[Any]) -> None:
    """Class and probability of every row ``[N, classes]``; other outputs as they are."""
    if output.ndim != 2 or output.dtype != np.float32:
        print(f"{path}: {output.dtype} {list(output.shape)}\n{output}")
        return
    grown = np.exp(output - output.max(1, keepdims=True))
    shares = grown / grown.sum(1, keepdims=True)
    for i, (best, row) in enumerate(zip(output.argmax(1), shares, strict=True)):
        print(f"{path}{'' if len(output) == 1 else f'[{i}]'}: class {best} ({row[best]:.3f})")


def _bench(net: Network, seconds: float = 1.0) -> int:
    """Median and best time of runs on zeros of the example's shape, and the time of every layer."""
    example = [np.zeros(info.shape, info.dtype) for info in net.inputs]
    net(*example)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        begin = time.perf_counter()
        net(*example)
        times.append(time.perf_counter() - begin)
    steps = [
        min(runs, key=lambda s: s.seconds)
        for runs in zip(*(net.profile(*example) for _ in range(5)), strict=True)
    ]
    shapes = ", ".join(f"{info.name} {list(info.shape)}" for info in net.inputs)
    print(
        f"{shapes}, {bop2nd_runtime.instruction_set()}: median {statistics.median(times) * 1e3:.3f} ms, "
        f"best {min(times) * 1e3:.3f} ms of {len(times)} runs"
    )
    width = max([len(step.name) for step in steps] + [4])
    print(f"{'step':<{width}}  {'kind':<16} {'us':>10} {'share':>6} {'GMAC/s':>8}")
    whole = sum(step.seconds for step in steps) or 1.0
    for step in steps:
        rate = f"{step.rate * 1e-9:8.1f}" if step.products else " " * 8
        print(
            f"{step.name:<{width}}  {step.kind:<16} {step.seconds * 1e6:10.1f} "
            f"{step.seconds / whole:6.1%} {rate}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
