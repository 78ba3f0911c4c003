"""``benchmarks.gpu`` without a GPU: its cases in the interpreter, gates, verdicts and exit status."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from tests.triton_device import DEVICE, runnable

if reason := runnable():
    pytest.skip(reason, allow_module_level=True)
if DEVICE == "cuda":
    pytest.skip("the dry run is for machines without a GPU", allow_module_level=True)
from benchmarks import gates, gpu, gpu_tune, run
from benchmarks.gpu_operators import Setting
from benchmarks.registry import GPU_SUITES, all_goals
from benchmarks.suites.gpu import PEAK, cases_of

DRY = Setting("cpu", True)


def _records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "gpu.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "case",
    [
        "step, ResNet",
        "pack NCHW",
        "linear batch 1",
        "signed linear, 256",
        "first layer",
        "conv 3x3",
        "training",
    ],
)
def test_cases_pass_their_gates_in_the_interpreter(case: str, tmp_path: Path) -> None:
    assert gpu.run_all(tmp_path, case, dry=True) == 0
    (record,) = _records(tmp_path)
    assert case in record["case"] and record["untimed"] and record["stamp"]["commit"]
    found = {row["name"]: row["gate"] for row in record["contenders"]}
    here = {name: gate for name, gate in found.items() if name != "cuda" and "CUDA graph" not in name}
    assert set(here.values()) == {"passed"} and not set(found.values()) & {"failed"}
    assert not any("seconds" in row for row in record["contenders"])


def test_a_wrong_kernel_fails_its_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bop2nd_fast.kernels import pack_bits

    monkeypatch.setattr(pack_bits, "unpack_bits", lambda words, n, dim, dtype: torch.ones(64, n, dtype=dtype))
    assert gpu.run_all(tmp_path, "pack rows", dry=True) == 1
    found = {row["name"]: row["gate"] for row in _records(tmp_path)[0]["contenders"]}
    assert found.pop("cuda") == "unavailable"
    assert found == {"triton pack signs and mask": "passed", "triton unpack": "failed", "copy": "passed"}


def test_no_case_is_a_failure_and_no_gpu_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.run_all(tmp_path, "no such case", dry=True) == 1
    assert gpu.main(["--out", str(tmp_path / "none")]) == 2
    assert "no CUDA GPU here" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_verdicts_compare_figures_with_aims() -> None:
    def row(name: str, seconds: float, **more: float) -> dict:
        return {"name": name, "seconds": {"median": seconds}, "ratio": {"median": seconds}, **more}

    def record(case: str, *rows: dict) -> dict:
        return {"suite": "gpu", "case": case, "tags": [], "contenders": list(rows)}

    large = (row("triton", 1.0, rate=95.0), row("copy", 1.0, rate=100.0), row("Adam fused", 1.2))
    peak = (row("cuda", 1.0, rate=3e6), row(PEAK, 1.0, rate=4e6), row("cuBLAS bf16", 2.9))
    bits = (row("cuda bits to bits", 2.0), row("cuDNN bf16", 7.0))
    records = [
        record("step, 64 M weights", *large, row("cuda", 1.02)),
        record("step, ResNet-18", row("triton", 1.0, rate=1.0, host_seconds=24e-6)),
        record("linear 8192^3", *peak),
        record("conv 3x3 64ch 56x56", *bits),
    ]
    lines = [goal.line(records) for goal in all_goals(GPU_SUITES)]
    for line in (
        "met     step, 64 M weights: of copy bandwidth 95 % (aim ≥ 90 %)",
        "open    step, 64 M weights: over torch.compile - (aim ≥ 1.3x)",
        "missed  step, 64 M weights: over Adam fused 1.2x (aim ≥ 1.3x)",
        "met     step, 64 M weights: CUDA C++, time over Triton's 1.02x (aim ≤ 1.03x)",
        "met     step, ResNet-18: host time of a call 24 µs (aim ≤ 25 µs)",
        "known   linear 8192^3: tensor cores' peak from registers 4 PMAC/s (aim to know)",
        "met     linear 8192^3: CUDA C++, of the tensor cores' peak 75 % (aim ≥ 70 %)",
        "missed  linear 8192^3: CUDA C++, over cuBLAS bf16 2.9x (aim ≥ 3x)",
        "met     conv 3x3 64ch 56x56: CUDA C++, bits to bits over cuDNN 3.5x (aim ≥ 3x)",
    ):
        assert line in lines


def test_every_goal_names_a_case_that_exists() -> None:
    full = [case.name for case in cases_of(Setting("cpu", False))]
    for goal in all_goals(GPU_SUITES):
        assert sum(goal.name.startswith(f"{name}: ") for name in full) == 1, goal.name


def test_tuning_prints_lines_for_every_table_and_leaves_the_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bop2nd_fast.kernels import pack_bits, tuning

    before = dict(tuning.STEP_TILES), pack_bits.PACK_TILE
    assert gpu_tune.tune(DRY, tmp_path) == 0
    assert (dict(tuning.STEP_TILES), pack_bits.PACK_TILE) == before
    records = [json.loads(line) for line in (tmp_path / "tune.jsonl").read_text().splitlines()]
    lines = {r["entry"]: r["line"] for r in records if "line" in r}
    for table in ("STEP_TILES", "PACK_TILE", "ROWS", "POPCOUNT", "DECODE", "GRADIENT_TILES", "BACKWARD"):
        assert any(entry.startswith(table) for entry in lines), table
    printed = capsys.readouterr().out
    for entry, line in lines.items():
        assert f"{entry} = {line}" in printed and "dry run, not timed, commit" in line
        filled = eval(line, vars(tuning))  # a line of tuning.py
        assert filled.measured.startswith(tuple(r["shape"] for r in records if r["entry"] == entry))


def test_candidate_tiles_follow_the_chip() -> None:
    tiles = [t for t in gpu_tune.matmul_tiles("sm90") if t.loop == "decode"]
    assert all(t.weights_in_shared == (t.block_m >= 64) for t in tiles)
    assert not any(t.weights_in_shared for t in gpu_tune.matmul_tiles("sm80"))


def test_a_contender_that_raises_is_a_row_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bop2nd_fast.kernels import pack_bits

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: invalid argument")

    monkeypatch.setattr(pack_bits, "unpack_bits", fail)
    assert gpu.run_all(tmp_path, "pack rows", dry=True) == 1
    rows = {row["name"]: row for row in _records(tmp_path)[0]["contenders"]}
    unpack = rows["triton unpack"]
    assert unpack["gate"] == "failed" and "RuntimeError: CUDA error: invalid" in unpack["gate_detail"]
    assert rows["copy"]["gate"] == "passed"


def test_a_lost_context_ends_the_run_with_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "context_lost", lambda device: "an illegal memory access")
    gpu.run_all(tmp_path, "pack", dry=True)
    (only,) = _records(tmp_path)
    assert only["lost"] == "an illegal memory access"
    told = capsys.readouterr().out
    for case in ("pack NCHW bf16", "pack channels-last bf16"):
        assert f"skipped gpu/{case}: an illegal memory access" in told
    assert "run the other cases by --only" in told


def _candidate(run: gpu_tune.Run) -> gpu_tune.Candidate:
    want = (torch.arange(3),)
    return gpu_tune.Candidate("ROWS", "a tile", run, gpu_tune.compared(lambda: want, gates.equal))


def test_a_candidate_that_does_not_compile_or_is_wrong_does_not_win(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime.errors import PTXASError

    def refuse() -> object:
        raise PTXASError("out of registers")

    assert gpu_tune._seconds(DRY, _candidate(lambda: (torch.arange(3),))) == 0
    assert gpu_tune._seconds(DRY, _candidate(refuse)) == math.inf
    assert gpu_tune._seconds(DRY, _candidate(lambda: (torch.zeros(3, dtype=torch.int64),))) == math.inf
    printed = capsys.readouterr().out
    assert "out of registers" in printed and "2 of 3 elements differ" in printed
    monkeypatch.setattr(gpu_tune, "context_lost", lambda s: "an illegal memory access")
    with pytest.raises(RuntimeError, match="context is lost"):
        gpu_tune._seconds(DRY, _candidate(refuse))
