"""param_groups edited between steps, as torch's optimizers tolerate: plans follow groups and parameters."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bop2nd_fast as bf
from bop2nd_fast.optim import Bop2ndOrder, FlipTracker, MixedOptimizer, schedule, step_in_backward

VALUES = {"gamma": 0.3, "sigma": 0.2, "threshold": 0.05}
SHAPES = [(3, 40), (2, 5, 3, 3), (7,), (4, 33), (1, 70)]


def parameter(i: int) -> nn.Parameter:
    generator = torch.Generator().manual_seed(i)
    w = torch.randint(0, 2, SHAPES[i], generator=generator).float() * 2 - 1
    return nn.Parameter(bf.pack(w, 1) if i % 2 == 0 and w.dim() > 1 else w)


def dense(p: Tensor) -> Tensor:
    return p.unpack().detach() if isinstance(p, bf.BinaryTensor) else p.detach().clone()


class Pair:
    """Five parameters of one optimizer, and the same parameters each in an optimizer of its own."""

    def __init__(self, **options: Any) -> None:
        self.options = VALUES | options
        self.ours = [parameter(i) for i in range(5)]
        self.theirs = [parameter(i) for i in range(5)]
        self.alone = [Bop2ndOrder([p], **self.options) for p in self.theirs]
        a, b, c, d, _ = self.ours
        self.optimizer = Bop2ndOrder([{"params": [a, b]}, {"params": [c]}, {"params": [d]}], **self.options)
        self.at = 0
        self.flipped = [0] * 5

    def listed(self) -> list[int]:
        ids = {id(p): i for i, p in enumerate(self.ours)}
        return sorted(ids[id(p)] for group in self.optimizer.param_groups for p in group["params"])

    def steps(self, n: int, without: tuple[int, ...] = ()) -> None:
        for _ in range(n):
            self.at += 1
            stepped = [i for i in self.listed() if i not in without]
            for i, (p, q) in enumerate(zip(self.ours, self.theirs, strict=True)):
                generator = torch.Generator().manual_seed(100 * self.at + i)
                p.grad = q.grad = None
                if i not in without:
                    p.grad = torch.randn(SHAPES[i], generator=generator)
                    q.grad = p.grad.clone()
                if i in stepped:
                    self.alone[i].step()
                    self.flipped[i] += self.alone[i].telemetry()[0].flips
            self.optimizer.step()
            seen = sum(c.flips for c in self.optimizer.telemetry())
            assert seen == sum(self.alone[i].telemetry()[0].flips for i in stepped)
        for i, (p, q) in enumerate(zip(self.ours, self.theirs, strict=True)):
            assert torch.equal(dense(p), dense(q)), f"parameter {i} went another way"
            for name in ("exp_avg", "exp_avg_sq", "step") if i in self.listed() else ():
                assert torch.equal(self.optimizer.state[p][name], self.alone[i].state[q][name])


def _append(pair: Pair) -> None:
    pair.optimizer.param_groups.append({"params": [pair.ours[4]], **pair.optimizer.defaults})


def _append_without_options(pair: Pair) -> None:
    pair.optimizer.param_groups.append({"params": [pair.ours[4]]})


def _move_parameter(pair: Pair) -> None:
    groups = pair.optimizer.param_groups
    groups[2]["params"].insert(0, groups[0]["params"].pop())


def _move_half_of_a_step_tensor(pair: Pair) -> None:
    """Both parameters of group 0 share a step count; one goes to a group that steps by itself."""
    groups = pair.optimizer.param_groups
    groups[1]["params"] = [*groups[1]["params"], groups[0]["params"].pop(0)]


def _plain_copies(pair: Pair) -> None:
    pair.optimizer.param_groups = [dict(group) for group in pair.optimizer.param_groups]


def _one_plain_group(pair: Pair) -> None:
    pair.optimizer.param_groups = ({**pair.optimizer.param_groups[0], "params": tuple(pair.ours[:4])},)  # type: ignore[assignment]


def _add(pair: Pair) -> None:
    pair.optimizer.param_groups.pop(1)
    pair.optimizer.add_param_group({"params": [pair.ours[4], pair.ours[2]]})


def _load(pair: Pair) -> None:
    pair.optimizer.param_groups.reverse()
    pair.optimizer.load_state_dict(copy.deepcopy(pair.optimizer.state_dict()))


def _swap_parameter(pair: Pair) -> None:
    """Another tensor takes a parameter's place, and its state is moved along."""
    old, new = pair.ours[0], nn.Parameter(dense(pair.ours[0]))
    pair.optimizer.param_groups[0]["params"][0] = new
    pair.optimizer.state[new] = pair.optimizer.state.pop(old)
    pair.ours[0] = new


