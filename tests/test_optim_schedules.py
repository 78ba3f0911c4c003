"""Schedules of gamma, sigma and threshold by torch's own schedulers, and the papers' runs as presets."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import bop2nd_fast as bf
from bop2nd_fast.optim import Bop2ndOrder, Knob, linear, presets, schedule


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # torch's SequentialLR passes an epoch to its own schedulers, which torch deprecates
        warnings.filterwarnings("ignore", message="The epoch parameter in `scheduler.step\\(\\)`")
        yield


def optimizer(**options: Any) -> Bop2ndOrder:
    params = [nn.Parameter(bf.pack(torch.ones(2, 40), 1)) for _ in range(2)]
    return Bop2ndOrder([{"params": [params[0]]}, {"params": [params[1]], "gamma": 0.25}], **options)


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 0.7, 8),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 7, eta_min=1e-4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 30, 2.0),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda k: 1 / (1 + k)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda k: 0.8),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=30, cycle_momentum=False),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=4, cycle_momentum=False),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
}


def _course(target: Any, scheduler: Any, name: str, n_steps: int) -> list[list[float]]:
    course = []
    for _ in range(n_steps):
        target.step()
        scheduler.step()
        course.append([float(group[name]) for group in target.param_groups])
    return course


@pytest.mark.parametrize("hyperparameter", ["gamma", "sigma", "threshold"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_hyperparameter_follows_what_the_scheduler_makes_of_a_learning_rate(
    name: str, hyperparameter: str
) -> None:
    ours = optimizer(gamma=0.5, sigma=0.02, threshold=3e-3)
    starts = [group[hyperparameter] for group in ours.param_groups]
    sgd = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": x} for x in starts], lr=1.0)
    wanted = _course(sgd, SCHEDULERS[name](sgd), "lr", 20)
    scheduler = SCHEDULERS[name](Knob(ours, hyperparameter))
    assert type(scheduler) is getattr(lr_scheduler, name)
    assert _course(ours, scheduler, hyperparameter, 20) == wanted
    assert len({tuple(row) for row in wanted}) > 1


def test_plateau_scheduler() -> None:
    ours = optimizer(gamma=0.5)
    scheduler = schedule(ours, "gamma", lr_scheduler.ReduceLROnPlateau, factor=0.5, patience=1)
    for loss in (1.0, 1.0, 1.0, 0.5, 0.5, 0.5):
        scheduler.step(loss)
    assert [group["gamma"] for group in ours.param_groups] == [0.125, 0.0625]


def test_several_at_once_on_chosen_groups_reach_the_step() -> None:
    ours = optimizer(gamma=0.5, sigma=0.5, threshold=0.0)
    gamma = schedule(ours, "gamma", lr_scheduler.StepLR, 1, 0.5, groups=[1])
    sigma = schedule(ours, "sigma", lr_scheduler.ExponentialLR, gamma=0.25)
    for _ in range(3):
        for group in ours.param_groups:
            group["params"][0].grad = torch.ones(2, 40)
        ours.step()
        gamma.step()
        sigma.step()
    assert [g["gamma"] for g in ours.param_groups] == [0.5, 0.25 / 8]
    assert [g["sigma"] for g in ours.param_groups] == [0.5 / 64] * 2
    first, second = (ours.state[g["params"][0]] for g in ours.param_groups)
    assert first["exp_avg"][0, 0] == 1 - 0.5**3
    assert second["exp_avg"][0, 0] == 1 - (1 - 0.25) * (1 - 0.125) * (1 - 0.0625)
    assert torch.all(first["exp_avg_sq"] == 1 - (1 - 0.5) * (1 - 0.125) * (1 - 0.03125))


def test_tensor_hyperparameters_are_written_in_place() -> None:
    gamma = torch.tensor(0.5, dtype=torch.float64)
    ours = optimizer(gamma=0.5)
    ours.param_groups[0]["gamma"] = gamma
    scheduler = schedule(ours, "gamma", lr_scheduler.ExponentialLR, 0.5)
    scheduler.step()
    assert ours.param_groups[0]["gamma"] is gamma
    assert gamma == 0.25


@pytest.mark.parametrize("name", ["LinearLR", "CosineAnnealingLR", "StepLR", "OneCycleLR"])
def test_resume_in_the_middle(name: str) -> None:
    def fresh() -> tuple[Bop2ndOrder, Any, Any]:
        ours = optimizer(gamma=0.5, sigma=0.02)
        return ours, SCHEDULERS[name](Knob(ours, "gamma")), SCHEDULERS["ExponentialLR"](Knob(ours, "sigma"))

    ours, gamma, sigma = fresh()
    _course(ours, gamma, "gamma", 7)
    sigma.step()
    saved = copy.deepcopy([x.state_dict() for x in (ours, gamma, sigma)])
    wanted = _course(ours, gamma, "gamma", 10)
    resumed = fresh()
    for x, state in zip(resumed, saved, strict=True):
        x.load_state_dict(state)
    assert [g["sigma"] for g in resumed[0].param_groups] == [0.02 * 0.9] * 2
    assert _course(resumed[0], resumed[1], "gamma", 10) == wanted


def test_linear_goes_up_and_down_in_a_straight_line() -> None:
    ours = optimizer(gamma=0.5, sigma=0.5)
    down, up = linear(ours, "gamma", 1e-2, 1e-5, 1000), linear(ours, "sigma", 1e-7, 1e-2, 1000)
    for k in range(1001):
        if k in (0, 1, 250, 999, 1000):
            for name, a, b in (("gamma", 1e-2, 1e-5), ("sigma", 1e-7, 1e-2)):
                value = ours.param_groups[0][name]
                assert value == pytest.approx(a + (b - a) * k / 1000, rel=1e-9)
        ours.step()
        down.step()
        up.step()
    assert ours.param_groups[1]["gamma"] == pytest.approx(1e-5, rel=1e-9)


def test_a_value_out_of_range_or_a_wrong_name_is_refused() -> None:
    ours = optimizer(gamma=0.5)
    scheduler = schedule(ours, "gamma", lr_scheduler.MultiplicativeLR, lambda k: 3.0)
    with pytest.raises(ValueError, match="gamma must be in"):
        scheduler.step()
    assert ours.param_groups[0]["gamma"] == 0.5
    with pytest.raises(ValueError, match="'lr' is in groups"):
        schedule(ours, "lr", lr_scheduler.StepLR, 1)
    with pytest.raises(ValueError, match="starts above 0"):
        linear(ours, "gamma", 0.0, 1e-2, 10)
    with pytest.raises(ValueError, match="starts above 0"):
        linear(ours, "gamma", 1e-2, -1e-3, 10)


ENDS: dict[str, Callable[[Any, str], Any]] = {
    "cosine": lambda o, name: schedule(o, name, lr_scheduler.CosineAnnealingLR, T_max=12),
    "polynomial": lambda o, name: schedule(o, name, lr_scheduler.PolynomialLR, 12, power=2.0),
    "linear": lambda o, name: linear(o, name, 1 / 3, 0.0, 12),
    "torch's linear": lambda o, name: schedule(o, name, lr_scheduler.LinearLR, 1 / 3, 0.0, 12),
    "lambda": lambda o, name: schedule(o, name, lr_scheduler.LambdaLR, lambda k: max(0.0, 1 - k / 12)),
    "rounding": lambda o, name: schedule(
        o, name, lr_scheduler.LambdaLR, lambda k: 1 - sum([1 / 12] * k) - 1e-15 * (k == 12)
    ),
}


@pytest.mark.parametrize("name", ["gamma", "sigma", "threshold", "eps"])
@pytest.mark.parametrize("end", ENDS)
def test_a_schedule_may_end_at_zero(end: str, name: str) -> None:
    ours = optimizer(gamma=0.25, sigma=0.25, threshold=0.25, eps=0.25)
    scheduler = ENDS[end](ours, name)
    for _ in range(14):
        if ours.param_groups[0][name] > 0 or end in ("linear", "torch's linear"):
            scheduler.step()
        ours.step()
    assert ours.param_groups[0][name] == pytest.approx(0, abs=1e-15)
    assert all(group[name] >= 0 for group in ours.param_groups)
    ours.param_groups[0][name] = 0.0
    with pytest.raises(ValueError, match=name):
        ours.param_groups[0][name] = -1e-30


@pytest.mark.parametrize("correction", ["none", "reference", "adam"])
@pytest.mark.parametrize("rate", [0.0, 1e-60], ids=["zero", "zero in fp32"])
def test_a_rate_of_zero_leaves_its_moment_and_a_correction_flips_nothing(
    rate: float, correction: str
) -> None:
    w = nn.Parameter(torch.ones(64))
    ours = Bop2ndOrder([w], gamma=0.5, sigma=0.5, threshold=1e9, bias_correction=correction)
    w.grad = torch.randn(64)
    ours.step()
    before = {name: value.clone() for name, value in ours.state[w].items()}
    for name, moment in (("gamma", "exp_avg"), ("sigma", "exp_avg_sq")):
        ours.param_groups[0].update({"gamma": 0.5, "sigma": 0.5, "threshold": 1e-3, name: rate})
        words = w.detach().clone()
        ours.step()
        assert torch.equal(ours.state[w][moment], before[moment])
        if correction != "none" and (name, rate) != ("sigma", 1e-60):
            assert torch.equal(words, w.detach())
        before = {name: value.clone() for name, value in ours.state[w].items()}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_schedule_and_its_optimizer_are_copied_together(copied: Callable[[Any], Any]) -> None:
    ours = optimizer(gamma=0.5)
    ours.param_groups.reverse()
    scheduler = schedule(ours, "gamma", lr_scheduler.CosineAnnealingLR, T_max=10, groups=[1])
    for _ in range(3):
        ours.step()
        scheduler.step()
    twin, again = copied((ours, scheduler))
    for one, its in ((ours, scheduler), (twin, again)):
        for _ in range(4):
            one.step()
            its.step()
    assert [g["gamma"] for g in ours.param_groups] == [g["gamma"] for g in twin.param_groups]
    assert ours.param_groups[0]["gamma"] == 0.25
    again.step()
    assert ours.param_groups[1]["gamma"] != twin.param_groups[1]["gamma"]


def test_torchs_schedulers_say_how_they_drive_a_hyperparameter() -> None:
    ours = optimizer()
    with pytest.raises(KeyError, match=r"bf\.optim\.schedule\(optimizer"):
        lr_scheduler.StepLR(ours, 3)
    with pytest.raises(KeyError, match="'lr'"):
        ours.param_groups[0]["lr"]
    with pytest.raises(KeyError, match="'lr'"):
        ours.param_groups[0]["lr"] = 0.1
    with pytest.raises(KeyError, match="'lr'"):
        Bop2ndOrder([{"params": [nn.Parameter(torch.ones(3))], "lr": 0.1}])
    assert "lr" not in ours.param_groups[0] and ours.param_groups[0].get("lr") is None
    with pytest.raises(KeyError, match=r"^'other'$"):
        ours.param_groups[0]["other"]


# ------------------------------------------------------------------------- presets


class _Net(nn.Module):
    """A binary layer and real ones: a kernel and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 40), bf.nn.BinaryLinear(40, 3)


