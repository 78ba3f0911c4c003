"""``benchmarks.gpu`` with CUDA C++ kernels on emulated blocks: cases, gates and the run for sanitizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_operators, gpu_sanitize
from benchmarks.gpu_cases import PEAK
from benchmarks.gpu_setting import Setting
from bop2nd_fast import backends
from tests.cuda_emulated import emulated_library

pytestmark = pytest.mark.timeout(900)  # compiles when its sources changed
DRY = Setting("cpu", True)


@pytest.fixture
def only_cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    emulated = emulated_library()
    emulated.become(90, 4)
    monkeypatch.setattr(gpu_operators, "OPERATORS", {"cuda": lambda: emulated})
    monkeypatch.setattr(gpu_sanitize, "OPERATORS", gpu_operators.OPERATORS)
    return emulated


def gates(out: Path, case: str) -> tuple[int, dict[str, str]]:
    status = gpu.run_all(DRY, out, case)
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
    assert found.get(PEAK, "absent") == "absent", "an emulated chip has no peak"


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
    monkeypatch.setattr(gpu_sanitize, "step", lambda *_: None)
    monkeypatch.setattr(gpu_sanitize, "products", lambda *_: None)
    assert gpu_sanitize.run_all_kernels("cpu") == 1
    assert "FAILED, apply_mask_" in capsys.readouterr().out


@pytest.mark.skipif(backends.why_not("cuda") is None, reason="the CUDA C++ kernels are here")
def test_a_backend_that_is_not_here_is_named_not_dropped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_operators, "OPERATORS", {"cuda": gpu_operators.cuda})
    status, found = gates(tmp_path, "pack rows")
    assert found["cuda"] == "absent" and status == 0
    assert backends.why_not("cuda") in capsys.readouterr().out
    monkeypatch.setattr(gpu_sanitize, "OPERATORS", gpu_operators.OPERATORS)
    assert gpu_sanitize.run_all_kernels("cpu") == 1, "nothing ran"


def test_goals_of_the_cuda_kernels_are_figures_of_one_run() -> None:
    def row(seconds: float, products: float = 0.0) -> dict[str, Any]:
        return {"seconds": {"median": seconds}, "products_per_second": products}

    records = {
        "linear 8192^3": {"cuda": row(1.0, 3e15), PEAK: row(1.0, 4e15), "cuBLAS bf16": row(2.9)},
        "step, 64 M weights": {"cuda": row(1.02), "triton": row(1.0)},
        "conv 3x3 64ch 56x56": {"cuda bits to bits": row(1.0), "cuDNN bf16": row(3.5)},
    }
    lines = [line for line in gpu.verdicts(records) if not line.startswith("open")]
    assert lines == [
        "met     step, 64 M weights: CUDA C++, time over Triton's 1.02 (aim ≤ 1.03)",
        "known   linear 8192^3: tensor cores' peak from registers, 10^15 products a second 4 (aim to know)",
        "met     linear 8192^3: CUDA C++, of the tensor cores' peak from registers 0.75 (aim ≥ 0.7)",
        "missed  linear 8192^3: CUDA C++, over cuBLAS bf16 2.9 (aim ≥ 3)",
        "met     conv 3x3 64ch 56x56: CUDA C++, bits to bits over cuDNN 3.5 (aim ≥ 3)",
    ]
