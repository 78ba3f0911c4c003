"""``benchmarks.gpu`` with CUDA C++ kernels on emulated blocks: cases, gates and the run for sanitizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_operators, gpu_sanitize
from benchmarks.suites.gpu import PEAK
from bop2nd_fast import backends
from tests.cuda_emulated import emulated_library

pytestmark = pytest.mark.timeout(900)  # compiles when its sources changed


@pytest.fixture
def only_cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    emulated = emulated_library()
    emulated.become(90, 4)
    monkeypatch.setattr(gpu_operators, "OPERATORS", {"cuda": lambda: emulated})
    monkeypatch.setattr(gpu_sanitize, "OPERATORS", gpu_operators.OPERATORS)
    return emulated


def gates(out: Path, case: str) -> tuple[int, dict[str, str]]:
    status = gpu.run_all(out, case, dry=True)
    (record,) = [json.loads(line) for line in (out / "gpu.jsonl").read_text().splitlines()]
    return status, {row["name"]: row["gate"] for row in record["contenders"]}


@pytest.mark.parametrize(
    ("case", "names"),
    [
        ("step, ResNet", ["cuda", "cuda, bf16 state and gradients"]),
        ("pack NCHW", ["cuda pack signs and mask", "cuda unpack"]),
        ("linear 8192", ["cuda"]),
        ("linear batch 1", ["cuda"]),
        ("conv 3x3", ["cuda", "cuda bits to bits"]),
    ],
)
def test_cases_pass_their_gates(only_cuda: Any, case: str, names: list[str], tmp_path: Path) -> None:
    served = only_cuda.calls()
    status, found = gates(tmp_path, case)
    assert status == 0 and only_cuda.calls() > served
    assert {name: found[name] for name in names} == dict.fromkeys(names, "passed")
    assert found.get(PEAK, "unavailable") == "unavailable", "an emulated chip has no peak"


def test_every_kernel_runs_for_the_sanitizer(
    only_cuda: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_sanitize, "LINEAR", gpu_sanitize.LINEAR[1:3])  # emulated blocks are slow
    monkeypatch.setattr(gpu_sanitize, "CONVOLUTIONS", gpu_sanitize.CONVOLUTIONS[2:])
    assert gpu_sanitize.run_all_kernels("cpu") == 0
    told = capsys.readouterr().out
    assert [f"cuda {part}: as specified" in told for part in ("packing", "step", "products")] == [True] * 3


def test_a_wrong_kernel_fails_the_run_for_the_sanitizer(
    only_cuda: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Wrong:
        def __getattr__(self, op: str) -> Any:
            return getattr(only_cuda, op)

        def apply_mask_(self, grad: torch.Tensor, mask: torch.Tensor) -> None:
            pass

    monkeypatch.setattr(gpu_sanitize, "OPERATORS", {"cuda": Wrong})
    monkeypatch.setattr(gpu_sanitize, "step", lambda _: ())
    monkeypatch.setattr(gpu_sanitize, "products", lambda _: ())
    assert gpu_sanitize.run_all_kernels("cpu") == 1
    assert "FAILED, apply_mask_" in capsys.readouterr().out


@pytest.mark.skipif(backends.why_not("cuda") is None, reason="the CUDA C++ kernels are here")
def test_a_backend_that_is_not_here_is_named_not_dropped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_operators, "OPERATORS", {"cuda": gpu_operators.cuda})
    status, found = gates(tmp_path, "pack rows")
    assert found["cuda"] == "unavailable" and status == 0
    assert "unavailable" in capsys.readouterr().out
    monkeypatch.setattr(gpu_sanitize, "OPERATORS", gpu_operators.OPERATORS)
    assert gpu_sanitize.run_all_kernels("cpu") == 1, "nothing ran"
