"""Programs of docs/optimizer.md and docs/averaging.md do what is said there (test_documents.py runs all)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bop2nd_fast as bf
from tests.documents import programs

DOCS = Path(__file__).parents[1] / "docs"
(ACCUMULATE,) = programs(DOCS / "optimizer.md", "Accumulating and clipping")
SKIP, START_ANEW = programs(DOCS / "optimizer.md", "Gradients that are not finite")
AVERAGE, VOTE = programs(DOCS / "averaging.md", "Averages of weights: EMA, SWA")


def names() -> dict[str, Any]:
    """What the programs take for granted."""
    torch.manual_seed(0)
    model = nn.Sequential(
        bf.nn.BinaryLinear(20, 64, input_quantizer=None),
        nn.BatchNorm1d(64),
        bf.nn.BinaryLinear(64, 4),
        nn.BatchNorm1d(4),
    )
    optimizer = bf.optim.MixedOptimizer(
        model,
        lambda named: bf.optim.Bop2ndOrder(named, gamma=0.02, sigma=0.01, threshold=1e-3),
        lambda named: torch.optim.Adam(named, lr=0.02),
    )
    x = torch.randn(64, 20)
    y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    return {
        "torch": torch, "F": F, "bf": bf, "model": model, "optimizer": optimizer, "x": x,
        "batches": [(x, y)] * 60, "loss": lambda m: F.cross_entropy(m(x), y).item(),
    }  # fmt: skip


def run(*which: str, **extra: Any) -> dict[str, Any]:
    scope = names() | extra
    for program in which:
        exec(program, scope)
    return scope


def test_accumulating_and_clipping() -> None:
    before = names()
    scope = run(ACCUMULATE)
    assert scope["loss"](scope["model"]) < before["loss"](before["model"]) / 1.5
    assert int(scope["optimizer"].binary.state[scope["model"][0].weight]["step"]) == 15


def test_a_step_with_an_infinite_gradient_is_skipped_whole() -> None:
    scope = names()
    x, y = scope["batches"][0]
    bad = x.clone()
    bad[3, 5] = float("inf")
    exec(SKIP, scope | {"batches": [(x, y)] * 5})
    before = [p.detach().clone() for p in scope["model"].parameters()]
    exec(SKIP, scope | {"batches": [(bad, y)]})
    after = [p.detach() for p in scope["model"].parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(row.not_finite == 0 for row in scope["optimizer"].report(quiet=True))
    for module in scope["model"]:  # batch norm has seen it in the forward pass
        if isinstance(module, nn.BatchNorm1d):
            module.reset_running_stats()
    exec(SKIP, scope | {"batches": [(x, y)] * 60})
    assert scope["loss"](scope["model"]) < 1


def test_moments_that_are_not_finite_start_anew() -> None:
    scope = names()
    x, y = scope["batches"][0]
    F.cross_entropy(scope["model"](x), y).backward()
    scope["model"][0].weight.grad[2, :7] = float("nan")
    scope["optimizer"].step()
    assert [row.not_finite for row in scope["optimizer"].report(quiet=True)] == [7, 0]
    exec(START_ANEW, scope)
    assert [row.not_finite for row in scope["optimizer"].report(quiet=True)] == [0, 0]


def test_averages() -> None:
    scope = run(AVERAGE)
    averaged, model = scope["averaged"].module, scope["model"]
    assert torch.equal(averaged[0].weight.words, model[0].weight.words)
    assert not torch.equal(averaged[1].weight, model[1].weight)
    assert scope["loss"](scope["averaged"]) < 1


def test_votes() -> None:
    scope = run(AVERAGE, VOTE)
    assert isinstance(scope["model"][0].weight, bf.BinaryTensor)
    vote = scope["votes"][scope["model"][0].weight]
    assert bool(((vote.abs() < 0.99) & (vote.abs() > 0)).any())
    assert torch.equal(scope["model"][0].weight.detach().unpack() < 0, vote < 0)
    assert scope["loss"](scope["model"]) < 1


@pytest.mark.parametrize("method", ["ema", "swa"])
def test_torchs_own_averages_are_refused_not_wrong(method: str) -> None:
    from torch.optim import swa_utils

    model = names()["model"]
    get = swa_utils.get_ema_multi_avg_fn if method == "ema" else swa_utils.get_swa_multi_avg_fn
    averaged = swa_utils.AveragedModel(model, multi_avg_fn=get())
    averaged.update_parameters(model)
    with torch.no_grad():
        model[0].weight.copy_(-model[0].weight.unpack())
    with pytest.raises((ValueError, RuntimeError), match=r"neither|arbitrary values"):
        averaged.update_parameters(model)
