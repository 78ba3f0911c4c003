"""Which GPU kernel serves an operator, on which chip, and why: one table of limits, and words for a choice.

Triton's kernels are chosen in ``kernels/tuning.py``, the CUDA C++ ones in ``csrc/cuda/binary_plan.h``; both
answer here without a GPU, for any chip, from the code the launch itself runs. ``table()`` lists every limit
with what measured it, and is written into ``docs/gpu.md``.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .kernels import tuning
from .kernels.geometry import Arguments, Geometry, pair

LINEAR = ("binary_linear", "binary_linear_packed")
CONVOLUTION = ("binary_conv2d", "binary_conv2d_packed")
SIGNED = ("signed_linear", "signed_conv2d")  # products of real and 8-bit inputs
EVERY_CHIP = "every chip"


@dataclass(frozen=True)
class Limit:
    """One decision: ``value`` is a number or a backend; ``measured`` says what timed it (None: reasoned)."""

    backend: str
    ops: tuple[str, ...]
    chip: str
    what: str
    value: int | str
    reason: str
    measured: str | None = None


# Where both GPU backends are there, this one serves. An entry holds for every chip: operators are registered
# before a device is known. A measurement that favours CUDA C++ for an operator changes its entry here.
_NOT_TIMED = (
    "kernels of one source for all chips; the 1-bit tensor cores of cuda have not been timed against it"
)
PREFERRED = (
    Limit("both", ("bop_step_",), EVERY_CHIP, "backend", "triton", "bound by memory in either"),
    Limit(
        "both",
        ("pack_bits", "pack_bits_ste", "unpack_bits", "apply_mask_"),
        EVERY_CHIP,
        "backend",
        "triton",
        "bound by memory in either",
    ),
    Limit("both", LINEAR, EVERY_CHIP, "backend", "triton", _NOT_TIMED),
    Limit("both", CONVOLUTION, EVERY_CHIP, "backend", "triton", _NOT_TIMED),
)

TRITON_LIMITS = (
    Limit(
        "triton",
        LINEAR,
        EVERY_CHIP,
        "row loop up to this many rows",
        tuning.ROWS_LIMIT,
        "reading the weights once bounds such a product",
    ),
    Limit(
        "triton",
        LINEAR,
        EVERY_CHIP,
        "popcount loop below this many rows",
        tuning.DECODE_ROWS,
        "tensor cores need a tile of 64 or 128 rows to repay decoding the weights",
    ),
    Limit(
        "triton",
        (*LINEAR, *CONVOLUTION),
        EVERY_CHIP,
        "popcount loop below this many outputs (of a group)",
        tuning.DECODE_OUTPUTS,
        "most of a tensor-core tile would be empty",
    ),
    Limit(
        "triton",
        SIGNED[:1],
        EVERY_CHIP,
        "loop without tensor cores up to this many rows",
        tuning.SIGNED_ROWS_LIMIT,
        "of a tensor-core tile's 16 rows most would be empty",
    ),
)


@dataclass(frozen=True)
class Chip:
    """Compute capability (90 for 9.0) and multiprocessors: all that a choice of kernel depends on."""

    name: str
    arch: int
    n_multiprocessors: int

    def __str__(self) -> str:
        return f"{self.name}: sm_{self.arch}, {self.n_multiprocessors} multiprocessors"


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("A100", 80, 108),
        Chip("L40S", 89, 142),
        Chip("RTX 4090", 89, 128),
        Chip("H100", 90, 132),
        Chip("H200", 90, 132),
        Chip("B200", 100, 148),
        Chip("RTX 5090", 120, 170),
    )
}


def chip_named(name: str | None) -> Chip | None:
    """A chip by name or as ``sm_90`` (the first of that kind); None: the GPU here, if there is one.

    Raises:
        ValueError: an unknown name.
    """
    if name is None:
        if not torch.cuda.is_available():
            return None
        here = torch.cuda.get_device_properties(torch.cuda.current_device())
        return Chip(here.name, 10 * here.major + here.minor, here.multi_processor_count)
    for chip in CHIPS.values():
        if name in (chip.name, f"sm_{chip.arch}"):
            return chip
    kinds = dict.fromkeys(f"sm_{chip.arch}" for chip in CHIPS.values())
    raise ValueError(f"there is no chip {name!r} in the table; there are {', '.join((*CHIPS, *kinds))}")


def preferred(op: str) -> Limit | None:
    """Which GPU backend serves ``op`` where both are there; None for operators without GPU kernels."""
    return next((limit for limit in PREFERRED if op in limit.ops), None)


Pair = int | tuple[int, int]


class _Shape(ctypes.Structure):
    """``ConvShape`` of csrc/core/conv_shape.h."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "height", "width", "channels", "groups", "out_channels")
        ),
        *((name, ctypes.c_int64 * 2) for name in ("kernel", "stride", "padding", "dilation")),
        ("padding_value", ctypes.c_int),
    )


