"""Time candidate tiles for ``kernels/tuning.py``: ``python -m benchmarks.gpu --tune --out DIR``.

Prints every candidate of every shape, fastest first, and writes them to ``DIR/tune.jsonl`` with the stamp. A
winner goes into the table by hand, with its line as ``measured``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .gpu_cases import Setting, conv_operands, linear_operands, step_contender
from .stamp import stamp
from .timing import QUICK, cuda_sampler, measure

Run = Callable[[], object]
MATMUL_SHAPES = ((8192, 8192, 8192), (256, 4096, 4096), (64, 4096, 4096), (16, 4096, 4096), (1, 4096, 4096))
CONV_SHAPES = ((256, 64, 56), (256, 128, 28), (256, 256, 14), (256, 512, 7))


def matmul_tiles(chip: str) -> Iterator[Any]:
    """Tiles of every inner loop; on sm90 with the weights in shared memory, as wgmma wants them."""
    from bop2nd_fast.kernels.tuning import MatmulTile

    for m, n, warps in ((128, 128, 8), (256, 128, 8), (128, 256, 8), (128, 64, 4), (64, 128, 4), (64, 64, 4)):
        for words in (2, 4):
            yield MatmulTile("decode", m, n, words, warps, weights_in_shared=chip == "sm90")
    for m, n, warps in ((32, 64, 4), (64, 64, 4), (16, 128, 4), (16, 32, 2)):
        yield MatmulTile("popcount", m, n, 4, warps)
    for n, words, warps in ((8, 128, 2), (16, 128, 4), (32, 128, 4), (32, 64, 2)):
        yield MatmulTile("rows", 1, n, words, warps)


def step_tiles(chip: str) -> Iterator[tuple[str, Run, Callable[[], None]]]:
    """(name, run, set-up) of the fp32 step of 64 M packed weights; the set-up puts a tile into the table."""
    from bop2nd_fast.kernels import bop_step, tuning

    f32 = torch.float32
    step = step_contender(Setting("cuda", False), [(8192, 8192)], "step", bop_step.bop_step_, f32, f32)
    for words, warps in ((16, 4), (32, 4), (32, 8), (64, 8)):
        for registers in (64, 96, 128):
            tile = tuning.StepTile(words, warps, registers)

            def use(tile: Any = tile) -> None:
                tuning.STEP_TILES[chip, "packed"] = tile

            yield str(tile), step.runs[0], use


def tune_step(chip: str) -> dict[str, float]:
    """Seconds per step of 64 M packed weights by tile; the table is as before afterwards."""
    from bop2nd_fast.kernels import tuning

    before = dict(tuning.STEP_TILES)
    timed = {}
    for name, run, use in step_tiles(chip):
        use()
        timed[name] = _median(run)
    tuning.STEP_TILES.update(before)
    return timed


def tune_linear(s: Setting, chip: str, rows: int, outputs: int, features: int) -> dict[str, float]:
    from bop2nd_fast.kernels.binary_linear import binary_linear_packed

    x, w = linear_operands(s, rows, outputs, features)
    tiles = [tile for tile in matmul_tiles(chip) if tile.loop != "rows" or rows <= 64]
    return {str(t): _median(partial(binary_linear_packed, x, w, features, tile=t)) for t in tiles}


def tune_conv(s: Setting, chip: str, batch: int, channels: int, side: int) -> dict[str, float]:
    from bop2nd_fast.kernels.binary_conv2d import binary_conv2d_packed

    operands = conv_operands(s, batch, channels, side)
    geometry = ([1, 1], [1, 1], [1, 1], 1, 0)
    timed = {}
    for tile in matmul_tiles(chip):
        fits = tile.block_words <= channels // 32 and tile.block_n <= max(64, channels)
        if tile.loop == "popcount" or (tile.loop == "decode" and fits):
            timed[str(tile)] = _median(
                partial(binary_conv2d_packed, *operands, channels, *geometry, tile=tile)
            )
    return timed


def tune(s: Setting, out: Path) -> int:
    """Time everything; returns the exit status."""
    from bop2nd_fast.kernels import tuning

    out.mkdir(parents=True, exist_ok=True)
    chip, mark = tuning.family(torch.device(s.device, 0)), stamp()
    jobs = {"step 64 M": partial(tune_step, chip)}
    jobs |= {f"linear {shape}": partial(tune_linear, s, chip, *shape) for shape in MATMUL_SHAPES}
    jobs |= {f"conv 3x3 {shape}": partial(tune_conv, s, chip, *shape) for shape in CONV_SHAPES}
    with (out / "tune.jsonl").open("w") as file:
        for name, job in jobs.items():
            for tile, seconds in sorted(job().items(), key=lambda item: item[1]):
                print(f"{name:28} {seconds * 1e6:10.1f} us  {tile}", flush=True)
                record = {"shape": name, "tile": tile, "seconds": seconds, "stamp": mark}
                file.write(json.dumps(record) + "\n")
    return 0


def _median(run: Run) -> float:
    plan = dataclasses.replace(QUICK, max_contender_s=0.1)
    return measure({"it": cuda_sampler([run])}, plan)["it"].seconds().median
