"""``bop2nd study``: start, resume or report a study from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..terminal import fail, out, shown, user_errors
from ..train_record import TrainingError
from ..train_replicas import checked_device
from .definitions import STUDIES, StudyError

if TYPE_CHECKING:
    from .trials import Trials  # needs Optuna, which other commands do without

COMMITTED = Path("studies/results")


def study(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(STUDIES)}.")],
    data_name: Annotated[str, typer.Option("--data", help="Data set.")] = "cifar10",
    data_dir: Annotated[Path | None, typer.Option(help="Folder of the data set's files.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each line of the table.")] = 3,
    epochs: Annotated[int | None, typer.Option(min=1, help="Of a run; schedules span them.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Of the network.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1)] = None,
    trials: Annotated[int, typer.Option(min=1, help="How many points a search tries.")] = 60,
    only: Annotated[
        list[str] | None, typer.Option(help="Lines whose names contain this; may be given several times.")
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(help="checkpoint.pt of the network whose outputs lines learn."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes; they divide torch's threads.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="Folder of the study; out/studies/NAME if not given.")
    ] = None,
    report_only: Annotated[
        bool,
        typer.Option("--report", help="Only draw table and pictures of --out (studies/results/NAME)."),
    ] = False,
) -> None:
    """Run a study, or go on with it: the same command on any machine that sees --out takes part in it."""
    with user_errors(StudyError, TrainingError, ValueError, OSError, ModuleNotFoundError):
        from . import records, report, start
        from .trials import JOURNAL, Trials

        if report_only:
            folder = COMMITTED / name if out_dir is None else out_dir
            if (folder / JOURNAL).exists():  # a study that is still running: with what is there by now
                records.collect(Trials(folder))
            if (found := records.read(folder / records.RESULTS)[0]["study"]) != name:
                raise StudyError(f"{folder} holds results of {found}, not of {name}")
            report.write(folder)
            out.print(f"wrote {shown(folder / report.TABLE)}", highlight=False, soft_wrap=True)
            return
        folder = Path("out/studies") / name if out_dir is None else out_dir
        checked_device(device)
        settings = start.settings_of(
            name,
            data_name,
            data_dir,
            seeds=seeds,
            epochs=epochs,
            width=width,
            batch_size=batch_size,
            n_trials=trials,
            only=only or (),
            teacher=teacher,
        )
        opened = start.open_study(folder, settings)
    _say(opened)
    statuses: list[int] = []
    if not opened.finished():
        try:
            statuses = start.run_workers(opened, workers, data_dir, device, teacher)
        except KeyboardInterrupt:
            fail(f"interrupted: {_counts(opened)}; the same command goes on from there", 130)
        _say(opened)
    with user_errors(StudyError, OSError, status=1):
        if records.collect(opened):
            report.write(folder)
    if errors := opened.errors():
        number, why = next(iter(errors.items()))
        fail(f"{len(errors)} trials failed; trial {number}: {why}", 1)
    if killed := [status for status in statuses if status]:
        fail(f"{len(killed)} of {workers} workers ended early; the same command goes on from there", 1)


def _counts(opened: Trials) -> str:
    return ", ".join(f"{count} {state}" for state, count in opened.counts().items())


def _say(opened: Trials) -> None:
    out.print(f"{shown(opened.folder)}: {_counts(opened)}", highlight=False, soft_wrap=True)