LINE = (1e-2, 1e-5), (1e-7, 1e-2), (1e-5, 1e-8), (0.01, 0.001)
IMAGENET = (1e-4, 1e-9), (1e-5, 1e-2), (1e-8, 1e-5), (2.5e-3, 5e-6)
FIXED = (1e-7, 1e-7), (1e-3, 1e-3), (1e-6, 1e-6), (0.01, 0.01)

# name: class, correction, epochs, batch, (gamma, sigma, threshold, lr) first and, for lines, last
ROWS = {
    "ablation": ("Bop2ndOrder", "reference", 100, 100, FIXED),
    "norm_comparison_biased": ("Bop2ndOrder", "none", 150, 100, FIXED),
    "norm_comparison_unbiased": ("Bop2ndOrder", "reference", 150, 100, FIXED),
    "cifar10_biased": ("Bop2ndOrder", "none", 500, 50, LINE),
    "cifar10_unbiased": ("Bop2ndOrder", "reference", 500, 50, LINE),
    "imagenet_xnornet": ("Bop2ndOrder", "none", 100, 1024, IMAGENET),
    "imagenet_birealnet": ("Bop2ndOrder", "none", 150, 1024, IMAGENET),
}


def _replay(name: str, steps_per_epoch: int) -> Iterator[dict[str, float]]:
    """Values in force before each step of a whole run, read from the optimizer that the preset builds."""
    run = presets.get(name)
    built, schedulers = run.build(_Net(), steps_per_epoch)
    for step in range(run.epochs * steps_per_epoch):
        values = {k: built.binary.param_groups[0][k] for k in run.courses if k != "lr"}
        values["lr"] = built.real.param_groups[0]["lr"]
        assert values == pytest.approx(run.values(step, steps_per_epoch), rel=1e-9)
        yield values
        for scheduler in schedulers:
            scheduler.step()