def _swap_rows(pair: Pair) -> None:
    pair.optimizer.param_groups[0]["params"].reverse()


def _offload(pair: Pair) -> None:
    for own in pair.optimizer.state.values():
        for name, value in own.items():
            own[name] = value.clone()


def _offload_in_place(pair: Pair) -> None:
    for own in pair.optimizer.state.values():
        for value in own.values():
            value.data = value.data.clone()


def _copied(pair: Pair) -> None:
    pair.optimizer.param_groups.pop()
    listed = [p for group in pair.optimizer.param_groups for p in group["params"]]
    twin = copy.deepcopy(pair.optimizer)
    new = [p for group in twin.param_groups for p in group["params"]]
    for i, p in enumerate(pair.ours):
        for old, made in zip(listed, new, strict=True):
            if p is old:
                pair.ours[i] = made
    pair.optimizer = twin


EDITS: dict[str, Callable[[Pair], Any]] = {
    "pop the first": lambda pair: pair.optimizer.param_groups.pop(0),
    "del the middle one": lambda pair: pair.optimizer.param_groups.__delitem__(1),
    "reverse": lambda pair: pair.optimizer.param_groups.reverse(),
    "clear": lambda pair: pair.optimizer.param_groups.clear(),
    "swap two": lambda pair: pair.optimizer.param_groups.insert(0, pair.optimizer.param_groups.pop()),
    "append a dict": _append,
    "append a dict without options": _append_without_options,
    "move a parameter": _move_parameter,
    "move half of a step tensor": _move_half_of_a_step_tensor,
    "assign plain copies": _plain_copies,
    "assign a tuple of one": _one_plain_group,
    "take a parameter out": lambda pair: pair.optimizer.param_groups[0].__setitem__("params", [pair.ours[1]]),
    "empty a group": lambda pair: pair.optimizer.param_groups[0]["params"].clear(),
    "reverse parameters": _swap_rows,
    "replace a parameter, move its state": _swap_parameter,
    "pop and add": _add,
    "reverse and load": _load,
    "state copied": _offload,
    "state's data replaced": _offload_in_place,
    "pop and deepcopy": _copied,
}


@pytest.mark.parametrize("options", [{}, {"bias_correction": "adam"}], ids=["none", "adam"])
@pytest.mark.parametrize("edit", EDITS)
def test_every_parameter_goes_on_as_if_alone(edit: str, options: dict[str, Any]) -> None:
    pair = Pair(**options)
    pair.steps(5)
    pair.steps(1, without=(1, 2))
    EDITS[edit](pair)
    pair.steps(5)
    assert sum(pair.flipped) > 0


def test_a_group_that_comes_back_has_its_moments() -> None:
    pair = Pair(bias_correction="adam")
    pair.steps(4)
    group = pair.optimizer.param_groups.pop(0)
    pair.steps(4)
    pair.optimizer.param_groups.append(group)
    pair.steps(4)
    assert int(pair.optimizer.state[pair.ours[0]]["step"]) == 8


def test_a_parameter_that_comes_back_has_its_own_count() -> None:
    pair = Pair(bias_correction="adam")
    pair.steps(4)
    taken = pair.optimizer.param_groups[0]["params"].pop()
    pair.steps(4)
    pair.optimizer.param_groups[2]["params"].append(taken)
    pair.steps(4)
    assert [int(pair.optimizer.state[p]["step"]) for p in pair.ours[:4]] == [12, 8, 12, 12]


