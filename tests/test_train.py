from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

from bop2nd_fast import checkpoint, data, plots, train
from bop2nd_fast.binary_tensor import BinaryTensor

SETTINGS = train.Settings(
    epochs=2, batch_size=32, gamma=3e-3, sigma=2e-2, threshold=1e-2, lr=0.02, seed=7, report_every=2
)


def small_dataset(n_train: int = 128, n_test: int = 64) -> data.Dataset:
    digits = data.digits()
    return dataclasses.replace(
        digits,
        train_images=digits.train_images[:n_train],
        train_labels=digits.train_labels[:n_train],
        test_images=digits.test_images[:n_test],
        test_labels=digits.test_labels[:n_test],
    )


def make_trainer(n_train: int = 128, width: int = 4, **changes: object) -> train.Trainer:
    settings = dataclasses.replace(SETTINGS, **changes)
    dataset = small_dataset(n_train)
    spec = train.ModelSpec.for_dataset(dataset, width=width)
    return train.Trainer(spec.build(settings.seed), dataset, settings, spec=spec)


def content(trainer: train.Trainer) -> dict[str, torch.Tensor]:
    """Everything that decides the future of a run, as plain tensors."""
    tensors = {
        f"model.{name}": (value.words if isinstance(value, BinaryTensor) else value).clone()
        for name, value in trainer.model.state_dict().items()
    }
    for label, optimizer in (("binary", trainer.binary_optimizer), ("real", trainer.real_optimizer)):
        assert optimizer is not None
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{label}.{index}.{k}": torch.as_tensor(v).clone() for k, v in state.items()}
    tensors["generator"] = trainer.generator.get_state()
    return tensors


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_training_learns_the_digits():
    history = make_trainer(n_train=512, width=8, epochs=6).run()
    assert [entry.epoch for entry in history] == list(range(1, 7))
    assert history[-1].loss < 0.7 * history[0].loss
    assert history[-1].train_accuracy > 0.4 and history[-1].test_accuracy > 0.4  # chance is 0.1
    assert all(0 < entry.flip_rate < 0.5 and 0 <= entry.blocked_rate < 1 for entry in history)


def test_history_holds_the_means_of_what_was_reported():
    trainer = make_trainer(epochs=1, report_every=1)
    reports: list[train.Progress] = []
    (epoch,) = trainer.run(on_progress=reports.append)
    assert [report.step for report in reports] == [1, 2, 3, 4] and reports[0].n_steps == 4
    assert epoch.loss == pytest.approx(sum(r.loss for r in reports) / 4)
    assert epoch.train_accuracy == pytest.approx(sum(r.accuracy for r in reports) / 4)
    assert epoch.flip_rate == pytest.approx(sum(r.flip_rate for r in reports) / 4)
    sizes = {n: p.numel() for n, p in trainer.model.named_parameters() if isinstance(p, BinaryTensor)}
    assert epoch.layers.keys() == sizes.keys()
    weighted = sum(epoch.layers[name] * sizes[name] for name in sizes) / sum(sizes.values())
    assert epoch.flip_rate == pytest.approx(weighted)


def test_flip_rate_is_the_share_of_bits_that_changed():
    trainer = make_trainer(epochs=1, batch_size=128, report_every=1)  # one step
    before = {n: p.unpack() for n, p in trainer.model.named_parameters() if isinstance(p, BinaryTensor)}
    (epoch,) = trainer.run()
    for name, old in before.items():
        new = dict(trainer.model.named_parameters())[name].unpack()
        assert epoch.layers[name] == pytest.approx(float((old != new).double().mean())), name
    assert epoch.flip_rate > 0


def test_reports_come_every_few_steps_and_at_the_end_of_an_epoch():
    steps: list[int] = []
    make_trainer(report_every=3).run(on_progress=lambda report: steps.append(report.step))
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


def test_a_resumed_run_continues_bit_for_bit(tmp_path):
    whole = make_trainer(epochs=4)
    whole.run()
    make_trainer(epochs=2).run(checkpoint=tmp_path / "checkpoint.pt")
    resumed = make_trainer(epochs=4)
    resumed.resume(tmp_path / "checkpoint.pt")
    resumed.run()
    assert_same(content(whole), content(resumed))
    assert [e.loss for e in whole.history] == [e.loss for e in resumed.history]


def test_augmented_training_resumes_too(tmp_path):
    whole = make_trainer(epochs=2, augment=True)
    whole.run()
    make_trainer(epochs=1, augment=True).run(checkpoint=tmp_path / "checkpoint.pt")
    resumed = make_trainer(epochs=2, augment=True)
    resumed.resume(tmp_path / "checkpoint.pt")
    resumed.run()
    assert_same(content(whole), content(resumed))


def test_resume_refuses_another_run_and_changes_nothing(tmp_path):
    make_trainer(epochs=1).run(checkpoint=tmp_path / "checkpoint.pt")
    other = make_trainer(gamma=1e-3)
    before = content(other)
    with pytest.raises(train.TrainingError, match=r"gamma was 0\.003, is now 0\.001"):
        other.resume(tmp_path / "checkpoint.pt")
    assert_same(before, content(other))
    assert other.history == []


