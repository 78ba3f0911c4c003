"""Bop and Bop2ndOrder: the rule by hand, bad input, torch's conventions for state, copies and closures."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bop2nd_fast as bf
from bop2nd_fast.optim import Bop, Bop2ndOrder

BACKENDS = [s.name for s in bf.backends.report() if s.available and s.devices in ("any", "cpu")]
VALUES = {"gamma": 3e-3, "sigma": 7e-3, "threshold": 0.04, "eps": 2e-8}


def signs(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, shape, generator=generator).float() * 2 - 1


def parameter(w: Tensor, packed: bool, dim: int = 1) -> nn.Parameter:
    return nn.Parameter(bf.pack(w, dim) if packed else w.clone())


def dense(p: Tensor) -> Tensor:
    return p.unpack().detach() if isinstance(p, bf.BinaryTensor) else p.detach().clone()


def snapshot(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Everything a step may change: weights, state, groups."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = [(k, v.clone()) for p in params for k, v in optimizer.state.get(p, {}).items()]
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return [[dense(p) for p in params], state, groups]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return bool(a == b)


def train(optimizer: torch.optim.Optimizer, n_steps: int, seed: int = 1) -> list[list[Tensor]]:
    """Steps on random gradients; the weights after each."""
    generator = torch.Generator().manual_seed(seed)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    trajectory = []
    for _ in range(n_steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        trajectory.append([dense(p) for p in params])
    return trajectory


# ------------------------------------------------------------------------- the rule


def test_two_steps_of_adam_correction_worked_by_hand() -> None:
    """gamma = 1/2, sigma = 1/4, tau = 1, eps = 0; all moments exact in binary.

    Step 1, g = (1, 2, -4): m = g/2, v = g^2/4; corrected |m'| = |g| = sqrt(v'): a tie, no flip.
    Step 2, g = (3, -2, -4): m = (7/4, -1/2, -3), c1 = 3/4, |m'| = (7/3, 2/3, 4); v = (39/16, 7/4, 7),
    c2 = 7/16, sqrt(v') = (2.360, 2, 4). tau = 0.9 gives the bound (2.124, 1.8, 3.6): exceeded at 1 and 3.
    The signs of m are (+, -, -) and w = (+, +, -): candidates 1 and 3, both flip.
    """
    p = nn.Parameter(torch.tensor([[1.0, 1.0, -1.0]]))
    optimizer = Bop2ndOrder([p], gamma=0.5, sigma=0.25, threshold=1.0, eps=0.0, bias_correction="adam")
    p.grad = torch.tensor([[1.0, 2.0, -4.0]])
    optimizer.step()
    assert dense(p).tolist() == [[1, 1, -1]]
    optimizer.param_groups[0]["threshold"] = 0.9
    p.grad = torch.tensor([[3.0, -2.0, -4.0]])
    optimizer.step()
    assert dense(p).tolist() == [[-1, 1, 1]]
    assert optimizer.state[p]["exp_avg"].tolist() == [[1.75, -0.5, -3.0]]
    assert optimizer.state[p]["exp_avg_sq"].tolist() == [[39 / 16, 7 / 4, 7]]
    (counts,) = optimizer.telemetry()
    assert (counts.candidates, counts.flips, counts.blocked, counts.numel) == (2, 2, 0, 3)


@pytest.mark.parametrize("correction", ["none", "reference", "adam"])
def test_bounds_against_numbers_worked_by_hand(correction: str) -> None:
    """gamma 1e-2, sigma 4e-2, tau 0.5, eps 1e-3, step 2: c1 = 0.0199, c2 = 0.0784, sqrt(c2) = 0.28."""
    wanted = {
        "none": (0.5, 5e-4),
        "reference": (0.5 * 1e-2 / 0.2, 5e-6),
        "adam": (0.5 * 0.0199 / 0.28, 0.5 * 0.0199 * 1e-3),
    }[correction]
    names = ("gamma", "sigma", "threshold", "eps")
    *values, step = [torch.tensor(x, dtype=torch.float64) for x in (1e-2, 4e-2, 0.5, 1e-3, 2.0)]
    knobs = dict(zip(names, values, strict=True))
    hyper = bf.optim.thresholds.bop2nd_hyper(knobs, step, correction, None)
    assert hyper.dtype == torch.float32
    torch.testing.assert_close(hyper, torch.tensor([1e-2, 4e-2, *wanted]), rtol=2e-7, atol=0)


@pytest.mark.parametrize("packed", [True, False])
def test_maximize_is_minimize_of_the_negated_gradient(packed: bool) -> None:
    runs = []
    for maximize, factor in ((True, -1.0), (False, 1.0)):
        p = parameter(signs(5, 70), packed)
        optimizer = Bop2ndOrder([p], **VALUES, maximize=maximize)
        for seed in range(10):
            p.grad = factor * torch.randn(5, 70, generator=torch.Generator().manual_seed(seed))
            optimizer.step()
        runs.append((dense(p), optimizer.state[p]["exp_avg"]))
    assert same(runs[0], runs[1])
    assert not torch.equal(runs[0][0], signs(5, 70))


def test_adam_correction_counts_each_parameters_own_steps() -> None:
    """A parameter without gradients in the first steps is corrected as if it had just begun."""
    late, early = parameter(signs(3, 40), True), parameter(signs(3, 40, seed=5), True)
    optimizer = Bop2ndOrder([early, late], **VALUES, bias_correction="adam")
    alone = parameter(signs(3, 40), True)
    reference = Bop2ndOrder([alone], **VALUES, bias_correction="adam")
    generator = torch.Generator().manual_seed(3)
    for i in range(20):
        early.grad = torch.randn(3, 40, generator=generator)
        if i >= 7:
            late.grad = torch.randn(3, 40, generator=generator)
            alone.grad = late.grad.clone()
            reference.step()
        optimizer.step()
        assert [c.index for c in optimizer.telemetry()] == ([0, 1] if i >= 7 else [0])
    assert optimizer.state[early]["step"] == 20
    assert optimizer.state[late]["step"] == 13
    assert torch.equal(late.words, alone.words)
    assert optimizer.telemetry()[1].flips == reference.telemetry()[0].flips
    assert optimizer.report(quiet=True)[1].steps == 13


# ------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("name", "value"),
    [(n, v) for n in ("gamma", "sigma") for v in (-1e-3, 1.5, math.nan, math.inf)]
    + [(n, v) for n in ("threshold", "eps") for v in (-1e-9, math.nan, math.inf)]
    + [("bias_correction", "Adam"), ("moment_dtype", torch.float16), ("warmup_steps", -1)]
    + [("target_flip_rate", 0.0), ("target_flip_rate", 1.0), ("seed", 0.5)],
)
def test_option_out_of_range(name: str, value: Any) -> None:
    p = parameter(signs(3, 33), True)
    with pytest.raises(ValueError, match=name):
        Bop2ndOrder([p], **{name: value})
    optimizer = Bop2ndOrder([p], **VALUES)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=name):
        optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError, match=name):
        optimizer.param_groups[0].update({"gamma": 0.5, name: value})
    with pytest.raises(ValueError, match=name):
        optimizer.add_param_group({"params": [parameter(signs(2, 2), True)], name: value})
    assert len(optimizer.param_groups) == 1
    assert same(before, snapshot(optimizer))


@pytest.mark.parametrize("value", ["fast", None, True, torch.ones(2), torch.ones((), dtype=torch.int64)])
def test_hyperparameter_of_a_wrong_kind(value: Any) -> None:
    with pytest.raises(TypeError, match="gamma"):
        Bop([parameter(signs(3, 33), True)], gamma=value)


def test_dense_weights_must_be_plus_minus_one() -> None:
    w = signs(3, 33)
    w[1, 7] = 0.5
    with pytest.raises(ValueError, match=r"1 of 99 values are neither"):
        Bop([nn.Parameter(w)])
    p = parameter(signs(3, 33), False)
    optimizer = Bop2ndOrder([p], **VALUES)
    train(optimizer, 2)
    with torch.no_grad():
        p[2, 3] = 0.0
    before = snapshot(optimizer)
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="neither"):
        optimizer.step()
    assert same(before, snapshot(optimizer))


def _sparse(p: Tensor) -> Tensor:
    return torch.zeros(p.shape).to_sparse()


class _Forged(nn.Parameter):
    """A parameter whose gradient does not fit, which torch itself would not allow to be set."""

    forged: Tensor | None = None

    @property  # type: ignore[override]
    def grad(self) -> Tensor | None:
        return self.forged

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        self.forged = value


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_sparse, "must be dense"),
        (lambda p: torch.zeros(3, 34), "does not fit"),
        (lambda p: torch.zeros(3, 33, device="meta"), "does not fit"),
        (lambda p: torch.zeros(3, 33, dtype=torch.int32), "does not fit"),
    ],
    ids=["sparse", "shape", "device", "dtype"],
)
def test_unusable_gradient_changes_nothing(make: Callable[[Tensor], Tensor], message: str) -> None:
    fine, bad = parameter(signs(4, 20), True), _Forged(signs(3, 33))
    optimizer = Bop2ndOrder([{"params": [fine]}, {"params": [bad], "gamma": 0.2}], **VALUES)
    fine.grad, bad.grad = torch.randn(4, 20), torch.randn(3, 33)
    optimizer.step()
    bad.grad = make(bad)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert same(before, snapshot(optimizer))


def test_other_refusals() -> None:
    with pytest.raises(TypeError, match=r"int64"):
        Bop([torch.ones(3, dtype=torch.int64)])
    with pytest.raises(ValueError, match="dense in memory"):
        Bop([nn.Parameter(signs(3, 40)[:, ::2])])
    with pytest.raises(ValueError, match="share a device"):
        Bop([parameter(signs(3, 3), True), nn.Parameter(torch.ones(3, device="meta"))])
    with pytest.raises(ValueError, match="threshold must be > 0"):
        Bop([parameter(signs(3, 3), True)], threshold=0.0, target_flip_rate=1e-3)
    p = parameter(signs(3, 3), True)
    optimizer = Bop([p])
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [p]})
    assert len(optimizer.param_groups) == len(optimizer._plans) == 1


DTYPES = [torch.float64, torch.float8_e4m3fn, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [True, False])
def test_a_gradient_of_another_dtype_changes_nothing_in_any_group(dtype: torch.dtype, packed: bool) -> None:
    params = [parameter(signs(3, 33, seed=i), packed) for i in range(4)]
    optimizer = Bop2ndOrder([{"params": params[:2]}, {"params": params[2:]}], **VALUES)
    train(optimizer, 2)
    before = snapshot(optimizer)
    params[3].grad, params[3].grad_dtype = None, None
    params[3].grad = torch.ones(3, 33).to(dtype)
    with pytest.raises(ValueError, match=str(dtype)):
        optimizer.step()
    assert same(before, snapshot(optimizer))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_dense_weights_have_a_dtype_that_the_step_takes(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=r"dense weights may be float32, bfloat16, float16"):
        Bop([nn.Parameter(torch.ones(4).to(dtype))])
    params = [parameter(signs(3, 33), True), parameter(signs(3, 33), False)]
    optimizer = Bop([{"params": params[:1]}, {"params": params[1:]}])
    train(optimizer, 1)
    params[1].grad = None
    params[1].data = params[1].data.to(dtype)
    params[1].grad_dtype = None
    params[1].grad = torch.ones(3, 33)
    before = optimizer.state[params[0]]["exp_avg"].clone()
    with pytest.raises(TypeError, match="dense weights may be"):
        optimizer.step()
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], before)


def test_a_capture_needs_capturable(monkeypatch: pytest.MonkeyPatch) -> None:
    fine, other = parameter(signs(3, 33), True), parameter(signs(3, 33), True)
    optimizer = Bop2ndOrder([{"params": [fine], "capturable": True}, {"params": [other]}], **VALUES)
    train(optimizer, 1)
    before = snapshot(optimizer)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="capturable=True"):
        optimizer.step()
    assert same(before, snapshot(optimizer))
    optimizer.param_groups[1]["capturable"] = True
    optimizer.step()
    assert not same(before, snapshot(optimizer))


def test_a_torch_that_has_cuda_but_no_driver_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver() -> bool:
        raise RuntimeError("CUDA driver version is insufficient for CUDA runtime version")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", no_driver)
    p = parameter(signs(3, 33), True)
    train(Bop2ndOrder([p], **VALUES), 1)


# ------------------------------------------------------------------------- groups and hyperparameters


def test_numpys_numbers_are_numbers() -> None:
    options: dict[str, Any] = {
        "gamma": np.float32(0.25),
        "sigma": np.float64(0.5),
        "threshold": np.int64(1),
        "warmup_steps": np.int64(3),
        "seed": np.int32(5),
        "target_flip_rate": np.float32(0.25),
        "maximize": np.True_,
    }
    optimizer = Bop2ndOrder([parameter(signs(3, 33), True)], **options)
    saved = _through_a_file(optimizer.state_dict())["param_groups"][0]
    assert {name: saved[name] for name in options} == options
    assert {type(saved[name]) for name in options} == {float, int, bool}
    optimizer.param_groups[0]["gamma"] = np.float32(0.125)
    train(optimizer, 2)
    assert optimizer.param_groups[0]["gamma"] == 0.125
    optimizer.signal_histogram(bins=np.int64(4))
    bf.optim.FlipTracker(optimizer, window=np.int64(4))
    with pytest.raises(ValueError, match="maximize"):
        Bop([parameter(signs(3, 33), True)], maximize="no")  # type: ignore[arg-type]


def test_groups_step_with_their_own_hyperparameters() -> None:
    a, b, c = (parameter(signs(4, 50, seed=i), True) for i in range(3))
    optimizer = Bop2ndOrder([{"params": [a]}, {"params": b, "gamma": 0.2, "threshold": 0.7}], **VALUES)
    optimizer.add_param_group({"params": [c], "sigma": 0.3, "bias_correction": "reference"})
    train(optimizer, 6)
    for p, extra in ((a, {}), (b, {"gamma": 0.2, "threshold": 0.7})):
        alone = parameter(signs(4, 50, seed=0 if p is a else 1), True)
        single = Bop2ndOrder([alone], **{**VALUES, **extra})
        generator = torch.Generator().manual_seed(1)
        for _ in range(6):
            draws = [torch.randn(4, 50, generator=generator) for _ in range(3)]
            alone.grad = draws[0 if p is a else 1]
            single.step()
        assert torch.equal(alone.words, p.words)
    assert [r.name for r in optimizer.telemetry()] == ["group0.param0", "group1.param0", "group2.param0"]


@pytest.mark.parametrize("as_tensor", [True, False])
def test_changed_hyperparameters_take_effect_at_the_next_step(as_tensor: bool) -> None:
    values = [1e-3, 0.25, 1e-2, 1.0]
    changing = parameter(signs(3, 64), True)
    gamma = torch.tensor(values[0], dtype=torch.float64) if as_tensor else values[0]
    optimizer = Bop([changing], gamma=gamma, threshold=0.01)
    m = torch.zeros(3, 64)
    for i, value in enumerate(values):
        if as_tensor:
            gamma.fill_(value)  # type: ignore[union-attr]
        else:
            optimizer.param_groups[0]["gamma"] = value
        changing.grad = torch.randn(3, 64, generator=torch.Generator().manual_seed(i))
        optimizer.step()
        m = m + torch.tensor(value) * (changing.grad - m)
    assert torch.equal(optimizer.state[changing]["exp_avg"], m)


def test_group_behaves_like_a_dict_and_swaps_tensors_for_floats() -> None:
    p = parameter(signs(3, 64), True)
    optimizer = Bop([p], gamma=torch.tensor(0.5), threshold=0.0)
    group = optimizer.param_groups[0]
    group["gamma"] = 1.0
    group |= {"mine": 3}
    assert group.setdefault("other", 4) == 4
    assert group["mine"] == 3
    p.grad = torch.randn(3, 64)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["exp_avg"], p.grad)
    group["gamma"] = torch.tensor(0.5)
    p.grad = torch.zeros(3, 64)
    before = optimizer.state[p]["exp_avg"].clone()
    optimizer.step()
    assert torch.equal(optimizer.state[p]["exp_avg"], before / 2)
    assert type(pickle.loads(pickle.dumps(group))) is dict


# ------------------------------------------------------------------------- changing one import


class EagerBop2ndOrder(torch.optim.Optimizer):
    """What people write themselves: dense weights, plain torch, the paper's biased rule."""

    def __init__(
        self, params: Any, gamma: float = 1e-6, sigma: float = 1e-2, threshold: float = 1e-6
    ) -> None:
        super().__init__(params, {"gamma": gamma, "sigma": sigma, "threshold": threshold})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["m"], state["v"] = torch.zeros_like(p), torch.zeros_like(p)
                m, v = state["m"], state["v"]
                m += group["gamma"] * (p.grad - m)
                v += group["sigma"] * (p.grad**2 - v)
                bound = group["threshold"] * (v.double().sqrt().float() + 1e-10)
                p[(m.sign() == p) & (m.abs() > bound)] *= -1


def _users_own_training(optimizer_class: Any) -> Tensor:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(12, 70, bias=False), nn.Tanh(), nn.Linear(70, 3, bias=False))
    for p in model.parameters():
        p.data = torch.where(p.data < 0, -1.0, 1.0)
    optimizer = optimizer_class(model.parameters(), gamma=1e-2, sigma=1e-2, threshold=5e-2)
    for _ in range(50):
        optimizer.zero_grad()
        model(torch.randn(20, 12)).square().mean().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_users_own_dense_model_changes_one_import() -> None:
    eager, ours = _users_own_training(EagerBop2ndOrder), _users_own_training(Bop2ndOrder)
    assert torch.equal(ours.abs(), torch.ones_like(ours))
    assert torch.equal(eager, ours)


