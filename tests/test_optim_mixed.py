"""One optimizer for a whole network, mixed precision, steps inside backward, Lightning and accelerate."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bop2nd_fast as bf
from bop2nd_fast.optim import Bop2ndOrder, MixedOptimizer, schedule, split_parameters, step_in_backward


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tiny networks: more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


BOP = functools.partial(Bop2ndOrder, gamma=0.05, sigma=0.02, threshold=0.03)
REAL: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": functools.partial(torch.optim.Adam, lr=0.01),
    "adam_fused": functools.partial(torch.optim.Adam, lr=0.01, fused=True),
    "sgd": functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9),
}


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        bf.nn.BinaryConv2d(3, 8, 3, input_quantizer=None),
        nn.BatchNorm2d(8),
        bf.nn.BinaryConv2d(8, 40, 3, padding=1),
        nn.Flatten(),
        nn.BatchNorm1d(40 * 16),
        bf.nn.BinaryLinear(40 * 16, 5, bias=True),
    )


def batches(n: int, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(6, 3, 6, 6, generator=generator), torch.randint(0, 5, (6,), generator=generator))
        for _ in range(n)
    ]


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """A copy of parameters and buffers, binary ones as words."""
    return {
        k: v.words.clone() if isinstance(v, bf.BinaryTensor) else v.clone()
        for k, v in model.state_dict().items()
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def run(model: nn.Module, steps: Callable[[], Any], data: list[tuple[Tensor, Tensor]]) -> None:
    for x, y in data:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        steps()


# ------------------------------------------------------------------------- mixed networks


@pytest.mark.parametrize("kind", REAL)
def test_mixed_is_its_two_members(kind: str) -> None:
    model, twin = network(), network()
    mixed = MixedOptimizer(model, BOP, REAL[kind])
    binary, real = split_parameters(twin)
    one, two = BOP(binary), REAL[kind](real)
    run(model, mixed.step, batches(10))
    run(twin, lambda: (one.step(), two.step()), batches(10))
    assert same(tensors(model), tensors(twin))
    assert not same(tensors(model), tensors(network()))
    assert [c.flips for c in mixed.telemetry()] == [c.flips for c in one.telemetry()]
    assert mixed.telemetry()[1].name == "2.weight"
    assert len(mixed.report(quiet=True)) == 3
    assert list(mixed.signal_histogram()) == ["0.weight", "2.weight", "5.weight"]
    assert len(mixed.param_groups) == 2


def test_mixed_resumes_bit_for_bit() -> None:
    model = network()
    mixed = MixedOptimizer(model, BOP, REAL["adam"])
    run(model, mixed.step, batches(7))
    saved = copy.deepcopy((model.state_dict(), mixed.state_dict()))
    run(model, mixed.step, batches(7, seed=2))
    assert list(saved[1]["state"]) == list(range(8))
    resumed = network(seed=4)
    again = MixedOptimizer(resumed, Bop2ndOrder, torch.optim.Adam)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    run(resumed, again.step, batches(7, seed=2))
    assert same(tensors(model), tensors(resumed))
    assert again.param_groups[0]["gamma"] == 0.05
    assert again.param_groups[1]["lr"] == 0.01
    with pytest.raises(ValueError, match="groups"):
        again.load_state_dict({"state": {}, "param_groups": saved[1]["param_groups"][:1]})


def test_mixed_copies_and_schedules_of_both_sides() -> None:
    model = network()
    mixed = MixedOptimizer(model, BOP, REAL["adam"])
    gamma = schedule(mixed, "gamma", torch.optim.lr_scheduler.StepLR, 2, 0.5)
    lr = torch.optim.lr_scheduler.ExponentialLR(mixed.real, 0.5)
    also_lr = schedule(mixed, "lr", torch.optim.lr_scheduler.ConstantLR, 0.5, 2)
    run(model, lambda: (mixed.step(), gamma.step(), lr.step(), also_lr.step()), batches(4))
    assert mixed.binary.param_groups[0]["gamma"] == 0.05 / 4
    assert mixed.real.param_groups[0]["lr"] == 0.01 / 16
    twin = copy.deepcopy(mixed)
    assert [len(g["params"]) for g in twin.param_groups] == [3, 5]
    assert len(twin.state) == 8
    assert "MixedOptimizer" in repr(mixed)
    mixed.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_mixed_routes_by_predicate() -> None:
    """A user's own dense +-1 layer goes to the binary optimizer because a predicate says so."""
    model = nn.Sequential(nn.Linear(6, 40, bias=False), nn.Linear(40, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.where(model[0].weight < 0, -1.0, 1.0))
    mixed = MixedOptimizer(model, BOP, route=lambda name, p: name == "0.weight")
    for seed in range(5):
        x = torch.randn(9, 6, generator=torch.Generator().manual_seed(seed))
        model(x).square().mean().backward()
        mixed.step()
    assert torch.equal(model[0].weight.abs(), torch.ones(40, 6))
    assert sum(row.flip_rate for row in mixed.report(quiet=True)) > 0
    assert type(mixed.real) is torch.optim.Adam


def test_mixed_refuses_wrong_claims() -> None:
    model = network()
    binary, real = split_parameters(model)
    with pytest.raises(ValueError, match=r"claimed by both.*5\.weight"):
        MixedOptimizer(model, BOP(binary), torch.optim.Adam([*real, *binary]))
    with pytest.raises(ValueError, match=r"claimed by no optimizer: 1\.weight"):
        MixedOptimizer(model, BOP(binary), torch.optim.Adam(real[1:]))
    with pytest.raises(ValueError, match="not given"):
        MixedOptimizer(model, BOP(binary), torch.optim.Adam([*real, nn.Parameter(torch.ones(1))]))
    with pytest.raises(ValueError, match="binary optimizer would claim no parameter"):
        MixedOptimizer(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="real optimizer would claim no parameter"):
        MixedOptimizer(bf.nn.BinaryLinear(40, 3))
    with pytest.raises(ValueError, match="exist already"):
        MixedOptimizer(model, BOP(binary), torch.optim.Adam(real), route=lambda n, p: True)
    mixed = MixedOptimizer(model, BOP(binary), torch.optim.Adam(real))
    with pytest.raises(ValueError, match="all binary or all real"):
        mixed.add_param_group({"params": [nn.Parameter(torch.ones(1)), bf.nn.BinaryLinear(40, 3).weight]})
    mixed.add_param_group({"params": bf.nn.BinaryLinear(40, 3).weight, "gamma": 0.5})
    assert [g.get("gamma") for g in mixed.param_groups] == [0.05, 0.5, None]


def _sparse(model: nn.Module) -> None:
    model[1].weight.grad = model[1].weight.grad.to_sparse()


def _real_float64(model: nn.Module) -> None:
    bias = model[5].bias
    grad, bias.grad, bias.grad_dtype = bias.grad, None, None
    bias.grad = grad.double()


def _binary_float64(model: nn.Module) -> None:
    weight = model[5].weight
    grad, weight.grad, weight.grad_dtype = weight.grad, None, None
    weight.grad = grad.double()


@pytest.mark.parametrize("kind", REAL)
@pytest.mark.parametrize("harm", [_sparse, _real_float64, _binary_float64])
def test_a_gradient_that_one_member_refuses_changes_neither(kind: str, harm: Callable[..., None]) -> None:
    if (kind, harm) == ("sgd", _sparse):
        return  # SGD takes sparse gradients
    model = network()
    mixed = MixedOptimizer(model, BOP, REAL[kind])
    run(model, mixed.step, batches(2))
    model.zero_grad()
    F.cross_entropy(model(batches(1)[0][0]), batches(1)[0][1]).backward()
    harm(model)
    before = _all_of(model, mixed)
    with pytest.raises(ValueError, match="gradient"):
        mixed.step()
    assert same(before, _all_of(model, mixed))


class Moody(torch.optim.SGD):
    """An optimizer of somebody else's that refuses for reasons of its own."""

    def step(self, closure: Any = None) -> Any:
        raise RuntimeError("not today")


def test_a_real_member_that_raises_has_changed_no_binary_weight() -> None:
    model = network()
    mixed = MixedOptimizer(model, BOP, functools.partial(Moody, lr=0.1))
    before = _all_of(model, mixed)
    with pytest.raises(RuntimeError, match="not today"):
        run(model, mixed.step, batches(1))
    assert same(before, _all_of(model, mixed))


def _bad_binary(saved: dict[str, Any]) -> None:
    saved["state"][0]["exp_avg"] = torch.zeros(3)


def _bad_real(saved: dict[str, Any]) -> None:
    saved["param_groups"][1]["params"].pop()


def _swapped(saved: dict[str, Any]) -> None:
    saved["param_groups"].reverse()


@pytest.mark.parametrize("harm", [_bad_binary, _bad_real, _swapped])
def test_mixed_loads_all_or_nothing(harm: Callable[..., None]) -> None:
    model = network()
    mixed = MixedOptimizer(model, BOP, REAL["adam"])
    run(model, mixed.step, batches(2))
    saved = copy.deepcopy(mixed.state_dict())
    run(model, mixed.step, batches(2))
    harm(saved)
    before = _all_of(model, mixed)
    with pytest.raises(ValueError):
        mixed.load_state_dict(saved)
    assert same(before, _all_of(model, mixed))


# ------------------------------------------------------------------------- mixed precision


def _scaled_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any, factor: float = 1.0
) -> None:
    (x, y) = batches(1)[0]
    model.zero_grad()
    scaler.scale(F.cross_entropy(model(x), y) * factor).backward()
    scaler.step(optimizer)
    scaler.update()


