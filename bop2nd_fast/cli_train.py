"""``bop2nd recipes`` and ``bop2nd train``."""

from __future__ import annotations

import difflib
import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.progress import BarColumn, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from torch import nn

from . import data, recipes, train
from .checkpoint import PREVIOUS, CheckpointError
from .optim.courses import FORMS, parse, text_of
from .recipes import Recipe
from .terminal import err, fail, out, refuse_existing, shown, user_errors
from .train_record import Epoch, Progress, TrainingError, model_from_checkpoint, read_checkpoint, recorded
from .train_replicas import checked_device, join_processes

LISTED = ("name", "network", "data", "optimizer", "epochs", "batch")  # of a recipe
PICTURE, TENSORBOARD = "training.png", "tensorboard"


def recipes_command(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="One recipe, with all it sets.")
    ] = None,
) -> None:
    """List the recipes (the papers' runs, and what a reader wants beside them), or show one."""
    if name is not None:
        with user_errors(ValueError):
            _show(recipe_called(name))
        return
    wide = out.width >= 78  # on a narrow terminal nothing is cut off
    columns = LISTED if wide else ("name", "epochs")
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=True, justify="right" if column in ("epochs", "batch") else "left")
    for each in recipes.NAMES:
        it = recipes.get(each)
        cells = (each, it.network, it.dataset, it.optimizer, str(it.epochs), str(it.batch_size))
        table.add_row(*(cell for cell, column in zip(cells, LISTED, strict=True) if column in columns))
    out.print(table)
    out.print("[bold]bop2nd recipes NAME[/] shows what one sets, [bold]bop2nd train NAME[/] starts it.")


def _show(it: Recipe) -> None:
    table = Table(title=shown(it.name), title_justify="left", show_header=False, box=box.SIMPLE)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    correction = it.preset.bias_correction
    table.add_row("network", " ".join([it.network, *(f"{k}={v}" for k, v in it.options.items())]))
    table.add_row("data", f"{it.dataset}, augmentation {it.augmentation}")
    table.add_row("optimizer", it.optimizer + (f", bias_correction={correction}" if correction else ""))
    for key, course in it.courses.items():
        table.add_row(key, _short(text_of(course)))
    table.add_row("epochs", str(it.epochs))
    table.add_row("batch size", str(it.batch_size))
    out.print(table, highlight=False)
    out.print(f"[bold]bop2nd train {shown(it.name)}[/] starts it; --set and --schedule change it.")


