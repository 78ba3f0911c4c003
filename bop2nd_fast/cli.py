"""The command line: ``bop2nd info | recipes | train | study | pack | predict | summary | bench``.

Mistakes of the user (a missing file, an impossible value) end with one line on standard error and exit
status 2, and nothing is written; a run that fails by itself (a loss that became NaN, a full disk) ends with
1, one that is interrupted with 130. No command replaces a file that it was not told to replace.
"""

from __future__ import annotations

import os
import subprocess
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Column, Table

from . import __version__, backends, cli_summary, cli_train, data, inference
from .atomic_write import check_target
from .studies import command as studies_command
from .system_report import versions
from .terminal import one_line, out, refuse_existing, shown, user_errors
from .train_record import TrainingError, model_from_checkpoint

app = typer.Typer(
    help="Train, pack and run binarized neural networks (Bop2ndOrder).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


_NAMES = ", ".join(data.NAMES)


class Background(str, Enum):
    black = "black"
    white = "white"


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
        table.add_column(column, overflow="fold", no_wrap=column in ("backend", "state"))
    for status in backends.report():
        state = (
            "[bold green]in use[/]" if status.active else "available" if status.available else "[dim]no[/]"
        )
        table.add_row(status.name, status.devices, state, shown(status.note))
    out.print(table)
    out.print("Force one with [bold]BOP2ND_BACKEND=name[/] or bop2nd_fast.backends.use(name).")


app.command("recipes")(cli_train.recipes_command)
app.command("train")(cli_train.train_command)
app.command("study")(studies_command.study)
app.command("summary")(cli_summary.summary_command)


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
    image_bytes: Annotated[
        bool, typer.Option("--image-bytes", help="The packed model takes uint8 images, as cameras give them.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace the file if it exists.")] = False,
) -> None:
    """Pack a trained network: 1 bit per binary weight, batch norm folded into thresholds."""
    with user_errors(OSError, TrainingError, ValueError):
        target, _ = check_target(output)
        if target.exists() and checkpoint.exists() and target.samefile(checkpoint):
            raise ValueError(f"{output} is the checkpoint itself; choose another --output")
        if not force:
            refuse_existing(output, instead="choose another --output, or replace it with --force")
        if _first_bytes(checkpoint)[8:9] == b"{":
            raise ValueError(f"{checkpoint} is a packed model already: give it to `bop2nd predict`")
        model, record = model_from_checkpoint(checkpoint)
        images = record["dataset"]
        shape = (1, images["in_channels"], images["image_size"], images["image_size"])
        example = torch.zeros(shape, dtype=torch.uint8 if image_bytes else torch.float32)
        inference.convert(model, example, exact=exact, image_bytes=image_bytes).save(output)
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
    data_name: Annotated[str | None, typer.Option("--data", help=f"Test split of: {_NAMES}.")] = None,
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
        if _first_bytes(model).startswith(b"PK"):
            raise ValueError(f"{model} is a checkpoint: pack it first, `bop2nd pack {model}`")
        packed = inference.load(model)
        if data_name is not None:
            size = packed.inputs[0].shape[-1] if data_name == "imagenet" else None
            dataset = data.get(data_name, data_dir, size if isinstance(size, int) else None)
            batches = [(_logits(packed, x, dataset.name), y) for x, y in dataset.test_batches(500)]
            logits, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
            _print_accuracy(dataset, logits, labels)
            return
        table = Table(Column("file", overflow="fold"), "image", "class", "probability")
        for path in images or []:
            pixels = data.read_images(path, None if background is None else background.value)
            for i, row in enumerate(_logits(packed, pixels, path).softmax(1)):
                table.add_row(shown(path), str(i), str(int(row.argmax())), f"{float(row.max()):.3f}")
        out.print(table)


def _first_bytes(path: Path) -> bytes:
    """Enough to tell a checkpoint (a zip file) from a packed model; nothing of what is no file."""
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        return file.read(9)


def _logits(packed: inference.PackedModel, images: torch.Tensor, source: object) -> torch.Tensor:
    """The model's outputs ``[N, classes]``; ``source`` is where the images come from, for errors."""
    try:
        outputs = [packed(_as_input(packed, part)) for part in images.split(500)]
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


def _as_input(packed: inference.PackedModel, images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] as the model takes them: bytes, if it does.

    Raises:
        ValueError: it does, and these are no bytes.
    """
    if [spec.dtype for spec in packed.inputs] != [torch.uint8]:
        return images
    bytes = ((images + 1) * 127.5).round()
    if bool((bytes < 0).any() or (bytes > 255).any()) or not torch.equal(bytes / 127.5 - 1, images):
        raise ValueError("it takes bytes v that stand for v / 127.5 - 1, and not all of these values do")
    return bytes.to(torch.uint8)


def _print_accuracy(
    dataset: data.Dataset | data.ImageFolder, logits: torch.Tensor, labels: torch.Tensor
) -> None:
    if logits.shape[1] != len(dataset.classes):
        raise ValueError(
            f"the model knows {logits.shape[1]} classes, {dataset.name} has {len(dataset.classes)}"
        )
    predictions = logits.argmax(1)
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
    """Measure the operators against their baselines; arguments go to `python -m benchmarks.run`.

    Listed by `bop2nd bench -- --help`: --suite, --quick, --compare BASE and others.
    """
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