def test_what_was_taken_out_is_not_saved() -> None:
    pair = Pair()
    pair.steps(2)
    pair.optimizer.param_groups.pop(0)
    saved = pair.optimizer.state_dict()
    assert sorted(saved["state"]) == [0, 1]
    assert len(pair.optimizer.state) == 4  # and is kept: the group may come back


def test_a_cleared_state_starts_anew() -> None:
    pair = Pair(bias_correction="adam")
    pair.steps(3)
    pair.optimizer.state = defaultdict(dict)
    pair.alone = [Bop2ndOrder([p], **pair.options) for p in pair.theirs]
    pair.steps(3)
    pair.optimizer.state.clear()
    pair.alone = [Bop2ndOrder([p], **pair.options) for p in pair.theirs]
    pair.steps(3)
    assert int(pair.optimizer.state[pair.ours[0]]["step"]) == 3


def test_hyperparameters_written_through_a_users_own_dict_reach_the_step() -> None:
    p = parameter(0)
    optimizer = Bop2ndOrder([parameter(1)], **VALUES)
    mine = {"params": [p], "gamma": 1.0}
    optimizer.param_groups.append(mine)
    for gamma in (1.0, 0.5):
        mine["gamma"] = gamma
        p.grad = torch.ones(SHAPES[0])
        optimizer.step()
    optimizer.param_groups[1]["gamma"] = 0.25
    p.grad = torch.zeros(SHAPES[0])
    optimizer.step()
    assert torch.equal(optimizer.state[p]["exp_avg"], torch.full(SHAPES[0], 0.75))
    mine["gamma"] = 7.0
    with pytest.raises(ValueError, match="gamma"):
        optimizer.step()


def test_names_follow_their_parameters() -> None:
    named = [(f"layer{i}", parameter(i)) for i in range(3)]
    optimizer = Bop2ndOrder([{"params": named[:2]}, {"params": named[2:]}], **VALUES)
    optimizer.param_groups.reverse()
    optimizer.param_groups[1]["params"].pop(0)
    optimizer.param_groups[1]["params"].append(parameter(3))
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p in params:
        p.grad = torch.randn(p.shape)
    optimizer.step()
    assert [c.name for c in optimizer.telemetry()] == ["layer2", "layer1", "param1"]
    assert [row.name for row in optimizer.report(quiet=True)] == ["layer2", "layer1", "param1"]
    assert list(optimizer.signal_histogram()) == ["layer2", "layer1", "param1"]
    assert optimizer.state_dict()["param_groups"][1]["param_names"] == ["layer1", "param1"]


def test_the_report_goes_on_over_an_edit() -> None:
    pair = Pair()
    pair.steps(4)
    pair.optimizer.param_groups.pop(0)
    pair.steps(2)
    rows = pair.optimizer.report(quiet=True)
    assert [row.steps for row in rows] == [6, 6]
    rates = [pair.flipped[i] / (6 * pair.ours[i].numel()) for i in (2, 3)]
    assert [row.flip_rate for row in rows] == pytest.approx(rates)


@pytest.mark.parametrize(
    ("break_it", "error", "message"),
    [
        (lambda o, p: o.param_groups.append({"params": [p]}), ValueError, "one group only"),
        (lambda o, p: o.param_groups[0]["params"].append(p), ValueError, "one group only"),
        (lambda o, p: o.param_groups[0]["params"].append(3), TypeError, "must be a floating point tensor"),
        (
            lambda o, p: o.param_groups[0]["params"].append(nn.Parameter(torch.zeros(3))),
            ValueError,
            "neither",
        ),
        (lambda o, p: o.param_groups.append({"params": [], "gamma": 3}), ValueError, "gamma"),
        (lambda o, p: o.param_groups.append(7), TypeError, "param_groups\\[2\\] is of type int"),
        (lambda o, p: o.param_groups.append({"gamma": 0.1}), ValueError, "no 'params'"),
        (lambda o, p: o.state[p].pop("exp_avg"), ValueError, "keeps"),
        (lambda o, p: o.state[p].update(exp_avg=torch.zeros(3)), ValueError, "has shape"),
        (lambda o, p: o.state[p].update(exp_avg=[1]), ValueError, "must be a floating tensor"),
    ],
)
def test_impossible_edits_are_refused_before_anything_changes(
    break_it: Callable[[Any, Any], Any], error: Any, message: str
) -> None:
    a, b = parameter(0), parameter(1)
    optimizer = Bop2ndOrder([{"params": [a]}, {"params": [b]}], **VALUES)
    for p in (a, b):
        p.grad = torch.randn(p.shape)
    optimizer.step()
    break_it(optimizer, b)
    before = [dense(a), dense(b), optimizer.state[a]["exp_avg"].clone(), optimizer.state[a]["step"].clone()]
    with pytest.raises(error, match=message):
        optimizer.step()
    now = [dense(a), dense(b), optimizer.state[a]["exp_avg"], optimizer.state[a]["step"]]
    assert all(torch.equal(x, y) for x, y in zip(before, now, strict=True))


