"""Compile the Triton kernels ahead of time and read the machine code: no GPU needed.

``python tests/triton_aot.py 80 90`` compiles every case for these chips and prints a JSON line each of what
``ptxas``, ``cuobjdump`` and ``nvdisasm`` (all in Triton's wheel) say: registers per thread, spills, and how
often the instructions that matter occur. Run as a program of its own, because a process that runs Triton's
interpreter (``TRITON_INTERPRET=1``) cannot compile.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bop2nd_fast.kernels import (
    binary_conv2d,
    binary_linear,
    bop_step,
    conv_backward,
    epilogue,
    gradient_product,
    linear_backward,
    pack_bits,
    signed_conv2d,
    signed_linear,
    tuning,
)
from bop2nd_fast.kernels.geometry import Geometry
from bop2nd_fast.kernels.outputs import Outputs

NVIDIA_TOOLS = "backends/nvidia/bin"


@dataclass(frozen=True)
class Const:
    """A value inside a tuple that the compiler knows: None for what is absent, 1 for a size of 1."""

    value: Any


# Types of arguments: "*fp32" is a pointer on 16 bytes, "i32%16" a multiple of 16, "i32" any number; tuples of
# types and ``Const``.
INT, MULTIPLE = "i32", "i32%16"


@dataclass
class Case:
    """One specialization of a kernel: argument types, compile-time values and options."""

    name: str
    kernel: Any
    types: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int = 4
    options: dict[str, Any] = field(default_factory=dict)


def step_cases(arch: int) -> Iterator[Case]:
    import triton.language as tl

    types = {"chunks": "*i32", "table": "*i64", "hyper": "*fp32", "counts": "*i64"}
    absent = {"inv_scale": None, "found_inf": None, "seed": None}
    amp = {"inv_scale": "*fp32", "found_inf": "*fp32", "seed": "*i64"}
    for name, weight, grad, moment, has_v in (
        ("bop_step fp32", tl.int32, tl.float32, tl.float32, True),
        ("bop_step fp32, Bop", tl.int32, tl.float32, tl.float32, False),
        ("bop_step fp32, dense weight", tl.float32, tl.float32, tl.float32, True),
        ("bop_step bf16 state, AMP", tl.int32, tl.bfloat16, tl.bfloat16, True),
    ):
        low = moment == tl.bfloat16
        chip, kind = tuning.family_of(arch // 10), torch.bfloat16 if low else torch.float32
        tile = tuning.step_tile(chip, weight == tl.int32, kind)
        constants = {
            "WEIGHT": weight, "GRAD": grad, "MOMENT": moment, "HAS_V": has_v, "MAXIMIZE": low,
            "BLOCK_WORDS": tile.block_words,
        }  # fmt: skip
        yield Case(
            name, bop_step.bop_step_kernel, {**types, **(amp if low else {})},
            {**constants, **({} if low else absent)}, tile.num_warps,
            options={"enable_fp_fusion": False, "maxnreg": tile.max_registers},
        )  # fmt: skip


def pack_cases(arch: int) -> Iterator[Case]:
    tile = tuning.PACK_TILE
    sizes = {"n_words": INT, "length": MULTIPLE, "words_per_row": MULTIPLE}
    image = dict.fromkeys(("inner", "length", "words_per_group", "groups"), MULTIPLE) | {"inner_blocks": INT}
    whole = {"WHOLE": True, "BLOCK": tile.block_words}
    masked = {"HAS_MASK": True, "BLOCK": tile.block_inner}
    both = {"signs": "*i32", "mask": "*i32"}
    for name, kernel, types, constants in (
        ("pack_bits rows fp32", pack_bits.pack_rows_kernel, {"x": "*fp32", **both, **sizes}, whole),
        ("pack_bits rows bf16", pack_bits.pack_rows_kernel, {"x": "*bf16", **both, **sizes}, whole),
        ("pack_bits NCHW fp32", pack_bits.pack_columns_kernel, {"x": "*fp32", **both, **image}, masked),
        ("unpack_bits bf16", pack_bits.unpack_rows_kernel, {"words": "*i32", "out": "*bf16", **sizes}, whole),
        ("apply_mask fp32", pack_bits.apply_mask_kernel, {"grad": "*fp32", "mask": "*i32", **sizes}, whole),
    ):
        more = {"HAS_MASK": True} if kernel is pack_bits.pack_rows_kernel else {}
        yield Case(name, kernel, types, {**constants, **more}, tile.num_warps)


def outputs_of(**given: str) -> Outputs:
    """Types of what a product emits; what is not given is absent."""
    absent = dict.fromkeys(Outputs._fields, Const(None))
    return Outputs(**{**absent, **given})


DOTS = outputs_of(reals="*fp32")
BITS = outputs_of(signs="*i32", threshold="*i32")
REAL_NET = outputs_of(reals="*bf16", signs="*i32", scale="*fp32", shift="*fp32", residual="*bf16")
ALL = REAL_NET._replace(
    low=INT, high=INT, slope="*fp32", post_shift="*fp32", sign_shift="*fp32"
)  # both clamps and PReLU


def geometry_types(channels: Any = MULTIPLE) -> Geometry:
    """Channels and outputs are multiples of 16, as a rule; nothing else is (words of 64..512 channels)."""
    pair: Any = (INT, INT)
    return Geometry(
        stride=pair, padding=pair, dilation=pair, groups=INT, padding_value=INT, image=pair, kernel=pair,
        out=pair, channels=channels, words=INT, outputs=channels, taps=INT, image_words=INT,
        all_outputs=channels,
    )  # fmt: skip


def matmul_case(name: str, kernel: Any, tile: Any, types: dict[str, Any], to: Outputs, **more: Any) -> Case:
    """A product that emits ``to``."""
    types = {"x": "*i32", "w": "*i32", "to": to, **types}
    return Case(name, kernel, types, {**more, **tile.constants()}, options=tile.options())


def linear_cases(arch: int) -> Iterator[Case]:
    types = {"rows": INT} | dict.fromkeys(("outputs", "n_words", "features"), MULTIPLE)
    wide = tuning.DECODE[tuning.family_of(arch // 10), "wide"]
    yield matmul_case("linear rows", binary_linear.linear_rows_kernel, tuning.ROWS, types, DOTS)
    yield matmul_case("linear popcount", binary_linear.linear_popcount_kernel, tuning.POPCOUNT, types, DOTS)
    yield matmul_case("linear decode", binary_linear.linear_decode_kernel, wide, types, DOTS)
    yield matmul_case("linear decode to bits", binary_linear.linear_decode_kernel, wide, types, BITS)


def conv_cases(arch: int) -> Iterator[Case]:
    types = {"pixels": INT, "geometry": geometry_types()}
    for outputs, words, bits, padding in ((64, 2, False, 0), (256, 8, False, 0), (256, 8, True, -1)):
        tile = tuning.conv_tile(tuning.family_of(arch // 10), outputs, words)
        name = f"conv decode {32 * words} to {outputs}{' bits' if bits else ''}"
        to = BITS if bits else DOTS
        yield matmul_case(name, binary_conv2d.conv_decode_kernel, tile, types, to, PADDING=padding)
    types = {"pixels": INT, "geometry": geometry_types(INT)}
    kernel = binary_conv2d.conv_popcount_kernel
    yield matmul_case("conv popcount", kernel, tuning.POPCOUNT, types, DOTS, PADDING=0)


def gradient_case(
    name: str, kernel: Any, arch: int, dtype: torch.dtype, sizes: dict[str, Any], **more: Any
) -> Case:
    """A gradient's product with signs: ``grad_input`` in its dtype with a mask, ``grad_weight`` in fp32."""
    pointer = "*bf16" if dtype == torch.bfloat16 else "*fp32"
    tile = tuning.gradient_tile(tuning.family_of(arch // 10), dtype, 128)
    types = {**sizes, "gradient": pointer, "words": "*i32"}
    types |= {"out": pointer, "mask": "*i32"} if "input" in name else {"out": "*fp32"}
    parts = gradient_product.parts_of(dtype, "ieee")
    constants = {"PARTS": parts, "WIDEN": False, **tile.constants(), **more}
    return Case(name, kernel, types, constants, options=tile.options())


def gradient_cases(arch: int) -> Iterator[Case]:
    """Both dtypes, both gradients; of convolutions those with three products, which need most registers."""
    linear, bf16, fp32 = linear_backward.linear_gradient_kernel, torch.bfloat16, torch.float32
    sizes = dict.fromkeys(("batch", "split_turns"), INT)
    sizes |= dict.fromkeys(("columns", "n_words", "width"), MULTIPLE)
    yield gradient_case("linear grad_input bf16", linear, arch, bf16, sizes, TRANSPOSED=False)
    yield gradient_case("linear grad_weight bf16", linear, arch, bf16, sizes, TRANSPOSED=True, mask=None)
    shapes: dict[str, Any] = {"pixels": INT, "geometry": geometry_types()}
    yield gradient_case("conv grad_input fp32", conv_backward.conv_grad_input_kernel, arch, fp32, shapes)
    shapes |= {"split_turns": INT}
    kernel = conv_backward.conv_grad_weight_kernel
    yield gradient_case("conv grad_weight fp32", kernel, arch, fp32, shapes, PADDING=0)


POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int8: "*i8", torch.uint8: "*u8"}


def signed_case(name: str, arch: int, dtype: torch.dtype, to: Outputs, offset: bool = False) -> Case:
    """A product of images of many channels, channels-last, or of a few rows, with signs."""
    types: dict[str, Any] = {"x": POINTERS[dtype], "w": "*i32", "to": to, "input_scale": "*fp32"}
    types |= dict.fromkeys(("multiplier", "offset", "zero_point"), INT)
    if "rows" in name:
        tile, kernel, more = tuning.SIGNED_ROWS, signed_linear.signed_rows_kernel, {}
        types |= {"rows": INT, "rows_per_scale": INT}
        types |= dict.fromkeys(("outputs", "n_words", "features"), MULTIPLE)
    else:
        tile = tuning.signed_tile(tuning.family_of(arch // 10), dtype.itemsize, 4096, 256, 8)
        kernel = signed_conv2d.signed_tile_kernel
        more = {"PARTS": gradient_product.parts_of(dtype, "ieee"), "WIDEN": False}
        strides = signed_conv2d.Image(MULTIPLE, MULTIPLE, MULTIPLE, Const(1))
        types |= {"pixels": INT, "pixels_per_scale": INT, "geometry": geometry_types(), "strides": strides}
    types = {k: t for k, t in types.items() if k in kernel.arg_names}
    constants = {"OFFSET": offset, **more, **tile.constants()}
    return Case(name, kernel, types, constants, options=tile.options())


def signed_cases(arch: int) -> Iterator[Case]:
    yield signed_case("signed rows fp32", arch, torch.float32, DOTS)
    yield signed_case("signed conv uint8 to bits", arch, torch.uint8, BITS, offset=True)
    yield signed_case("signed conv fp32", arch, torch.float32, DOTS)


def _ones(types: Any) -> Any:
    """The same types with every size 1, which is a constant to Triton."""
    if isinstance(types, tuple):
        items = [_ones(t) for t in types]
        return type(types)(*items) if hasattr(types, "_fields") else tuple(items)
    return Const(1) if types in (INT, MULTIPLE) else types


def variant_cases(arch: int) -> Iterator[Case]:
    """What the launchers also ask for: sizes of 1 (constants to Triton), other dtypes, epilogues.

    The interpreter does not check types as the compiler does; here it is enough that they compile.
    """
    import triton.language as tl

    made = (step_cases, pack_cases, linear_cases, conv_cases, gradient_cases, signed_cases)
    base = {case.name: case for some in made for case in some(arch)}
    for name in (
        "linear rows",
        "conv decode 64 to 64",
        "linear grad_input bf16",
        "conv grad_input fp32",
        "conv grad_weight fp32",
    ):
        case = base[name]
        never = {"pixels", "rows", "batch", "split_turns"}  # not specialized
        types = {k: t if k in never else _ones(t) for k, t in case.types.items()}
        more = {"BLOCK_WORDS": 1} if "rows" not in name else {}
        more |= {"PADDING": -1} if "PADDING" in case.constants else {}
        yield replace(
            case, name=f"variant: {name}, sizes 1", types=types, constants={**case.constants, **more}
        )
    for name in ("linear rows", "conv decode 256 to 256"):
        case = base[name]
        yield replace(case, name=f"variant: {name}, epilogue", types={**case.types, "to": REAL_NET})
        yield replace(case, name=f"variant: {name}, whole epilogue", types={**case.types, "to": ALL})
    yield signed_case("variant: signed conv bf16, whole epilogue", arch, torch.bfloat16, ALL)
    types = {"dots": "*fp32", "to": ALL, "input_scale": "*fp32"}
    types |= dict.fromkeys(("rows", "width", "rows_per_scale"), INT)
    yield Case("variant: finish", epilogue.finish_kernel, types, {"BLOCK_M": 32, "BLOCK_N": 64})
    for name in ("pack_bits rows fp32", "unpack_bits bf16"):
        case = base[name]
        yield replace(case, name=f"variant: {name}, ragged", constants={**case.constants, "WHOLE": False})
    case = base["bop_step fp32, dense weight"]
    constants = {**case.constants, "WEIGHT": tl.float16, "GRAD": tl.float16, "HAS_V": False}
    yield replace(case, name="variant: bop_step dense fp16, Bop", constants=constants)


def cases(arch: int) -> Iterator[Case]:
    if arch == 90:
        yield from variant_cases(arch)
    yield from conv_cases(arch)
    yield from step_cases(arch)
    yield from pack_cases(arch)
    yield from linear_cases(arch)
    yield from gradient_cases(arch)
    yield from signed_cases(arch)


def _sass(cubin: bytes) -> tuple[str, str]:
    """(disassembly, resource usage) of a cubin."""
    import triton

    tools = Path(triton.__file__).parent / NVIDIA_TOOLS
    # nvdisasm, not cuobjdump: no hexadecimal columns, and without data flow analysis it takes a third less
    commands = [[tools / "nvdisasm", "-c", "-ndf"], [tools / "cuobjdump", "--dump-resource-usage"]]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        texts = [
            subprocess.run([*command, file.name], check=True, capture_output=True, text=True).stdout
            for command in commands
        ]
    return texts[0], texts[1]


def _narrow_columns(ttir: str) -> int:
    """Remainders (of a word's index in its row) that are multiplied by 32 as 32-bit integers."""
    remainders = re.findall(r"(%\w+) = arith\.remsi [^:]*: (?:tensor<\d+xi32>|i32)", ttir)
    thirty_twos = set(re.findall(r"(%\w+) = arith\.constant (?:dense<32>|32) : ", ttir))
    products = re.findall(r"arith\.muli (%\w+), (%\w+) : (?:tensor<\d+xi32>|i32)", ttir)
    return sum(a in remainders and b in thirty_twos for a, b in products)


def compile_case(case: Case, arch: int) -> dict[str, Any]:
    """Compile ``case`` for ``arch`` and count what the tests look at."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    constexprs = {(names.index(name),): value for name, value in case.constants.items()}
    attrs: dict[tuple[int, ...], Any] = {}

    def signature_of(types: Any, path: tuple[int, ...]) -> Any:
        if isinstance(types, tuple):
            items = [signature_of(t, (*path, i)) for i, t in enumerate(types)]
            return type(types)(*items) if hasattr(types, "_fields") else tuple(items)
        if isinstance(types, Const):
            constexprs[path] = types.value
            return "constexpr"
        if types.startswith("*") or types == MULTIPLE:
            attrs[path] = [["tt.divisibility", 16]]
        return types.removesuffix("%16")

    signature = {
        name: signature_of(case.types[name], (i,)) if name in case.types else "constexpr"
        for i, name in enumerate(names)
    }
    options = {"num_warps": case.num_warps, **case.options}
    source = ASTSource(case.kernel, signature, constexprs, attrs)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx, (sass, usage) = binary.asm["ptx"], _sass(binary.asm["cubin"])
    count = lambda pattern, text: len(re.findall(pattern, text))  # noqa: E731
    return {
        "case": case.name,
        "arch": arch,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": count(r"\b(LDL|STL)\b", sass) + int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": binary.metadata.shared,
        "instructions": count(r"(?m)^\s+/\*[0-9a-f]{4,}\*/\s", sass),
        "ldg128": count(r"\bLDG\.E[.\w]*\.128\b", sass),
        "stg128": count(r"\bSTG\.E[.\w]*\.128\b", sass),
        "ldg": count(r"\bLDG\b", sass),
        "popc": count(r"\bPOPC\b", sass),
        "wgmma": count(r"\bIGMMA\b", sass),
        "tensor_int8": count(r"\b(IMMA|IGMMA)\b|UTC\w*IMMA|UTCIMMA", sass),
        "tensor_float": count(r"\bHG?MMA\b|UTC\w*HMMA", sass),
        "ffma": count(r"\bFFMA\b", sass),
        "narrow_columns": _narrow_columns(binary.asm["ttir"]),
        "ptx_fma": count(r"\bfma\.rn\.f32", ptx),
        "ptx_ftz": count(r"\.ftz\b", ptx),
    }


def compile_all(arch: int) -> list[dict[str, Any]]:
    return [compile_case(case, arch) for case in cases(arch)]


def main(archs: list[int]) -> None:
    """A process for each chip, forked when torch and Triton are imported."""
    with multiprocessing.get_context("fork").Pool(len(archs)) as pool:
        for results in pool.imap(compile_all, archs):
            print("\n".join(map(json.dumps, results)), flush=True)


if __name__ == "__main__":
    main([int(arch) for arch in sys.argv[1:]])