@pytest.mark.parametrize("name", ROWS)
def test_preset_against_the_table(name: str) -> None:
    optimizer_name, correction, epochs, batch, courses = ROWS[name]
    run = presets.get(name)
    assert (run.optimizer, run.bias_correction, run.epochs, run.batch_size) == (
        optimizer_name,
        correction,
        epochs,
        batch,
    )
    values = list(_replay(name, 2))
    assert len(values) == 2 * epochs
    for key, (start, end) in zip(("gamma", "sigma", "threshold", "lr"), courses, strict=True):
        assert values[0][key] == pytest.approx(start, rel=1e-9)
        assert values[epochs][key] == pytest.approx((start + end) / 2, rel=1e-9)  # half way
        last = start + (end - start) * (2 * epochs - 1) / (2 * epochs)
        assert values[-1][key] == pytest.approx(last, rel=1e-6)


def test_cifar10_biased_at_steps_worked_by_hand() -> None:
    """500 epochs of 1000 steps; after epoch 1: gamma = 1e-2 - 9.99e-3 / 500 = 9.98002e-3."""
    values = presets.get("cifar10_biased").values(1000, 1000)
    wanted = {"gamma": 9.98002e-3, "sigma": 2.00998e-5, "threshold": 9.98002e-6, "lr": 9.982e-3}
    assert values == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("which", ["gamma", "sigma", "threshold", "all"])
