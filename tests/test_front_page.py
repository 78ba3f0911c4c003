"""The README's table and picture: the fastest of the others counts; what is missing is a dash."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from benchmarks import front_page, report, results
from benchmarks.suites import inference, step, train_step

STAMP = {
    "processor": "Some(R) Processor, 2 logical cores",
    "active_backend": "avx2",
    "torch": "2.13",
    "date": "1",
}


def record(suite: str, case: str, *contenders: tuple[str, float], **memory: dict[str, int]) -> dict[str, Any]:
    entries = [
        {"name": n, "seconds": {"median": s}, "ratio": {"median": s / contenders[0][1]}}
        for n, s in contenders
    ]
    for entry in entries:
        entry["memory"] = memory.get("all", {})
    return {"suite": suite, "case": case, "contenders": entries, "stamp": STAMP}


RECORDS = [
    record("inference", "BinaryNet, 32x32, batch 64", (inference.PACKED, 1.0), (inference.FP32, 9.0)),
    record(
        "inference",
        "BinaryNet, 32x32, batch 1",
        (inference.PACKED, 0.002),
        (inference.FP32, 0.03),
        (inference.FP32_LAST, 0.012),
        all={"weights": 10, "weights_fp32": 320},
    ),
    record(
        "inference",
        "Bi-Real-Net-18, 224x224, batch 1",
        (inference.PACKED, 0.02),
        (inference.ROUNDED, 0.01),
        (inference.FP32, 0.08),
    ),
    record("train_step", "BinaryNet width 128", (train_step.PACKED, 0.5), (train_step.LATENT, 1.5)),
]


def test_ratios_of_the_table(tmp_path: Path) -> None:
    other = [record("step", "ResNet-18, 22 tensors", (step.PACKED, 0.01), (step.ADAM, 0.014))]
    machines = {"a": RECORDS, "b": other}
    lines = front_page.networks_block(machines, tmp_path / "results", tmp_path / "README.md").splitlines()
    assert "[Some, `avx2`](results/a/README.md)" in lines[0]
    cells = {line.split(" | ")[0]: line.rstrip(" |").split(" | ")[2:] for line in lines[2:]}
    assert cells["| Inference, BinaryNet, one image"] == ["6x", "-"]  # of two fp32 networks the faster one
    assert cells["| Inference, BinaryNet, 64 images"] == ["9x", "-"]
    assert cells["| Inference, Bi-Real-Net-18, 224x224"] == ["8x", "-"]  # against what exact=False gives
    assert cells["| Training step, BinaryNet, batch 50"] == ["3x", "-"]
    assert cells["| Weights of BinaryNet"] == ["32x", "-"]
    assert cells["| Optimizer step, ResNet-18's weights"] == ["-", "1.4x"]
    assert "| – peak memory" not in cells  # nobody measured it


def test_the_picture_is_the_same_for_the_same_results(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first, second = (front_page.draw(RECORDS, tmp_path / name / "networks.svg") for name in ("a", "b"))
    assert first is not None and second is not None and first.read_bytes() == second.read_bytes()
    assert front_page.draw([], tmp_path / "none.svg") is None


def test_the_committed_picture_shows_the_committed_results() -> None:
    records = results.read_all(results.RESULTS / report.default_machine(results.RESULTS))
    shown = html.unescape(report.PICTURE.read_text())
    assert front_page.described(records) in shown, "run python -m benchmarks.report"
