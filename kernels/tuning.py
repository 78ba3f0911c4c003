"""Tile sizes, one small table per chip family, and the chip a tensor lives on. Host code only.

Every entry says which measurement chose it. ``measured=None`` means: reasoned, compiled and read as machine
code, never timed. ``python -m benchmarks.gpu --tune`` times the candidates and prints new entries; nothing
is tuned at import, in a step or inside a captured graph.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StepTile:
    """Words per block (32 weights each), warps per program and the register limit of ``bop_step_kernel``.

    A thread holds ``block_words / num_warps`` weights: 4 or 8, one 16-byte access of fp32 or bf16. The
    limit keeps enough programs on an SM to cover memory latency; the compile tests hold it to no spills.
    """

    block_words: int
    num_warps: int
    max_registers: int
    measured: str | None = None


# Keyed by chip family and kind: packed weights or dense ones with fp32 moments, or bf16 moments.
STEP_TILES = {
    ("sm80", "packed"): StepTile(block_words=16, num_warps=4, max_registers=64, measured=None),
    ("sm80", "dense"): StepTile(block_words=16, num_warps=4, max_registers=96, measured=None),
    ("sm80", "bf16"): StepTile(block_words=32, num_warps=4, max_registers=144, measured=None),
    ("sm90", "packed"): StepTile(block_words=16, num_warps=4, max_registers=64, measured=None),
    ("sm90", "dense"): StepTile(block_words=16, num_warps=4, max_registers=96, measured=None),
    ("sm90", "bf16"): StepTile(block_words=32, num_warps=4, max_registers=144, measured=None),
    ("sm100", "packed"): StepTile(block_words=16, num_warps=4, max_registers=96, measured=None),
    ("sm100", "dense"): StepTile(block_words=16, num_warps=4, max_registers=112, measured=None),
    ("sm100", "bf16"): StepTile(block_words=32, num_warps=4, max_registers=200, measured=None),
    ("sm120", "packed"): StepTile(block_words=16, num_warps=4, max_registers=96, measured=None),
    ("sm120", "dense"): StepTile(block_words=16, num_warps=4, max_registers=112, measured=None),
    ("sm120", "bf16"): StepTile(block_words=32, num_warps=4, max_registers=200, measured=None),
}


def step_tile(chip: str, packed: bool, moment_dtype: torch.dtype) -> StepTile:
    """Tile of the step on ``family(device)``; the interpreter runs the tiles of sm90."""
    kind = "bf16" if moment_dtype == torch.bfloat16 else "packed" if packed else "dense"
    return STEP_TILES["sm90" if chip == "interpreter" else chip, kind]


def step_chunk_words(total_words: int) -> int:
    """Words per program of the step: many programs for small groups, fewer atomics for large ones."""
    return 64 if total_words < 2**19 else 256  # not measured yet


@dataclass(frozen=True)
class PackTile:
    """Words per program where the packed axis is contiguous, pixels per program where it is strided."""

    block_words: int
    block_inner: int
    num_warps: int
    measured: str | None = None


PACK_TILE = PackTile(block_words=64, block_inner=512, num_warps=4, measured=None)


@dataclass(frozen=True)
class MatmulTile:
    """Inner loop and tile of a binary product: outputs per program, words per turn, warps, pipeline stages.

    ``weights_in_shared``: the decode loop hands weights to the tensor cores through shared memory (wgmma).
    """

    loop: str  # "rows", "popcount" or "decode"
    block_m: int
    block_n: int
    block_words: int
    num_warps: int
    num_stages: int = 3
    weights_in_shared: bool = False
    measured: str | None = None

    def constants(self) -> dict[str, int]:
        """Compile-time values of the kernels of binary_linear.py and binary_conv2d.py."""
        return {
            "BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_WORDS": self.block_words,
            "SHARED": self.weights_in_shared,
        }  # fmt: skip

    def options(self) -> dict[str, int]:
        """How they are compiled: no fused multiply-add, the epilogue rounds every operation."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": False}


