"""Time candidate tiles for ``kernels/tuning.py``: ``python -m benchmarks.gpu --tune --out DIR``.

Prints every candidate of every shape, fastest first, and writes them to ``DIR/tune.jsonl`` with the stamp.
The fastest of each table entry follows as the line to put there by hand, with the shape, time, GPU and commit
that chose it as ``measured``. With ``--dry-run`` one candidate of each entry runs once, untimed.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bop2nd_fast import reference
from bop2nd_fast.kernels import bop_step, pack_bits, tuning
from bop2nd_fast.kernels.binary_conv2d import binary_conv2d_packed
from bop2nd_fast.kernels.binary_linear import binary_linear_packed
from bop2nd_fast.kernels.conv_backward import binary_conv2d_backward
from bop2nd_fast.kernels.linear_backward import binary_linear_backward
from bop2nd_fast.kernels.tuning import Choice, GradientTile, MatmulTile
from bop2nd_fast.ops.binary_conv2d import _backward as conv_in_torch
from bop2nd_fast.ops.binary_linear import _backward as linear_in_torch
from bop2nd_fast.stamp import stamp

from .gates import close, context_lost, equal, failures
from .gpu_operators import Setting
from .registry import GateError
from .steps import StepData
from .suites.gpu import PADDED, conv_operands, linear_operands
from .timing import QUICK, cuda_sampler, measure

Run = Callable[[], object]
Check = Callable[[Any], object]
MATMUL_SHAPES = ((8192, 8192, 8192), (256, 4096, 4096), (64, 4096, 4096), (16, 4096, 4096), (1, 4096, 4096))
CONV_SHAPES = ((256, 64, 56), (256, 128, 28), (256, 256, 14), (256, 512, 7))
GRADIENT_SHAPES = ((8192, 4096, 4096), (50, 1024, 1024))  # rows, outputs, features
F32, BF16 = torch.float32, torch.bfloat16


@dataclass
class Candidate:
    """A value for the entry ``entry`` of the tables, how to run the work with it, and its check.

    ``check`` takes what ``run`` returned and raises GateError: no wrong tile wins.
    """

    entry: str
    value: Any
    run: Run
    check: Check


Candidates = Iterator[Candidate]


def compared(want: Run, compare: Callable[..., object]) -> Check:
    """A check against what ``want`` returns, made once: ``compare`` is ``equal`` or ``close``."""
    made = functools.cache(want)

    def check(got: Any) -> None:
        for i, (g, w) in enumerate(zip(got, made(), strict=True)):  # type: ignore[call-overload]
            if w.numel():
                compare(g, w, f"result {i}")

    return check


# --------------------------------------------------------------------------------------------- candidates


def matmul_tiles(chip: str) -> Iterator[Any]:
    """Tiles of every inner loop; on sm90 with the weights in shared memory, as wgmma wants them."""
    for m, n, warps in ((128, 128, 8), (256, 128, 8), (128, 256, 8), (128, 64, 4), (64, 128, 4), (64, 64, 4)):
        for words in (2, 4):
            yield MatmulTile("decode", m, n, words, warps, weights_in_shared=chip == "sm90")
    for m in (16, 32):  # few rows: wgmma takes 64 at least, so mma.sync on sm90 as well
        yield MatmulTile("decode", m, 128, 4, 4)
    for m, n, warps in ((32, 64, 4), (64, 64, 4), (16, 128, 4), (16, 32, 2)):
        yield MatmulTile("popcount", m, n, 4, warps)
    for n, words, warps in ((8, 128, 2), (16, 128, 4), (32, 128, 4), (32, 64, 2)):
        yield MatmulTile("rows", 1, n, words, warps)


def step_candidates(s: Setting, chip: str, kind: str) -> Candidates:
    """The step of 64 M weights; the runs put their tile into the table, which ``tune`` restores."""
    moment = BF16 if kind == "bf16" else F32
    shape = (s.size(8192, 8), s.size(8192, 64))
    step: Any = StepData([shape], s.normal).packed(bop_step.bop_step_, moment, moment)
    for words, warps in ((16, 4), (32, 4), (32, 8), (64, 8)):
        for registers in (128, 144, 200) if kind == "bf16" else (64, 96, 128):
            tile = tuning.StepTile(words, warps, registers)

            def run(tile: Any = tile) -> None:
                tuning.STEP_TILES[chip, kind] = tile
                step.run()

            yield Candidate(f'STEP_TILES["{chip}", "{kind}"]', tile, run, lambda _: step.check())


def pack_candidates(s: Setting) -> Candidates:
    """Rows and columns in turns, so that one tile serves both."""
    x = s.normal(s.size(256, 1), s.size(64, 40), s.size(56, 6), s.size(56, 6), dtype=BF16)
    rows = x.contiguous(memory_format=torch.channels_last)
    check = compared(lambda: (*reference.pack_bits_ste(x, 1), *reference.pack_bits_ste(rows, 1)), equal)
    for words in (32, 64, 128, 256):
        for inner, warps in ((256, 4), (512, 4), (1024, 8)):
            tile = tuning.PackTile(words, inner, warps)

            def run(tile: Any = tile) -> object:
                pack_bits.PACK_TILE = tile
                return *pack_bits.pack_bits_ste(x, 1), *pack_bits.pack_bits_ste(rows, 1)

            yield Candidate("PACK_TILE", tile, run, check)


def linear_candidates(s: Setting, chip: str, rows: int, outputs: int, features: int) -> Candidates:
    run = partial(binary_linear_packed, *linear_operands(s, rows, outputs, features), features)
    return _products(chip, run, outputs, lambda tile: tile.loop != "rows" or rows <= 64)


def conv_candidates(s: Setting, chip: str, batch: int, channels: int, side: int) -> Candidates:
    def fits(tile: MatmulTile) -> bool:
        inside = tile.block_words <= channels // 32 and tile.block_n <= max(64, channels)
        return tile.loop == "popcount" or (tile.loop == "decode" and inside)

    run = partial(binary_conv2d_packed, *conv_operands(s, batch, channels, side), channels, *PADDED, 0)
    return _products(chip, run, channels, fits)


def _products(chip: str, run: Any, outputs: int, fits: Callable[[Any], bool]) -> Candidates:
    check = compared(run, equal)  # exact integers, in the table's tile
    for tile in filter(fits, matmul_tiles(chip)):
        width = "wide" if outputs > 64 else "narrow"
        entry = f'DECODE["{chip}", "{width}"]' if tile.loop == "decode" else tile.loop.upper()
        yield Candidate(entry, tile, partial(run, tile=tile), check)


def gradient_candidates(
    s: Setting, chip: str, dtype: Any, rows: int, outputs: int, features: int
) -> Candidates:
    """Both gradients of a linear layer in Triton's tiles; the table's tile, and torch's library."""
    x, w = linear_operands(s, rows, outputs, features)
    arguments = (s.normal(rows, outputs, dtype=dtype), x, x, w, features, True, True)
    check = compared(partial(linear_in_torch, *arguments), close)
    size = dtype.itemsize
    entry = f'GRADIENT_TILES["{chip}", {size}, "{"wide" if rows > 64 else "narrow"}"]'
    for block_rows, words, warps in ((128, 4, 8), (128, 8, 8), (64, 4, 4), (128, 2, 4)):
        for inner in (16, 32, 64):
            tile = GradientTile(block_rows, words, inner, warps)
            yield Candidate(entry, tile, partial(binary_linear_backward, *arguments, tile=tile), check)
    yield from _ways(binary_linear_backward, linear_in_torch, arguments, check)


