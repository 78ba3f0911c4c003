"""The Triton kernels compile for five chips to the machine code they were written for."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Not imported here: this process may be the interpreter's.
if importlib.util.find_spec("triton") is None:
    pytest.skip("the package 'triton' is not installed", allow_module_level=True)
pytestmark = [pytest.mark.aot, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parent.parent
ARCHS = (80, 90, 100)
OTHER_ARCHS = (89, 120)
# Registers per thread. An SM has 65536: 64 leave room for 1024 threads, 128 for 512, 255 is the most a thread
# can have. The step must hide memory latency, the products hold a tile of sums.
BUDGETS = {
    "bop_step fp32": 96,
    "bop_step fp32, Bop": 96,
    "bop_step fp32, dense weight": 112,
    "bop_step bf16 state, AMP": 200,
    "pack_bits rows fp32": 40,
    "pack_bits rows bf16": 40,
    "pack_bits NCHW fp32": 200,
    "unpack_bits bf16": 40,
    "apply_mask fp32": 40,
    "linear rows": 128,
    "linear popcount": 168,
    "linear decode": 168,
    "linear decode to bits": 168,
    "conv decode 64 to 64": 192,
    "conv decode 256 to 256": 192,
    "variant: conv decode 256 to 256, epilogue": 224,
    "variant: conv decode 256 to 256, whole epilogue": 240,
    "conv decode 256 to 256 bits": 208,
    "conv popcount": 168,
    "linear grad_input bf16": 192,
    "linear grad_weight bf16": 192,
    "conv grad_input fp32": 208,
    "conv grad_weight fp32": 224,
    "signed rows fp32": 80,
    "signed conv uint8 to bits": 192,
    "signed conv fp32": 224,
}


def compile_for(archs: tuple[int, ...]) -> dict[tuple[int, str], dict[str, Any]]:
    """What every case compiled to, by architecture and name."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests/triton_aot.py")]
    done = subprocess.run(
        [*command, *map(str, archs)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {(r["arch"], r["case"]): r for r in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[int, str], dict[str, Any]]:
    return compile_for(ARCHS)


def spills(compiled: dict) -> dict[tuple[int, str], int]:
    return {key: r["spills"] for key, r in compiled.items() if r["spills"]}


def over_budget(compiled: dict) -> dict[tuple[int, str], int]:
    return {
        key: r["registers"] for key, r in compiled.items() if r["registers"] > BUDGETS.get(r["case"], 208)
    }


@pytest.mark.fuzz
def test_the_other_chips_keep_the_budgets() -> None:
    """sm_86, sm_89 and sm_120 have 99 KiB of shared memory for a block."""
    compiled = compile_for(OTHER_ARCHS)
    assert {(arch, name) for arch, name in compiled if not name.startswith("variant")} == {
        (arch, name) for arch in OTHER_ARCHS for name in BUDGETS if not name.startswith("variant")
    }
    assert spills(compiled) == over_budget(compiled) == {}
    assert max(r["shared"] for r in compiled.values()) <= 99 << 10


def test_columns_of_long_rows_are_64_bit(compiled: dict) -> None:
    """An index of a word in a row, times 32, may be above 2**31."""
    rows = {key: r for key, r in compiled.items() if "pack_bits" in key[1] or "bop_step" in key[1]}
    assert len(rows) > 20 and {key for key, r in rows.items() if r["narrow_columns"]} == set()


def test_table_registers_and_spills(compiled: dict, capsys: pytest.CaptureFixture[str]) -> None:
    assert {(arch, name) for arch, name in compiled if not name.startswith("variant")} == {
        (arch, name) for arch in ARCHS for name in BUDGETS if not name.startswith("variant")
    }
    columns = ["registers", "spills", "shared", "instructions", "ldg128", "stg128", "popc"]
    columns += ["tensor_int8", "tensor_float"]
    lines = [f"{'sm':>4} {'kernel':42}" + "".join(f"{column:>13}" for column in columns)]
    lines += [
        f"{r['arch']:>4} {r['case']:42}" + "".join(f"{r[column]:>13}" for column in columns)
        for r in compiled.values()
    ]
    with capsys.disabled():
        print("\n" + "\n".join(lines))
    assert spills(compiled) == over_budget(compiled) == {}


def test_rarer_specializations_compile(compiled: dict) -> None:
    assert len([name for _, name in compiled if name.startswith("variant")]) == 14


@pytest.mark.parametrize("arch", ARCHS)
def test_the_step_moves_16_bytes_at_a_time_and_never_fuses(compiled: dict, arch: int) -> None:
    for case, tensors_read, tensors_written in (
        ("bop_step fp32", 3, 2),
        ("bop_step fp32, Bop", 2, 1),
        ("bop_step fp32, dense weight", 4, 2),
        ("bop_step bf16 state, AMP", 3, 2),
    ):
        r = compiled[arch, case]
        assert r["ldg128"] >= tensors_read and r["stg128"] >= tensors_written, case
        assert r["ptx_fma"] == 0 and r["ptx_ftz"] == 0, case
    # Only the square root's own iteration may fuse: without it there is nothing left.
    assert compiled[arch, "bop_step fp32, Bop"]["ffma"] == 0
    assert compiled[arch, "bop_step fp32"]["ffma"] > 0


@pytest.mark.parametrize("arch", ARCHS)
def test_packing_moves_16_bytes_at_a_time(compiled: dict, arch: int) -> None:
    for case in ("pack_bits rows fp32", "pack_bits rows bf16", "pack_bits NCHW fp32"):
        r = compiled[arch, case]
        assert r["ldg128"] == r["ldg"] > 0, case
    assert compiled[arch, "unpack_bits bf16"]["stg128"] > 0
    assert compiled[arch, "apply_mask fp32"]["ldg128"] > 0 and compiled[arch, "apply_mask fp32"]["stg128"] > 0


@pytest.mark.parametrize("arch", ARCHS)
def test_products_use_popc_or_int8_tensor_cores_as_meant(compiled: dict, arch: int) -> None:
    for (chip, case), r in compiled.items():
        if chip != arch or not case.startswith(("linear", "conv")):
            continue
        if "grad" in case:  # three bf16 products where the gradient is fp32
            bf16 = compiled[arch, "linear grad_input bf16"]  # its turns are twice as long
            assert r["tensor_float"] > 0 and r["tensor_int8"] == r["popc"] == 0, case
            assert "bf16" in case or 2 * r["tensor_float"] == 3 * bf16["tensor_float"], case
            continue
        if "decode" in case:
            assert r["tensor_int8"] > 0 and r["popc"] == 0, case
            assert (r["wgmma"] > 0) == (arch == 90), case
        else:
            assert r["popc"] >= 16 and r["tensor_int8"] == 0, case


@pytest.mark.parametrize("arch", ARCHS)
def test_signed_products_use_tensor_cores_of_their_kind(compiled: dict, arch: int) -> None:
    rows, bits, real = (
        compiled[arch, f"signed {name}"] for name in ("rows fp32", "conv uint8 to bits", "conv fp32")
    )
    assert rows["tensor_int8"] == rows["tensor_float"] == rows["ptx_fma"] == rows["ptx_ftz"] == 0
    assert bits["tensor_int8"] > 0 == bits["tensor_float"] and (bits["wgmma"] > 0) == (arch == 90)
    assert real["tensor_float"] > 0 == real["tensor_int8"] and real["tensor_float"] % 3 == 0