ROWS = MatmulTile("rows", 1, 32, 128, 4, measured=None)
POPCOUNT = MatmulTile("popcount", 32, 64, 4, 4, measured=None)
# Two programs of the wide tile fit on an SM: one decodes while the other multiplies.
DECODE = {
    ("sm80", "wide"): MatmulTile("decode", 128, 128, 4, 8, measured=None),
    ("sm80", "narrow"): MatmulTile("decode", 128, 64, 4, 4, measured=None),
    ("sm90", "wide"): MatmulTile("decode", 128, 128, 4, 8, weights_in_shared=True, measured=None),
    ("sm90", "narrow"): MatmulTile("decode", 128, 64, 4, 4, weights_in_shared=True, measured=None),
    ("sm100", "wide"): MatmulTile("decode", 128, 128, 4, 8, measured=None),
    ("sm100", "narrow"): MatmulTile("decode", 128, 64, 4, 4, measured=None),
    ("sm120", "wide"): MatmulTile("decode", 128, 128, 4, 8, measured=None),
    ("sm120", "narrow"): MatmulTile("decode", 128, 64, 4, 4, measured=None),
}


# The limits between the inner loops. None of them is measured yet.
ROWS_LIMIT, DECODE_ROWS, DECODE_OUTPUTS = 8, 64, 32


def linear_tile(chip: str, rows: int, outputs: int) -> MatmulTile:
    """Inner loop and tile for ``[rows, K] x [K, outputs]``."""
    if rows <= ROWS_LIMIT:
        return ROWS
    if rows < DECODE_ROWS or outputs < DECODE_OUTPUTS:
        return POPCOUNT
    return DECODE["sm90" if chip == "interpreter" else chip, "wide" if outputs > 64 else "narrow"]


def conv_tile(chip: str, group_outputs: int, group_words: int) -> MatmulTile:
    """Inner loop and tile for a convolution: the tensor cores need 16 outputs; a turn stays in one tap."""
    if group_outputs < DECODE_OUTPUTS:
        return POPCOUNT
    tile = DECODE["sm90" if chip == "interpreter" else chip, "wide" if group_outputs > 64 else "narrow"]
    # mma.sync keeps both decoded operands in registers: two words a turn hold the wide tile to 192 of them.
    words = 4 if group_words > 2 and tile.weights_in_shared else min(group_words, 2)
    return dataclasses.replace(tile, block_words=words)


# Products with real and 8-bit inputs: up to this many rows of a linear layer, the loop without tensor cores.
SIGNED_ROWS_LIMIT = 4
SIGNED_ROWS = MatmulTile("rows", 1, 32, 8, 8, measured=None)


def signed_tile(chip: str, itemsize: int, rows: int, outputs: int, words: int) -> MatmulTile:
    """Tile of ``rows`` rows or pixels by the signs of a group, for numbers of ``itemsize`` bytes.

    A turn takes 128 bytes of a row, or 64 where mma.sync keeps bytes of both operands in registers. Signs as
    bytes go through shared memory where wgmma reads them there, as 16-bit signs always do. Not measured yet.
    """
    block_m = 16 if rows <= 16 else 64 if rows <= 64 else 128
    block_n = 32 if outputs <= 32 else 128 if outputs > 64 and block_m == 128 else 64
    wgmma = chip in ("sm90", "interpreter") and block_m >= 64
    block_words = min({1: 4 if wgmma else 2, 2: 2, 4: 1}[itemsize], 1 << max(0, words - 1).bit_length())
    num_warps = 8 if block_m * block_n > 64 * 128 else 4
    return MatmulTile("decode", block_m, block_n, block_words, num_warps, weights_in_shared=wgmma)