def conv_gradient_candidates(s: Setting, dtype: Any, batch: int, channels: int, side: int) -> Candidates:
    """Both gradients of a 3x3 convolution: the table's tile, and cuDNN on signs unpacked tile by tile."""
    x, w = conv_operands(s, batch, channels, side)
    gradient = s.normal(batch, channels, side, side, dtype=dtype)
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    arguments = (gradient, x, x, w, channels, *PADDED, 0, True, True)
    check = compared(partial(conv_in_torch, *arguments), close)
    yield from _ways(binary_conv2d_backward, conv_in_torch, arguments, check)


def _ways(triton: Any, torchs: Any, arguments: tuple[Any, ...], check: Check) -> Candidates:
    for runs, way in (("triton", triton), ("torch", torchs)):
        choice = Choice(runs, "the faster of the two")
        yield Candidate(f'BACKWARD["{triton.__name__}"]', choice, partial(way, *arguments), check)


def jobs(s: Setting, chip: str) -> dict[str, Iterator[Candidate]]:
    """Every shape's candidates, by name; the interpreter runs one tiny shape of each kind."""
    found = {f"step 64 M, {kind}": step_candidates(s, chip, kind) for kind in ("packed", "bf16")}
    found["pack 256x64x56x56 bf16"] = pack_candidates(s)
    for shape in MATMUL_SHAPES if not s.dry else ((2, 33, 64),):
        found[f"linear {shape}"] = linear_candidates(s, chip, *shape)
    for shape in CONV_SHAPES if not s.dry else ((1, 64, 3),):
        found[f"conv 3x3 {shape}"] = conv_candidates(s, chip, *shape)
    for dtype in (BF16, F32):
        for shape in GRADIENT_SHAPES if not s.dry else ((3, 33, 64),):
            found[f"linear gradients {shape} {dtype}"] = gradient_candidates(s, chip, dtype, *shape)
        for shape in CONV_SHAPES if not s.dry else ((1, 64, 3),):
            found[f"conv gradients {shape} {dtype}"] = conv_gradient_candidates(s, dtype, *shape)
    return found


