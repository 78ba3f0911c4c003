"""What the optimizer tells about itself, and its two controls: warm-up and a target flip rate."""

from __future__ import annotations

import builtins
import copy
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bop2nd_fast as bf
from bop2nd_fast.optim import Bop, Bop2ndOrder, FlipTracker, JsonLinesLogger, TensorBoardLogger


def ones(*shape: int) -> nn.Parameter:
    return nn.Parameter(bf.pack(torch.ones(shape), 1))


def give(p: nn.Parameter, *values: float) -> None:
    """A gradient that repeats ``values`` along the last axis."""
    p.grad = torch.tensor(values).repeat(p.shape[0], p.shape[1] // len(values))


# ------------------------------------------------------------------------- counts and regimes


@pytest.mark.parametrize("packed", [True, False])
def test_counts_by_hand(packed: bool) -> None:
    """Weights +1, gamma 1, tau 1/2: gradients 2, 1/4, -2, 0 flip, are blocked, no candidate, blocked."""
    p = ones(3, 40) if packed else nn.Parameter(torch.ones(3, 40))
    optimizer = Bop([("layer", p)], gamma=1.0, threshold=0.5)
    assert optimizer.telemetry() == []
    give(p, 2.0, 0.25, -2.0, 0.0)
    optimizer.step()
    (counts,) = optimizer.telemetry()
    assert (counts.name, counts.group, counts.index, counts.numel) == ("layer", 0, 0, 120)
    assert (counts.candidates, counts.flips, counts.blocked) == (90, 30, 60)


def test_a_parameter_without_gradient_has_no_record() -> None:
    params = [ones(2, 40), ones(3, 40), ones(4, 40)]
    optimizer = Bop(params, gamma=1.0, threshold=0.5)
    for p in params:
        give(p, 2.0)
    optimizer.step()
    assert [(c.index, c.flips) for c in optimizer.telemetry()] == [(0, 80), (1, 120), (2, 160)]
    params[1].grad = None
    give(params[2], -3.0)  # the weights are -1 now
    optimizer.step()
    assert [(c.index, c.flips) for c in optimizer.telemetry()] == [(0, 0), (2, 160)]


def test_report_names_each_regime(capsys: pytest.CaptureFixture[str]) -> None:
    names = ("inactive", "active", "frozen", "idle")
    layers = {name: ones(2, 40) for name in names}
    optimizer = Bop([(f"layer.{k}", p) for k, p in layers.items()], gamma=1.0, threshold=0.5)
    for sign in (1.0, -1.0):
        give(layers["inactive"], 2.0 * sign)
        give(layers["active"], 2.0 * sign, 0.1 * sign)
        give(layers["frozen"], 0.1)
        optimizer.step()
    rows = optimizer.report()
    assert [r.regime for r in rows] == list(names)
    assert [r.steps for r in rows] == [2, 2, 2, 0]
    assert [r.flip_rate for r in rows] == [1.0, 0.5, 0.0, 0.0]
    assert [r.blocked_share for r in rows] == pytest.approx([0.0, 1 / 3, 1.0, 0.0])
    printed = capsys.readouterr().out
    for word in ("layer.frozen", *names, "lower the threshold", "does the layer get a gradient"):
        assert word in printed
    assert {r.regime for r in optimizer.report(quiet=True)} == {"idle"}  # it starts anew


def test_report_without_rich(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def no_rich(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "rich":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    p = ones(2, 40)
    optimizer = Bop([("conv1.weight", p)], gamma=1.0, threshold=0.5)
    give(p, 0.1)
    optimizer.step()
    monkeypatch.setattr(builtins, "__import__", no_rich)
    optimizer.report()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["layer", "weights", "flips/step", "blocked", "regime"]
    assert lines[1].split() == ["conv1.weight", "80", "0.0e+00", "100.0%", "frozen"]


def test_signal_histogram_by_hand() -> None:
    """gamma 1/2 has the unit 1/2. After g = 1: m = 1/2 and, with sigma 1, v = 1: the signal is one unit."""
    p = ones(2, 40)
    optimizer = Bop2ndOrder([("w", p)], gamma=0.5, sigma=1.0)
    give(p, 1.0, 0.0)
    optimizer.step()
    histogram = optimizer.signal_histogram(bins=8, limit=4.0)["w"]
    assert histogram.tolist() == [40, 0, 40, 0, 0, 0, 0, 0, 0]
    give(p, 100.0, 0.0)  # m = 50.25, v = 1e4: 1.005 units
    optimizer.step()
    assert optimizer.signal_histogram(bins=4, limit=0.5)["w"].tolist() == [40, 0, 0, 0, 40]
    with pytest.raises(TypeError, match="no second moment"):
        Bop([ones(2, 40)]).signal_histogram()


@pytest.mark.parametrize(("value", "bad"), [(float("nan"), 20), (float("inf"), 20), (-1e25, 20)])
def test_a_gradient_that_is_not_finite_is_named(value: float, bad: int, capsys: Any) -> None:
    """1e25 is finite, its square is not. The other layer is what it was."""
    p, q = ones(2, 40), ones(2, 40)
    optimizer = Bop2ndOrder([("hurt", p), ("sound", q)], gamma=0.5, sigma=0.5, threshold=0.1)
    for step in range(3):
        p.grad, q.grad = torch.randn(2, 40), torch.randn(2, 40)
        if step == 1:
            p.grad[0, :bad] = value
        optimizer.step()
    hurt, sound = optimizer.report()
    assert (hurt.regime, hurt.not_finite, sound.not_finite) == ("not finite", bad, 0)
    assert f"moments of {bad} weights of hurt are infinite or NaN" in capsys.readouterr().out
    assert sound.regime == "active"
    assert [int(h.sum()) for h in optimizer.signal_histogram().values()] == [80 - bad, 80]
    for name in ("exp_avg", "exp_avg_sq"):
        moment = optimizer.state[p][name]
        moment.masked_fill_(~moment.isfinite(), 0)
    assert [row.not_finite for row in optimizer.report(quiet=True)] == [0, 0]


def test_a_histogram_at_gamma_zero() -> None:
    p = ones(2, 40)
    optimizer = Bop2ndOrder([p], gamma=1.0, sigma=1.0)
    give(p, 1.0, 0.0)
    optimizer.step()
    optimizer.param_groups[0]["gamma"] = 0
    assert optimizer.signal_histogram(bins=2)["group0.param0"].tolist() == [40, 0, 40]


@pytest.mark.parametrize("packed", [True, False])
def test_tracker_sees_oscillation_and_weights_that_never_flip(packed: bool) -> None:
    """gamma 1: a weight flips whenever its gradient's sign is its own. Column 0 flips at steps 1, 2, 6;
    column 1 at step 1 only; columns 2 and 3 never."""
    p = ones(5, 4) if packed else nn.Parameter(torch.ones(5, 4))
    optimizer = Bop([("w", p)], gamma=1.0, threshold=0.5)
    tracker = FlipTracker(optimizer, window=3)
    expected = [(0, 0), (5, 5), (0, 5), (0, 5), (0, 5), (0, 5)]  # step 6 comes 4 steps after step 2
    for step, (now, total) in enumerate(expected, start=1):
        flip0, flip1 = step in (1, 2, 6), step == 1
        w = p.unpack().detach() if isinstance(p, bf.BinaryTensor) else p.detach()
        p.grad = torch.stack([w[:, 0] * flip0, w[:, 1] * flip1, -w[:, 2], -w[:, 3]], dim=1)
        optimizer.step()
        (row,) = tracker.read()
        assert (row.name, row.oscillations, row.total_oscillations) == ("w", now, total)
    assert row.total_flips == 20
    assert row.never_flipped == 0.5
    tracker.close()
    give(p, 1.0, 1.0, 1.0, 1.0)
    optimizer.step()
    assert tracker.read()[0].total_flips == 20
    with pytest.raises(ValueError, match="window"):
        FlipTracker(optimizer, window=0)


def test_loggers(tmp_path: Path) -> None:
    p, q = ones(2, 40), ones(3, 40)
    optimizer = Bop([{"params": [("a", p)]}, {"params": [("b", q)], "gamma": 0.5}], gamma=1.0, threshold=0.25)
    log = JsonLinesLogger(tmp_path / "flips.jsonl")
    for step in (1, 2):
        give(p, 1.0, 0.1)
        give(q, 1.0)
        optimizer.step()
        log(optimizer, step)
    lines = [json.loads(line) for line in (tmp_path / "flips.jsonl").read_text().splitlines()]
    seen = [(x["step"], x["name"], x["flips"]) for x in lines]
    assert seen == [
        (1, "a", 40),
        (1, "b", 120),
        (2, "a", 0),
        (2, "b", 0),
    ]
    assert lines[0]["blocked"] == 40
    assert [x["gamma"] for x in lines[:2]] == [1.0, 0.5]

    class Writer:
        scalars: dict[str, float] = {}

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.scalars[f"{name}@{step}"] = value

    TensorBoardLogger(Writer())(optimizer, 7)
    assert Writer.scalars["hyper/group1/gamma@7"] == 0.5
    assert Writer.scalars["blocked/a@7"] == 0.5
    assert Writer.scalars["flips/b@7"] == 0.0


def test_tensorboard_file(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    p = ones(2, 40)
    optimizer = Bop([("a", p)], gamma=1.0, threshold=0.25)
    give(p, 1.0)
    optimizer.step()
    with tensorboard.SummaryWriter(tmp_path) as writer:
        TensorBoardLogger(writer)(optimizer, 1)
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [e.value for e in events.Scalars("flips/a")] == [1.0]


# ------------------------------------------------------------------------- controls


@pytest.mark.parametrize("make", [Bop, Bop2ndOrder])
def test_warmup_moves_moments_and_flips_nothing(make: Any) -> None:
    p, q = ones(3, 40), ones(3, 40)
    warm, plain = make([p], gamma=0.3, threshold=0.01, warmup_steps=4), make([q], gamma=0.3, threshold=0.01)
    for step in range(1, 7):
        p.grad = torch.randn(3, 40)
        q.grad = p.grad.clone()
        warm.step()
        plain.step()
        assert torch.equal(warm.state[p]["exp_avg"], plain.state[q]["exp_avg"])
        assert (warm.telemetry()[0].flips > 0) == (step > 4)
        assert warm.telemetry()[0].candidates > 0
        assert bool((p.words == 0).all()) == (step <= 4)  # all weights still +1


def _noise(params: list[nn.Parameter], generator: torch.Generator) -> None:
    for i, p in enumerate(params):
        p.grad = torch.randn(p.shape, generator=generator) * 10.0**-i


@pytest.mark.parametrize("start", [1e-6, 10.0], ids=["from below", "from above"])
def test_target_flip_rate_converges_in_every_layer(start: float) -> None:
    """Three layers whose gradients, and so whose right thresholds, differ by a factor of 100."""
    params, generator = [ones(50, 64) for _ in range(3)], torch.Generator().manual_seed(0)
    optimizer = Bop(params, gamma=0.1, threshold=start, target_flip_rate=0.01)
    for _ in range(400):
        _noise(params, generator)
        optimizer.step()
    optimizer.report(quiet=True)
    for _ in range(300):
        _noise(params, generator)
        optimizer.step()
    rates = [row.flip_rate for row in optimizer.report(quiet=True)]
    assert rates == pytest.approx([0.01] * 3, rel=0.1)
    thresholds = [start * float(optimizer.state[p]["threshold_scale"]) for p in params]
    assert thresholds[0] / thresholds[1] == pytest.approx(10, rel=0.3)
    assert thresholds[1] / thresholds[2] == pytest.approx(10, rel=0.3)
    assert optimizer.param_groups[0]["threshold"] == start


def test_target_flip_rate_resumes_and_switches_off() -> None:
    params, generator = [ones(9, 64) for _ in range(2)], torch.Generator().manual_seed(0)
    optimizer = Bop2ndOrder(params, gamma=0.1, threshold=0.1, target_flip_rate=0.02)
    for _ in range(30):
        _noise(params, generator)
        optimizer.step()
    twin = copy.deepcopy(optimizer)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    draw = generator.get_state()
    words: list[list[Tensor]] = []
    for one in (optimizer, twin):
        generator.set_state(draw)
        mine = one.param_groups[0]["params"]
        for _ in range(30):
            _noise(mine, generator)
            one.step()
        words.append([p.words for p in mine] + [one.state[p]["threshold_scale"] for p in mine])
    assert all(torch.equal(a, b) for a, b in zip(*words, strict=True))
    assert words[0][-1] != 1
    optimizer.param_groups[0]["target_flip_rate"] = None
    assert all("threshold_scale" not in optimizer.state[p] for p in params)
    _noise(params, generator)
    optimizer.step()
    assert [c.index for c in optimizer.telemetry()] == [0, 1]


def test_target_flip_rate_rests_in_warmup_and_in_skipped_steps() -> None:
    p = ones(9, 64)
    optimizer = Bop([p], gamma=0.1, threshold=0.1, target_flip_rate=0.02, warmup_steps=2)
    for step in range(1, 5):
        p.grad = torch.randn(9, 64)
        if step == 3:
            optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.ones(())
        optimizer.step()
        if step == 3:
            del optimizer.grad_scale, optimizer.found_inf
        assert (optimizer.state[p]["threshold_scale"] == 1) == (step < 4)


# ------------------------------------------------------------------------- the example


def test_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Path(__file__).parents[1] / "examples" / "optimizer.py"
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    assert float(printed.split("epoch 10  accuracy ")[1].split()[0]) > 0.8
    assert "flips/step" in printed
    assert "resumed at gamma 0.001" in printed
    assert len((tmp_path / "flips.jsonl").read_text().splitlines()) == 20
