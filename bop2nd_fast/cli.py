"""The command line: ``bop2nd info | train | pack | predict | bench``.

Mistakes of the user (a missing file, an impossible value) end with one line on standard error and exit
status 2, and nothing is written; a run that fails by itself (a loss that became NaN, a full disk) ends with
1, one that is interrupted with 130. No command replaces a file that it was not told to replace.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import warnings
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from . import __version__, backends, data, inference, train
from .atomic_write import check_target
from .checkpoint import PREVIOUS
from .system_report import versions
from .terminal import err, fail, one_line, out, refuse_existing, shown, user_errors

app = typer.Typer(
    help="Train, pack and run binarized neural networks (Bop2ndOrder).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


class DataName(str, Enum):
    digits = "digits"
    cifar10 = "cifar10"


class Background(str, Enum):
    black = "black"
    white = "white"


class BiasCorrection(str, Enum):
    none = "none"
    reference = "reference"
    adam = "adam"


def _version(wanted: bool) -> None:
    if wanted:
        out.print(__version__, highlight=False)
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


# ---------------------------------------------------------------------------------------------- info


@app.command()
def info() -> None:
    """Show what can run on this machine, and what is missing and why."""
    about = Table(title="bop2nd_fast on this machine", show_header=False, title_justify="left")
    about.add_column(style="bold")
    about.add_column(overflow="fold")
    for name, value in versions().items():
        about.add_row(name, shown(value))
    out.print(about)
    table = Table(title="Backends", title_justify="left")
    for column in ("backend", "devices", "state", "needs, or why not"):
        table.add_column(column, overflow="fold")
    for status in backends.report():
        state = (
            "[bold green]in use[/]" if status.active else "available" if status.available else "[dim]no[/]"
        )
        table.add_row(status.name, status.devices, state, shown(status.note))
    out.print(table)
    out.print("Force one with [bold]BOP2ND_BACKEND=name[/] or bop2nd_fast.backends.use(name).")


# --------------------------------------------------------------------------------------------- train


@app.command("train")
def train_command(
    data_name: Annotated[DataName, typer.Option("--data", help="Data set.")] = DataName.digits,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of the data set's files (digits need none).")
    ] = None,
    model: Annotated[str, typer.Option(help=f"Network: {', '.join(train.MODELS)}.")] = "binarynet",
    width: Annotated[int | None, typer.Option(min=1, help="Channels of the first layer.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1)] = None,
    batch_size: Annotated[int | None, typer.Option(min=1)] = None,
    gamma: Annotated[float | None, typer.Option(help="Rate of the first moment, in (0, 1].")] = None,
    sigma: Annotated[float | None, typer.Option(help="Rate of the second moment, in (0, 1].")] = None,
    threshold: Annotated[float | None, typer.Option(help="A larger one flips less, >= 0.")] = None,
    bias_correction: Annotated[BiasCorrection | None, typer.Option()] = None,
    lr: Annotated[float | None, typer.Option(help="Adam's, for the real parameters.")] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Of initial weights, batches and augmentation.")
    ] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    out_dir: Annotated[
        Path, typer.Option("--out", help="Where checkpoint.pt, history.json and training.png go.")
    ] = Path("out/train"),
    resume: Annotated[bool, typer.Option("--resume", help="Continue from --out's checkpoint.")] = False,
) -> None:
    """Train a binary network. Values not given come from the data set's recipe."""
    default_width, settings = train.RECIPES[data_name.value]
    given: dict[str, Any] = {
        "epochs": epochs,
        "batch_size": batch_size,
        "gamma": gamma,
        "sigma": sigma,
        "threshold": threshold,
        "bias_correction": None if bias_correction is None else bias_correction.value,
        "lr": lr,
        "seed": seed,
    }
    checkpoint, history_file, picture = (
        out_dir / name for name in ("checkpoint.pt", "history.json", "training.png")
    )
    with user_errors(ValueError, OSError, ModuleNotFoundError, train.TrainingError):
        from . import plots  # what is missing is said before the training, not after it

        target = _device(device)
        settings = dataclasses.replace(settings, **{k: v for k, v in given.items() if v is not None})
        if not resume:
            refuse_existing(
                checkpoint,
                out_dir / f"{checkpoint.name}{PREVIOUS}",
                instead="continue it with --resume or choose another --out",
            )
            refuse_existing(history_file, picture, instead="choose another --out")
        dataset = data.get(data_name.value, data_dir)
        assert isinstance(dataset, data.Dataset)
        spec = train.ModelSpec.for_dataset(dataset, model, default_width if width is None else width)
        trainer = train.Trainer(spec.build(settings.seed), dataset, settings, target, spec)
        if resume:
            _resume(trainer, checkpoint)
        _make_folder(out_dir)
    about = {
        "model": dataclasses.asdict(spec),
        "dataset": dataset.name,
        "settings": dataclasses.asdict(settings),
    }
    try:
        with user_errors(train.TrainingError, OSError, status=1):
            history = run_with_progress(trainer, checkpoint)
            train.write_history(history_file, history, **about)
            plots.training(history, picture, f"{spec.name}, width {spec.width}, {dataset.name}")
    except KeyboardInterrupt:
        fail(f"interrupted: {_what_is_left(checkpoint, settings.epochs)}", 130)
    except SystemExit:  # from the console
        fail(f"nobody reads the output any more: {_what_is_left(checkpoint, settings.epochs)}", 1)
    out.print(
        f"test accuracy [bold]{history[-1].test_accuracy:.2%}[/]; wrote {shown(out_dir)}/", highlight=False
    )