@dataclass(frozen=True)
class GradientTile:
    """Tile of a gradient's product with signs: rows and words of the result, summed elements per turn."""

    block_rows: int
    block_words: int
    block_inner: int
    num_warps: int
    num_stages: int = 3
    measured: str | None = None

    def constants(self) -> dict[str, int]:
        """Compile-time values of the kernels of linear_backward.py and conv_backward.py."""
        return {
            "BLOCK_ROWS": self.block_rows, "BLOCK_INNER": self.block_inner, "BLOCK_WORDS": self.block_words
        }  # fmt: skip

    def options(self) -> dict[str, int]:
        """How they are compiled."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


# Keyed by chip family, bytes per element of the gradient, and rows: more than the small tile has, or not.
# mma.sync keeps both operands in registers: turns are half as long on sm80 and sm120. Two programs fit on an
# SM of the others. fp32 gradients are three operands, so their turns are half as long again.
GRADIENT_TILES = {
    ("sm80", 2, "wide"): GradientTile(128, 4, 32, 8, measured=None),
    ("sm80", 2, "narrow"): GradientTile(64, 4, 32, 4, measured=None),
    ("sm80", 4, "wide"): GradientTile(128, 4, 16, 8, measured=None),
    ("sm80", 4, "narrow"): GradientTile(64, 4, 16, 4, measured=None),
    ("sm90", 2, "wide"): GradientTile(128, 4, 64, 8, measured=None),
    ("sm90", 2, "narrow"): GradientTile(64, 4, 64, 4, measured=None),
    ("sm90", 4, "wide"): GradientTile(128, 4, 32, 8, measured=None),
    ("sm90", 4, "narrow"): GradientTile(64, 4, 32, 4, measured=None),
    ("sm100", 2, "wide"): GradientTile(128, 4, 64, 8, measured=None),
    ("sm100", 2, "narrow"): GradientTile(64, 4, 64, 4, measured=None),
    ("sm100", 4, "wide"): GradientTile(128, 4, 32, 8, measured=None),
    ("sm100", 4, "narrow"): GradientTile(64, 4, 32, 4, measured=None),
    ("sm120", 2, "wide"): GradientTile(128, 4, 32, 8, measured=None),
    ("sm120", 2, "narrow"): GradientTile(64, 4, 32, 4, measured=None),
    ("sm120", 4, "wide"): GradientTile(128, 4, 16, 8, measured=None),
    ("sm120", 4, "narrow"): GradientTile(64, 4, 16, 4, measured=None),
}


def gradient_tile(chip: str, dtype: torch.dtype, rows: int) -> GradientTile:
    """Tile for a result of ``rows`` rows (batch, pixels or outputs); the interpreter runs those of sm90."""
    size = "wide" if rows > 64 else "narrow"
    return GRADIENT_TILES["sm90" if chip == "interpreter" else chip, dtype.itemsize, size]


def gradient_splits(result_words: int, inner: int) -> int:
    """Partial sums for a gradient of a weight: about two programs per multiprocessor of a large GPU.

    By shapes alone, so that every GPU sums in one order; at least 1024 elements to a sum. Not measured yet.
    """
    programs = max(1, result_words // 512)  # 128 rows of 4 words each
    return max(1, min(264 // programs, inner // 1024))


@dataclass(frozen=True)
class Choice:
    """What runs an operator where both could: ``triton`` (ours) or ``torch`` (its libraries), and why."""

    runs: str
    why: str
    measured: str | None = None


# A benchmark compares the two by calling either directly, or whole steps by exchanging an entry.
BACKWARD = {
    "binary_linear_backward": Choice(
        "triton",
        "signs are decoded in registers, 1/8 byte each; cuBLAS would read 2 or 4 that were written before",
        measured=None,
    ),
    "binary_conv2d_backward": Choice(
        "torch",
        "cuDNN convolves signs unpacked in tiles of 256 MiB: every tap uses a sign again, so decoding it "
        "saves little, and strides cost cuDNN no empty products",
        measured=None,
    ),
}


@functools.cache
def _family_of(device_index: int) -> str:
    major, _ = torch.cuda.get_device_capability(device_index)
    if major < 8:
        raise ValueError(f"the Triton kernels need compute capability 8.0 or newer, this GPU has {major}.x")
    return family_of(major)


def family_of(major: int) -> str:
    """Chip family of a major compute capability."""
    return {8: "sm80", 9: "sm90", 12: "sm120"}.get(major, "sm100")


def family(device: torch.device) -> str:
    """``sm80`` (8.x), ``sm90``, ``sm100`` (10.x, 11.x), ``sm120``, or ``interpreter`` for CPU tensors."""
    if device.type != "cuda":
        return "interpreter"
    return _family_of(torch.cuda.current_device() if device.index is None else device.index)


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Context in which Triton launches on ``tensor``'s device; free when that is the current one."""
    device = tensor.device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
