"""The CUDA kernels compile for every architecture without a GPU, and their machine code keeps the rules.

The rules (no spills, register budgets, which instructions must be there) are stated in
``csrc/cuda/check.py``, which ``make cuda-check`` runs as well; its table is printed here with ``-s``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.modules import cuda_check as check

pytestmark = pytest.mark.timeout(900)  # compiles when its sources changed

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def reports() -> list[Any]:
    try:
        compiled: list[Any] = check.compile_all()
    except check.ToolMissing as missing:
        pytest.skip(str(missing))
    print("\n" + check.table(compiled))
    return compiled


def test_every_kernel_keeps_the_rules_on_every_architecture(reports: list[Any]) -> None:
    assert {r.arch for r in reports} == set(check.ARCHITECTURES)
    assert {r.name for r in reports} == set(check.REGISTER_BUDGETS)
    per_arch = Counter(r.arch for r in reports)
    assert len(set(per_arch.values())) == 1, f"kernels are missing somewhere: {per_arch}"
    assert [text for r in reports for text in check.broken_rules(r)] == []


def test_the_tensor_core_instruction_is_the_native_one(reports: list[Any]) -> None:
    """Stated on its own, beside the rules: 1-bit XOR, 1-bit AND, or bytes, by architecture."""
    wanted = {80: "BMMA.*XOR", 89: "BMMA.*XOR", 90: "BMMA.*AND", 100: "IMMA", 120: "IMMA"}
    for r in reports:
        if r.name.startswith("binary_matmul"):
            mma = {text for text in r.instructions if "MMA" in text}
            assert mma
            assert all(re.match(wanted[r.arch], text) for text in mma), (r.name, r.arch, mma)


def test_shared_memory_lets_two_blocks_share_any_multiprocessor() -> None:
    """KiB of a multiprocessor by compute capability; that the tiles fit is asserted in tile.h itself."""
    capacity = {800: 164, 860: 100, 870: 164, 890: 100, 900: 228, 1000: 228, 1030: 228, 1100: 228}
    capacity |= {1200: 100, 1210: 100}
    lines = ['#include "tile.h"', "using namespace bop2nd::cuda;"]
    for arch, kib in capacity.items():
        lines.append(f"static_assert(is_lean({arch}) == {str(kib == 100).lower()});")
        lean = "::Lean" if kib == 100 else ""
        for tile, blocks in (("LargeTile", 2), ("TallTile", 2), ("SmallTile", 4)):
            lines.append(f"static_assert({blocks} * ({tile}{lean}::kSharedBytes + 1024) <= {kib} * 1024);")
    command = [_compiler(), "-std=c++17", "-fsyntax-only", f"-I{ROOT / 'csrc' / 'cuda'}", "-x", "c++", "-"]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_step_fuses_nothing() -> None:
    try:
        ptx = check.step_ptx()
    except check.ToolMissing as missing:
        pytest.skip(str(missing))
    assert ".entry" in ptx
    assert "sqrt.rn.f32" in ptx
    assert not re.findall(r"fma\.r\w+\.f32|sqrt\.approx|\.ftz", ptx)


def test_a_broken_rule_is_reported() -> None:
    instructions = Counter({"BMMA.168256.XOR.POPC": 4, "LDGSTS.E.BYPASS.128": 4, "LDSM.16.M88.4": 2})
    spilling = check.KernelReport("binary_matmul_large", "vector 4", 90, 256, 8, 16, instructions)
    text = "\n".join(check.broken_rules(spilling))
    for part in ("8 bytes of spills", "stack frame of 16", "256 registers", "wants AND.POPC"):
        assert part in text
    sound = check.KernelReport("binary_matmul_large", "vector 4", 80, 200, 0, 0, instructions)
    assert check.broken_rules(sound) == []
    wordy = check.KernelReport(
        "binary_matmul_large", "vector 4", 90, 200, 0, 0, loop=Counter(BMMA=64, IMAD=200)
    )
    assert "4.12 instructions per MMA" in "\n".join(check.broken_rules(wordy))
    slow = check.KernelReport("bop_step", "fp32, with v", 90, 64, 0, 0, Counter({"LDG.E": 20, "STG.E": 8}))
    assert len(check.broken_rules(slow)) == 2


def _compiler() -> str:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    return compiler


def test_the_binding_compiles_against_any_torch() -> None:
    """Against a CPU-only torch as well: the stable headers carry the shims it needs."""
    command = [
        *(_compiler(), "-std=c++17", "-fsyntax-only", "-Wall", "-Wno-unknown-pragmas"),
        *("-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030A0000"),
        f"-I{Path(torch.__file__).parent / 'include'}",
        f"-I{sysconfig.get_paths()['include']}",
        str(ROOT / "csrc" / "register_cuda.cpp"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_library_that_does_not_load_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from bop2nd_fast import cuda_library

    monkeypatch.setattr(cuda_library.importlib.util, "find_spec", lambda _: None)
    absent = cuda_library.CudaLibrary()
    assert absent.symbols is None
    assert "were not built" in (absent.why_not() or "")
    assert absent.calls() == 0

    def refuse(name: str) -> ModuleType:
        raise ImportError(f"{name}: undefined symbol: some_shim")

    monkeypatch.setattr(cuda_library.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(cuda_library.importlib, "import_module", refuse)
    with pytest.warns(RuntimeWarning, match="do not load .*some_shim"):
        assert "undefined symbol: some_shim" in (cuda_library.CudaLibrary().why_not() or "")


BROKEN_LIBRARY = """
import sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import spec_from_file_location

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "bop2nd_fast._C_cuda":
            return spec_from_file_location(name, {path!r}, loader=ExtensionFileLoader(name, {path!r}))

sys.meta_path.insert(0, Finder)
from bop2nd_fast.cli import app
app(["info"])
"""


def test_info_tells_why_a_broken_library_is_not_used(tmp_path: Path) -> None:
    broken = tmp_path / "_C_cuda.abi3.so"
    broken.write_bytes(b"no library")
    command = [sys.executable, "-c", BROKEN_LIBRARY.format(path=str(broken))]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "400"}
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "CUDA C++ kernels" in line]
    assert "do not load" in line and str(broken) in line and "no" in line
    assert "RuntimeWarning" in done.stderr and "do not load" in done.stderr
