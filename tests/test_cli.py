from __future__ import annotations

import errno
import json
import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import bop2nd_fast as bf
from bop2nd_fast import __main__, backends, cli, cli_train, data, inference, recipes, train
from bop2nd_fast.train_record import logits_of, model_from_checkpoint, read_checkpoint

TINY = ["train", "digits", "--epochs", "1", "--width", "2", "--batch-size", "256", "--seed", "3"]


def tiny(epochs: int, *more: object) -> list[object]:
    return [*TINY[:3], epochs, *TINY[4:], *more]


def history_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


class TwoInputs(torch.nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a + b).flatten(1)


class Named(torch.nn.Module):
    def forward(self, a: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": a.flatten(1)}


class Classes(torch.nn.Sequential):
    def __init__(self, n: int) -> None:
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(64, n))


class Result:
    def __init__(self, *arguments: object) -> None:
        done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], prog_name="bop2nd")
        self.status, self.out, self.err = done.exit_code, done.stdout, done.stderr
        self.error = done.exception

    def ok(self) -> Result:
        assert self.status == 0, (self.out, self.err, self.error)
        return self

    def fails(self, *words: str, status: int = 2) -> None:
        """Ended with one short message that contains ``words``, and no traceback."""
        assert self.status == status and isinstance(self.error, SystemExit), (self.out, self.err, self.error)
        assert all(word in self.err for word in words), self.err
        assert "Traceback" not in self.err and self.err.count("\n") <= 12


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("train") / "run"
    Result(*TINY, "--out", folder).ok()
    return folder


