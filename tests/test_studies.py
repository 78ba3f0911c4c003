"""Studies: trials that survive their processes, refusals, results that are the trainings', reports."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bop2nd_fast import cli, data, recipes
from bop2nd_fast.optim.courses import Constant, Linear
from bop2nd_fast.studies import (
    claims,
    definitions,
    evidence,
    pictures,
    records,
    report,
    search,
    start,
    summary,
    tables,
)
from bop2nd_fast.studies.definitions import Arm, StudyError
from bop2nd_fast.studies.trials import Trials, create, differences
from bop2nd_fast.studies.worker import Place, held_out, run_trial, work
from bop2nd_fast.train import Trainer
from bop2nd_fast.train_record import model_from_checkpoint

ROOT = Path(__file__).parents[1]
STAMP = {
    "processor": "a processor",
    "active_backend": "avx2",
    "torch": "2.0",
    "commit": "abc",
    "dirty": False,
    "date": "2026-01-01T00:00:00+00:00",
    "gpu": None,
}


def bop2nd(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], prog_name="bop2nd")
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def refused(*arguments: object) -> str:
    """The line in which a command is refused."""
    status, _, error = bop2nd("study", *arguments)
    assert status == 2 and error.count("\n") == 1 and error.startswith("error: "), (status, error)
    return error


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def settings(name: str = "optimizers", **changes: object) -> dict[str, object]:
    options = {"seeds": 2, "epochs": 2, "width": 2, "only": ("biased, short", "Bop, short")}
    return start.settings_of(name, "digits", None, **{**options, **changes})


# ------------------------------------------------------------------------------------- what is compared


@pytest.mark.parametrize("name", definitions.STUDIES)
def test_every_study_has_distinct_lines_that_survive_their_text(name):
    arms = definitions.arms_of(name, "cifar10", epochs=4, width=3)
    assert len({arm.name for arm in arms}) == len(arms)
    for arm in arms:
        assert Arm.from_plain(json.loads(json.dumps(arm.to_plain()))) == arm
        assert (arm.recipe.dataset, arm.recipe.epochs, arm.recipe.options["width"]) == ("cifar10", 4, 3)
        assert arm.recipe.augmentation == (
            "flip" if name in ("ladder", "optimizers", "search") else "crop_flip"
        )


def test_every_rung_of_the_ladder_has_what_those_before_it_have():
    rungs = [definitions.arms_of("ladder", "cifar10")[i::2] for i in (0, 1)]
    for arms, weights in zip(rungs, ("binary", "latent"), strict=True):
        options = [{"cifar": True, "width": 16, "weights": weights}]
        for added in ({"sign": "rsign"}, {"activation": "rprelu"}, {"scale": True}, {}):
            options.append(options[-1] | added)
        assert [arm.recipe.options for arm in arms] == options
        assert [arm.teacher for arm in arms] == [False] * 4 + [True]
    assert {arm.recipe.optimizer for arm in rungs[0]} == {"Bop2ndOrder"}


def test_optimizers_are_compared_on_one_network_and_budget():
    arms = definitions.arms_of("optimizers", "cifar10")
    same = {(a.recipe.network, a.recipe.epochs, a.recipe.batch_size, a.recipe.augmentation) for a in arms}
    assert len(same) == 1
    kinds = {(a.recipe.optimizer, a.recipe.preset.bias_correction) for a in arms}
    versions = {("Bop2ndOrder", correction) for correction in ("none", "reference", "adam")}
    assert kinds == {("Adam", None), ("Bop", None), *versions}


def test_the_ablation_is_a_grid_of_decades_around_the_papers_point():
    arms = definitions.arms_of("ablation", "cifar10")
    base = recipes.get("ablation").courses
    points = {
        (a.axes["version"], *(a.recipe.courses[n].at(0, 1, 1) for n in ("gamma", "sigma", "threshold")))
        for a in arms
    }
    assert len(points) == 2 * 27
    for version in ("biased", "bias-corrected"):
        assert (version, base["gamma"].start, base["sigma"].start, base["threshold"].start) in points


def test_the_schedulers_differ_in_what_is_scheduled_alone():
    arms = {arm.name: arm.recipe for arm in definitions.arms_of("schedulers", "cifar10", epochs=7)}
    assert len(arms) == 10
    for version in ("biased", "bias-corrected"):
        for what in ("none", "gamma", "sigma", "threshold", "all"):
            moving = {
                n for n, course in arms[f"{version}, {what}"].courses.items() if type(course) is not Constant
            }
            assert moving == {"none": set(), "all": {"gamma", "sigma", "threshold"}}.get(what, {what})
        assert arms[f"{version}, all"].courses["gamma"].every == 2  # of 350 epochs it was 100


def test_the_search_measures_thresholds_by_the_noise():
    point = {
        **search.FIRST,
        "gamma": 0.02,
        "gamma_end": 0.01,
        "threshold": 2.0,
        "threshold_end": 3.0,
        "lr": 0.5,
    }
    found = search.courses({**point, "sigma": 0.125, "lr_end": 0.1})
    assert found["gamma"] == Linear(0.02, 0.0002) and found["sigma"] == Constant(0.125)
    assert found["lr"] == Linear(0.5, 0.05)
    assert found["threshold"].start == pytest.approx(0.2)  # 2 * sqrt(0.01)
    assert found["threshold"].end == pytest.approx(0.03)  # 3 * sqrt(0.0001)


def test_validation_images_are_training_images_and_nothing_is_tested_on():
    full = data.digits()
    part = held_out(full)
    n = len(full.train_labels)
    assert len(part.test_labels) == round(0.1 * n) and len(part.train_labels) + len(part.test_labels) == n
    together = torch.cat([part.train_images, part.test_images]).flatten(1)
    assert torch.equal(together.sort(0).values, full.train_images.flatten(1).sort(0).values)
    assert torch.equal(held_out(full).test_images, part.test_images)


def test_the_hash_is_of_the_images_and_labels():
    digits = data.digits()
    before = records.dataset_hash(digits)
    assert before == records.dataset_hash(data.digits())
    digits.test_labels[3] += 1
    assert records.dataset_hash(digits) != before


# ------------------------------------------------------------------------------------- taking trials


def hold(folder: Path, ready: object, taken: object) -> None:
    """In a process of its own: take a trial and never let it go."""
    with Trials(folder).take() as trial:
        trial.suggest_categorical("arm", ["a", "b"])
        taken.put(trial.number)
        ready.set()
        time.sleep(100)


@pytest.fixture
def small(tmp_path) -> Path:
    folder = tmp_path / "study"
    made = settings()
    create(folder, made, [{"arm": "b", "seed": 0}, {"arm": "a", "seed": 0}])
    return folder


def test_a_trial_of_a_killed_process_is_taken_again_and_one_of_a_living_is_not(small):
    context = multiprocessing.get_context("fork")
    ready, taken = context.Event(), context.Queue()
    other = context.Process(target=hold, args=(small, ready, taken))
    other.start()
    assert ready.wait(60) and taken.get() == 0
    trials = Trials(small)
    with trials.take() as trial:
        assert trial.number == 1
    assert trials.counts() == {"running": 2}
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    with trials.take() as trial:
        assert trial.number == 0 and trial.params == {"arm": "b"}  # with the parameters it had
        trials.study.tell(trial, 0.5)
    with trials.take() as trial:
        trials.study.tell(trial, 0.25)
    with trials.take() as trial:
        assert trial is None
    assert trials.counts() == {"complete": 2}


def test_making_a_study_twice_leaves_the_first(small):
    before = files(small)
    create(small, {**settings(), "study": "another"}, [])
    assert files(small) == before


def test_differences_are_named():
    before, now = settings(), settings(epochs=3, only=("biased, short", "Bop, paper"))
    text = "; ".join(differences(before, now))
    assert "Bop, paper is new" in text and "Bop, short is gone" in text
    assert "Bop2ndOrder biased, short: epochs was 2, is now 3" in text
    assert differences(before, settings()) == []


# ------------------------------------------------------------------------------------- whole studies

STUDY = (
    "optimizers",
    "--data",
    "digits",
    "--seeds",
    2,
    "--epochs",
    3,
    "--width",
    2,
    "--only",
    "biased, short",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A study of four trials on two workers, one of which was killed in the middle of a trial."""
    folder = tmp_path_factory.mktemp("studies") / "optimizers"
    arguments = [*map(str, STUDY), "--only", "Bop, short", "--workers", "2", "--out", str(folder)]
    command = [sys.executable, "-m", "bop2nd_fast", "study", *arguments]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = []
    for line in running.stdout:
        lines.append(line)
        if line.startswith("trial"):  # an epoch has just ended: its worker is in the middle of its trial
            os.kill(_busy_worker(folder), signal.SIGKILL)
            break
    output = "".join(lines) + running.stdout.read()
    assert running.wait(120) == 1 and "1 of 2 workers ended early" in output, output
    return folder


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _busy_worker(folder: Path) -> int:
    """A process that holds the lock of a trial."""
    for _ in range(1000):
        held = Path("/proc/locks").read_text()
        for path in sorted(folder.glob("trials/*/lock")):
            if found := re.search(rf"POSIX .* (\d+) [0-9a-f:]+:{path.stat().st_ino} ", held):
                return int(found.group(1))
        time.sleep(0.01)
    raise AssertionError("nobody works on this study")


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="finds the process to kill in /proc/locks")
def test_a_killed_workers_trial_goes_on_and_nothing_is_lost_or_changed(finished, threads):
    assert Trials(finished).counts() == {"complete": 4}
    lines = records.read(finished / records.RESULTS)
    assert [line["epoch"] for line in lines] == 4 * [1, 2, 3]
    assert {line["state"] for line in lines} == {"complete"}
    assert not list(finished.rglob("checkpoint*"))
    digits = data.digits()
    assert {line["dataset"]["sha256"] for line in lines} == {records.dataset_hash(digits)}
    for run in summary.runs_of(lines):
        recipe = recipes.Recipe.from_json(json.dumps(run.last["recipe"]))
        torch.set_num_threads(run.last["threads"])  # sums in torch depend on it
        history = Trainer(recipe, digits, seed=run.last["seed"]).run()
        assert [epoch.loss for epoch in history] == [line["loss"] for line in run.lines]
        assert [epoch.test_accuracy for epoch in history] == [line["accuracy"] for line in run.lines]


