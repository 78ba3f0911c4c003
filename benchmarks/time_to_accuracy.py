"""How long the paper's CIFAR-10 run takes to its accuracy: ``python -m benchmarks.time_to_accuracy``.

Trains ``cifar10_biased`` with the step captured in a CUDA graph (on a CPU: without), tests after every epoch
and stops at the goal or when the time is over. ``time_to_accuracy.jsonl`` in ``--out`` gets a line per epoch,
stamped like all results; time is that of training and testing, without reading the data set. Nothing else is
written, so that no checkpoint takes time.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from bop2nd_fast import data, recipes
from bop2nd_fast.stamp import stamp
from bop2nd_fast.train import Epoch, Trainer

GOAL = 0.919  # what the paper reports for this run


def main(arguments: list[str] | None = None) -> int:
    """Train; returns 0 if the goal was reached in time."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of CIFAR-10")
    parser.add_argument("--goal", type=float, default=GOAL, help="test accuracy at which to stop")
    parser.add_argument("--minutes", type=float, default=13.0, help="after which to stop")
    parser.add_argument("--epochs", type=int, help="schedules span the run; the recipe's if not given")
    parser.add_argument("--width", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--amp", choices=["bf16"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    asked = {"epochs": options.epochs, "width": options.width, "batch_size": options.batch_size}
    recipe = recipes.get("cifar10_biased").replace(**asked)
    results = options.out / "time_to_accuracy.jsonl"
    if results.exists():
        raise SystemExit(f"{results} exists; choose another --out")
    options.out.mkdir(parents=True, exist_ok=True)
    on_gpu = options.device.startswith("cuda")
    how = {"seed": options.seed, "device": options.device, "amp": options.amp, "graph": on_gpu}
    trainer = Trainer(recipe, data.get("cifar10", options.data_dir), report_every=100, **how)
    mark = stamp() | {"device": torch.cuda.get_device_name() if on_gpu else "cpu"}
    in_all = {"recipe": json.loads(recipe.to_json()), "seed": trainer.seed, "amp": trainer.amp}
    spent = 0.0
    for record in trainer.records():
        if not isinstance(record, Epoch):
            continue
        spent += record.seconds + record.test_seconds
        line = {**in_all, "seconds_in_all": spent, **record.to_dict(), "stamp": mark}
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        told = f"epoch {record.epoch:3d}  {spent:6.1f} s  loss {record.loss:.3f}  test "
        told += f"{record.test_accuracy:.2%}  {record.steps_per_second:.0f} steps/s"
        print(told, flush=True)
        if record.test_accuracy >= options.goal:
            print(f"{options.goal:.1%} after {spent:.1f} s")
            return 0
        if spent >= 60 * options.minutes:
            break
    print(f"{options.goal:.1%} was not reached")
    return 1


if __name__ == "__main__":
    sys.exit(main())