def recipe_called(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ValueError: there is none; the message says which one may have been meant.
    """
    close = difflib.get_close_matches(name, recipes.NAMES, n=1)
    if name not in recipes.NAMES and close:
        known = ", ".join(recipes.NAMES)
        raise ValueError(f"there is no recipe {name!r}; did you mean {close[0]!r}? There are {known}")
    return recipes.get(name)


def _short(text: str) -> str:
    """``linear:0.01:1e-05`` for a reader; a constant is its value."""
    kind, *numbers = text.split(":")
    return ":".join([*([] if kind == "constant" else [kind]), *(f"{float(n):g}" for n in numbers)])


def train_command(
    name: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="A recipe; `bop2nd recipes` lists them.")
    ] = None,
    data_name: Annotated[
        str | None,
        typer.Option("--data", help=f"Another data set than the recipe's: {', '.join(data.NAMES)}."),
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder of its files (digits need none).")] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Of pictures from a folder; 224.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Schedules span the run whatever its length.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Of all processes together.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Channels of the first layer.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="NAME=VALUE of the network: norm=layer.")] = None,
    augmentation: Annotated[str | None, typer.Option(help=", ".join(recipes.AUGMENTATIONS))] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="NAME=VALUE: gamma=1e-3, lr=0.01, bias_correction=adam; several times."),
    ] = None,
    schedule: Annotated[list[str] | None, typer.Option(help=f"NAME=SCHEDULE; {FORMS}")] = None,
    teacher: Annotated[
        Path | None, typer.Option(help="checkpoint.pt of a network whose outputs are learnt, not the labels.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**63 - 1, help="Of initial weights, batches, augmentation; 0.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    amp: Annotated[str | None, typer.Option(help=f"Autocast: {', '.join(train.AMP)}.")] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Run the network through torch.compile.")
    ] = False,
    graph: Annotated[bool, typer.Option("--graph", help="Replay each step as a CUDA graph.")] = False,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode pictures of a folder.")] = 0,
    out_dir: Annotated[
        Path, typer.Option("--out", help="Where checkpoint.pt, history.jsonl and training.png go.")
    ] = Path("out/train"),
    resume: Annotated[bool, typer.Option("--resume", help="Continue from --out's checkpoint.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write into --out/tensorboard.")] = False,
) -> None:
    """Train a recipe. Under torchrun the same command trains data-parallel."""
    kinds = (ValueError, OSError, ModuleNotFoundError, TrainingError, CheckpointError)
    with user_errors(*kinds):
        from . import plots  # what is missing is said before the training, not after it

        target = join_processes(checked_device(device))
        checkpoint = out_dir / train.CHECKPOINT
        run: dict[str, Any] = {"seed": 0, "amp": None}
        if name is not None:
            recipe = recipe_called(name)
        elif resume:
            recipe, run = recorded(checkpoint)
        else:
            raise ValueError("name a recipe, as in `bop2nd train digits`; `bop2nd recipes` lists them")
        recipe = _changed(recipe, set_ or [], schedule or []).replace(
            dataset=data_name,
            epochs=epochs,
            batch_size=batch_size,
            width=width,
            options=dict(_value(*_pair("--option", text)) for text in option or []),
            augmentation=augmentation,
        )
        _check_folder(out_dir, resume)
        dataset = data.get(recipe.dataset, data_dir, image_size)
        trainer = train.Trainer(
            recipe,
            dataset,
            seed=run["seed"] if seed is None else seed,
            device=target,
            out=out_dir,
            amp=run["amp"] if amp is None else amp,
            compile=compile,
            graph=graph,
            teacher=_teacher(teacher),
            workers=workers,
        )
        if resume:
            _restore(trainer)
        trainer.replicas.total([0.0])  # everybody has looked before anybody writes
        _make_folder(out_dir)
        log = _tensorboard(out_dir, trainer.step) if tensorboard and trainer.replicas.first else None
    try:
        with _run_errors(), _signals(trainer):
            run_with_progress(trainer, log)
            if trainer.replicas.first:
                title = f"{recipe.name}: {recipe.network} on {dataset.name}, {_size(trainer.model)}"
                plots.training(trainer.history, out_dir / PICTURE, title)
    except KeyboardInterrupt:
        if not trainer.replicas.first:  # one of them says it
            raise typer.Exit(130) from None
        fail(f"interrupted: {_what_is_left(checkpoint, trainer.n_steps)}", 130)
    except SystemExit:  # from the console
        fail(f"nobody reads the output any more: {_what_is_left(checkpoint, trainer.n_steps)}", 1)
    if trainer.replicas.first:
        trainer.report()
        accuracy = trainer.history[-1].test_accuracy
        out.print(
            f"test accuracy [bold]{accuracy:.2%}[/]; wrote {shown(out_dir)}/",
            highlight=False,
            soft_wrap=True,
        )
    trainer.replicas.leave()


# ------------------------------------------------------------------------------ what was asked for


def _pair(option: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise ValueError(f"{option} {text!r} is not NAME=VALUE")
    return name, value


def _value(name: str, text: str) -> tuple[str, Any]:
    """A network's option: a whole number, another number, a switch, or text."""
    if text in ("true", "false"):
        return name, text == "true"
    for kind in (int, float):
        try:
            return name, kind(text)
        except ValueError:
            continue
    return name, text


def _changed(recipe: Recipe, values: Sequence[str], schedules: Sequence[str]) -> Recipe:
    """``recipe`` with the hyperparameters of ``--set`` and ``--schedule``."""
    courses, correction = {}, None
    for text in values:
        name, value = _pair("--set", text)
        if name == "bias_correction":
            correction = value
            continue
        try:
            courses[name] = parse(f"constant:{float(value)!r}")
        except ValueError:
            raise ValueError(f"--set {text!r}: {value!r} is not a number") from None
    for text in schedules:
        name, value = _pair("--schedule", text)
        courses[name] = parse(value)
    return recipe.replace(schedules=courses, bias_correction=correction)


def _teacher(path: Path | None) -> nn.Module | None:
    return None if path is None else model_from_checkpoint(path)[0]


def _check_folder(folder: Path, resume: bool) -> None:
    checkpoint = folder / train.CHECKPOINT
    previous = folder / f"{train.CHECKPOINT}{PREVIOUS}"
    if resume:
        if not (checkpoint.exists() or previous.exists()):
            raise FileNotFoundError(f"there is no file {checkpoint} to resume from")
        return
    refuse_existing(checkpoint, previous, instead="continue it with --resume or choose another --out")
    refuse_existing(
        folder / train.HISTORY, folder / PICTURE, folder / TENSORBOARD, instead="choose another --out"
    )


def _make_folder(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"no permission to write into the folder {folder}")


def _restore(trainer: train.Trainer) -> None:
    """Go on from the checkpoint; what the library warns of (a damaged file) becomes a line of its own."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", RuntimeWarning)
        trainer.restore()
    for warning in said:
        err.print(f"[bold yellow]warning:[/] {shown(warning.message)}", highlight=False, soft_wrap=True)


# ------------------------------------------------------------------------------------- the run itself


@contextmanager
def _run_errors() -> Iterator[None]:
    """What ends a run: a picture that cannot be read is the user's (2), a loss that is NaN or a full disk is
    not (1)."""
    with user_errors(OSError, TrainingError, CheckpointError, status=1), user_errors(ValueError):
        yield


@contextmanager
def _signals(trainer: train.Trainer) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the run after the step that is being taken; the second one ends it at once."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def stop(number: int, frame: object) -> None:
        restore()
        trainer.interrupt()

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        restore()


def _what_is_left(checkpoint: Path, n_steps: int) -> str:
    if not checkpoint.exists():
        return "no checkpoint was due yet, nothing was saved"
    state = read_checkpoint(checkpoint)
    n_epochs = len(state["members"]["record"]["history"])
    return (
        f"{state['step']} of {n_steps} steps ({n_epochs} whole epochs) are in {checkpoint}; "
        "the same command with --resume goes on from there"
    )


def run_with_progress(trainer: train.Trainer, tensorboard: Any = None) -> list[Epoch]:
    """Train with a live bar: loss, accuracy, flip rate, steps per second; one line per finished epoch.

    Of several processes the first one speaks. ``tensorboard``: a writer, or None.
    """
    columns: list[ProgressColumn] = [TextColumn("epoch {task.fields[epoch]}  loss {task.fields[loss]}")]
    if out.width >= 78:  # a narrow terminal gets what fits
        columns += [
            BarColumn(bar_width=12),
            TextColumn("acc {task.fields[accuracy]}  flips {task.fields[flip_rate]}"),
            TextColumn("{task.fields[rate]} steps/s"),
        ]
    columns.append(TimeRemainingColumn(compact=True))
    if trainer.step >= trainer.n_steps:
        return trainer.history  # resumed at its end
    with Bar(*columns, console=out, disable=not trainer.replicas.first) as bar:
        blank: dict[str, Any] = {"epoch": "-", "loss": "-", "accuracy": "-", "flip_rate": "-", "rate": "-"}
        task = bar.add_task("training", total=trainer.n_steps, completed=trainer.step, **blank)

        def on_step(now: Progress) -> None:
            bar.update(
                task,
                completed=now.step,
                epoch=f"{now.epoch}/{trainer.recipe.epochs}",
                loss=f"{now.loss:.3f}",
                accuracy=f"{now.accuracy:.1%}",
                flip_rate=_rate(now.flip_rate),
                rate=f"{now.steps_per_second:.1f}",
            )
            if tensorboard is not None:
                trainer.log(tensorboard, now)

        def on_epoch(epoch: Epoch) -> None:
            if tensorboard is not None:
                tensorboard.add_scalar("accuracy/test", epoch.test_accuracy, epoch.step)
                tensorboard.flush()
            if trainer.replicas.first:
                bar.console.print(
                    f"epoch {epoch.epoch:3d}  loss {epoch.loss:.3f}  train {epoch.train_accuracy:6.1%}  "
                    f"test {epoch.test_accuracy:6.1%}  "
                    f"flips {_rate(epoch.flip_rate)}  {epoch.steps_per_second:.1f} steps/s",
                    highlight=False,
                )

        return trainer.run(on_step, on_epoch)


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _tensorboard(folder: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / TENSORBOARD), purge_step=step)


def _size(model: nn.Module) -> str:
    n = sum(p.numel() for p in model.parameters())
    return f"{n / 1e6:.1f} M parameters" if n >= 1e6 else f"{n / 1e3:.0f} k parameters"