@pytest.mark.parametrize("name", ["gamma", "params", "seed"])
def test_what_the_step_needs_cannot_be_removed_from_a_group(name: str) -> None:
    group = Bop2ndOrder([parameter(0)], **VALUES).param_groups[0]
    with pytest.raises(KeyError, match="cannot be removed"):
        del group[name]
    with pytest.raises(KeyError, match="cannot be removed"):
        group.pop(name)
    with pytest.raises(TypeError):
        group.popitem()
    with pytest.raises(TypeError):
        group.clear()
    group["mine"] = 3
    assert group.pop("mine") == 3 and group.pop("mine", 4) == 4


# ------------------------------------------------------------------------- what stands around the step


def test_steps_in_backward_follow_the_groups() -> None:
    model = nn.ModuleList(bf.nn.BinaryLinear(33, 33) for _ in range(3))
    optimizer = Bop2ndOrder([{"params": [layer.weight]} for layer in model], gamma=1.0, threshold=0.0)

    def backward() -> list[bool]:
        before = [layer.weight.words.clone() for layer in model]
        x = torch.randn(9, 33)
        for layer in model:
            x = x + layer(x)
        x.square().sum().backward()
        return [not torch.equal(b, layer.weight.words) for b, layer in zip(before, model, strict=True)]

    step_in_backward(model, optimizer)
    assert backward() == [True] * 3
    taken = optimizer.param_groups.pop(0)
    assert backward() == [False, True, True]
    assert model[0].weight.grad is not None
    optimizer.param_groups.append(taken)
    optimizer.param_groups.reverse()
    assert backward() == [True] * 3
    assert len(optimizer.telemetry()) == 3


def test_tracker_and_target_rate_follow_the_groups() -> None:
    pair = Pair(target_flip_rate=0.02)
    tracker = FlipTracker(pair.optimizer)
    pair.steps(10)
    pair.optimizer.param_groups.pop(0)
    pair.steps(10)
    assert [row.total_flips for row in tracker.read()] == [pair.flipped[2], pair.flipped[3]]
    for i in (2, 3):
        mine = pair.optimizer.state[pair.ours[i]]["threshold_scale"]
        assert torch.equal(mine, pair.alone[i].state[pair.theirs[i]]["threshold_scale"])


def test_a_schedule_stays_with_its_group() -> None:
    a, b = parameter(0), parameter(1)
    optimizer = Bop2ndOrder([{"params": [a]}, {"params": [b]}], **VALUES)
    first, second = optimizer.param_groups
    scheduler = schedule(optimizer, "gamma", torch.optim.lr_scheduler.StepLR, 1, 0.5, groups=[1])
    optimizer.param_groups.pop(0)
    optimizer.step()
    scheduler.step()
    assert (first["gamma"], second["gamma"]) == (0.3, 0.15)
    optimizer.param_groups.insert(0, first)
    optimizer.step()
    scheduler.step()
    assert (first["gamma"], second["gamma"]) == (0.3, 0.075)


