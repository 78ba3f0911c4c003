"""Networks for ImageNet-style folders, from end to end, on pictures of shapes that are drawn here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from bop2nd_fast import cli, data, inference, recipes, train
from bop2nd_fast.train_record import logits_of, model_from_checkpoint

SHAPES = ("disc", "ring", "stripes")
SIZE = 64
# Of a run of some epochs: the papers' values are for 100 and more.
VALUES = {"gamma": 1e-2, "sigma": 1e-2, "threshold": 1e-3, "lr": 1e-2}
NETWORKS = {"imagenet_xnornet": 6, "imagenet_birealnet": 8}  # recipe -> width


def draw(shape: str, number: int) -> Image.Image:
    """A bright shape on a dark ground, its colours, place and size from ``number``."""
    generator = torch.Generator().manual_seed(97 * number + SHAPES.index(shape))
    dark, bright = (
        torch.randint(0, 90, (3,), generator=generator),
        torch.randint(160, 256, (3,), generator=generator),
    )
    x, y, r = (int(v) for v in torch.randint(0, 6, (3,), generator=generator))
    picture = Image.new("RGB", (80, 72), tuple(dark.tolist()))
    pen, ink = ImageDraw.Draw(picture), tuple(bright.tolist())
    box = (8 + x, 6 + y, 62 + x + r, 58 + y + r)
    if shape == "stripes":
        for top in range(y, 72, 12):
            pen.rectangle((0, top, 80, top + 5), fill=ink)
    elif shape == "ring":
        pen.ellipse(box, outline=ink, width=6)
    else:
        pen.ellipse(box, fill=ink)
    return picture


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    for split, n, first in (("train", 32, 0), ("val", 8, 1000)):
        for shape in SHAPES:
            (root / split / shape).mkdir(parents=True)
            for i in range(n):
                draw(shape, first + i).save(root / split / shape / f"{i}.png")
    return root


def trainer(name: str, root: Path, epochs: int, out: Path | None = None, **settings: Any) -> train.Trainer:
    recipe = recipes.get(name).replace(epochs=epochs, batch_size=16, width=NETWORKS[name], values=VALUES)
    dataset = data.get("imagenet", root, SIZE)
    return train.Trainer(recipe, dataset, seed=1, out=out, report_every=1, **settings)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], prog_name="bop2nd")


@pytest.mark.parametrize("name", NETWORKS)
def test_shapes_are_learnt_packed_and_predicted(pictures, tmp_path, name):
    options = [f"--set={key}={value}" for key, value in VALUES.items()]
    options += ["--data-dir", pictures, "--image-size", SIZE, "--width", NETWORKS[name], "--batch-size", 16]
    done = run("train", name, "--epochs", 4, *options, "--out", tmp_path)
    assert done.exit_code == 0, done.stderr
    model, record = model_from_checkpoint(tmp_path / "checkpoint.pt")
    losses = [epoch["loss"] for epoch in record["history"]]
    assert losses[-1] < 0.8 * losses[0]
    assert record["history"][-1]["test_accuracy"] > 0.5  # chance is 1/3

    packed = tmp_path / "model.safetensors"
    assert run("pack", tmp_path / "checkpoint.pt", "-o", packed).exit_code == 0
    said = run("predict", packed, "--data", "imagenet", "--data-dir", pictures)
    assert f"accuracy {record['history'][-1]['test_accuracy']:.2%} on 24 test images" in said.stdout
    assert all(shape in said.stdout for shape in SHAPES)
    ((images, _),) = data.get("imagenet", pictures, SIZE).test_batches(24)
    assert torch.equal(logits_of(inference.load(packed), images), logits_of(model, images))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_run_resumes_exactly_with_another_number_of_workers(pictures, tmp_path, name):
    whole = trainer(name, pictures, 2)
    whole.run()
    stopped = trainer(name, pictures, 2, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        stopped.run(on_step=lambda now: stopped.interrupt() if now.step == 2 else None)
    resumed = train.Trainer.resume(tmp_path, whole.dataset, workers=1)
    assert resumed.step == 2
    resumed.run()
    assert [e.loss for e in resumed.history] == [e.loss for e in whole.history]
    assert [e.layers for e in resumed.history] == [e.layers for e in whole.history]
    images, _ = next(iter(whole.dataset.test_batches(24)))
    assert torch.equal(logits_of(whole.model, images), logits_of(resumed.model, images))


# ------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_cannot_be_read_is_named(pictures, tmp_path, workers):
    root = tmp_path / "pictures"
    for shape in SHAPES:
        for split in ("train", "val"):
            (root / split / shape).mkdir(parents=True)
            draw(shape, 1).save(root / split / shape / "1.png")
    (root / "train" / "ring" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    options = ["--data-dir", root, "--image-size", 64, "--width", 2, "--epochs", 1, "--batch-size", 3]
    options += ["--workers", workers, "--out", tmp_path / "out"]
    done = run("train", "imagenet_birealnet", *options)
    said = r"error: \S*/train/ring/1\.png is damaged: .*\n"
    assert done.exit_code == 2 and re.fullmatch(said, done.stderr), done.stderr
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        (["train/disc"], "lacks the folder val"),
        (["val/disc"], "lacks the folder train"),
        (["train/disc", "val/disc", "val/cube"], "cube in val, but not in train"),
        (["train/disc", "val/disc"], "holds no pictures"),
    ],
)
def test_folders_that_cannot_be_trained_on_are_refused(tmp_path, folders, words):
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    out = tmp_path / "out"
    done = run("train", "imagenet_xnornet", "--data-dir", tmp_path, "--epochs", 1, "--out", out)
    assert done.exit_code == 2 and words in done.stderr and done.stderr.count("\n") == 1
    assert not out.exists()