# ------------------------------------------------------------------------------------------------- timing


def tune(s: Setting, out: Path) -> int:
    """Time everything; returns the exit status. The tables are as before afterwards."""
    out.mkdir(parents=True, exist_ok=True)
    chip = "sm90" if s.dry else tuning.family(torch.device(s.device, 0))  # the interpreter runs sm90's tables
    mark = stamp()
    before = dict(tuning.STEP_TILES), pack_bits.PACK_TILE
    where = f"{mark['gpu'] or 'dry run, not timed'}, commit {mark['commit']}"
    with (out / "tune.jsonl").open("w") as file:

        def write(record: dict[str, Any]) -> None:
            file.write(json.dumps(record | {"dry_run": s.dry, "stamp": mark}) + "\n")
            file.flush()

        for name, candidates in jobs(s, chip).items():
            if s.dry:  # the first of each entry will do
                candidates = iter({c.entry: c for c in reversed(list(candidates))}.values())
            timed = sorted(((_seconds(s, c), c) for c in candidates), key=lambda pair: pair[0])
            for seconds, c in timed:
                print(f"{name:40} {seconds * 1e6:10.1f} us  {c.value}", flush=True)
                write({"shape": name, "entry": c.entry, "value": str(c.value), "seconds": seconds})
            for entry, line in winners(name, timed, where).items():
                print(f"{entry} = {line}", flush=True)
                write({"shape": name, "entry": entry, "line": line})
    tuning.STEP_TILES.update(before[0])
    pack_bits.PACK_TILE = before[1]
    return 0


def winners(name: str, timed: list[tuple[float, Candidate]], where: str) -> dict[str, str]:
    """The fastest value of each entry as it goes into the table, ``measured`` filled in."""
    lines: dict[str, str] = {}
    for seconds, c in timed:  # fastest first
        if seconds == math.inf:
            break
        measured = f"{name}: {seconds * 1e6:.1f} us, {where}"
        lines.setdefault(c.entry, repr(dataclasses.replace(c.value, measured=measured)))
    return lines


def _seconds(s: Setting, c: Candidate) -> float:
    """Median on the GPU, infinite where the tile does not compile or is wrong; the interpreter only runs it.

    Raises:
        RuntimeError: the GPU can be used no more.
    """
    refused: tuple[type[Exception], ...] = (GateError, *failures())
    try:
        c.check(c.run())
    except refused as error:
        print(f"{c.value}: {type(error).__name__}: {error}", flush=True)
        if (lost := context_lost(s.device)) is not None:
            raise RuntimeError(f"the GPU's context is lost: {lost}") from error
        return math.inf
    if s.dry:
        return 0.0
    plan = dataclasses.replace(QUICK, max_contender_s=0.1)
    return measure({"it": cuda_sampler([c.run])}, plan)["it"].seconds().median