def _resume(trainer: train.Trainer, checkpoint: Path) -> None:
    """Continue from ``checkpoint``; what the library warns of (a damaged file) becomes a line of its own."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", RuntimeWarning)
        trainer.resume(checkpoint)
    for warning in said:
        err.print(f"[bold yellow]warning:[/] {shown(warning.message)}", highlight=False, soft_wrap=True)
    if len(trainer.history) > trainer.settings.epochs:
        raise ValueError(
            f"{checkpoint} has finished {len(trainer.history)} epochs; --epochs must be at least as many"
        )


def _make_folder(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"no permission to write into the folder {folder}")


def _what_is_left(checkpoint: Path, n_epochs: int) -> str:
    if not checkpoint.exists():
        return "no epoch was finished, nothing was saved"
    done = len(train.read_checkpoint(checkpoint)["history"])
    return (
        f"{done} of {n_epochs} epochs are in {checkpoint}; the same command with --resume goes on from there"
    )


def run_with_progress(trainer: train.Trainer, checkpoint: Path | None = None) -> list[train.Epoch]:
    """Train with a live bar: loss, accuracy, flip rate, steps per second; one line per finished epoch."""
    columns = (
        TextColumn("epoch {task.fields[epoch]}"),
        BarColumn(bar_width=12),
        TextColumn("loss {task.fields[loss]}  acc {task.fields[accuracy]}  flips {task.fields[flip_rate]}"),
        TextColumn("{task.fields[rate]} steps/s"),
        TimeRemainingColumn(compact=True),
    )
    done = len(trainer.history) * len(trainer.batches)
    with Progress(*columns, console=out) as bar:
        blank: dict[str, Any] = {"epoch": "-", "loss": "-", "accuracy": "-", "flip_rate": "-", "rate": "-"}
        task = bar.add_task("training", total=trainer.n_steps, completed=done, **blank)

        def on_progress(now: train.Progress) -> None:
            bar.update(
                task,
                completed=now.step,
                epoch=f"{now.epoch}/{trainer.settings.epochs}",
                loss=f"{now.loss:.3f}",
                accuracy=f"{now.accuracy:.1%}",
                flip_rate=f"{now.flip_rate:.1e}",
                rate=f"{now.steps_per_second:.1f}",
            )

        def on_epoch(epoch: train.Epoch) -> None:
            bar.console.print(
                f"epoch {epoch.epoch:3d}  loss {epoch.loss:.3f}  train {epoch.train_accuracy:6.1%}  "
                f"test {epoch.test_accuracy:6.1%}  "
                f"flips {epoch.flip_rate:.1e}  {epoch.steps_per_second:.1f} steps/s",
                highlight=False,
            )

        return trainer.run(on_progress, on_epoch, checkpoint)


def _device(name: str) -> torch.device:
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or not (index.isdigit() or name == kind):
        raise ValueError(f"unknown device {name!r}; allowed are cpu, cuda, cuda:0, cuda:1, ...")
    n_gpus = torch.cuda.device_count()
    if kind == "cuda" and int(index or 0) >= n_gpus:
        raise ValueError(f"device {name!r} is not there: torch sees {n_gpus} CUDA devices")
    return torch.device(name)


# ---------------------------------------------------------------------------------- pack and predict


@app.command()
def pack(
    checkpoint: Annotated[Path, typer.Argument(help="checkpoint.pt of `bop2nd train`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = Path(
        "model.safetensors"
    ),
    exact: Annotated[
        bool, typer.Option(help="Same outputs bit for bit; --no-exact is faster in residual networks.")
    ] = True,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace the file if it exists.")] = False,
) -> None:
    """Pack a trained network: 1 bit per binary weight, batch norm folded into thresholds."""
    with user_errors(OSError, train.TrainingError, ValueError):
        target, _ = check_target(output)
        if target.exists() and checkpoint.exists() and target.samefile(checkpoint):
            raise ValueError(f"{output} is the checkpoint itself; choose another --output")
        if not force:
            refuse_existing(output, instead="choose another --output, or replace it with --force")
        model, state = train.model_from_checkpoint(checkpoint)
        spec = state["spec"]
        example = torch.zeros(1, spec["in_channels"], spec["image_size"], spec["image_size"])
        inference.convert(model, example, exact=exact).save(output)
    n_weights = sum(parameter.numel() for parameter in model.parameters())
    size, fp32 = output.stat().st_size, 4 * n_weights
    out.print(
        f"wrote {shown(str(output))}: {_bytes(size)}, the same parameters in fp32 are {_bytes(fp32)} "
        f"({fp32 / size:.1f}x)",
        highlight=False,
    )


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="A file written by `bop2nd pack`.")],
    images: Annotated[
        list[Path] | None, typer.Option("--images", help=".npy or picture; may be given several times.")
    ] = None,
    data_name: Annotated[DataName | None, typer.Option("--data", help="Test split of a data set.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="As for train.")] = None,
    background: Annotated[
        Background | None, typer.Option(help="Laid under transparent pictures; white if not given.")
    ] = None,
) -> None:
    """Classify pictures, or measure the accuracy on a data set's test images."""
    with user_errors(ValueError, OSError, ModuleNotFoundError):
        if (images is None) == (data_name is None):
            raise ValueError("give either --images or --data")
        if images is not None and data_dir is not None:
            raise ValueError("--data-dir belongs to --data, not to --images")
        if data_name is not None and background is not None:
            raise ValueError("--background belongs to --images, not to --data")
        packed = inference.load(model)
        if data_name is not None:
            dataset = data.get(data_name.value, data_dir)
            assert isinstance(dataset, data.Dataset)
            _print_accuracy(dataset, _logits(packed, dataset.test_images, dataset.name))
            return
        table = Table(Column("file", overflow="fold"), "image", "class", "probability")
        for path in images or []:
            pixels = data.read_images(path, None if background is None else background.value)
            for i, row in enumerate(_logits(packed, pixels, path).softmax(1)):
                table.add_row(shown(path), str(i), str(int(row.argmax())), f"{float(row.max()):.3f}")
        out.print(table)