def _mixed() -> tuple[nn.Module, MixedOptimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(bf.nn.BinaryLinear(40, 33), nn.BatchNorm1d(33), bf.nn.BinaryLinear(33, 4))
    return model, MixedOptimizer(
        model,
        lambda named: Bop2ndOrder([{"params": [entry]} for entry in named], gamma=1.0, threshold=0.0),
        lambda named: torch.optim.SGD([{"params": [entry]} for entry in named], lr=0.1),
    )


def _moved(model: nn.Module, optimizer: MixedOptimizer) -> list[str]:
    before = {name: dense(p) for name, p in model.named_parameters()}
    optimizer.zero_grad()
    model(torch.randn(9, 40)).square().sum().backward()
    optimizer.step()
    return [name for name, p in model.named_parameters() if not torch.equal(before[name], dense(p))]


def test_mixed_groups_can_be_edited_like_a_list() -> None:
    model, optimizer = _mixed()
    assert _moved(model, optimizer) == ["0.weight", "1.weight", "1.bias", "2.weight"]
    binary, real = optimizer.param_groups.pop(0), optimizer.param_groups.pop()
    assert [len(member.param_groups) for member in (optimizer.binary, optimizer.real)] == [1, 1]
    assert _moved(model, optimizer) == ["1.weight", "2.weight"]
    optimizer.param_groups.append(real)
    optimizer.param_groups = [binary, *optimizer.param_groups]
    assert _moved(model, optimizer) == ["0.weight", "1.weight", "1.bias", "2.weight"]
    del optimizer.param_groups[1]
    optimizer.param_groups[0]["params"].clear()
    assert _moved(model, optimizer) == ["1.weight", "1.bias"]
    with pytest.raises(ValueError, match="binary groups, then the real"):
        optimizer.param_groups.reverse()
    with pytest.raises(ValueError, match="all binary or all real"):
        optimizer.param_groups.append({"params": list(model.parameters())})
    assert len(optimizer.param_groups) == 3


def test_mixed_state_can_be_assigned() -> None:
    model, optimizer = _mixed()
    _moved(model, optimizer)
    assert len(optimizer.state) == 2
    optimizer.state = defaultdict(dict)
    assert len(optimizer.state) == 0
    _moved(model, optimizer)
    assert int(optimizer.state[model[0].weight]["step"]) == 1
    optimizer.state.clear()
    _moved(model, optimizer)
    assert int(optimizer.state[model[0].weight]["step"]) == 1
    assert model[0].weight in optimizer.state


# ------------------------------------------------------------------------- parameters that miss steps


def _calls(monkeypatch: pytest.MonkeyPatch, optimizer: Bop2ndOrder) -> int:
    """How many calls of the operator one step makes."""
    from bop2nd_fast.optim.plan import Plan

    seen = []
    original = Plan._run
    with monkeypatch.context() as patch:
        patch.setattr(Plan, "_run", lambda self, *args: (seen.append(1), original(self, *args)))
        optimizer.step()
    return len(seen)


@pytest.mark.parametrize("correction", ["none", "adam"])
def test_parameters_that_miss_steps_join_again(correction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params = [nn.Parameter(torch.ones(40)) for _ in range(6)]
    optimizer = Bop2ndOrder(params, **VALUES, bias_correction=correction)
    for missing in range(6):
        for i, p in enumerate(params):
            p.grad = None if i == missing else torch.randn(40)
        assert _calls(monkeypatch, optimizer) <= 2
    for p in params:
        p.grad = torch.randn(40)
    assert _calls(monkeypatch, optimizer) == 1  # each has missed one step
    assert {int(optimizer.state[p]["step"]) for p in params} == {6}
    params[0].grad = None
    optimizer.step()
    params[0].grad = torch.randn(40)
    assert _calls(monkeypatch, optimizer) == (2 if correction == "adam" else 1)


@pytest.mark.parametrize("correction", ["none", "adam"])
def test_sets_that_take_turns_are_cut_once(correction: str) -> None:
    params = [nn.Parameter(torch.ones(40)) for _ in range(4)]
    optimizer = Bop2ndOrder(params, **VALUES, bias_correction=correction)
    cuts = []
    for step in range(8):
        for i, p in enumerate(params):
            p.grad = torch.randn(40) if i % 2 == step % 2 else None
        optimizer.step()
        cuts.append(optimizer._plans[0].recent[0])
    assert cuts[-1] is cuts[-3] and cuts[-2] is cuts[-4]
