"""The training loop: what it learns, reports and writes, and that it resumes bit for bit."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch

from bop2nd_fast import checkpoint, data, models, plots, recipes, train, train_record
from bop2nd_fast import nn as bf_nn
from bop2nd_fast.binary_tensor import BinaryTensor
from bop2nd_fast.optim.courses import Cosine, Linear, Staircase

VALUES = {"gamma": 3e-3, "sigma": 2e-2, "threshold": 1e-2, "lr": 0.02}
RECIPE = recipes.get("digits").replace(epochs=2, batch_size=32, width=4, values=VALUES)


def small_dataset(n_train: int = 128, n_test: int = 64) -> data.Dataset:
    digits = data.digits()
    return dataclasses.replace(
        digits,
        train_images=digits.train_images[:n_train],
        train_labels=digits.train_labels[:n_train],
        test_images=digits.test_images[:n_test],
        test_labels=digits.test_labels[:n_test],
    )


def make_trainer(
    n_train: int = 128, out: Any = None, seed: int = 7, settings: Any = None, **changes: Any
) -> train.Trainer:
    options = {"report_every": 2, **(settings or {})}
    return train.Trainer(RECIPE.replace(**changes), small_dataset(n_train), seed=seed, out=out, **options)


def content(trainer: train.Trainer) -> dict[str, torch.Tensor]:
    """Everything that decides the future of a run, as plain tensors."""
    tensors = {
        f"model.{name}": (value.words if isinstance(value, BinaryTensor) else value).clone()
        for name, value in trainer.model.state_dict().items()
    }
    state = trainer.optimizer.state_dict()
    for index, own in state["state"].items():
        tensors |= {f"{index}.{k}": torch.as_tensor(v).clone() for k, v in own.items()}
    for i, group in enumerate(state["param_groups"]):
        numbers = {k: v for k, v in group.items() if isinstance(v, float)}
        tensors |= {f"group{i}.{k}": torch.tensor(v, dtype=torch.float64) for k, v in numbers.items()}
    tensors["step"] = torch.tensor(trainer.step)
    return tensors


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def timeless(history: list[train.Epoch]) -> list[dict[str, Any]]:
    """The history without what a clock measured."""
    times = ("seconds", "test_seconds", "steps_per_second", "processor_seconds")
    return [{k: v for k, v in epoch.to_dict().items() if k not in times} for epoch in history]


def test_training_learns_the_digits():
    history = make_trainer(n_train=512, width=8, epochs=6).run()
    assert [entry.epoch for entry in history] == list(range(1, 7))
    assert history[-1].loss < 0.7 * history[0].loss
    assert history[-1].train_accuracy > 0.4 and history[-1].test_accuracy > 0.4  # chance is 0.1
    assert all(0 < (entry.flip_rate or 0) < 0.5 and 0 <= (entry.blocked_share or 0) < 1 for entry in history)


def test_history_holds_the_means_of_what_was_reported():
    trainer = make_trainer(epochs=1, settings={"report_every": 1})
    reports: list[train.Progress] = []
    (epoch,) = trainer.run(on_step=reports.append)
    assert [report.step for report in reports] == [1, 2, 3, 4] and reports[0].n_steps == 4
    assert epoch.loss == pytest.approx(sum(r.loss for r in reports) / 4)
    assert epoch.train_accuracy == pytest.approx(sum(r.accuracy for r in reports) / 4)
    assert epoch.flip_rate == pytest.approx(sum(r.flip_rate or 0 for r in reports) / 4)
    sizes = {n: p.numel() for n, p in trainer.model.named_parameters() if isinstance(p, BinaryTensor)}
    assert epoch.layers.keys() == sizes.keys()
    weighted = sum(epoch.layers[name].flip_rate * sizes[name] for name in sizes) / sum(sizes.values())
    assert epoch.flip_rate == pytest.approx(weighted)
    assert epoch.test_accuracy == pytest.approx(
        float(
            (
                train_record.logits_of(trainer.model, trainer.dataset.test_images).argmax(1)
                == trainer.dataset.test_labels
            )
            .double()
            .mean()
        )
    )


def test_flips_are_counted_in_every_step_not_only_in_reported_ones():
    (often,) = make_trainer(epochs=1, settings={"report_every": 1}).run()
    (seldom,) = make_trainer(epochs=1, settings={"report_every": 100}).run()
    assert often.layers == seldom.layers and often.blocked_share == seldom.blocked_share


def test_flip_rate_is_the_share_of_bits_that_changed():
    trainer = make_trainer(epochs=1, batch_size=128)  # one step
    before = {n: p.unpack() for n, p in trainer.model.named_parameters() if isinstance(p, BinaryTensor)}
    (epoch,) = trainer.run()
    for name, old in before.items():
        new = dict(trainer.model.named_parameters())[name].unpack()
        assert epoch.layers[name].flip_rate == pytest.approx(float((old != new).double().mean())), name
    assert epoch.flip_rate > 0


def test_reports_come_every_few_steps_and_at_the_end_of_an_epoch():
    steps: list[int] = []
    make_trainer(settings={"report_every": 3}).run(on_step=lambda report: steps.append(report.step))
    assert steps == [3, 4, 7, 8]


def test_runs_are_reproducible_and_follow_the_seed():
    first, second, other = make_trainer(), make_trainer(), make_trainer(seed=8)
    torch.manual_seed(1)  # the global state must not matter
    first.run()
    torch.manual_seed(2)
    second.run()
    other.run()
    assert_same(content(first), content(second))
    assert not torch.equal(first.model.conv2.weight.words, other.model.conv2.weight.words)


def test_hyperparameters_follow_their_courses():
    trainer = make_trainer(epochs=2, schedules={"gamma": Linear(1e-2, 2e-3), "lr": Linear(0.1, 0.02)})
    gammas: list[float] = []
    trainer.run(on_step=lambda _: gammas.append(trainer.optimizer.param_groups[0]["gamma"]))
    assert gammas == pytest.approx([8e-3, 6e-3, 4e-3, 2e-3])
    assert [e.hyperparameters["lr"] for e in trainer.history] == pytest.approx([0.06, 0.02])


# -------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("augmentation", ["none", "crop_flip"])
@pytest.mark.parametrize("stop", [3, 4, 5])
def test_a_run_that_stops_anywhere_resumes_bit_for_bit(tmp_path, stop, augmentation):
    changes = {
        "epochs": 2,
        "augmentation": augmentation,
        "schedules": {"gamma": Linear(1e-2, 1e-3), "lr": Linear(0.02, 0.001)},
    }
    whole = make_trainer(**changes)
    whole.run()
    stopped = make_trainer(out=tmp_path, settings={"report_every": 1}, **changes)

    def interrupt(now: train.Progress) -> None:
        if now.step == stop:
            stopped.interrupt()

    with pytest.raises(KeyboardInterrupt):
        stopped.run(on_step=interrupt)
    torch.manual_seed(3)
    resumed = make_trainer(out=tmp_path, **changes)
    assert resumed.restore() == stop and len(resumed.history) == (stop >= 4)
    resumed.run()
    assert_same(content(whole), content(resumed))
    assert timeless(whole.history) == timeless(resumed.history)


@pytest.mark.parametrize("amp", [None, "bf16", "fp16"])
@pytest.mark.parametrize("name", ["cifar10_bop", "cifar10_latent_adam"])
def test_every_optimizer_and_precision_resumes_bit_for_bit(tmp_path, name, amp):
    recipe = recipes.get(name).replace(
        dataset="digits",
        augmentation="none",
        epochs=2,
        width=4,
        batch_size=32,
        schedules={"lr": Cosine(1e-2)},
    )

    def make(out: Any = None) -> train.Trainer:
        return train.Trainer(recipe, small_dataset(), seed=2, out=out, amp=amp, report_every=1)

    whole, stopped = make(), make(tmp_path)
    whole.run()
    with pytest.raises(KeyboardInterrupt):
        stopped.run(on_step=lambda now: stopped.interrupt() if now.step == 3 else None)
    resumed = train.Trainer.resume(tmp_path, small_dataset())
    assert resumed.step == 3
    resumed.run()
    assert_same(content(whole), content(resumed))
    assert timeless(whole.history) == timeless(resumed.history)
    assert (whole.history[0].flip_rate is None) is (recipe.optimizer == "Adam")


def test_long_epochs_write_checkpoints_in_their_middle(tmp_path):
    trainer = make_trainer(out=tmp_path, settings={"report_every": 1, "checkpoint_every": 0.0})
    for record in trainer.records():
        if record.step == 3:
            break
    assert train.Trainer.resume(tmp_path, small_dataset()).step == 2


def test_a_run_is_resumed_from_its_folder_alone(tmp_path):
    make_trainer(out=tmp_path, seed=11, settings={"amp": "bf16"}).run()
    resumed = train.Trainer.resume(tmp_path, small_dataset())
    assert resumed.recipe == RECIPE and (resumed.seed, resumed.amp, resumed.step) == (11, "bf16", 8)
    assert len(resumed.run()) == 2


def test_restoring_where_there_is_nothing_starts_anew(tmp_path):
    trainer = make_trainer(out=tmp_path / "new")
    assert trainer.restore() == 0
    trainer.run()
    assert len(trainer.history) == 2
    with pytest.raises(FileNotFoundError):
        train.Trainer.resume(tmp_path / "none", small_dataset())


def test_a_new_run_replaces_no_old_one(tmp_path):
    make_trainer(out=tmp_path).run()
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match=r"checkpoint\.pt exists; restore it"):
        make_trainer(out=tmp_path).run()
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": {"gamma": 1e-3}}, r"gamma was constant:0\.003, is now constant:0\.001"),
        ({"epochs": 3}, "epochs was 2, is now 3"),
        ({"width": 5}, "width was 4, is now 5"),
        ({"seed": 8}, "seed was 7, is now 8"),
        ({"settings": {"amp": "bf16"}}, "amp was None, is now bf16"),
    ],
)
def test_restoring_another_run_is_refused_and_changes_nothing(tmp_path, change, message):
    make_trainer(out=tmp_path).run()
    other = make_trainer(out=tmp_path, **change)
    before = content(other)
    with pytest.raises(checkpoint.CheckpointError, match=message):
        other.restore()
    assert_same(before, content(other))
    assert other.history == []


@pytest.mark.parametrize("damage", ["empty", "half", "other"])
def test_a_damaged_checkpoint_is_refused_and_changes_nothing(tmp_path, damage):
    path = tmp_path / "checkpoint.pt"
    make_trainer(epochs=1, out=tmp_path).run()
    whole = path.read_bytes()
    if damage == "other":
        torch.save({"format": "something else"}, path)
    else:
        path.write_bytes(whole[: 0 if damage == "empty" else len(whole) // 2])
    trainer = make_trainer(epochs=1, out=tmp_path)
    before = content(trainer)
    with pytest.raises(checkpoint.CheckpointError, match="checkpoint"):
        trainer.restore()
    assert_same(before, content(trainer))


def test_restoring_takes_the_previous_checkpoint_and_says_so(tmp_path):
    path = tmp_path / "checkpoint.pt"
    make_trainer(out=tmp_path).run()
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    path.write_bytes(damaged)
    resumed = make_trainer(out=tmp_path)
    with pytest.warns(RuntimeWarning, match=r"damaged.*going on from .*checkpoint\.pt\.previous"):
        resumed.restore()
    assert len(resumed.history) == 1


@pytest.mark.parametrize("part", ["model", "optimizer", "record", "history", "format"])
def test_one_bad_part_changes_nothing(tmp_path, part):
    path = tmp_path / "checkpoint.pt"
    make_trainer(out=tmp_path).run()
    state = checkpoint.load(path)
    members = state["members"]
    if part == "model":
        members["model"].popitem()
    elif part == "optimizer":
        members["optimizer"]["param_groups"] = []
    elif part == "record":
        del members["record"]["run"]
    elif part == "history":
        members["record"]["history"][0]["unknown"] = 3
    else:
        members["record"]["format"] = "another"
    checkpoint.save(path, state)
    trainer = make_trainer(out=tmp_path)
    before = content(trainer)
    with pytest.raises(checkpoint.CheckpointError, match="does not fit"):
        trainer.restore()
    assert_same(before, content(trainer))
    assert trainer.history == []


# -------------------------------------------------------------------------------------- what is left


def test_the_model_is_rebuilt_from_a_checkpoint(tmp_path):
    trainer = make_trainer(epochs=1, out=tmp_path)
    trainer.run()
    model, record = train_record.model_from_checkpoint(tmp_path / "checkpoint.pt")
    images = trainer.dataset.test_images
    assert torch.equal(train_record.logits_of(model, images), train_record.logits_of(trainer.model, images))
    assert recipes.Recipe.from_json(record["recipe"]) == trainer.recipe
    assert record["dataset"]["classes"] == list(trainer.dataset.classes)


def test_history_and_plots_are_written(tmp_path):
    history = make_trainer(out=tmp_path).run()
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [train.Epoch.from_dict(json.loads(line)) for line in lines] == history
    plots.training(history, tmp_path / "training.png", "a title")
    latent = [dataclasses.replace(e, layers={}, flip_rate=None, blocked_share=None) for e in history]
    plots.training(latent, tmp_path / "latent.png", "a title")
    plots.bars(
        [("panel", [plots.Bar("a", 1e-4, 9e-5, 2e-4), plots.Bar("b", 1e-3, 9e-4, 2e-3, factor=10.0)])],
        tmp_path / "bars.png",
        "a title",
    )
    for name in ("training.png", "latent.png", "bars.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_report_is_of_the_last_epoch(capsys):
    trainer = make_trainer()
    trainer.run()
    rows = trainer.report()
    assert "conv1.weight" in capsys.readouterr().out
    assert {row.name: row.flip_rate for row in rows} == {
        name: layer.flip_rate for name, layer in trainer.history[-1].layers.items()
    }
    assert all(row.steps == 4 for row in rows)


def test_a_teacher_s_outputs_are_learnt_instead_of_labels():
    teacher = make_trainer(n_train=512, width=8, epochs=6)
    teacher.run()
    student = make_trainer(n_train=512, width=8, epochs=3, seed=5, settings={"teacher": teacher.model})
    student.dataset.train_labels.zero_()
    student.run()
    assert student.history[-1].loss < student.history[0].loss
    assert student.history[-1].test_accuracy > 0.3  # no label has been seen


def test_a_run_goes_on_with_its_own_teacher_alone(tmp_path):
    def teacher(seed: int) -> torch.nn.Module:
        return RECIPE.model(small_dataset(128), seed)

    stopped = make_trainer(out=tmp_path, settings={"teacher": teacher(1)})
    stopped.interrupt()
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    for other in (None, teacher(2)):
        with pytest.raises(checkpoint.CheckpointError, match=r"teacher was [0-9a-f]{64}, is now"):
            make_trainer(out=tmp_path, settings={"teacher": other}).restore()
    assert make_trainer(out=tmp_path, settings={"teacher": teacher(1)}).restore() == stopped.step > 0


def test_the_hash_of_weights_covers_every_value_of_every_type():
    network = torch.nn.Sequential(
        torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 4, dtype=torch.bfloat16), bf_nn.BinaryLinear(4, 5)
    )
    found = {train_record.weights_sha256(network)}
    for value in network.state_dict().values():
        raw = value.words if isinstance(value, BinaryTensor) else value
        raw.view(-1)[-1:] += 1
        found.add(train_record.weights_sha256(network))
    assert len(found) == 1 + len(network.state_dict())


@pytest.mark.parametrize(("channels", "classes"), [(1, 7), (3, 10)])
def test_a_teacher_of_other_images_or_classes_is_refused_at_once(tmp_path, channels, classes):
    teacher = models.get("binarynet", num_classes=classes, in_channels=channels, image_size=8, width=8)
    with pytest.raises(ValueError, match=r"teacher does not fit digits.*\[1, 8, 8\] and have 10 outputs"):
        make_trainer(out=tmp_path / "run", settings={"teacher": teacher})
    assert not (tmp_path / "run").exists()


def test_a_renamed_recipe_comes_back_from_its_json():
    renamed = RECIPE.replace(name="mine")
    assert renamed != RECIPE and renamed.preset.name == "mine"
    assert recipes.Recipe.from_json(renamed.to_json()) == renamed


@pytest.mark.parametrize(
    ("part", "value"),
    [("name", 3), ("options", []), ("epochs", 1.5), ("batch_size", "32")],
)
def test_a_recipe_s_json_with_a_part_of_another_type_is_refused(part, value):
    plain = json.loads(RECIPE.to_json())
    with pytest.raises(ValueError, match=f"^{part} is .*must be"):
        recipes.Recipe.from_json(json.dumps({**plain, part: value}))


def test_a_number_is_no_course():
    number: Any = 0.001
    with pytest.raises(ValueError, match=r"course of gamma is 0\.001, it must be a Constant"):
        RECIPE.replace(schedules={"gamma": number})


@pytest.mark.parametrize("part", ["factor", "every"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_a_staircase_that_leads_nowhere_is_no_course(part, value):
    with pytest.raises(ValueError, match="staircase of gamma needs a finite factor"):
        RECIPE.replace(schedules={"gamma": dataclasses.replace(Staircase(1e-3), **{part: value})})


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    trainer = make_trainer(out=tmp_path)
    with torch.no_grad():
        trainer.model.norm9.bias[0] = float("nan")
    with pytest.raises(train.TrainingError, match="the loss became nan"):
        trainer.run()
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 129}, "allowed is 1 to 128"),
        ({"augmentation": "resized_crop"}, "allowed is none or flip or crop_flip"),
        ({"settings": {"amp": "int8"}}, "allowed are bf16, fp16"),
        ({"settings": {"report_every": 0}}, "report_every is 0"),
        ({"dataset": "cifar10"}, "is for cifar10, this data set is digits"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**change)


def test_logits_leave_the_mode_as_it_was():
    model = make_trainer().model
    images = small_dataset().test_images
    for mode in (True, False):
        model.train(mode)
        logits = train_record.logits_of(model, images, batch_size=50)
        assert model.training is mode and not logits.requires_grad
        assert torch.equal(logits, train_record.logits_of(model, images, batch_size=64))
