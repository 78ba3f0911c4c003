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
from benchmarks import gpu, gpu_tune
from benchmarks.gpu_cases import cases
from benchmarks.gpu_setting import Setting

DRY = Setting("cpu", True)


def _records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "gpu.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("case", ["step, ResNet", "pack NCHW", "linear batch 1", "conv 3x3", "training"])
def test_cases_pass_their_gates_in_the_interpreter(case: str, tmp_path: Path) -> None:
    assert gpu.run_all(DRY, tmp_path, case) == 0
    (record,) = _records(tmp_path)
    assert case in record["case"] and record["dry_run"] and record["stamp"]["commit"]
    gates = {row["name"]: row["gate"] for row in record["contenders"]}
    assert gates.pop("cuda", "absent") == "absent" and set(gates.values()) == {"passed"}
    assert not any("seconds" in row for row in record["contenders"])


def test_a_wrong_kernel_fails_its_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bop2nd_fast.kernels import pack_bits

    monkeypatch.setattr(pack_bits, "unpack_bits", lambda words, n, dim, dtype: torch.ones(64, n, dtype=dtype))
    assert gpu.run_all(DRY, tmp_path, "pack rows") == 1
    gates = {row["name"]: row["gate"] for row in _records(tmp_path)[0]["contenders"]}
    assert gates.pop("cuda") == "absent"
    assert gates == {"triton pack signs and mask": "passed", "triton unpack": "failed", "copy": "passed"}


def test_no_case_is_a_failure_and_no_gpu_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.run_all(DRY, tmp_path, "no such case") == 1
    assert gpu.main(["--out", str(tmp_path / "none")]) == 2
    assert "no CUDA GPU here" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_verdicts_compare_figures_with_aims() -> None:
    def row(seconds: float, **more: float) -> dict:
        return {"seconds": {"median": seconds}, **more}

    records = {
        "step, 64 M weights": {
            "triton": row(1.0, bytes_per_second=95.0),
            "copy": row(1.0, bytes_per_second=100.0),
            "Adam fused": row(1.2),
        },
        "step, ResNet-18": {"triton": row(1.0, host_seconds=24e-6, bytes_per_second=1.0)},
    }
    lines = list(gpu.verdicts(records))
    assert len(lines) == len(gpu.GOALS)
    assert lines[0] == "met     step, 64 M weights: of copy bandwidth 0.95 (aim ≥ 0.9)"
    assert lines[1] == "open    step, 64 M weights: over torch.compile (aim ≥ 1.3)"
    assert lines[2] == "missed  step, 64 M weights: over Adam fused 1.2 (aim ≥ 1.3)"
    assert lines[6] == "met     step, ResNet-18: host microseconds 24 (aim ≤ 25)"


def test_every_goal_names_a_case_and_contenders_that_exist() -> None:
    full = set(cases(Setting("cpu", False)))
    assert {goal.case for goal in gpu.GOALS} <= full


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
    assert gpu.run_all(DRY, tmp_path, "pack rows") == 1
    rows = {row["name"]: row for row in _records(tmp_path)[0]["contenders"]}
    assert rows["triton unpack"]["gate"] == "error" and "invalid argument" in rows["triton unpack"]["detail"]
    assert rows["copy"]["gate"] == "passed"


def test_a_lost_context_ends_the_run_with_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "context_lost", lambda s: "an illegal memory access")
    gpu.run_all(DRY, tmp_path, "pack")
    first, *others = _records(tmp_path)
    assert first["lost"] == "an illegal memory access" and len(others) == 2
    assert all(record["skipped"] == "an illegal memory access" for record in others)
    assert "run the other cases by --only" in capsys.readouterr().out


def _candidate(run: gpu_tune.Run) -> gpu_tune.Candidate:
    want = (torch.arange(3),)
    return gpu_tune.Candidate("ROWS", "a tile", run, gpu_tune.compared(lambda: want, gpu_tune.equal))


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