def test_a_study_with_other_settings_is_refused_and_nothing_written(finished):
    before = files(finished)
    error = refused(*STUDY, "--epochs", 5, "--only", "Bop, short", "--out", finished)
    assert "epochs was 3, is now 5" in error and "--out" in error
    error = refused(*STUDY, "--out", finished)
    assert "Bop, short is gone" in error
    assert files(finished) == before


def test_a_finished_study_is_only_reported(finished):
    before = files(finished)
    status, text, _ = bop2nd("study", *STUDY, "--only", "Bop, short", "--out", finished)
    assert status == 0 and text.count("4 complete") == 1
    assert files(finished) == before


def test_report_draws_the_same_from_the_results_alone(finished, tmp_path):
    (tmp_path / records.RESULTS).write_bytes((finished / records.RESULTS).read_bytes())
    status, text, _ = bop2nd("study", "optimizers", "--report", "--out", tmp_path)
    assert status == 0 and report.TABLE in text
    assert (tmp_path / report.TABLE).read_bytes() == (finished / report.TABLE).read_bytes()
    assert {path.name for path in tmp_path.glob("*.png")} == {"accuracy.png", "blocked.png"}
    assert "of optimizers, not of norms" in refused("norms", "--report", "--out", tmp_path)


def test_a_search_prunes_by_validation_images(tmp_path):
    made = start.settings_of("search", "digits", None, epochs=4, width=2, n_trials=5)
    trials = start.open_study(tmp_path / "s", made)
    assert work(tmp_path / "s", None, "cpu", 1) == 0
    counts = trials.counts()
    assert counts.get("complete", 0) + counts.get("pruned", 0) == 5
    runs = summary.runs_of(records.read(tmp_path / "s" / records.RESULTS))
    assert {run.last["split"] for run in runs} == {"validation"}
    assert runs[0].last["params"] == pytest.approx(search.FIRST)
    assert len({run.last["params"]["gamma"] for run in runs}) == 5
    for run in runs:
        assert (run.last["state"] == "complete") == run.complete
        recipe = recipes.Recipe.from_json(json.dumps(run.last["recipe"]))
        assert recipe.courses == {**search.courses(run.last["params"])}
    report.write(tmp_path / "s")
    assert "5 trials" in (tmp_path / "s" / report.TABLE).read_text()
    assert (tmp_path / "s" / "search.png").exists()


