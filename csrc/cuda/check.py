"""Compile every CUDA kernel without a GPU and read the reports: ``python csrc/cuda/check.py``.

For each architecture nvcc writes a cubin with ``-Xptxas -v``; from its report come registers, spills and
stack, from the disassembly the instructions that must or must not be there. Objects are kept in
``build/cuda`` under a hash of their sources. Prints a table; exits with 1 if a rule is broken.

Shared memory of the product kernels is asked for at launch, so its size is stated in ``tile.h``, not here.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = ROOT / "build" / "cuda"
ARCHITECTURES = (80, 89, 90, 100, 120)
SOURCES = ("bop_step", "pack_bits", "binary_matmul", "mma_peak")
FLAGS = ("-std=c++17", "-O3", "--fmad=false", "-Xptxas", "-v")

MMA = re.compile(r"BMMA|IMMA")

TILES = {"128": "large", "256": "tall", "64": "small"}  # by rows

# Instructions of the main loop for each matrix instruction that 1-bit chips may spend: a quarter of a
# multiprocessor takes 8 clocks for a BMMA on sm_80 (data sheet) and issues one instruction a clock, so more
# than 8 would starve the tensor cores.
LOOP_BUDGETS = {"binary_matmul_large": 3.2, "binary_matmul_tall": 4.0, "binary_matmul_small": 7.0}
# The same where bits are decoded to bytes, so that a regression shows; most of it is the decoding.
LOOP_BUDGETS_OF_BYTES = {"binary_matmul_large": 5.5, "binary_matmul_tall": 6.0, "binary_matmul_small": 10.5}

# Registers a thread each kernel may use: what lets the blocks stated in its launch bounds share one
# multiprocessor (65536 registers).
REGISTER_BUDGETS = {
    "bop_step": 80,  # 3 blocks of 256 threads
    "pack_bits": 48,  # 5 blocks of 256
    "unpack_bits": 32,  # 8 blocks of 256
    "apply_mask": 32,  # 8 blocks of 256
    "binary_matmul_large": 255,  # 2 blocks of 128
    "binary_matmul_tall": 255,  # 2 blocks of 128
    "binary_matmul_small": 128,  # 4 blocks of 128
    "binary_skinny": 128,  # 2 blocks of 256
    "binary_terms": 64,
    "mma_peak": 128,
}


@dataclass
class KernelReport:
    """What the compiler and the disassembler say about one kernel on one architecture."""

    name: str  # as in REGISTER_BUDGETS
    variant: str  # template arguments, readable
    arch: int
    registers: int
    spill_bytes: int
    stack_bytes: int
    instructions: Counter[str] = field(default_factory=Counter)
    loop: Counter[str] = field(default_factory=Counter)  # of the loop with the most matrix instructions

    def count(self, pattern: str) -> int:
        """How many instructions match a regular expression, e.g. ``BMMA.*AND.POPC``."""
        return sum(n for text, n in self.instructions.items() if re.search(pattern, text))

    def per_mma(self) -> float:
        """Instructions of the main loop for each of its matrix instructions."""
        return self.loop.total() / max(1, sum(n for text, n in self.loop.items() if MMA.match(text)))


class ToolMissing(RuntimeError):
    """A tool this check needs is not on the machine; the message says which and where it was looked for."""


def nvcc() -> str:
    """Path of the CUDA compiler.

    Raises:
        ToolMissing: there is none.
    """
    for candidate in (os.environ.get("NVCC"), "nvcc", "/usr/local/cuda/bin/nvcc"):
        if candidate and (found := shutil.which(candidate)):
            return found
    raise ToolMissing("no CUDA compiler: neither $NVCC nor nvcc on the PATH nor /usr/local/cuda/bin/nvcc")


def disassembler() -> str:
    """Path of cuobjdump: the one beside nvcc, or the one in the triton wheel.

    Raises:
        ToolMissing: there is none.
    """
    candidates = [str(Path(nvcc()).resolve().parent / "cuobjdump"), "cuobjdump"]
    if (spec := importlib.util.find_spec("triton")) and spec.origin:
        candidates.append(str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"))
    for candidate in candidates:
        # cuobjdump calls nvdisasm, which must lie beside it
        if (found := shutil.which(candidate)) and (Path(found).resolve().parent / "nvdisasm").exists():
            return found
    raise ToolMissing(
        "no cuobjdump with nvdisasm beside it: neither in the CUDA toolkit nor in the triton wheel"
    )


def _source_hash(command: list[str], sources: Iterable[Path] = ()) -> str:
    digest = hashlib.sha256(" ".join(command).encode())
    headers = [*HERE.glob("*.h"), *(HERE.parent / "core").glob("*.h")]
    for path in sorted({*HERE.glob("*.cu*"), *headers, *sources}):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def compile_unit(source: str, arch: int) -> list[KernelReport]:
    """Compile one .cu file for one architecture (or take it from the cache) and read its reports."""
    base = [nvcc(), *FLAGS, f"-arch=sm_{arch}", "-cubin", str(HERE / f"{source}.cu")]
    stem = CACHE / f"{source}-sm{arch}-{_source_hash(base)}"
    report, cubin, sass = (stem.with_suffix(s) for s in (".txt", ".cubin", ".sass"))
    if not sass.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        for old in CACHE.glob(f"{source}-sm{arch}-*"):
            old.unlink()
        report.write_text(_run([*base, "-o", str(cubin)]))
        sass.with_suffix(".part").write_text(_run([disassembler(), "-sass", str(cubin)]))
        sass.with_suffix(".part").rename(sass)
    return _read(report.read_text(), sass.read_text(), arch)


def step_ptx() -> str:
    """PTX of the step: here, unlike in machine code, a fused multiply-add could only be ours."""
    return _cached("bop_step.ptx", [*FLAGS[:3], "-arch=sm_90", "-ptx", str(HERE / "bop_step.cu")]).read_text()


def build_program(name: str, sources: list[Path], options: list[str]) -> Path:
    """An executable of host code (and kernels, which need not run), for tests."""
    return _cached(f"{name}.program", [FLAGS[0], *options, *map(str, sources)], sources)


def _cached(name: str, arguments: list[str], sources: Iterable[Path] = ()) -> Path:
    """What nvcc makes of its arguments, kept until the sources change: csrc/cuda, csrc/core and these."""
    stem, _, suffix = name.partition(".")
    command = [nvcc(), *arguments]
    made = CACHE / f"{stem}-{_source_hash(command, sources)}.{suffix}"
    if not made.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        for old in CACHE.glob(f"{stem}-*.{suffix}"):
            old.unlink()
        part = made.with_suffix(".part")
        _run([*command, "-o", str(part)])
        part.rename(made)
    return made


def _read(report: str, sass: str, arch: int) -> list[KernelReport]:
    kernels = {}
    entry = re.compile(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    for symbol, stack, stores, loads, registers in entry.findall(report):
        name, variant = _readable(symbol)
        kernels[symbol] = KernelReport(
            name, variant, arch, int(registers), int(stores) + int(loads), int(stack)
        )
    for section in sass.split("Function : ")[1:]:
        kernel = kernels[section.partition("\n")[0].strip()]
        code = [
            (int(address, 16), name, rest)
            for address, name, rest in re.findall(
                r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^\n]*?);", section
            )
        ]
        kernel.instructions = Counter(name for _, name, _ in code)
        kernel.loop = _main_loop(code)
    return list(kernels.values())


def _main_loop(code: list[tuple[int, str, str]]) -> Counter[str]:
    """Instructions between a backward branch and its target, for the loop that holds the most MMA."""
    loops = [Counter()]
    for address, name, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if target and int(target[1], 16) < address:
            loops.append(Counter(n for a, n, _ in code if int(target[1], 16) <= a <= address))
    return max(loops, key=lambda loop: sum(n for text, n in loop.items() if MMA.match(text)))


def _readable(symbol: str) -> tuple[str, str]:
    """Mangled symbol -> (name in REGISTER_BUDGETS, template arguments)."""
    match = re.search(r"bop2nd4cuda\d+([a-z_]+?)(?:I(.*)EEv|E)", symbol)
    if match is None:
        raise RuntimeError(f"a kernel of unknown form: {symbol}")
    name, arguments = match[1], match[2] or ""
    values = {"0": "fp32", "1": "bf16", "2": "fp16"}
    if name == "binary_matmul":
        numbers = re.findall(r"Li(\d+)", arguments)  # of the tile, then vector words and blocks
        return f"binary_matmul_{TILES[numbers[0]]}", f"vector {numbers[-2]}"
    found = [values[v] for v in re.findall(r"5DtypeE(\d)", arguments)]
    found += [f"{'with' if v == '1' else 'no'} v" for v in re.findall(r"Lb(\d)", arguments)]
    found += [("flat", "rows", "columns")[int(v)] for v in re.findall(r"4PathE(\d)", arguments)]
    found += [{"Word4": "32 bits", "Half4": "16 bits"}[v] for v in re.findall(r"\d(Word4|Half4)", arguments)]
    found += [f"vector {v}" for v in re.findall(r"^Li(\d)", arguments)]
    return name, ", ".join(found)


def compile_all(architectures: tuple[int, ...] = ARCHITECTURES, jobs: int = 2) -> list[KernelReport]:
    """Reports of every kernel on every architecture, compiled ``jobs`` at a time."""
    nvcc(), disassembler()
    units = [(source, arch) for source in reversed(SOURCES) for arch in architectures]
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        reports = [r for unit in pool.map(lambda u: compile_unit(*u), units) for r in unit]
    return sorted(reports, key=lambda r: (r.name, r.variant, r.arch))


def broken_rules(r: KernelReport) -> list[str]:
    """What a kernel's machine code does that it must not, or does not that it must."""
    broken = []

    def rule(holds: bool, text: str) -> None:
        if not holds:
            broken.append(f"{r.name} ({r.variant}) on sm_{r.arch}: {text}")

    rule(r.spill_bytes == 0, f"{r.spill_bytes} bytes of spills")
    rule(r.stack_bytes == 0, f"a stack frame of {r.stack_bytes} bytes")
    rule(
        r.registers <= REGISTER_BUDGETS[r.name], f"{r.registers} registers, budget {REGISTER_BUDGETS[r.name]}"
    )
    if r.name.startswith("binary_matmul") or r.name == "mma_peak":
        xor, conjunction, integer = (
            r.count(p) for p in (r"BMMA.*XOR\.POPC", r"BMMA.*AND\.POPC", r"^IMMA.*U8")
        )
        if r.arch < 90:
            rule(
                xor > 0 and conjunction == 0 and integer == 0,
                f"wants XOR.POPC: {xor}, {conjunction}, {integer}",
            )
        elif r.arch < 100:
            rule(
                conjunction > 0 and xor == 0 and integer == 0,
                f"wants AND.POPC: {xor}, {conjunction}, {integer}",
            )
        else:
            rule(
                integer > 0 and xor == 0 and conjunction == 0,
                f"wants int8 MMA: {xor}, {conjunction}, {integer}",
            )
    if r.name.startswith("binary_matmul"):
        rule(r.count(r"^LDGSTS") > 0, "no asynchronous copies")
        rule(r.count(r"^LDSM.*\.4") > 0, "no ldmatrix.x4")
        if r.variant == "vector 4":
            budget = (LOOP_BUDGETS if r.arch < 100 else LOOP_BUDGETS_OF_BYTES)[r.name]
            rule(
                r.per_mma() <= budget, f"{r.per_mma():.2f} instructions per MMA in the loop, budget {budget}"
            )
        if r.variant == "vector 4":
            rule(r.count(r"^LDGSTS\.E\..*128") > 0, "no 16-byte asynchronous copies")
    if r.name == "bop_step" and r.variant.startswith("fp32"):
        rule(r.count(r"^LDG\.E.*\.128") >= 4, "fewer than four 16-byte loads in flight")
        rule(r.count(r"^STG\.E.*\.128") >= 2, "no 16-byte stores")
    if r.name == "pack_bits" and "flat" in r.variant and "fp32" in r.variant:
        rule(r.count(r"^LDG\.E.*\.128") >= 4, "fewer than four 16-byte loads in flight")
    if r.name == "pack_bits" and "rows" in r.variant:
        rule(r.count(r"^VOTE") > 0, "no ballot")
    if r.name == "apply_mask" and r.variant == "32 bits":
        rule(r.count(r"^STG\.E.*\.128") > 0, "no 16-byte stores")
    if r.name == "binary_terms":
        rule(r.count(r"^ATOMS") == 0, "atomics on shared memory")
    if r.name == "binary_skinny":
        rule(r.count(r"^POPC") > 0, "no popcount")
        rule(
            r.variant != "vector 4" or r.count(r"^LDG\.E.*\.128") >= 4,
            "fewer than four 16-byte loads in flight",
        )
    return broken


