"""The whole way in a few minutes: train, pack, save, load elsewhere, predict, measure.

Run it with ``make demo`` or ``python -m examples.demo``. It exits with status 1 if the trained network stays
under 95 % test accuracy or if the packed one, loaded in a new process, predicts anything else, to the bit.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bop2nd_fast import data, inference, plots, recipes, train
from bop2nd_fast.checkpoint import PREVIOUS
from bop2nd_fast.cli_train import run_with_progress
from bop2nd_fast.optim import split_parameters
from bop2nd_fast.train_record import logits_of
from examples.demo_benchmark import measure_short

GOAL = 0.95
SEED = 0

# What the new process runs: it knows the file and the images, nothing of the training.
LOAD_AND_PREDICT = """
import sys, numpy, torch
import bop2nd_fast as bf
model = bf.inference.load(sys.argv[1])
with torch.no_grad():
    logits = model(torch.from_numpy(numpy.load(sys.argv[2])))
numpy.save(sys.argv[3], logits.numpy())
"""

console = Console()


def main() -> int:
    """Run all steps; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("out/demo"), help="folder for the pictures and files"
    )
    parser.add_argument("--no-benchmark", action="store_true", help="leave the measurements out")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)

    console.rule("1. train BinaryNet on scikit-learn's digits with Bop2ndOrder")
    trainer, seconds = train_digits(out)
    accuracy = trainer.history[-1].test_accuracy

    console.rule("2. pack, save, load in a new process")
    file_bytes, fp32_bytes = pack(trainer, out / "model.safetensors")
    same, packed_accuracy = predictions_agree(trainer, out)

    results = Table(title="Results", title_justify="left", show_header=False)
    results.add_row("test accuracy, trained", f"{accuracy:.2%}  (goal {GOAL:.0%})")
    results.add_row("test accuracy, packed and reloaded", f"{packed_accuracy:.2%}")
    results.add_row("outputs of both", "the same, bit for bit" if same else "[bold red]different[/]")
    results.add_row("training time", f"{seconds:.0f} s on {torch.get_num_threads()} threads")
    results.add_row(
        "file", f"{file_bytes / 1e3:.1f} kB; the parameters in fp32: {fp32_bytes / 1e3:.1f} kB "
        f"({fp32_bytes / file_bytes:.1f}x)"
    )  # fmt: skip
    console.print(results)

    if not arguments.no_benchmark:
        console.rule("3. a short benchmark")
        measure_short(out / "benchmark.png", console)
    console.print(f"pictures and files are in {out}/", highlight=False)

    failed = []
    if accuracy < GOAL:
        failed.append(f"test accuracy {accuracy:.2%} is below {GOAL:.0%}")
    if not same:
        failed.append("the packed model predicts something else than the trained one")
    for reason in failed:
        Console(stderr=True).print(f"[bold red]demo failed:[/] {reason}")
    return 1 if failed else 0


def train_digits(out: Path) -> tuple[train.Trainer, float]:
    """Train with the recipe for the digits; writes checkpoint.pt, history.jsonl and training.png."""
    recipe = recipes.get("digits")
    for name in (train.CHECKPOINT, train.CHECKPOINT + PREVIOUS, train.HISTORY):
        (out / name).unlink(missing_ok=True)  # of an earlier demo
    trainer = train.Trainer(recipe, data.digits(), seed=SEED, out=out)
    n_binary = sum(p.numel() for p in split_parameters(trainer.model)[0])
    values = ", ".join(f"{name} {value:g}" for name, value in recipe.preset.values(0, 1).items())
    console.print(f"{n_binary:,} binary weights; {values} (Adam's, for the biases)", highlight=False)
    started = time.perf_counter()
    history = run_with_progress(trainer)
    seconds = time.perf_counter() - started
    title = "BinaryNet, width 32, on scikit-learn's digits, trained with Bop2ndOrder"
    plots.training(history, out / "training.png", title)
    trainer.report()
    return trainer, seconds


def pack(trainer: train.Trainer, path: Path) -> tuple[int, int]:
    """Convert and save; returns the bytes of the file and of the same parameters in fp32."""
    trainer.model.eval()
    inference.convert(trainer.model, trainer.dataset.test_images[:1]).save(path)
    return path.stat().st_size, 4 * sum(p.numel() for p in trainer.model.parameters())


def predictions_agree(trainer: train.Trainer, out: Path) -> tuple[bool, float]:
    """Predict the test images in a new process; whether its outputs have the trained model's bits."""
    images, answers = out / "test_images.npy", out / "packed_outputs.npy"
    np.save(images, trainer.dataset.test_images.numpy())
    program = [
        sys.executable,
        "-c",
        LOAD_AND_PREDICT,
        str(out / "model.safetensors"),
        str(images),
        str(answers),
    ]
    subprocess.run(program, check=True)
    packed = torch.from_numpy(np.load(answers))
    expected = logits_of(trainer.model, trainer.dataset.test_images)
    correct = packed.argmax(1) == trainer.dataset.test_labels
    same = packed.dtype == expected.dtype and torch.equal(
        packed.view(torch.int32), expected.view(torch.int32)
    )
    return same, float(correct.double().mean())


if __name__ == "__main__":
    sys.exit(main())