@pytest.mark.parametrize("version", ["biased", "unbiased"])
def test_staircase_presets(which: str, version: str) -> None:
    run = presets.get(f"schedulers_{which}_{version}")
    assert (run.epochs, run.batch_size) == (350, 50)
    assert run.bias_correction == {"biased": "none", "unbiased": "reference"}[version]
    values = list(_replay(run.name, 1))
    base = {"gamma": 1e-7, "sigma": 1e-3, "threshold": 1e-6, "lr": 0.01}
    for epoch, factor in ((0, 1), (99, 1), (100, 0.1), (199, 0.1), (200, 0.01), (300, 0.001), (349, 0.001)):
        moved = ("gamma", "sigma", "threshold") if which == "all" else (which,)
        wanted = {k: x * factor if k in moved else x for k, x in base.items()}
        assert values[epoch] == pytest.approx(wanted, rel=1e-9)


def test_cifar10_bop() -> None:
    run = presets.get("cifar10_bop")
    assert (run.optimizer, run.epochs, run.batch_size) == ("Bop", 500, 50)
    values = list(_replay("cifar10_bop", 1))
    gammas = [values[epoch]["gamma"] for epoch in (0, 99, 100, 499)]
    assert gammas == pytest.approx([1e-4, 1e-4, 1e-5, 1e-8], rel=1e-9)
    assert {(v["threshold"], v["lr"]) for v in values} == {(1e-8, 0.01)}
    assert isinstance(run.build(_Net(), 1)[0].binary, bf.optim.Bop)


def test_imagenet_xnornet_penalises_real_kernels_only() -> None:
    built, _ = presets.get("imagenet_xnornet").build(net := _Net(), 1)
    decay = {id(p): g["weight_decay"] for g in built.real.param_groups for p in g["params"]}
    assert decay == {id(net.first.weight): 1e-6, id(net.first.bias): 0}  # gradient of 5e-7 w^2: 1e-6 w
    assert [
        g["weight_decay"] for g in presets.get("imagenet_birealnet").build(_Net(), 1)[0].real.param_groups
    ] == [0]


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match="cifar10_biased"):
        presets.get("cifar100")
    assert len(presets.NAMES) == 16
