"""A vocabulary that lacks a word is refused by the compiler in the words of the project."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent / "csrc"
COMPILER = shutil.which("c++") or shutil.which("g++")

PROGRAM = """
#include <cstring>
#include <cstdint>
#include "cpu/target.h"
#include "cpu/vocabulary_scalar.h"
#include "cpu/vocabulary_words.h"
namespace bop2nd {{
struct Mine : {base} {{
  {hidden}
}};
template struct {check}<Mine>;
}}
"""


def compiled(tmp_path, base, check, hidden):
    source = tmp_path / "mine.cpp"
    source.write_text(PROGRAM.format(base=base, check=check, hidden=hidden))
    command = [COMPILER, "-std=c++17", "-fsyntax-only", "-w", f"-I{CSRC}", str(source)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    "base, check",
    [("ScalarLanes", "LanesComplete"), ("ScalarCount", "CountComplete"), ("ScalarBytes", "BytesComplete")],
)
def test_missing_words_are_named(tmp_path, base, check):
    assert compiled(tmp_path, base, check, "").returncode == 0
    word = {"ScalarLanes": "not_less", "ScalarCount": "xor_word", "ScalarBytes": "whole"}[base]
    lacking = compiled(tmp_path, base, check, f"void {word}() = delete;")
    assert lacking.returncode != 0
    assert f"owes `{word}`" in lacking.stderr
