"""The inner loops for 64-bit ARM, read from their machine code: how many instructions, and what rate follows.

``docs/performance.md`` states the rates that follow from the instructions counted here; a test compares them.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILER, OBJDUMP = shutil.which("aarch64-linux-gnu-g++"), shutil.which("aarch64-linux-gnu-objdump")
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-Wno-unknown-pragmas"]

pytestmark = pytest.mark.skipif(
    not (COMPILER and OBJDUMP), reason="needs Debian's g++-aarch64-linux-gnu: make arm-test"
)

# Vector operations that an instruction on 16 bytes is; 1 where nothing stands. From LLVM's
# AArch64SchedA57.td, which LLVM and GCC use for the Cortex-A72 too, and AArch64SchedNeoverseN1.td, whose
# core is the Cortex-A76's.
OPERATIONS = {"Cortex-A72": {"tbl": 3, "bit": 2, "bif": 2, "bsl": 2}, "Cortex-A76": {}}
VECTOR_PORTS = 2


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[int, str, str]]]:
    """Address, operation and operands of every instruction, by function."""
    made = tmp_path_factory.mktemp("arm") / "isa.o"
    source = ROOT / "csrc/cpu/isa_neon_dot.cpp"  # has both loops
    subprocess.run([COMPILER, *FLAGS, "-c", str(source), "-o", str(made)], check=True)
    command = [OBJDUMP, "-d", "-C", "--no-show-raw-insn", str(made)]
    functions: dict[str, list[tuple[int, str, str]]] = {}
    name = ""
    for line in subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines():
        if found := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            name = found[1]
            functions[name] = []
        elif found := re.match(r"\s*([0-9a-f]+):\s+(\S+)\s*(.*)", line):
            functions[name].append((int(found[1], 16), found[2], found[3]))
    return functions


def inner_loop(code: dict, function: str, operation: str) -> list[tuple[str, str]]:
    """The longest loop without a loop inside that has `operation`: the one for the most pixels at a time."""
    loops = []
    for name, body in code.items():
        if function not in name:
            continue
        place = {address: i for i, (address, _, _) in enumerate(body)}
        for i, (_, op, operands) in enumerate(body):
            target = re.search(r"\b([0-9a-f]+) <", operands) if op.startswith(("b.", "cb", "tb")) else None
            start = place.get(int(target[1], 16), i + 1) if target else i + 1
            if start <= i:
                loops.append((start, i, [(op, operands) for _, op, operands in body[start : i + 1]]))
    innermost = [a for a in loops if not any(a[0] <= b[0] and b[1] <= a[1] and a is not b for b in loops)]
    having = [body for _, _, body in innermost if operation in (op for op, _ in body)]
    assert having, f"no loop with {operation} in {function}"
    return max(having, key=len)


def vector_operations(loop: list[tuple[str, str]]) -> Counter:
    """Instructions for the vector ports: not loads and stores, but moves."""
    return Counter(
        op for op, operands in loop if re.search(r"\bv\d+\.", operands) and not op.startswith(("ld", "st"))
    )


def on_stack(loop: list[tuple[str, str]]) -> int:
    return sum("[sp" in operands for _, operands in loop)


def rate(loop: list[tuple[str, str]], products: int, processor: str) -> float:
    """Multiply-accumulates a cycle, if nothing but the vector ports limits."""
    weight = OPERATIONS[processor]
    operations = sum(n * weight.get(op, 1) for op, n in vector_operations(loop).items())
    return products * VECTOR_PORTS / operations


# Two pixels, two steps of 8 bits of 64 outputs; four pixels, three groups of 4 bits of 64 outputs.
LOOPS = {
    "counting": ("count_pixels_in_bytes<bop2nd::NeonDotCount, 8, 2, false>", "cnt", 2 * 2 * 8 * 64),
    "look-ups": ("multiply_byte_pairs<bop2nd::NeonDotCount, 4>", "tbl", 4 * 3 * 4 * 64),
}


def test_counting_takes_the_instructions_it_should(code: dict) -> None:
    loop = inner_loop(code, *LOOPS["counting"][:2])
    ops = vector_operations(loop)
    choices = ops.pop("bit", 0) + ops.pop("bif", 0) + ops.pop("bsl", 0)
    assert choices == 8 and ops == {"eor": 24, "cnt": 8, "add": 8, "dup": 4}
    assert len(loop) <= 68 and on_stack(loop) <= 2


def test_lookups_take_the_instructions_they_should(code: dict) -> None:
    loop = inner_loop(code, *LOOPS["look-ups"][:2])
    assert vector_operations(loop) == {"tbl": 24, "add": 24, "usra": 8}
    assert len(loop) <= 86 and on_stack(loop) == 0


def test_dot_products_are_used_where_a_lane_is_an_output(code: dict) -> None:
    body = [op for name, lines in code.items() if "NeonDotCount, 32, " in name for _, op, _ in lines]
    assert body.count("udot") >= 8


def test_rates_are_those_of_the_document(code: dict) -> None:
    text = (ROOT / "docs/performance.md").read_text()
    for name, (function, operation, products) in LOOPS.items():
        loop = inner_loop(code, function, operation)
        rates = [f"{rate(loop, products, processor):.0f}" for processor in OPERATIONS]
        row = next(line for line in text.splitlines() if line.startswith(f"| {name}"))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[1:] == [str(len(loop)), str(vector_operations(loop).total()), *rates]