@pytest.mark.parametrize("damage", ["empty", "half", "other"])
def test_resume_refuses_a_damaged_checkpoint_and_changes_nothing(tmp_path, damage):
    path = tmp_path / "checkpoint.pt"
    make_trainer(epochs=1).run(checkpoint=path)
    whole = path.read_bytes()
    if damage == "other":
        torch.save({"format": "something else"}, path)
    else:
        path.write_bytes(whole[: 0 if damage == "empty" else len(whole) // 2])
    trainer = make_trainer()
    before = content(trainer)
    with pytest.raises(train.TrainingError, match="checkpoint"):
        trainer.resume(path)
    assert_same(before, content(trainer))


def test_resume_goes_on_from_the_previous_checkpoint_and_says_so(tmp_path):
    path = tmp_path / "checkpoint.pt"
    make_trainer(epochs=2).run(checkpoint=path)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    path.write_bytes(damaged)
    resumed = make_trainer(epochs=2)
    with pytest.warns(RuntimeWarning, match=r"damaged.*going on from .*checkpoint\.pt\.previous"):
        resumed.resume(path)
    assert len(resumed.history) == 1
    path.unlink()
    with pytest.warns(RuntimeWarning, match="there is no file"):
        make_trainer(epochs=2).resume(path)


@pytest.mark.parametrize(
    "part", ["model", "binary_optimizer", "real_optimizer", "generator", "history", "settings"]
)
def test_resume_with_one_bad_part_changes_nothing(tmp_path, part):
    path = tmp_path / "checkpoint.pt"
    make_trainer(epochs=1).run(checkpoint=path)
    state = checkpoint.load(path)
    if part == "model":
        state["model"].popitem()
    elif part == "history":
        state["history"][0]["unknown"] = 3
    elif part == "generator":
        state["generator"] = torch.zeros(3)
    elif part == "settings":
        del state["settings"]
    else:
        state[part]["param_groups"] = []
    checkpoint.save(path, state)
    trainer = make_trainer()
    before = content(trainer)
    with pytest.raises(train.TrainingError, match=r"checkpoint|another run"):
        trainer.resume(path)
    assert_same(before, content(trainer))
    assert trainer.history == []


def test_a_missing_checkpoint_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        make_trainer().resume(tmp_path / "none.pt")


def test_the_model_is_rebuilt_from_a_checkpoint(tmp_path):
    trainer = make_trainer(epochs=1)
    trainer.run(checkpoint=tmp_path / "checkpoint.pt")
    model, state = train.model_from_checkpoint(tmp_path / "checkpoint.pt")
    images = trainer.test_images
    assert torch.equal(train.logits_of(model, images), train.logits_of(trainer.model, images))
    assert state["spec"]["width"] == 4 and state["dataset"] == "digits"


def test_a_checkpoint_without_a_spec_says_so(tmp_path):
    trainer = make_trainer(epochs=1)
    trainer.spec = None
    trainer.save(tmp_path / "checkpoint.pt")
    with pytest.raises(train.TrainingError, match="does not say how its model was built"):
        train.model_from_checkpoint(tmp_path / "checkpoint.pt")


def test_a_loss_that_is_not_finite_stops_the_run():
    trainer = make_trainer()
    with torch.no_grad():
        trainer.model.norm9.bias[0] = float("nan")
    with pytest.raises(train.TrainingError, match="the loss became nan"):
        trainer.run()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 129}, "allowed is 1 to 128"),
        ({"report_every": 0}, "report_every is 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": -1.0}, "lr is -1"),
        ({"gamma": 0.0}, "gamma"),
        ({"gamma": -1.0}, "gamma"),
        ({"bias_correction": "some"}, "bias_correction"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**change)


def test_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match="there are binarynet"):
        train.ModelSpec(name="resnet").build(0)


def test_a_model_without_binary_parameters_is_refused():
    with pytest.raises(ValueError):
        train.Trainer(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), small_dataset(), SETTINGS)


def test_logits_leave_the_mode_as_it_was():
    model = make_trainer().model
    images = small_dataset().test_images
    for mode in (True, False):
        model.train(mode)
        logits = train.logits_of(model, images, batch_size=50)
        assert model.training is mode and not logits.requires_grad
        assert torch.equal(logits, train.logits_of(model, images, batch_size=64))


def test_history_and_plots_are_written(tmp_path):
    history = make_trainer().run()
    train.write_history(tmp_path / "history.json", history, dataset="digits")
    read = json.loads((tmp_path / "history.json").read_text())
    assert read["dataset"] == "digits" and [train.Epoch(**entry) for entry in read["epochs"]] == history
    plots.training(history, tmp_path / "training.png", "a title")
    plots.bars(
        [("panel", [plots.Bar("a", 1e-4, 9e-5, 2e-4), plots.Bar("b", 1e-3, 9e-4, 2e-3, factor=10.0)])],
        tmp_path / "bars.png",
        "a title",
    )
    for name in ("training.png", "bars.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_numbers_of_numpy_are_python_s_in_files(tmp_path):
    settings = train.Settings(np.int64(1), np.int64(256), gamma=np.float32(1e-3), lr=np.float64(0.01))
    dataset = data.digits()
    spec = train.ModelSpec.for_dataset(dataset, width=np.int64(2))
    trainer = train.Trainer(spec.build(np.int64(0)), dataset, settings, spec=spec)
    trainer.run(checkpoint=tmp_path / "checkpoint.pt")
    train.write_history(tmp_path / "history.json", trainer.history, settings=dataclasses.asdict(settings))
    saved = train.read_checkpoint(tmp_path / "checkpoint.pt")["settings"]
    assert saved["gamma"] == float(np.float32(1e-3)) and type(saved["epochs"]) is int
    with pytest.raises(TypeError):
        train.Settings(epochs=1.5)