def _logits(packed: inference.PackedModel, images: torch.Tensor, source: object) -> torch.Tensor:
    """The model's outputs ``[N, classes]``; ``source`` is where the images come from, for errors."""
    try:
        outputs = [packed(part) for part in images.split(500)]
    except (TypeError, ValueError, RuntimeError) as error:
        wanted = " and ".join(str(list(spec.shape[1:])) for spec in packed.inputs)
        raise ValueError(
            f"{source} does not fit the model, which was packed for inputs of {wanted}: {one_line(error)}"
        ) from error
    first = outputs[0]
    if not isinstance(first, torch.Tensor) or first.dim() != 2 or not first.is_floating_point():
        kind = f"of shape {tuple(first.shape)}" if isinstance(first, torch.Tensor) else type(first).__name__
        raise ValueError(f"the model's result is {kind}; predict needs one tensor [N, classes]")
    return torch.cat(outputs)


def _print_accuracy(dataset: data.Dataset, logits: torch.Tensor) -> None:
    if logits.shape[1] != len(dataset.classes):
        raise ValueError(
            f"the model knows {logits.shape[1]} classes, {dataset.name} has {len(dataset.classes)}"
        )
    predictions, labels = logits.argmax(1), dataset.test_labels
    table = Table("class", "images", "correct", "most often mistaken for")
    for index, name in enumerate(dataset.classes):
        own = predictions[labels == index]
        right = int((own == index).sum())
        mistakes = own[own != index]
        mistaken = dataset.classes[int(mistakes.mode().values)] if len(mistakes) else ""
        table.add_row(name, str(len(own)), f"{right / max(1, len(own)):.1%}", mistaken)
    out.print(table)
    accuracy = float((predictions == labels).double().mean())
    out.print(
        f"accuracy [bold]{accuracy:.2%}[/] on {len(labels)} test images of {dataset.name}", highlight=False
    )


def _bytes(n: float) -> str:
    for unit in ("B", "kB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} MB"


# --------------------------------------------------------------------------------------------- bench


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Measure the operators against their baselines; arguments go to `python -m benchmarks.run`."""
    checkout = Path(__file__).resolve().parent.parent
    with user_errors(FileNotFoundError):
        if not (checkout / "benchmarks" / "run.py").is_file():
            raise FileNotFoundError(
                "the benchmarks live in the source checkout, not in the installed package; "
                "clone the project and run `make bench` there"
            )
    path = os.pathsep.join(filter(None, (str(checkout), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "benchmarks.run", *context.args]
    environment: dict[str, Any] = {**os.environ, "PYTHONPATH": path}
    status = subprocess.run(command, env=environment, check=False).returncode
    raise typer.Exit(status if status >= 0 else 128 - status)  # as a shell says that a signal ended it