@dataclass(frozen=True)
class Product:
    """A binary product as the plans see it: a linear layer is a convolution of 1x1 images."""

    geometry: Geometry
    batch: int

    @property
    def rows(self) -> int:
        """Of the matrix product: output pixels."""
        return self.geometry.pixels(self.batch)

    @property
    def outputs(self) -> int:
        """Of a group."""
        return self.geometry.outputs

    @property
    def group_words(self) -> int:
        return self.geometry.words

    @classmethod
    def linear(cls, input: tuple[int, ...], weight: tuple[int, ...]) -> Product:
        """Of logical shapes ``[..., K]`` and ``[N, K]``."""
        outputs, features = weight
        return cls(Geometry.of((1, 1), (1, 1), features, outputs), math.prod(input[:-1]))

    @classmethod
    def convolution(
        cls,
        input: tuple[int, ...],
        weight: tuple[int, ...],
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        padding_value: int = 0,
    ) -> Product:
        """Of logical shapes NCHW and OIHW; the number of groups follows from their channels."""
        (n, channels, height, width), (outputs, group_channels, *kernel) = input, weight
        arguments = Arguments(
            pair(stride, "stride", 1), pair(padding, "padding", 0), pair(dilation, "dilation", 1),
            channels // group_channels, padding_value,
        )  # fmt: skip
        return cls(Geometry.of((height, width), (kernel[0], kernel[1]), channels, outputs, arguments), n)

    def shape(self) -> _Shape:
        """For the C++ plan."""
        g = self.geometry
        shape = _Shape(self.batch, *g.image, g.all_channels, g.groups, g.all_outputs)
        for name in ("kernel", "stride", "padding", "dilation"):
            getattr(shape, name)[:] = getattr(g, name)
        shape.padding_value = g.padding_value
        return shape


def product(op: str, shapes: Sequence[tuple[int, ...]], geometry: dict[str, Any]) -> Product | None:
    """The product that ``op`` does on ``shapes``; None without shapes, or where ``op`` is no product.

    Raises:
        ValueError: shapes that are not an input's and a weight's.
    """
    if not shapes or op not in (*LINEAR, *CONVOLUTION, *SIGNED):
        return None
    linear = op in (*LINEAR, SIGNED[0])
    axes = 2 if linear else 4
    if len(shapes) != 2 or len(shapes[1]) != axes or (axes == 4 and len(shapes[0]) != 4):
        wanted = "[..., K] and [N, K]" if linear else "NCHW and OIHW"
        raise ValueError(
            f"{op} is explained for an input and a weight, logical shapes {wanted}; got {shapes}"
        )
    operands = shapes[0], shapes[1]
    return Product.linear(*operands) if linear else Product.convolution(*operands, **geometry)