# ------------------------------------------------------------------------- conventions


def test_closure_runs_with_gradients_and_its_loss_is_returned() -> None:
    p = parameter(signs(3, 40), True)
    optimizer = Bop([p], gamma=0.5, threshold=0.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (p.unpack() * 2).sum()  # type: ignore[attr-defined]
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert loss == 2 * signs(3, 40).sum()
    assert torch.equal(dense(p), -torch.ones(3, 40))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool) -> None:
    p = parameter(signs(3, 40), True)
    optimizer = Bop([p])
    p.grad = torch.ones(3, 40)
    optimizer.zero_grad(set_to_none=set_to_none)
    assert p.grad is None if set_to_none else torch.equal(p.grad, torch.zeros(3, 40))


def test_hooks_of_steps_and_state_dicts_run() -> None:
    p = parameter(signs(3, 40), True)
    optimizer = Bop([p])
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda o, a, k: seen.append("pre"))
    optimizer.register_step_post_hook(lambda o, a, k: seen.append("post"))
    optimizer.register_state_dict_post_hook(lambda o, s: seen.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda o, s: {**s, "state": {}})
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    train(optimizer, 2)
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["pre", "post", "pre", "post", "saved", "loaded"]
    assert optimizer.state[p]["step"] == 0  # the pre-hook's empty state was loaded