def table(reports: list[KernelReport]) -> str:
    """One line per kernel and variant: registers on each architecture, and the instructions that matter."""
    archs = sorted({r.arch for r in reports})
    heading = "registers on " + " ".join(f"sm_{a}" for a in archs)
    lines = [f"{'kernel':<20} {'variant':<16} {heading:<44} spills  sm_90: mma, loop/mma"]
    for name, variant in dict.fromkeys((r.name, r.variant) for r in reports):
        rows = {r.arch: r for r in reports if (r.name, r.variant) == (name, variant)}
        registers = "  ".join(f"{rows[a].registers:>4}" for a in archs)
        spills = sum(r.spill_bytes for r in rows.values())
        some = rows.get(90, next(iter(rows.values())))
        mma = some.count(r"^(BMMA|IMMA)")
        told = f"{mma:>10}, {some.per_mma():.2f}" if mma else ""
        lines.append(f"{name:<20} {variant:<16} {registers:<44} {spills:>6}  {told}")
    return "\n".join(lines)


def main() -> int:
    try:
        reports = compile_all(jobs=min(2, os.cpu_count() or 1))
    except ToolMissing as missing:
        print(f"cuda-check: skipped, {missing}")
        return 0
    print(table(reports))
    broken = [text for r in reports for text in broken_rules(r)]
    if fused := re.findall(r"fma\.r\w+\.f32", step_ptx()):
        broken.append(f"bop_step: {len(fused)} fused multiply-adds")
    for text in broken:
        print(f"BROKEN: {text}")
    print(
        f"{len(reports)} kernels compiled for {len(ARCHITECTURES)} architectures, {len(broken)} rules broken"
    )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