def triton_tile(op: str, work: Product, chip: Chip, dtype: torch.dtype = torch.float32) -> tuning.MatmulTile:
    """The tile that ``kernels/tuning.py`` chooses. ``dtype``: of a signed product's input."""
    family = tuning.family_of(chip.arch // 10)
    if op == SIGNED[0] and work.rows <= tuning.SIGNED_ROWS_LIMIT:
        return tuning.SIGNED_ROWS
    if op in SIGNED:
        return tuning.signed_tile(family, dtype.itemsize, work.rows, work.outputs, work.group_words)
    if op in LINEAR:
        return tuning.linear_tile(family, work.rows, work.outputs)
    return tuning.conv_tile(family, work.outputs, work.group_words)


def triton_kernel(
    op: str, work: Product | None, chip: Chip | None, dtype: torch.dtype = torch.float32
) -> str:
    """What Triton would run, in words. ``dtype``: of a signed product's input."""
    if op in tuning.BACKWARD and tuning.BACKWARD[op].runs == "torch":
        return "its kernels are there, but torch's library is preferred"
    if work is None or chip is None:
        return _without_choice(op, work, chip)
    tile = triton_tile(op, work, chip, dtype)
    loops = TRITON_LOOPS | (SIGNED_LOOPS if op in SIGNED else {})
    kind = "int8" if op not in SIGNED or dtype.itemsize == 1 else "fp16" if dtype == torch.float16 else "bf16"
    loop = loops[tile.loop].format(kind=kind)
    if op in SIGNED and tile.loop == "decode" and dtype == torch.float32:
        loop += ", numbers are cut into three such parts"
    size = f"tile {tile.block_m} x {tile.block_n}, {tile.block_words} words a turn"
    return f"{loop}; {size}; {timed(tile.measured)}"


TRITON_LOOPS = {
    "rows": "row loop with popcounts, the weights are read once",
    "popcount": "popcount loop, a tensor-core tile would be mostly empty",
    "decode": "bits become {kind} in registers, for the tensor cores",
}
SIGNED_LOOPS = {"rows": "few rows: signs applied to numbers without tensor cores, the weights are read once"}


class _PlanNumbers(ctypes.Structure):
    """``PlanNumbers`` of csrc/cuda/explain.cpp."""

    _fields_ = tuple((name, ctypes.c_int32) for name in ("tile_rows", "tile_columns", "math", "n_slices"))


MATH = ("XOR.POPC", "AND.POPC", "int8")  # in the order of ``Math`` in csrc/cuda/fragment.h


@dataclass(frozen=True)
class CudaPlan:
    """The tile of a block (8 x 32: bits are counted without tensor cores), what it multiplies with, the
    number of slices of k, and all that in words."""

    tile: tuple[int, int]
    math: str
    n_slices: int
    text: str


def cuda_plan(work: Product, chip: Chip, symbols: ctypes.CDLL) -> CudaPlan:
    """The plan of ``csrc/cuda/binary_plan.h``, asked through ``_C``.

    Raises:
        ValueError: sizes beyond the kernels' limits.
    """
    text, shape, plan = ctypes.create_string_buffer(512), work.shape(), _PlanNumbers()
    n = symbols.bop2nd_gpu_explain(
        ctypes.byref(shape), ctypes.sizeof(shape), chip.arch, chip.n_multiprocessors, ctypes.byref(plan),
        text, len(text),
    )  # fmt: skip
    words = text.value.decode()
    if n < 0:
        raise ValueError(words)
    return CudaPlan((plan.tile_rows, plan.tile_columns), MATH[plan.math], plan.n_slices, words)


def cuda_kernel(op: str, work: Product | None, chip: Chip | None, symbols: ctypes.CDLL | None) -> str:
    """What CUDA C++ would run, in words; raises as :func:`cuda_plan`."""
    if work is None or chip is None:
        return _without_choice(op, work, chip)
    if symbols is None:
        return "unknown here: the plan is part of the C++ extension, which is not there"
    untimed = sum(limit.measured is None for limit in cuda_limits(symbols))
    text = cuda_plan(work, chip, symbols).text
    return text + (f"; {untimed} of its limits not measured" if untimed else "")


def _without_choice(op: str, work: Product | None, chip: Chip | None) -> str:
    if op not in (*LINEAR, *CONVOLUTION, *SIGNED):
        return "a kernel of its own, the same for every shape"
    missing = ["the operands' shapes"] if work is None else []
    missing += ["a chip (for example chip='H100')"] if chip is None else []
    return f"depends on {' and '.join(missing)}: name them to learn the kernel"


def timed(measured: str | None) -> str:
    return f"measured: {measured}" if measured else "not measured"


def cuda_limits(symbols: ctypes.CDLL) -> Iterator[Limit]:
    """The entries of ``csrc/cuda/dispatch_table.h``."""
    symbols.bop2nd_gpu_limit_text.restype = ctypes.c_char_p
    for i in range(symbols.bop2nd_gpu_limit_count()):
        what, reason, measured = (symbols.bop2nd_gpu_limit_text(i, part) for part in range(3))
        value = int(symbols.bop2nd_gpu_limit_value(i))
        ops = LINEAR if what.startswith(b"linear") else (*LINEAR, *CONVOLUTION)
        what = what.decode().removeprefix("linear: ")
        yield Limit("cuda", ops, EVERY_CHIP, what, value, reason.decode(), measured and measured.decode())


def table(symbols: ctypes.CDLL) -> list[Limit]:
    """Every limit that decides which kernel runs on a GPU."""
    backward = (
        Limit("triton", (op,), EVERY_CHIP, "backward pass", choice.runs, choice.why, choice.measured)
        for op, choice in tuning.BACKWARD.items()
    )
    return [*PREFERRED, *TRITON_LIMITS, *backward, *cuda_limits(symbols)]