@pytest.fixture(scope="module")
def packed_file(run_folder, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pack") / "model.safetensors"
    Result("pack", run_folder / "checkpoint.pt", "-o", path).ok()
    return path


# ----------------------------------------------------------------------------------------- info and help


def test_info_lists_every_backend_and_why_some_are_missing():
    text = " ".join(Result("info").ok().out.split())
    for status in backends.report():
        assert status.name in text
    assert torch.__version__ in text and bf.__version__ in text and "in use" in text
    for status in backends.report():
        if not status.available:
            assert status.note.split()[0] in text


@pytest.mark.parametrize("command", ["info", "recipes", "train", "pack", "predict", "bench"])
def test_every_command_explains_itself(command):
    assert "Usage" in Result(command, "--help").ok().out


def test_version():
    assert Result("--version").ok().out.strip() == bf.__version__


def test_the_installed_command_reaches_the_application():
    command = [
        sys.executable,
        "-m",
        "bop2nd_fast",
        "predict",
        "/nowhere/model.safetensors",
        "--data",
        "digits",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "there is no file /nowhere/model.safetensors" in done.stderr
    assert "Traceback" not in done.stderr


# ------------------------------------------------------------------------------------------------ train


def test_train_writes_checkpoint_history_and_picture(run_folder):
    assert [entry["epoch"] for entry in history_in(run_folder)] == [1]
    assert (run_folder / "training.png").read_bytes().startswith(b"\x89PNG")
    state = read_checkpoint(run_folder / "checkpoint.pt")
    recipe = recipes.Recipe.from_json(state["members"]["record"]["recipe"])
    assert recipe == recipes.get("digits").replace(epochs=1, width=2, batch_size=256)
    assert state["members"]["record"]["run"]["seed"] == 3 and state["step"] == 5


def test_train_shows_progress_and_refuses_a_second_run(tmp_path):
    text = Result(*TINY, "--out", tmp_path).ok().out
    for word in ("loss", "acc", "flips", "steps/s", "epoch 1/1", "regime", "conv1.weight"):
        assert word in text
    Result(*TINY, "--out", tmp_path).fails("exists; continue it with --resume")
    again = Result(*TINY, "--out", tmp_path, "--resume").ok()
    assert "epoch   1" not in again.out and len(history_in(tmp_path)) == 1


def test_options_change_the_recipe(tmp_path):
    options = ["--set", "sigma=0.5", "--set", "bias_correction=adam", "--schedule", "gamma=cosine:0.01:0.001"]
    options += ["--option", "padding_value=-1", "--augmentation", "crop_flip", "--tensorboard"]
    Result(*TINY, *options, "--out", tmp_path).ok()
    record = read_checkpoint(tmp_path / "checkpoint.pt")["members"]["record"]
    plain = json.loads(record["recipe"])
    assert plain["courses"]["sigma"] == "constant:0.5" and plain["courses"]["gamma"] == "cosine:0.01:0.001"
    assert plain["bias_correction"] == "adam" and plain["augmentation"] == "crop_flip"
    assert plain["options"] == {"width": 2, "padding_value": -1}
    assert history_in(tmp_path)[0]["hyperparameters"]["gamma"] == pytest.approx(0.001)
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def interrupted(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupted)
    assert __main__.main() == 130
    assert capsys.readouterr().err == "bop2nd: interrupted\n"


@pytest.mark.parametrize("width", [80, 40])
def test_recipes_are_listed_whole_in_any_width(width, monkeypatch):
    monkeypatch.setattr(cli_train.out, "_width", width)
    lines = Result("recipes").ok().out.splitlines()
    assert {line.split()[0] for line in lines} >= set(recipes.NAMES)
    assert max(map(len, lines)) <= width


def test_one_recipe_is_shown_with_all_it_sets():
    text = Result("recipes", "cifar10_unbiased").ok().out
    assert "linear:0.01:1e-05" in text and "bias_correction=reference" in text and "500" in text
    Result("recipes", "digts").fails("no recipe 'digts'", "did you mean 'digits'")


def test_a_checkpoint_and_a_packed_model_are_told_apart(tmp_path):
    Result(*TINY, "--out", tmp_path / "run").ok()
    packed, checkpoint = tmp_path / "model.safetensors", tmp_path / "run" / "checkpoint.pt"
    Result("predict", checkpoint, "--data", "digits").fails("is a checkpoint", "bop2nd pack")
    Result("pack", checkpoint, "-o", packed).ok()
    Result("pack", packed, "-o", tmp_path / "again.safetensors").fails("packed model already", "predict")


def test_a_run_that_is_finished_is_resumed_to_nothing(tmp_path):
    first = Result(*TINY, "--out", tmp_path).ok().out
    again = Result("train", "--resume", "--out", tmp_path).ok().out
    assert again.splitlines()[-1] == first.splitlines()[-1] and "epoch" not in again


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--set", "gamma=0"], ["gamma", "(0, 1]"]),
        (["--set", "sigma=1.5"], ["sigma", "(0, 1]"]),
        (["--set", "threshold=-1"], ["threshold", ">= 0"]),
        (["--set", "threshold=nan"], ["threshold"]),
        (["--set", "lr=-1"], ["lr"]),
        (["--set", "momentum=0.9"], ["momentum", "gamma, sigma, threshold, lr"]),
        (["--set", "gamma"], ["NAME=VALUE"]),
        (["--set", "gamma=much"], ["not a number"]),
        (["--set", "bias_correction=some"], ["some", "reference"]),
        (["--schedule", "gamma=exponential:1:2"], ["exponential", "linear:START:END", "cosine"]),
        (["--schedule", "gamma=linear:1"], ["linear:1", "linear:START:END"]),
        (["--schedule", "lr=linear:0:1"], ["lr", "above 0"]),
        (["--option", "depth=3"], ["depth", "padding_value"]),
        (["--option", "padding_value=5"], ["padding"]),
        (["--augmentation", "cutout"], ["cutout", "crop_flip"]),
        (["--epochs", "0"], ["epochs"]),
        (["--batch-size", "100000"], ["batch_size"]),
        (["--width", "0"], ["--width"]),
        (["--width", "1000000"], ["allowed"]),
        (["--seed", "-1"], ["--seed"]),
        (["--seed", "9" * 30], ["--seed"]),
        (["--data-dir", "somewhere"], ["take no folder"]),
        (["--image-size", "32"], ["one size"]),
        (["--data", "svhn"], ["svhn", "cifar10"]),
        (["--device", "tpu"], ["tpu", "cpu"]),
        (["--device", "cuda:99"], ["cuda:99", "not there"]),
        (["--amp", "int8"], ["int8", "bf16"]),
        (["--graph"], ["graph", "CUDA"]),
        (["--teacher", "nothing.pt"], ["there is no file nothing.pt"]),
        (["--data", "cifar10"], ["--data-dir"]),
        (["--data", "cifar10", "--data-dir", "/nowhere"], ["/nowhere", "data_batch_1.bin"]),
        (["--resume"], ["there is no file", "checkpoint.pt"]),
    ],
)
def test_train_refuses_impossible_options_and_leaves_nothing(tmp_path, options, words):
    out = tmp_path / "out"
    Result(*TINY, "--out", out, *options).fails(*words)
    assert not out.exists()