def _all_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    parameters = {k: v for k, v in tensors(model).items() if "running" not in k and "batches" not in k}
    state = {
        f"state {i} {k}": v.clone()
        for i, values in optimizer.state_dict()["state"].items()
        for k, v in values.items()
    }
    return parameters | state


@pytest.mark.parametrize("kind", ["binary", *REAL])
def test_grad_scaler_skips_an_infinite_step_bit_for_bit(kind: str) -> None:
    model = network()
    optimizer = (
        BOP(split_parameters(model)[0]) if kind == "binary" else MixedOptimizer(model, BOP, REAL[kind])
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    _scaled_step(model, optimizer, scaler)
    before = _all_of(model, optimizer)
    _scaled_step(model, optimizer, scaler, factor=float("inf"))
    assert same(before, _all_of(model, optimizer))
    assert scaler.get_scale() == 2.0**9
    assert all(c.candidates == c.flips == 0 for c in optimizer.telemetry())  # type: ignore[attr-defined]
    _scaled_step(model, optimizer, scaler)
    assert not same(before, _all_of(model, optimizer))
    assert not hasattr(optimizer, "found_inf")


def test_one_infinite_element_is_enough() -> None:
    model = network()
    optimizer = MixedOptimizer(model, BOP)
    scaler = torch.amp.GradScaler("cpu")
    before = _all_of(model, optimizer)
    scaler.scale(F.cross_entropy(model(batches(1)[0][0]), batches(1)[0][1])).backward()
    model[2].weight.grad[3, 2, 1, 0] = float("-inf")
    scaler.step(optimizer)
    assert same(before, _all_of(model, optimizer))


def test_unscaling_in_the_kernel_gives_the_bits_of_no_scaling() -> None:
    """The scale is a power of two, so that scaling itself is exact."""
    model, twin = network(), network()
    scaled, plain = BOP(split_parameters(model)[0]), BOP(split_parameters(twin)[0])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=3)
    for _ in range(8):
        _scaled_step(model, scaled, scaler)
        run(twin, plain.step, batches(1))
    assert same(_all_of(model, scaled), _all_of(twin, plain))
    assert scaler.get_scale() > 2.0**12