def test_repr_shows_the_hyperparameters() -> None:
    text = repr(Bop2ndOrder([parameter(signs(3, 40), True)], **VALUES))
    assert "Bop2ndOrder (" in text
    assert "gamma: 0.003" in text
    assert "bias_correction: none" in text


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_go_on_alike_and_apart(copy_of: Callable[[Any], Any]) -> None:
    params = [parameter(signs(3, 40), True), parameter(signs(2, 9, 3, 3), True), parameter(signs(7), False)]
    optimizer = Bop2ndOrder(params, **VALUES, bias_correction="adam")
    train(optimizer, 5)
    twin = copy_of(optimizer)
    before = snapshot(twin)
    ours = train(optimizer, 20, seed=9)
    assert same(before, snapshot(twin))
    assert same(ours, train(twin, 20, seed=9))
    twin.param_groups[0]["gamma"] = 0.5
    assert optimizer.param_groups[0]["gamma"] == VALUES["gamma"]


# ------------------------------------------------------------------------- state


def _network(packed: bool, channels_last: bool = False) -> list[nn.Parameter]:
    conv = signs(6, 35, 3, 3, seed=2)
    if channels_last:
        conv = conv.contiguous(memory_format=torch.channels_last)
    return [parameter(signs(5, 70), packed), parameter(conv, packed), nn.Parameter(signs(11, seed=4))]