def test_a_trial_that_fails_is_recorded_and_the_others_go_on(tmp_path):
    made = settings(seeds=1, epochs=1)
    for arm in made["arms"][:1]:
        arm["recipe"]["courses"]["lr"] = "constant:1e+300"
    create(tmp_path / "s", made, start._parameters(made))
    assert work(tmp_path / "s", None, "cpu", 1) == 1
    trials = Trials(tmp_path / "s")
    assert trials.counts() == {"complete": 1, "failed": 1} and "loss became" in trials.errors()[0]


def test_lines_with_a_teacher_learn_its_outputs(tmp_path, monkeypatch):
    recipe = recipes.get("digits").replace(epochs=1, width=2)
    Trainer(recipe, data.digits(), seed=5, out=tmp_path / "teacher").run()
    lines = [Arm("alone", recipe), Arm("taught", recipe, teacher=True)]
    monkeypatch.setitem(definitions.STUDIES, "norms", definitions.Study("norms", "T", lambda: lines))
    out, teacher = tmp_path / "s", tmp_path / "teacher" / "checkpoint.pt"
    given = ("norms", "--data", "digits", "--seeds", 1, "--epochs", 1, "--out", out)
    assert "taught needs a teacher" in refused(*given)
    assert "nothing in norms has a teacher" in refused(*given, "--only", "alone", "--teacher", teacher)
    assert "no file" in refused(*given, "--teacher", tmp_path / "nothing.pt") and not out.exists()
    made = start.settings_of("norms", "digits", None, seeds=1, epochs=1, teacher=teacher)
    start.open_study(out, made)
    with pytest.raises(StudyError, match="another teacher"):
        work(out, None, "cpu", 1)
    assert work(out, None, "cpu", 1, teacher) == 0
    alone, taught = (run.last["loss"] for run in summary.runs_of(records.read(out / records.RESULTS)))
    network, _ = model_from_checkpoint(teacher)
    by_hand = Trainer(recipe, data.digits(), seed=0, teacher=network)
    assert alone != taught
    assert taught == pytest.approx(by_hand.run()[-1].loss, rel=1e-3)