def test_an_unknown_recipe_is_refused(tmp_path):
    Result("train", "cifar11", "--out", tmp_path / "x").fails("'cifar11'", "cifar10_biased", "digits")
    Result("train", "--out", tmp_path / "x").fails("name a recipe", "digits")


def test_train_refuses_to_resume_another_run(run_folder):
    before = (run_folder / "checkpoint.pt").read_bytes()
    other = [*TINY, "--out", run_folder, "--resume"]
    Result(*other, "--set", "gamma=0.5").fails("gamma was constant:0.001, is now constant:0.5")
    Result(*tiny(2, "--out", run_folder, "--resume")).fails("epochs was 1, is now 2")
    Result("train", "digits", "--out", run_folder, "--resume").fails("batch_size was 256, is now 32")
    assert (run_folder / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("name", ["checkpoint.pt.previous", "history.jsonl", "training.png"])
def test_train_replaces_nothing_that_is_not_its_own(tmp_path, name):
    (tmp_path / name).write_bytes(b"mine")
    Result(*TINY, "--out", tmp_path).fails(f"{name} exists", "choose another --out")
    assert (tmp_path / name).read_bytes() == b"mine" and os.listdir(tmp_path) == [name]


def test_train_refuses_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    Result(*TINY, "--out", tmp_path / "file").fails("file is a file; allowed is a folder")
    Result(*TINY, "--out", tmp_path / "file" / "x").fails("a part of this path is a file")
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_train_says_what_is_missing_before_it_starts(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "bop2nd_fast.plots", raising=False)
    monkeypatch.delattr(bf, "plots", raising=False)
    Result(*TINY, "--out", tmp_path / "out").fails(
        "'matplotlib' is missing", "pip install 'bop2nd-fast[cli]'"
    )
    assert not (tmp_path / "out").exists()


def test_a_damaged_or_lost_checkpoint_is_said_in_one_line(tmp_path):
    two = tiny(2, "--out", tmp_path)
    Result(*two).ok()
    checkpoint = tmp_path / "checkpoint.pt"
    data = bytearray(checkpoint.read_bytes())
    data[500] ^= 1
    checkpoint.write_bytes(data)
    result = Result(*two, "--resume").ok()
    assert result.err.startswith("warning: ") and result.err.count("\n") == 1
    assert "checkpoint.pt.previous" in result.err and "epoch   2" in result.out
    checkpoint.unlink()
    assert "there is no file" in Result(*two, "--resume").ok().err
    (tmp_path / "checkpoint.pt.previous").unlink()
    checkpoint.write_bytes(data)
    Result(*two, "--resume").fails("not a checkpoint, or it is damaged")
    assert checkpoint.read_bytes() == data


@pytest.mark.parametrize("command", [["pack", "-o", "out"], ["predict", "--data", "digits"]])
def test_what_is_no_file_of_ours_is_refused_in_one_line(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    Path("empty").touch()
    Path("folder").mkdir()
    Path("text").write_text("hello " * 1000)
    Image.new("L", (8, 8)).save("picture.png")
    torch.save({"a": 1}, "other.pt")
    torch.save(torch.nn.Linear(2, 2), "pickled.pt")
    os.mkfifo("pipe")
    before = sorted(os.listdir())
    for name in before:
        result = Result(command[0], name, *command[1:])
        result.fails(name)
        assert result.err.startswith(f"error: {name}") and result.err.count("\n") == 1, result.err
        assert len(result.err) < 200 and "weights_only" not in result.err
    assert sorted(os.listdir()) == before


def test_an_interrupted_run_says_how_to_go_on(tmp_path, monkeypatch):
    save = train.Trainer.save

    def interrupted(self: train.Trainer) -> None:
        if len(self.history) == stop_at:
            raise KeyboardInterrupt
        save(self)

    with monkeypatch.context() as patched:
        patched.setattr(train.Trainer, "save", interrupted)
        stop_at = 1
        Result(*tiny(3, "--out", tmp_path)).fails("interrupted: no checkpoint was due yet", status=130)
        stop_at = 3
        lines = "interrupted: 10 of 15 steps (2 whole epochs) are in", "--resume goes on"
        Result(*tiny(3, "--out", tmp_path)).fails(*lines, status=130)
    text = Result("train", "--out", tmp_path, "--resume").ok().out
    assert "epoch   3" in text and "epoch   2" not in text
    Result(*tiny(3, "--out", tmp_path / "whole")).ok()
    resumed, whole = (
        read_checkpoint(p / "checkpoint.pt")["members"]["model"] for p in (tmp_path, tmp_path / "whole")
    )
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_running_command(tmp_path, number):
    command = [sys.executable, "-m", "bop2nd_fast", *map(str, tiny(100000, "--out", tmp_path))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline().startswith("epoch   1")
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert "of 500000 steps" in errors and "--resume goes on" in errors
    assert read_checkpoint(tmp_path / "checkpoint.pt")["step"] > 0


def test_a_full_disk_is_said_and_the_last_checkpoint_stays(tmp_path, monkeypatch):
    save = train.Trainer.save

    def full(self: train.Trainer) -> None:
        if len(self.history) == 2:
            monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        save(self)

    monkeypatch.setattr(train.Trainer, "save", full)
    Result(*tiny(3, "--out", tmp_path)).fails(str(tmp_path / "checkpoint.pt"), status=1)
    monkeypatch.undo()
    assert read_checkpoint(tmp_path / "checkpoint.pt")["step"] == 5
    assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob(".*"))


# ---------------------------------------------------------------------------------------------- output


def shell(line: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one line of bash; ``$B`` is the command."""
    program = f"set -o pipefail; B='{sys.executable} -m bop2nd_fast'; {line}"
    return subprocess.run(
        ["bash", "-c", program],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1]), **environment},
    )


def test_a_reader_that_leaves_ends_the_command_quietly(tmp_path):
    done = shell("$B info | true", tmp_path)
    assert done.stderr == ""
    done = shell(f"$B {' '.join(map(str, tiny(1000)))} --out run | head -1", tmp_path)
    assert done.stdout.startswith("epoch   1") and "Traceback" not in done.stderr
    assert "nobody reads the output any more" in done.stderr and "--resume goes on" in done.stderr
    assert read_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] > 0


def test_an_output_that_cannot_be_written_is_said(tmp_path):
    done = shell("$B info > /dev/full", tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "could not be written" in done.stderr


@pytest.mark.parametrize(
    "environment",
    [{"NO_COLOR": "1", "COLUMNS": "20"}, {"PYTHONIOENCODING": "ascii", "TERM": "dumb"}],
    ids=["narrow and without colour", "ascii"],
)
def test_output_suits_the_terminal(tmp_path, environment):
    done = shell("$B info && $B predict né.safetensors --data digits", tmp_path, **environment)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "\x1b" not in done.stdout + done.stderr
    assert done.stderr.startswith("error: there is no file n") and bf.__version__ in done.stdout


def test_a_lack_of_memory_is_said(tmp_path, monkeypatch):
    def build(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(recipes.Recipe, "model", build)
    Result(*TINY, "--out", tmp_path / "out").fails("not enough memory")


def test_a_run_that_fails_by_itself_ends_with_one(tmp_path, monkeypatch):
    def diverge(*_: object) -> None:
        raise train.TrainingError("the loss became nan within the steps up to 10")

    monkeypatch.setattr(train.Trainer, "run", diverge)
    Result(*TINY, "--out", tmp_path).fails("the loss became nan", status=1)


# ------------------------------------------------------------------------------------- pack and predict


def test_pack_prints_sizes_and_the_packed_file_predicts_the_same(run_folder, packed_file, tmp_path):
    text = " ".join(
        Result("pack", run_folder / "checkpoint.pt", "-o", tmp_path / "m.safetensors").ok().out.split()
    )
    n_bytes = (tmp_path / "m.safetensors").stat().st_size
    assert cli._bytes(n_bytes) in text and "in fp32" in text
    model, _ = model_from_checkpoint(run_folder / "checkpoint.pt")
    images = data.digits().test_images
    packed = inference.load(packed_file)
    assert torch.equal(logits_of(packed, images), logits_of(model, images))


def test_a_model_of_bytes_predicts_the_same(run_folder, packed_file, tmp_path):
    of_bytes = tmp_path / "bytes.safetensors"
    Result("pack", run_folder / "checkpoint.pt", "-o", of_bytes, "--image-bytes").ok()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "many.npy", pixels)
    Image.fromarray(pixels[1]).save(tmp_path / "one.png")
    options = ["--images", tmp_path / "many.npy", "--images", tmp_path / "one.png"]
    assert Result("predict", of_bytes, *options).ok().out == Result("predict", packed_file, *options).ok().out
    Result("predict", of_bytes, "--data", "digits").fails("takes bytes v that stand for v / 127.5 - 1")
    Result("pack", run_folder / "checkpoint.pt", "-o", tmp_path / "m", "--image-bytes", "--no-exact").fails(
        "image_bytes needs exact=True"
    )
    assert not (tmp_path / "m").exists()


def test_predict_prints_the_accuracy_of_the_trained_model(run_folder, packed_file):
    text = Result("predict", packed_file, "--data", "digits").ok().out
    (epoch,) = history_in(run_folder)
    assert f"accuracy {epoch['test_accuracy']:.2%} on 450 test images" in text
    assert text.count("%") == 11  # ten classes and the total


def test_predict_reads_arrays_and_pictures(packed_file, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "many.npy", pixels)
    np.save(tmp_path / "one.npy", (pixels[1] / 127.5 - 1).astype(np.float32))
    Image.fromarray(pixels[1]).save(tmp_path / "one.png")
    names = ["many.npy", "one.npy", "one.png"]
    options = [option for name in names for option in ("--images", tmp_path / name)]
    rows = [
        line.split("│")
        for line in Result("predict", packed_file, *options).ok().out.splitlines()
        if "│" in line
    ]
    answers = [tuple(cell.strip() for cell in row[2:5]) for row in rows if row[2].strip().isdigit()]
    assert [answer[0] for answer in answers] == ["0", "1", "2", "0", "0"]
    assert answers[1][1:] == answers[3][1:] == answers[4][1:]


def test_pictures_are_read_with_their_channels_and_scale(tmp_path):
    pixels = np.zeros((4, 5, 3), np.uint8)
    pixels[1, 2] = (255, 51, 0)
    Image.fromarray(pixels).save(tmp_path / "colour.png")
    image = data.read_images(tmp_path / "colour.png")
    assert image.shape == (1, 3, 4, 5)
    torch.testing.assert_close(image[0, :, 1, 2], torch.tensor([1.0, 51 / 127.5 - 1, -1.0]))
    np.save(tmp_path / "batch.npy", np.stack([pixels.transpose(2, 0, 1)] * 2))
    assert torch.equal(data.read_images(tmp_path / "batch.npy"), torch.cat([image, image]))


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros(4, np.uint8), ["has shape (4,)"]),
        (np.zeros((8, 8), np.int32), ["int32", "uint8"]),
        (np.full((8, 8), 2.0), ["outside [-1, 1]"]),
        (np.full((8, 8), np.nan), ["outside [-1, 1]"]),
        (np.zeros((1, 3, 8, 8), np.uint8), ["[N, 1, H, W]"]),
        (np.zeros((2, 1, 32, 32), np.uint8), []),
    ],
)
def test_predict_refuses_images_that_do_not_fit(packed_file, tmp_path, array, words):
    np.save(tmp_path / "a.npy", array)
    Result("predict", packed_file, "--images", tmp_path / "a.npy").fails(*words)


def test_predict_refuses_what_is_not_there_or_not_readable(packed_file, tmp_path):
    text = tmp_path / "text.png"
    text.write_text("not a picture")
    Result("predict", packed_file, "--images", text).fails("not a picture")
    Result("predict", packed_file, "--images", tmp_path / "none.npy").fails("there is no file")
    Result("predict", packed_file, "--images", tmp_path / "none.png").fails("there is no file")
    Result("predict", packed_file).fails("either --images or --data")
    Result("predict", tmp_path / "none.safetensors", "--data", "digits").fails("there is no file")
    Result("predict", text, "--data", "digits").fails("not a packed model")
    damaged = tmp_path / "half.safetensors"
    damaged.write_bytes(packed_file.read_bytes()[:-100])
    Result("predict", damaged, "--data", "digits").fails("damaged")


def test_pack_refuses_what_is_no_checkpoint_and_writes_nothing(run_folder, tmp_path):
    output = tmp_path / "m.safetensors"
    half = tmp_path / "half.pt"
    half.write_bytes((run_folder / "checkpoint.pt").read_bytes()[:1000])
    Result("pack", half, "-o", output).fails("not a checkpoint, or it is damaged")
    Result("pack", tmp_path / "none.pt", "-o", output).fails("there is no file")
    assert not output.exists()
    checkpoint = run_folder / "checkpoint.pt"
    Result("pack", checkpoint, "-o", tmp_path / "no" / "file").fails(
        f"there is no folder {tmp_path / 'no'}\n"
    )
    Result("pack", checkpoint, "-o", half / "file").fails("a part of this path is a file, not a folder")
    Result("pack", checkpoint, "-o", tmp_path).fails(f"{tmp_path} is a folder; allowed is a file")
    Result("pack", checkpoint, "-o", "/dev/null").fails("only regular files are written, not /dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert os.listdir(tmp_path) == ["half.pt"]


def test_pack_replaces_nothing_that_it_was_not_told_to(run_folder, tmp_path):
    output, checkpoint = tmp_path / "m.safetensors", tmp_path / "checkpoint.pt"
    checkpoint.write_bytes((run_folder / "checkpoint.pt").read_bytes())
    output.write_bytes(b"mine")
    Result("pack", checkpoint, "-o", output).fails(f"{output} exists; choose another --output, or replace it")
    assert output.read_bytes() == b"mine"
    Result("pack", checkpoint, "-o", output, "--force").ok()
    assert inference.load(output).inputs[0].shape == (1, 1, 8, 8)
    before = checkpoint.read_bytes()
    (tmp_path / "link").symlink_to(checkpoint)
    for name in ("checkpoint.pt", "link"):
        Result("pack", checkpoint, "-o", tmp_path / name, "--force").fails("is the checkpoint itself")
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize(
    ("model", "example", "words"),
    [
        (
            TwoInputs(),
            (torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)),
            ["inputs of [1, 8, 8] and [1, 8, 8]"],
        ),
        (Named(), torch.zeros(1, 1, 8, 8), ["result is dict; predict needs one tensor [N, classes]"]),
        (torch.nn.Conv2d(1, 10, 3), torch.zeros(1, 1, 8, 8), ["of shape (450, 10, 6, 6)", "[N, classes]"]),
        (Classes(7), torch.zeros(1, 1, 8, 8), ["the model knows 7 classes, digits has 10"]),
    ],
    ids=["two inputs", "dict", "picture", "classes"],
)
def test_predict_says_which_models_it_can_use(tmp_path, model, example, words):
    inference.convert(model.eval(), example).save(tmp_path / "m.safetensors")
    Result("predict", tmp_path / "m.safetensors", "--data", "digits").fails(*words)


def test_predict_names_the_file_and_the_size_wanted(packed_file, tmp_path):
    for shape in ((16, 16), (8, 8, 3)):
        path = tmp_path / f"{len(shape)}.png"
        Image.fromarray(np.zeros(shape, np.uint8)).save(path)
        Result("predict", packed_file, "--images", path).fails(str(path), "inputs of [1, 8, 8]")


def test_predict_lays_transparent_pictures_on_the_background_asked_for(packed_file, tmp_path):
    pixels = np.full((8, 8, 2), 255, np.uint8)
    pixels[:, 4:, 1] = 0
    Image.fromarray(pixels).save(tmp_path / "white.png")
    options = ["predict", packed_file, "--images", tmp_path / "white.png"]
    Result(*options).fails("white.png is transparent", "black or white")
    assert "white.png" in "".join(re.findall(r"[\w./]", Result(*options, "--background", "black").ok().out))
    Result(*options, "--background", "green").fails("green")
    Result("predict", packed_file, "--data", "digits", "--background", "black").fails("belongs to --images")
    Result(*options, "--data-dir", tmp_path).fails("--data-dir belongs to --data, not")


def test_names_cannot_reach_the_terminal_as_commands(packed_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"a\xff\x1b[31m[red]\n.npy")
    np.save(name, np.zeros((8, 8), np.uint8))
    for result in (
        Result("predict", packed_file, "--images", name).ok(),
        Result("predict", packed_file, "--images", f"no{name}"),
        Result("predict", f"no{name}", "--data", "digits"),
        Result(*TINY, "--resume", "--out", name),
    ):
        text = "".join((result.out + result.err).split())
        assert "\x1b" not in result.out + result.err and "[red]" in text.replace("│", "")


# ------------------------------------------------------------------------------------------------ bench


def test_bench_passes_its_arguments_on_and_returns_the_status():
    command = [sys.executable, "-m", "bop2nd_fast", "bench"]
    helped = subprocess.run([*command, "--", "--help"], capture_output=True, text=True, check=False)
    assert helped.returncode == 0 and "--quick" in helped.stdout, helped.stderr
    wrong = subprocess.run([*command, "--suite", "nonsense"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and "nonsense" in wrong.stderr


def test_bench_of_an_installed_package_says_where_benchmarks_live(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "bop2nd_fast" / "cli.py"))
    Result("bench").fails("source checkout")
