"""Loggers: what an optimizer reports, written to a file or to TensorBoard."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from .group import HyperGroup
from .telemetry import FlipCounts


class Reports(Protocol):
    """What a logger asks of an optimizer: Bop, Bop2ndOrder, MixedOptimizer."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    def telemetry(self) -> list[FlipCounts]: ...


def _hyperparameters(optimizer: Reports) -> dict[str, float]:
    """Everything a schedule may drive; of a real optimizer's groups the learning rate."""
    return {
        f"group{g}/{name}": float(group[name])
        for g, group in enumerate(optimizer.param_groups)
        for name in (group.ranges if isinstance(group, HyperGroup) else ("lr",))
        if name in group
    }


class JsonLinesLogger:
    """Append one JSON object per parameter and call to a file.

    >>> log = bf.optim.JsonLinesLogger("flips.jsonl")
    >>> log(optimizer, step)      # {"step": 100, "name": "conv1.weight", "flips": 12, ...}
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __call__(self, optimizer: Reports, step: int) -> None:
        """Write the last step's counts, stamped ``step``."""
        hyper = _hyperparameters(optimizer)
        with self.path.open("a", encoding="utf-8") as file:
            for counts in optimizer.telemetry():
                values: dict[str, Any] = {"step": step, **asdict(counts), "blocked": counts.blocked}
                prefix = f"group{counts.group}/"
                values |= {k.removeprefix(prefix): v for k, v in hyper.items() if k.startswith(prefix)}
                file.write(json.dumps(values) + "\n")


class TensorBoardLogger:
    """Write flip, candidate and blocked rates and the hyperparameters to a TensorBoard writer.

    >>> log = bf.optim.TensorBoardLogger(torch.utils.tensorboard.SummaryWriter("runs/a"))
    >>> log(optimizer, step)
    """

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def __call__(self, optimizer: Reports, step: int) -> None:
        """Write the last step's rates, stamped ``step``."""
        for counts in optimizer.telemetry():
            for what in ("flips", "candidates", "blocked"):
                value = getattr(counts, what) / max(1, counts.numel)
                self.writer.add_scalar(f"{what}/{counts.name}", value, step)
        for name, value in _hyperparameters(optimizer).items():
            self.writer.add_scalar(f"hyper/{name}", value, step)