def _through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)  # type: ignore[no-any-return]


@pytest.mark.parametrize("correction", ["none", "adam"])
@pytest.mark.parametrize(
    ("source", "target"),
    [((True, False), (False, False)), ((False, False), (True, False)), ((False, True), (False, False))],
    ids=["packed->dense", "dense->packed", "channels_last->contiguous"],
)
def test_resume_between_packed_and_dense(source: Any, target: Any, correction: str) -> None:
    params = _network(*source)
    optimizer = Bop2ndOrder(params, **VALUES, bias_correction=correction)
    train(optimizer, 10)
    other = _network(*target)
    resumed = Bop2ndOrder(other, gamma=0.9, bias_correction=correction)
    with torch.no_grad():
        for p, q in zip(params, other, strict=True):
            q.copy_(dense(p))
    resumed.load_state_dict(_through_a_file(optimizer.state_dict()))
    assert resumed.param_groups[0]["gamma"] == VALUES["gamma"]
    (cut,) = resumed._plans[0].recent
    assert len(cut.batches) == 1  # parameters in lock-step are one call again
    assert same(train(optimizer, 100, seed=5), train(resumed, 100, seed=5))
    for p, q in zip(params, other, strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg"], resumed.state[q]["exp_avg"])


@pytest.mark.parametrize("resume_on", [b for b in BACKENDS if b != "reference"] or ["reference"])
def test_resume_on_another_backend(resume_on: str) -> None:
    params, other = _network(True), _network(True)
    optimizer = Bop2ndOrder(params, **VALUES, bias_correction="reference")
    with bf.backends.use("reference"):
        train(optimizer, 10)
        saved = _through_a_file(optimizer.state_dict())
        weights = [dense(p) for p in params]
        wanted = train(optimizer, 100, seed=5)
    with torch.no_grad():
        for q, w in zip(other, weights, strict=True):
            q.copy_(w)
    with bf.backends.use(resume_on):
        resumed = Bop2ndOrder(other)
        resumed.load_state_dict(saved)
        before = bf.backends.calls()[resume_on]
        assert resumed.param_groups[0]["bias_correction"] == "reference"
        assert same(wanted, train(resumed, 100, seed=5))
        assert bf.backends.calls()[resume_on] > before


def test_moments_of_bf16_parameters_keep_fp32_when_loaded() -> None:
    p = nn.Parameter(bf.pack(signs(3, 40).bfloat16(), 1))
    optimizer = Bop2ndOrder([p], **VALUES)
    p.grad = torch.randn(3, 40).bfloat16()
    optimizer.step()
    saved = _through_a_file(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    for name in ("exp_avg", "exp_avg_sq"):
        assert optimizer.state[p][name].dtype == torch.float32
        assert torch.equal(optimizer.state[p][name], saved["state"][0][name])
    assert not torch.equal(saved["state"][0]["exp_avg"].bfloat16().float(), saved["state"][0]["exp_avg"])


def test_bf16_moments_are_rounded_by_chance_and_resume_alike() -> None:
    params = _network(True)
    optimizer = Bop2ndOrder(params, **VALUES, moment_dtype=torch.bfloat16, seed=11)
    train(optimizer, 5)
    twin = copy.deepcopy(optimizer)
    saved = _through_a_file(optimizer.state_dict())
    twin.load_state_dict(saved)
    assert twin.state[twin.param_groups[0]["params"][0]]["exp_avg"].dtype == torch.bfloat16
    assert same(train(optimizer, 20, seed=3), train(twin, 20, seed=3))
    other = Bop2ndOrder(_network(True), **VALUES, moment_dtype=torch.bfloat16, seed=12)
    train(other, 5)
    first = next(iter(other.state.values()))["exp_avg"]
    assert not torch.equal(first, saved["state"][0]["exp_avg"])


@pytest.mark.parametrize("saved_as", [torch.float32, torch.bfloat16])
def test_the_saved_precision_of_moments_wins(saved_as: torch.dtype) -> None:
    optimizer = Bop2ndOrder(_network(True), **VALUES, moment_dtype=saved_as)
    train(optimizer, 5)
    other = torch.bfloat16 if saved_as == torch.float32 else torch.float32
    resumed = Bop2ndOrder(_network(True), moment_dtype=other)
    resumed.load_state_dict(optimizer.state_dict())
    for p, q in zip(optimizer.param_groups[0]["params"], resumed.param_groups[0]["params"], strict=True):
        assert resumed.state[q]["exp_avg"].dtype == saved_as
        assert torch.equal(optimizer.state[p]["exp_avg"], resumed.state[q]["exp_avg"])
    resumed.param_groups[0]["moment_dtype"] = other
    train(resumed, 1)
    assert resumed.state[q]["exp_avg"].dtype == other


def test_options_that_contradict_each_other_later() -> None:
    optimizer = Bop([parameter(signs(3, 3), True)], target_flip_rate=1e-3)
    group = optimizer.param_groups[0]
    with pytest.raises(ValueError, match="threshold must be > 0"):
        group["threshold"] = 0.0
    group["target_flip_rate"] = None
    group["threshold"] = 0.0
    with pytest.raises(ValueError, match="threshold must be > 0"):
        group["target_flip_rate"] = 1e-3
    assert group["target_flip_rate"] is None


def test_moments_follow_a_parameter_whose_memory_order_changes() -> None:
    params, twins = _network(False), _network(False)
    optimizer, untouched = Bop2ndOrder(params, **VALUES), Bop2ndOrder(twins, **VALUES)
    train(optimizer, 3)
    train(untouched, 3)
    params[1].data = params[1].data.contiguous(memory_format=torch.channels_last)
    assert same(train(optimizer, 20, seed=2), train(untouched, 20, seed=2))
    assert torch.equal(optimizer.state[params[1]]["exp_avg"], untouched.state[twins[1]]["exp_avg"])


def _edit(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(saved: dict[str, Any]) -> None:
        saved["param_groups"][0][key] = value

    return change


def _drop_second_moment(saved: dict[str, Any]) -> None:
    del saved["state"][1]["exp_avg_sq"]


def _wrong_shape(saved: dict[str, Any]) -> None:
    saved["state"][2]["exp_avg"] = torch.zeros(12)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_edit("params", [0, 1]), "2 parameters"),
        (_edit("gamma", 7.0), "gamma"),
        (_drop_second_moment, "exp_avg_sq"),
        (_wrong_shape, r"\(12,\)"),
        (lambda saved: saved["param_groups"].append(saved["param_groups"][0]), "2 parameter groups"),
    ],
    ids=["count", "range", "moment", "shape", "groups"],
)
def test_saved_state_that_does_not_fit_changes_nothing(damage: Callable[[Any], None], message: str) -> None:
    optimizer = Bop2ndOrder(_network(True), **VALUES)
    train(optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    train(optimizer, 3)
    damage(saved)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert same(before, snapshot(optimizer))


def test_state_of_bop_is_refused_by_bop2ndorder() -> None:
    bop, second = Bop(_network(True)), Bop2ndOrder(_network(True))
    train(bop, 1)
    with pytest.raises(ValueError, match="another optimizer's: it has no sigma"):
        second.load_state_dict(bop.state_dict())


def test_state_of_adam_is_refused() -> None:
    """Its state has the same names and shapes."""
    dense_ones = [nn.Parameter(signs(3, 40)) for _ in range(2)]
    adam, ours = torch.optim.Adam(dense_ones), Bop2ndOrder([parameter(signs(3, 40), True) for _ in range(2)])
    train(adam, 2)
    before = snapshot(ours)
    with pytest.raises(ValueError, match="another optimizer's: it has no gamma"):
        ours.load_state_dict(adam.state_dict())
    for wrong in ({}, {"state": {}}, {"param_groups": 3, "state": {}}):
        with pytest.raises(ValueError, match="no optimizer's state_dict"):
            ours.load_state_dict(wrong)
    assert same(before, snapshot(ours))


def test_an_unfrozen_parameter_joins_later() -> None:
    params = _network(True)
    params[1].requires_grad_(False)
    optimizer = Bop2ndOrder(params, **VALUES)
    assert params[1] not in optimizer.state
    params[0].grad = torch.randn(5, 70)
    optimizer.step()
    params[1].requires_grad_(True)
    train(optimizer, 4)
    assert int(optimizer.state[params[1]]["step"]) == 4
    assert int(optimizer.state[params[0]]["step"]) == 5
    saved = optimizer.state_dict()
    assert saved["state"].keys() == {0, 1, 2}
