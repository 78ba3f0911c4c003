"""``bop2nd summary``: layers, operations and bytes of a recipe's network, a checkpoint or a packed model."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table
from torch import Tensor, nn

from . import data, inference, models, recipes
from .network_summary import Summary, summary
from .terminal import out, refuse_existing, shown, user_errors
from .train_record import TrainingError, model_from_checkpoint


class Format(str, Enum):
    table = "table"
    markdown = "markdown"
    json = "json"


def summary_command(
    network: Annotated[str, typer.Argument(help="A recipe, a checkpoint.pt, or a packed model.")],
    batch: Annotated[int, typer.Option(min=1, help="Images in the call.")] = 1,
    width: Annotated[int | None, typer.Option(min=1, help="Of a recipe's network.")] = None,
    timed: Annotated[bool, typer.Option("--time", help="Measure every layer on this machine.")] = False,
    form: Annotated[Format, typer.Option("--format", help="How to print it.")] = Format.table,
    picture: Annotated[
        Path | None, typer.Option(help="Also draw bytes (and times) per layer into this PNG.")
    ] = None,
) -> None:
    """Show a network layer by layer: shapes, multiply-accumulates, bytes, what a training step saves."""
    with user_errors(ValueError, OSError, TrainingError, ModuleNotFoundError):
        if picture is not None:
            refuse_existing(picture, instead="choose another --picture")
        found = summary(*_network(network, batch, width), timed=timed)
        if picture is not None:
            from .plots import layers

            layers(found, picture, title=f"{network}, batch {batch}")
    if form is Format.json:
        print(found.to_json())
    elif form is Format.markdown:
        print(found, end="")
    else:
        _print(found)


def _network(name: str, batch: int, width: int | None) -> tuple[nn.Module, Tensor]:
    """The network and an example of ``batch`` images."""
    path = Path(name)
    if name in recipes.NAMES:
        recipe = recipes.get(name).replace(width=width)
        classes, channels, size = data.SHAPES[recipe.dataset]
        model = models.get(
            recipe.network, num_classes=classes, in_channels=channels, image_size=size, **recipe.options
        )
        return model, torch.randn(batch, channels, size, size)
    if width is not None:
        raise ValueError("--width is for recipes; a file has the width it was trained with")
    if not path.exists():
        raise ValueError(f"there is no recipe and no file {name!r}; recipes: {', '.join(recipes.NAMES)}")
    with path.open("rb") as file:
        packed = file.read(9)[8:] == b"{"
    if not packed:
        trained, record = model_from_checkpoint(path)
        images = record["dataset"]
        size = images["image_size"]
        return trained, torch.randn(batch, images["in_channels"], size, size)
    model = inference.load(path)
    if len(model.inputs) != 1:
        raise ValueError(f"{name} has {len(model.inputs)} inputs; bop2nd_fast.summary takes them")
    spec = model.inputs[0]
    example = torch.zeros((batch, *spec.shape[1:]), dtype=spec.dtype)
    return model, example.normal_() if spec.dtype.is_floating_point else example


# What a narrow terminal does without, first to go first.
_DISPENSABLE = (
    *("input", "1-bit x real MACs", "real weights", "kernel", "saved for backward", "kernel's share"),
    *("in fp32", "real MACs", "1-bit weights", "output", "BOPs", "kind"),
)


def _print(found: Summary) -> None:
    titles, rows = found.cells()
    columns = dict(zip(titles, zip(*rows, strict=True), strict=True))
    left_out = []
    for title in _DISPENSABLE:
        if sum(3 + max(map(len, (name, *cells))) for name, cells in columns.items()) < out.width:
            break
        if columns.pop(title, None) is not None:
            left_out.append(title)
    table = Table()
    for title in columns:
        text = title in ("layer", "kind", "input", "output", "kernel")
        table.add_column(title, justify="left" if text else "right", overflow="fold")
    *layers, total = zip(*columns.values(), strict=True)
    for row in layers:
        table.add_row(*map(shown, row))
    table.add_section()
    table.add_row(*map(shown, total), style="bold")
    out.print(table)
    out.print("BOPs: binary MACs / 64 + the others. Saved for backward: by one training step.")
    if left_out:
        out.print(f"Not shown for lack of room: {', '.join(left_out)} (--format markdown has all).")
