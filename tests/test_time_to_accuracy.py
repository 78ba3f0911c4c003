"""The benchmark of time to accuracy on a CPU, tiny; the captured step with a capture that is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import time_to_accuracy
from bop2nd_fast import data, recipes
from bop2nd_fast.train import Trainer
from bop2nd_fast.train_graph import WARM_UP, CapturedStep


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cifar")
    generator = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        records = generator.integers(0, 256, (8, 1 + 3 * 32 * 32), dtype=np.uint8)
        records[:, 0] %= 10
        records.tofile(folder / f"{name}.bin")
    return folder


def test_it_stops_at_the_goal_or_when_the_time_is_over(cifar, tmp_path, capsys):
    def run(out: str, *more: str) -> tuple[int, list[dict[str, Any]]]:
        options = ["--data-dir", str(cifar), "--out", str(tmp_path / out), "--epochs", "3", "--width", "2"]
        status = time_to_accuracy.main([*options, "--batch-size", "20", "--device", "cpu", *more])
        lines = (tmp_path / out / "time_to_accuracy.jsonl").read_text().splitlines()
        return status, [json.loads(line) for line in lines]

    status, (line,) = run("a", "--goal", "1.1", "--minutes", "0")  # one epoch is always taken
    assert status == 1 and "110.0% was not reached" in capsys.readouterr().out
    assert line["stamp"]["commit"] is not None and line["recipe"]["epochs"] == 3
    assert line["seconds_in_all"] >= line["seconds"] > 0
    assert [entry["epoch"] for entry in run("b", "--goal", "1.1")[1]] == [1, 2, 3]
    status, lines = run("c", "--goal", "0.0")
    assert (status, len(lines)) == (0, 1) and "0.0% after" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="exists; choose another --out"):
        run("c")


def test_a_replayed_step_gets_every_batch_and_every_learning_rate():
    """The capture keeps what it met, tensors by reference and numbers by value, as a CUDA graph does."""
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    seen: list[tuple[list[float], float]] = []

    def step(images: Tensor, labels: Tensor) -> Tensor:
        seen.append((images.tolist(), float(optimizer.param_groups[0]["lr"])))
        return images.sum() + labels.sum()

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        captured = optimizer.param_groups[0]["lr"]
        assert isinstance(captured, Tensor)

        def replay() -> None:
            now = optimizer.param_groups[0]["lr"]
            optimizer.param_groups[0]["lr"] = captured
            work()
            optimizer.param_groups[0]["lr"] = now

        return replay

    replayed = CapturedStep(step, optimizer, capture)
    for i in range(WARM_UP + 3):
        optimizer.param_groups[0]["lr"] = 1.0 + i
        images, labels = torch.full((2,), float(i)), torch.tensor([i])
        assert float(replayed(images, labels)) == 3 * i
        assert optimizer.param_groups[0]["lr"] == 1.0 + i
    assert seen == [([float(i)] * 2, 1.0 + i) for i in range(WARM_UP + 3)]


def test_a_graph_needs_a_gpu():
    with pytest.raises(ValueError, match="graph needs one process on a CUDA device"):
        Trainer(recipes.get("digits"), data.digits(), graph=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_training_is_the_eager_one():
    recipe = recipes.get("digits").replace(epochs=2, width=8)
    eager, graph = (Trainer(recipe, data.digits(), device="cuda", graph=g) for g in (False, True))
    eager.run()
    graph.run()
    assert graph.history[-1].loss == pytest.approx(eager.history[-1].loss, rel=0.05)
    assert graph.history[-1].hyperparameters == eager.history[-1].hyperparameters