def test_gradients_unscaled_by_the_user_are_not_unscaled_twice() -> None:
    model, twin = network(), network()
    clipped, plain = (MixedOptimizer(m, BOP, REAL["sgd"]) for m in (model, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    (x, y) = batches(1)[0]
    scaler.scale(F.cross_entropy(model(x), y)).backward()
    scaler.unscale_(clipped)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    scaler.step(clipped)
    F.cross_entropy(twin(x), y).backward()
    assert torch.equal(norm, nn.utils.clip_grad_norm_(twin.parameters(), 0.1))
    plain.step()
    assert same(_all_of(model, clipped), _all_of(twin, plain))


def test_bf16_autocast_trains() -> None:
    model = network()
    optimizer = MixedOptimizer(model, BOP)
    losses = []
    (x, y) = batches(1)[0]
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x).float(), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert model[2].weight.grad.dtype == torch.float32
    assert optimizer.state[model[2].weight]["exp_avg"].dtype == torch.float32
    assert min(losses[-5:]) < losses[0] / 2


# ------------------------------------------------------------------------- inside backward


def _live_gradient_bytes(model: nn.Module, before_free: list[Any]) -> list[int]:
    """Bytes of gradients alive whenever one has just been made (weak references: freed means freed)."""
    alive: list[tuple[Any, int]] = []
    sums: list[int] = []

    def note(p: Tensor) -> None:
        assert p.grad is not None
        alive.append((weakref.ref(p.grad), p.grad.nbytes))
        sums.append(sum(n for ref, n in alive if ref() is not None))

    before_free += [p.register_post_accumulate_grad_hook(note) for p in model.parameters()]
    return sums


@pytest.mark.parametrize("kind", REAL)
def test_steps_in_backward_have_the_same_bits_and_free_gradients(kind: str) -> None:
    model, twin = network(), network()
    inside, outside = (MixedOptimizer(m, BOP, REAL[kind]) for m in (model, twin))
    hooks: list[Any] = []
    peak_inside, peak_outside = _live_gradient_bytes(model, hooks), _live_gradient_bytes(twin, hooks)
    handle = step_in_backward(model, inside)
    for x, y in batches(8):
        F.cross_entropy(model(x), y).backward()
        assert all(p.grad is None for p in model.parameters())
        inside.step()  # finds nothing to do, forgets nothing
    run(twin, outside.step, batches(8))
    assert same(_all_of(model, inside), _all_of(twin, outside))
    assert inside.telemetry() == outside.telemetry()
    sizes = [p.numel() * 4 for p in model.parameters()]
    assert max(peak_outside) == sum(sizes)
    assert max(peak_inside) == max(sizes)
    handle.remove()
    for hook in hooks:
        hook.remove()
    run(model, inside.step, batches(3, seed=5))
    run(twin, outside.step, batches(3, seed=5))
    assert same(tensors(model), tensors(twin))


def test_step_in_backward_refuses_what_would_go_wrong() -> None:
    model = network()
    optimizer = BOP(split_parameters(model)[0])
    with pytest.raises(ValueError, match="not the model's"):
        step_in_backward(network(), optimizer)
    F.cross_entropy(model(batches(1)[0][0]), batches(1)[0][1]).backward()
    with pytest.raises(ValueError, match="waiting for a step"):
        step_in_backward(model, optimizer)


@pytest.mark.parametrize("kind", ["bop", "sgd"])
def test_a_step_in_backward_looks_at_one_parameter(kind: str) -> None:
    """Whatever the number of parameters: their gradients are asked for a fixed number of times each."""
    asked: list[int] = []

    class Counted(nn.Parameter):
        @property  # type: ignore[override]
        def grad(self) -> Tensor | None:
            asked.append(1)
            return super().grad

        @grad.setter
        def grad(self, value: Tensor | None) -> None:
            Tensor.grad.__set__(self, value)  # type: ignore[attr-defined]

    counts = []
    for n in (10, 40):
        model = nn.ParameterList([Counted(torch.ones(33)) for _ in range(n)])
        optimizer = BOP(model) if kind == "bop" else torch.optim.SGD(model, lr=0.1, foreach=False)
        step_in_backward(model, optimizer)
        for _ in range(2):
            asked.clear()
            sum(p.sum() for p in model).backward()
        counts.append(len(asked))
    assert counts[1] == 4 * counts[0]


# ------------------------------------------------------------------------- other people's trainers


def test_accelerate_takes_it_for_an_optimizer(tmp_path: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, twin = network(), network()
    plain = MixedOptimizer(twin, BOP, REAL["adam"])
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, MixedOptimizer(model, BOP, REAL["adam"]))
    assert isinstance(optimizer, torch.optim.Optimizer)
    for x, y in batches(4):
        optimizer.zero_grad()
        accelerator.backward(F.cross_entropy(prepared(x), y))
        optimizer.step()
    run(twin, plain.step, batches(4))
    assert same(tensors(model), tensors(twin))
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["gamma"] == 0.05


def test_lightning_trains_schedules_and_resumes(tmp_path: Any) -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: Any, index: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            optimizer = MixedOptimizer(self.net, BOP, REAL["adam"])
            gamma = schedule(optimizer, "gamma", torch.optim.lr_scheduler.ExponentialLR, 0.5)
            return [optimizer], [{"scheduler": gamma, "interval": "step"}]

    def fit(epochs: int, checkpoint: str | None = None) -> tuple[Any, Any]:
        module = Module()
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            enable_checkpointing=False,
            default_root_dir=tmp_path,
            **quiet,
        )
        loader = torch.utils.data.DataLoader(batches(3), batch_size=None)
        trainer.fit(module, loader, ckpt_path=checkpoint)
        return module, trainer

    straight, trainer = fit(2)
    assert trainer.optimizers[0].param_groups[0]["gamma"] == 0.05 * 0.5**6
    first, half = fit(1)
    half.save_checkpoint(tmp_path / "half.ckpt", weights_only=False)
    resumed, _ = fit(2, str(tmp_path / "half.ckpt"))
    assert same(tensors(straight), tensors(resumed))
    assert not same(tensors(first), tensors(resumed))
