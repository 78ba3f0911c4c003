"""The Triton launchers on a GPU that is not there: grids, variants, and that all they ask for compiles."""

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


@pytest.fixture(scope="module")
def scenes() -> dict[str, dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests/triton_launches.py"), "90"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {line["scene"]: line for line in map(json.loads, done.stdout.splitlines())}


def test_another_batch_size_compiles_nothing_new(scenes: dict) -> None:
    others = [scene for name, scene in scenes.items() if name.endswith(("other rows", "other batch"))]
    assert len(others) == 8
    assert [scene["scene"] for scene in others if scene["compiled"]] == []
    assert all(scene["launches"] for scene in others)


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("depthwise convolution", "conv_popcount_kernel"),
        ("pack, an embedding along its rows", "pack_columns_kernel"),
        ("linear, millions of outputs", "linear_popcount_kernel"),
        ("linear gradient, millions of features", "linear_gradient_kernel"),
    ],
)
def test_more_than_65535_blocks_along_any_axis(scenes: dict, name: str, kernel: str) -> None:
    launched, (x, y, z) = scenes[name]["launches"][-1]
    assert launched == kernel and x > 65535 and (y, z) == (1, 1)


def test_every_launcher_was_called(scenes: dict) -> None:
    launched = {kernel for scene in scenes.values() for kernel, _ in scene["launches"]}
    assert launched == {
        "bop_step_kernel",
        "conv_decode_kernel",
        "conv_grad_input_kernel",
        "conv_grad_weight_kernel",
        "conv_popcount_kernel",
        "finish_kernel",
        "linear_decode_kernel",
        "linear_gradient_kernel",
        "linear_popcount_kernel",
        "linear_rows_kernel",
        "pack_columns_kernel",
        "largest_kernel",
        "quotients_kernel",
        "signed_rows_kernel",
        "signed_tile_kernel",
        "pack_rows_kernel",
    }
