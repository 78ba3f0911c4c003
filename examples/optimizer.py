"""The optimizer on a small network of one's own: presets, schedules, telemetry, resume. Runs in seconds.

python examples/optimizer.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import bop2nd_fast as bf

EPOCHS, STEPS_PER_EPOCH = 10, 40


def make_model() -> nn.Sequential:
    """One real layer, two binary ones, batch norm between."""
    return nn.Sequential(
        nn.Linear(16, 128, bias=False),
        nn.BatchNorm1d(128),
        bf.nn.BinaryLinear(128, 128),
        nn.BatchNorm1d(128),
        bf.nn.BinaryLinear(128, 4),
        nn.BatchNorm1d(4),
    )


def batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Four classes: the signs of two hidden directions."""
    x = torch.randn(64, 16, generator=generator)
    return x, (x[:, :8].sum(1) > 0).long() + 2 * (x[:, 8:].sum(1) > 0).long()


def main() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = make_model()

    # One optimizer object: BinaryTensors by Bop2ndOrder, the rest by Adam.
    optimizer = bf.optim.MixedOptimizer(
        model,
        binary=lambda named: bf.optim.Bop2ndOrder(named, gamma=1e-2, sigma=1e-3, threshold=1e-2),
        real=lambda named: torch.optim.Adam(named, lr=0.01),
    )
    # Any scheduler of torch drives any hyperparameter.
    total = EPOCHS * STEPS_PER_EPOCH
    schedulers = [
        bf.optim.linear(optimizer, "gamma", 1e-2, 1e-3, total),
        bf.optim.schedule(optimizer, "lr", torch.optim.lr_scheduler.StepLR, total // 2),
    ]
    log = bf.optim.JsonLinesLogger("flips.jsonl")
    for epoch in range(1, EPOCHS + 1):
        correct = 0
        for _ in range(STEPS_PER_EPOCH):
            x, y = batch(generator)
            optimizer.zero_grad()
            logits = model(x)
            F.cross_entropy(logits, y).backward()
            optimizer.step()
            for scheduler in schedulers:
                scheduler.step()
            correct += int((logits.argmax(1) == y).sum())
        log(optimizer, epoch * STEPS_PER_EPOCH)
        print(f"epoch {epoch:2d}  accuracy {correct / (64 * STEPS_PER_EPOCH):.3f}")
    optimizer.report()

    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    state["schedulers"] = [scheduler.state_dict() for scheduler in schedulers]
    torch.save(state, "checkpoint.pt")
    saved = torch.load("checkpoint.pt", weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    print("resumed at gamma", optimizer.param_groups[0]["gamma"])


if __name__ == "__main__":
    main()