def test_other_images_are_refused(small):
    trials = Trials(small)
    trials.settings["dataset_sha256"] = "0" * 64
    trials.study.set_user_attr("settings", trials.settings)
    with pytest.raises(StudyError, match="other images of digits"):
        work(small, None, "cpu", 1)


def test_sigterm_leaves_a_checkpoint_and_an_unfinished_trial(small, monkeypatch):
    made = settings(seeds=1, epochs=2)
    folder = small.parent / "t"
    create(folder, made, start._parameters(made))
    trials = Trials(folder)
    monkeypatch.setattr(records, "append", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with trials.take() as trial, pytest.raises(KeyboardInterrupt):
        run_trial(trials, trial, data.digits(), Place("cpu", 1, STAMP))
    assert trials.counts() == {"waiting": 1, "running": 1}
    assert (trials.folder_of(0) / "checkpoint.pt").exists()


# ------------------------------------------------------------------------------------- bad input


def test_mistakes_are_one_line_and_write_nothing(tmp_path):
    out = tmp_path / "out"
    assert "optimizers, ablation" in refused("optimisers", "--data", "digits", "--out", out)
    assert "latent Adam" in refused("optimizers", "--data", "digits", "--only", "adamw", "--out", out)
    assert "cifar100" in refused("norms", "--data", "cifar", "--out", out)
    assert "--data-dir" in refused("norms", "--data", "cifar10", "--out", out)
    assert "results.jsonl does not exist" in refused("norms", "--report", "--out", out)
    assert "unknown device 'gpu'" in refused(*STUDY, "--device", "gpu", "--out", out)
    assert not out.exists()
    (tmp_path / "mine.txt").write_text("")
    assert "holds no study" in refused(*STUDY, "--out", tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "mine.txt"]


def test_damaged_results_are_named(tmp_path):
    path = tmp_path / records.RESULTS
    path.write_text("{]\n")
    with pytest.raises(StudyError, match=r"results\.jsonl is damaged"):
        records.read(path)
    path.write_text(json.dumps({**line(), "seed": "0"}) + "\n")
    with pytest.raises(StudyError, match="line 1: seed is '0'"):
        records.read(path)
    path.write_text("")
    with pytest.raises(StudyError, match="no epoch was finished"):
        records.read(path)


# ------------------------------------------------------------------------------------- tables and pictures


def line(**changes: object) -> dict[str, object]:
    recipe = json.loads(recipes.get("digits").to_json())
    return {
        "schema": 1,
        "study": "optimizers",
        "trial": 0,
        "state": "complete",
        "arm": "A",
        "axes": {},
        "params": {},
        "seed": 0,
        "recipe": recipe,
        "split": "test",
        "epoch": 1,
        "epochs": 2,
        "loss": 1.5,
        "train_accuracy": 0.5,
        "accuracy": 0.5,
        "flip_rate": 1e-3,
        "blocked_share": 0.25,
        "seconds": 10.0,
        "clock": "processor",
        "threads": 1,
        "device": "cpu",
        "dataset": {"name": "digits", "sha256": "5" * 64},
        "stamp": STAMP,
        **changes,
    }


def test_the_table_by_hand():
    lines = [
        line(trial=0, epoch=1, accuracy=0.5),
        line(trial=0, epoch=2, accuracy=0.7, seconds=30.0),
        line(trial=1, seed=1, epoch=1, accuracy=0.6),
        line(trial=1, seed=1, epoch=2, accuracy=0.5, seconds=30.0),
        line(trial=2, arm="B", epoch=1, accuracy=0.3, seconds=40.0, flip_rate=None, blocked_share=None),
        line(trial=2, arm="B", epoch=2, accuracy=0.4, seconds=40.0, flip_rate=None, blocked_share=None),
        line(trial=3, arm="B", seed=1, epoch=1, state="running"),
        line(trial=4, arm="C", epoch=1, accuracy=0.25, state="running"),
    ]
    rows = tables.table(lines).splitlines()[-3:]
    # 0.7 and 0.5: mean 0.6, deviation 0.1 * sqrt(2). A takes 40 s, when B has just finished its first epoch.
    deviation = f"{10 * math.sqrt(2):.1f}"
    assert (
        rows[0]
        == f"| A | 2 | 60.0 ± {deviation} | 65.0 ± 7.1 | 60.0 ± {deviation} | 20.0 | 1.0e-03 | 25.0% |"
    )
    assert rows[1] == "| B | 1 of 2 | 40.0 | 40.0 | 30.0 | 40.0 | – | – |"
    assert rows[2] == "| C | 0 of 1 | epoch 1 of 2: 25.0 | | | | | |"


def test_runs_without_times_count_for_accuracies_alone(tmp_path):
    lines = [
        line(trial=0, epoch=1, seconds=None), line(trial=0, epoch=2, accuracy=0.7, seconds=None),
        line(trial=1, epoch=1, seed=1, accuracy=0.3), line(trial=1, epoch=2, seed=1, accuracy=0.5),
        line(trial=2, epoch=1, arm="B", seconds=None), line(trial=2, epoch=2, arm="B", seconds=None),
    ]  # fmt: skip
    text = tables.table(lines)
    assert "seconds are a processor's (those of seed 0 were not measured)" in text
    a, b = text.splitlines()[-2:]
    assert a == "| A | 2 | 60.0 ± 14.1 | 60.0 ± 14.1 | 50.0 | 10.0 | 1.0e-03 | 25.0% |"
    assert b == "| B | 1 | 50.0 | 50.0 | – | – | 1.0e-03 | 25.0% |"
    assert {path.name for path in pictures.draw(lines, tmp_path)} == {"accuracy.png", "blocked.png"}
    wall = [{**each, "clock": "wall"} for each in lines]
    assert "processor" not in tables.table(wall).replace(STAMP["processor"], "")


def test_accuracy_at_a_time_lies_on_straight_lines():
    run = summary.Run([line(accuracy=0.2, seconds=10.0), line(epoch=2, accuracy=0.6, seconds=20.0)])
    assert run.accuracy_at(9.9) is None and run.accuracy_at(10.0) == 0.2
    assert run.accuracy_at(15.0) == pytest.approx(0.3) and run.accuracy_at(99.0) == 0.6


def test_images_that_were_changed_are_called_so():
    sha256 = next(iter(tables.KNOWN))
    lines = [line(dataset={"name": "cifar10", "sha256": sha256})]
    assert "CIFAR-10 (JPEG-75)" in tables.table(lines) and "cifar10" not in tables.table(lines)


def test_heat_maps_of_the_ablation(tmp_path):
    lines = [
        line(study="ablation", arm=arm.name, axes=arm.axes, trial=i, epochs=1, accuracy=i / 54)
        for i, arm in enumerate(definitions.arms_of("ablation", "digits"))
        if i != 7  # a point that is missing is an empty cell
    ]
    drawn = {path.name for path in pictures.draw(lines, tmp_path)}
    assert drawn == {"heatmap_biased.png", "heatmap_bias-corrected.png", "blocked.png"}


# ------------------------------------------------------------------------------------- evidence


def test_the_document_is_filled_from_results_and_an_old_one_is_found(tmp_path):
    folder = tmp_path / evidence.RESULTS / "optimizers"
    folder.mkdir(parents=True)
    lines = [line(), line(epoch=2)]
    (folder / records.RESULTS).write_text("".join(json.dumps(each) + "\n" for each in lines))
    (tmp_path / "docs").mkdir()
    page = tmp_path / evidence.DOCUMENT
    page.write_text("Before\n<!-- study:optimizers -->\nold\n<!-- /study -->\nAfter\n")
    assert page in evidence.outdated(tmp_path)
    evidence.write(tmp_path)
    assert evidence.outdated(tmp_path) == []
    text = page.read_text()
    assert text.startswith("Before\n") and text.endswith("After\n") and "| A | 1 | 50.0 |" in text
    assert "](../studies/results/optimizers/accuracy.png)" in text and "old" not in text
    page.write_text(text.replace("50.0", "51.0"))
    assert evidence.outdated(tmp_path) == [page]
    page.write_text("<!-- study:norms -->\n<!-- /study -->\n")
    assert "No results yet" in evidence.document(tmp_path)
    page.write_text("<!-- study:nothing -->\n<!-- /study -->\n")
    with pytest.raises(StudyError, match="nothing"):
        evidence.outdated(tmp_path)


def test_a_training_is_shown_by_its_history(tmp_path):
    folder = tmp_path / evidence.RESULTS / "long"
    recipe = recipes.get("digits").replace(epochs=4, width=2)
    history = Trainer(recipe, data.digits(), out=folder).run()
    rows = evidence.block(tmp_path, "long").splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| 1", "| 2", "| 3", "| 4"]
    assert f" {100 * history[-1].test_accuracy:.1f} |" in rows[-1]
    assert rows[-1].endswith(f" {sum(epoch.seconds for epoch in history):.0f} |")


def test_the_claims_by_hand():
    def run(arm, trial, *accuracies, study="optimizers", seconds=10.0, **axes):
        own = {"study": study, "arm": arm, "trial": trial, "axes": axes, "seconds": seconds}
        return [line(**own, epoch=e, accuracy=a) for e, a in enumerate(accuracies, start=1)]

    results = {
        "optimizers": [*run("A", 0, 0.5, 0.6), *run("A", 1, 0.7, 0.8), *run("B", 2, 0.9, 0.4, seconds=20.0)],
        "ablation": [
            *run("x", 0, 0.1, 0.2, study="ablation", version="biased"),
            *run("y", 1, 0.1, 0.4, study="ablation", version="biased"),
        ],
    }
    faster, robust, better, schedulers = (claim.measured for claim in claims.claims(results))
    assert (
        "1–2 seeds: B 90.0; A 60.0 ± 14.1." in faster
        and "After the same 20 s of training: B 90.0; A 70" in faster
    )
    alone = [{**each, "seconds": None} if each["arm"] == "A" else each for each in results["optimizers"]]
    assert "After the same" not in claims.claims({"optimizers": alone})[0].measured
    assert robust == "biased: 2 settings, 30.0 ± 14.1 % over them, from 20.0 to 40.0 %."
    assert "after 2 epochs" in better and "A 70.0 ± 14.1; B 40.0." in better
    assert schedulers == claims.NOTHING and claims.claims({})[0].measured == claims.NOTHING
    assert claims.table(results).count("\n") == 6


def test_the_committed_evidence_is_what_the_committed_results_give():
    assert evidence.outdated(ROOT) == []
