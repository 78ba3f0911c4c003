"""The authors' trajectories (TensorFlow, 80 steps x 999 weights x 8 settings), followed on every backend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bop2nd_fast as bf

FILE = Path(__file__).parent / "data" / "bop_trajectories.npz"
BACKENDS = [s.name for s in bf.backends.report() if s.available and s.devices in ("any", "cpu")]


def _settings() -> list[dict[str, Any]]:
    with np.load(FILE) as data:
        return json.loads(bytes(data["meta"]))  # type: ignore[no-any-return]


def _trajectory(i: int) -> dict[str, Tensor]:
    """Arrays of run ``i`` as OIHW tensors (the authors' are HWIO)."""
    with np.load(FILE) as data:
        names = [k for k in data.files if k.startswith(f"{i}/")]
        arrays = {k.split("/")[1]: torch.from_numpy(data[k]) for k in names}
    axes = {4: (3, 2, 0, 1), 5: (0, 4, 3, 1, 2)}
    return {k: a.permute(axes[a.dim()]).contiguous() for k, a in arrays.items()}


def _optimizer(setting: dict[str, Any], p: Tensor) -> bf.optim.Bop | bf.optim.Bop2ndOrder:
    if setting["optimizer"] == "Bop":
        return bf.optim.Bop([p], gamma=setting["gamma"], threshold=setting["threshold"])
    correction = {"Bop2ndOrder": "none", "Bop2ndOrder_unbiased": "reference"}[setting["optimizer"]]
    values = {name: setting[name] for name in ("gamma", "sigma", "threshold")}
    return bf.optim.Bop2ndOrder([p], **values, bias_correction=correction)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "dense"])
@pytest.mark.parametrize("run", range(8))
@pytest.mark.parametrize("backend", BACKENDS)
def test_authors_trajectory(backend: str, run: int, packed: bool) -> None:
    data = _trajectory(run)
    p = torch.nn.Parameter(bf.pack(data["w0"], dim=1) if packed else data["w0"].clone())
    optimizer = _optimizer(_settings()[run], p)
    mismatches, flips = 0, 0
    with bf.backends.use(backend):
        before = bf.backends.calls()[backend]
        for g, wanted in zip(data["g"], data["w"], strict=True):
            p.grad = g.clone()
            optimizer.step()
            now = p.unpack() if packed else p.detach()  # type: ignore[attr-defined]
            mismatches += int((now != wanted).sum())
            flips += optimizer.telemetry()[0].flips
        steps_served = bf.backends.calls()[backend] - before
    assert steps_served >= 80
    assert flips > 0
    assert mismatches == 0
    assert torch.equal(optimizer.state[p]["exp_avg"], data["m"])
    assert ("v" in data) == ("exp_avg_sq" in optimizer.state[p])
    if "v" in data:
        assert torch.equal(optimizer.state[p]["exp_avg_sq"], data["v"])
