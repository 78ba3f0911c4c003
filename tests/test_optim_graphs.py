"""The step never looks at a value on the host; torch.compile takes it whole and never compiles it twice."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils._python_dispatch import TorchDispatchMode

import bop2nd_fast as bf
from bop2nd_fast.optim import Bop2ndOrder, MixedOptimizer, linear, schedule, split_parameters

VALUES = {"gamma": 0.02, "sigma": 0.03, "threshold": 0.04, "eps": 2e-8}
aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()


# ------------------------------------------------------------------------- graph safety, without a GPU


class NoHost(TorchDispatchMode):
    """Raises on what a CUDA graph cannot hold: reading a value, copies between devices, host constants."""

    forbidden = (
        aten._local_scalar_dense.default,
        aten.is_nonzero.default,
        aten.equal.default,
        aten.nonzero.default,
        aten.masked_select.default,
        aten.lift_fresh.default,
        aten.lift_fresh_copy.default,
    )

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __enter__(self) -> NoHost:
        self.patch = (
            pytest.MonkeyPatch()
        )  # a constant from the host is a copy, which meta tensors do not show
        for name in ("tensor", "as_tensor", "from_numpy", "frombuffer"):
            self.patch.setattr(torch, name, self._refuse)
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        self.patch.undo()
        super().__exit__(*exception)

    @staticmethod
    def _refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a tensor made from a host value in the step")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in self.forbidden, f"{func} in the step"
        out = func(*args, **(kwargs or {}))
        flat, _ = torch.utils._pytree.tree_flatten((args, kwargs, out))
        devices = {t.device.type for t in flat if isinstance(t, Tensor)}
        assert len(devices) <= 1, f"{func} between {devices}"
        self.seen.append(func)
        return out


def _meta_parameters() -> list[nn.Parameter]:
    """Packed parameters on the meta device: like a GPU, it is not the host, and nothing on it can be read."""
    shapes = ((5, 70), (6, 35, 3, 3))
    return [nn.Parameter(bf.pack(torch.ones(shape, device="meta"), 1)) for shape in shapes]


CASES: dict[str, dict[str, Any]] = {
    "capturable": {"capturable": True},
    "eager": {"capturable": False},
    "adam": {"capturable": True, "bias_correction": "adam"},
    "bf16": {"capturable": True, "moment_dtype": torch.bfloat16},
    "warmup": {"capturable": True, "warmup_steps": 3},
    "target": {"capturable": True, "target_flip_rate": 1e-3},
    "bop": {"capturable": True, "class": bf.optim.Bop},
}


@pytest.mark.parametrize("case", CASES)
def test_no_step_touches_the_host(case: str) -> None:
    options = dict(CASES[case])
    make = options.pop("class", Bop2ndOrder)
    params = _meta_parameters()
    optimizer = make(params, gamma=0.5, threshold=0.1, **options)
    scheduler = schedule(optimizer, "gamma", lr_scheduler.StepLR, 1)
    for p in params:
        p.grad = torch.ones(p.shape, device="meta")
    with NoHost() as mode:
        for _ in range(3):
            optimizer.step()
            scheduler.step()
            optimizer.param_groups[0]["threshold"] = 0.2
    assert mode.seen.count(torch.ops.bop2nd.bop_step_.default) == 3 * (2 if case == "target" else 1)


def test_no_scaled_step_touches_the_host() -> None:
    params = _meta_parameters()
    optimizer = Bop2ndOrder(params, bias_correction="adam", capturable=True)
    for p in params:
        p.grad = torch.ones(p.shape, device="meta")
    optimizer.grad_scale = torch.ones((), device="meta")
    optimizer.found_inf = torch.ones((), device="meta")
    with NoHost() as mode:
        optimizer.step()
    assert torch.ops.bop2nd.bop_step_.default in mode.seen


def test_the_guard_itself_catches_host_reads_and_copies() -> None:
    """And what the options above do not cover: a hyperparameter left on the CPU."""
    x = torch.ones((), device="meta")
    for offence in (
        lambda: x.item(),
        lambda: x.cpu(),
        lambda: torch.tensor(3.0, device="meta"),
        lambda: bool(x > 0),
    ):
        with NoHost(), pytest.raises((AssertionError, RuntimeError)):
            offence()
    with pytest.raises(ValueError, match="gamma must lie on meta"):
        Bop2ndOrder(_meta_parameters(), gamma=torch.ones(()), capturable=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.cuda
def test_captured_steps_follow_the_eager_ones() -> None:
    def fresh() -> tuple[nn.Parameter, Bop2ndOrder]:
        p = nn.Parameter(bf.pack(torch.ones(64, 100, device="cuda"), 1))
        p.grad = torch.empty(64, 100, device="cuda")
        return p, Bop2ndOrder([p], **VALUES, bias_correction="adam", capturable=True)

    (p, captured), (q, eager) = fresh(), fresh()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for seed in range(20):
        g = torch.randn(64, 100, generator=torch.Generator().manual_seed(seed))
        p.grad.copy_(g)
        q.grad.copy_(g)
        for optimizer in (captured, eager):
            optimizer.param_groups[0]["gamma"] = 0.02 / (1 + seed)
        graph.replay()
        eager.step()
        assert torch.equal(p.words, q.words)
        assert captured.telemetry() == eager.telemetry()


# ------------------------------------------------------------------------- torch.compile


def _signs(*shape: int) -> Tensor:
    return torch.randint(0, 2, shape).float() * 2 - 1


@pytest.mark.parametrize("correction", ["none", "adam"])
def test_compiled_steps_have_the_bits_of_eager_ones(correction: str) -> None:
    """100 steps with three schedules over Python floats: one graph, compiled once; packed and dense."""
    weights = [_signs(5, 70), _signs(6, 35, 3, 3), _signs(7, 9)]

    def fresh() -> tuple[list[nn.Parameter], Bop2ndOrder, list[Any]]:
        params = [nn.Parameter(bf.pack(w, 1)) for w in weights[:2]] + [nn.Parameter(weights[2].clone())]
        optimizer = Bop2ndOrder(params, **VALUES, bias_correction=correction)
        schedulers = [
            linear(optimizer, "gamma", 0.02, 1e-4, 100),
            linear(optimizer, "sigma", 1e-3, 0.03, 100),
            schedule(optimizer, "threshold", lr_scheduler.StepLR, 10),
        ]
        return params, optimizer, schedulers

    ours, eager = fresh(), fresh()
    step = torch.compile(ours[1].step, fullgraph=True, backend="aot_eager")
    flips = 0
    for _ in range(100):
        for p, q in zip(ours[0], eager[0], strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        step()
        eager[1].step()
        for scheduler in (*ours[2], *eager[2]):
            scheduler.step()
        assert ours[1].telemetry() == eager[1].telemetry()
        flips += sum(c.flips for c in eager[1].telemetry())
    assert flips > 0
    for p, q in zip(ours[0], eager[0], strict=True):
        assert torch.equal(p.detach().clone(), q.detach().clone())
        assert all(
            torch.equal(ours[1].state[p][k], eager[1].state[q][k]) for k in ("step", "exp_avg", "exp_avg_sq")
        )


EDITS = [
    lambda o, p: o.param_groups.pop(0),
    lambda o, p: setattr(o, "param_groups", o.param_groups[:1]),
    lambda o, p: o.param_groups[0]["params"].pop(),
    lambda o, p: o.param_groups[0].__setitem__("params", [p]),
]


@pytest.mark.parametrize("edit", EDITS)
def test_a_step_compiled_in_parts_follows_edited_groups(edit: Callable[..., Any]) -> None:
    params = [nn.Parameter(bf.pack(_signs(5, 70), 1)) for _ in range(3)]
    optimizer = Bop2ndOrder([{"params": params[:2]}, {"params": params[2:]}], **VALUES)
    step = torch.compile(optimizer.step, backend="aot_eager")
    for p in params:
        p.grad = torch.randn(5, 70)
    step()
    edit(optimizer, params[0])
    with torch._dynamo.config.patch(error_on_recompile=False):
        step()
        step()
    listed = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert [int(optimizer.state[p]["step"]) for p in params] == [3 if id(p) in listed else 1 for p in params]


@pytest.mark.parametrize("edit", EDITS)
def test_a_compiled_step_notices_edited_groups(edit: Callable[..., Any]) -> None:
    params = [nn.Parameter(bf.pack(_signs(5, 70), 1)) for _ in range(3)]
    optimizer = Bop2ndOrder([{"params": params[:2]}, {"params": params[2:]}], **VALUES)
    step = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)
    for p in params:
        p.grad = torch.randn(5, 70)
    step()
    edit(optimizer, params[0])
    with torch._dynamo.config.patch(error_on_recompile=False):
        with pytest.raises(RuntimeError, match="one step that is not compiled"):
            step()
        optimizer.step()
        step()
    listed = [p for group in optimizer.param_groups for p in group["params"]]
    assert [int(optimizer.state[p]["step"]) for p in params] == [
        3 if any(p is q for q in listed) else 1 for p in params
    ]


def _network() -> nn.Sequential:
    return nn.Sequential(
        bf.nn.BinaryLinear(20, 64, input_quantizer=None),
        nn.BatchNorm1d(64),
        bf.nn.BinaryLinear(64, 4),
        nn.BatchNorm1d(4),
    )


def _train(step: Callable[[Tensor, Tensor], Tensor], after: Callable[[], Any]) -> list[float]:
    x, losses = torch.randn(32, 20), []
    y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    for _ in range(100):
        losses.append(float(step(x, y)))
        after()
    return losses


@pytest.mark.slow
def test_compiled_mixed_training_never_breaks_nor_recompiles() -> None:
    """Forward and backward one compiled thing, the steps of both members another (that one by inductor, which
    is slow to compile): 100 scheduled steps."""
    model = _network()
    optimizer = MixedOptimizer(
        model,
        functools.partial(Bop2ndOrder, gamma=0.02, sigma=0.01, threshold=1e-3),
        functools.partial(torch.optim.Adam, lr=torch.tensor(0.02)),
    )
    schedulers = [
        linear(optimizer, "gamma", 0.02, 1e-3, 100),
        schedule(optimizer, "lr", lr_scheduler.ExponentialLR, 0.99),
    ]
    forward = torch.compile(model, fullgraph=True, backend="aot_eager")
    update = torch.compile(optimizer.step, fullgraph=True)

    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(forward(x), y)
        loss.backward()
        update()
        return loss.detach()

    losses = _train(step, lambda: [s.step() for s in schedulers])
    assert min(losses[-5:]) < losses[0] / 2
    assert optimizer.binary.state[model[0].weight]["step"] == 100
    assert optimizer.param_groups[0]["gamma"] == pytest.approx(1e-3)
    assert float(optimizer.param_groups[1]["lr"]) == pytest.approx(0.02 * 0.99**100, rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(
    torch.torch_version.TorchVersion(torch.__version__) < (2, 13),
    reason="this torch breaks the graph at backward(); 2.11 has the switch, but does not get through",
)
def test_forward_backward_and_step_in_one_graph() -> None:
    model = _network()
    for norm in (model[1], model[3]):
        norm.requires_grad_(False)
    optimizer = Bop2ndOrder(split_parameters(model)[0], gamma=0.02, sigma=0.01, threshold=1e-3)
    gamma = linear(optimizer, "gamma", 0.02, 1e-3, 100)

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        for p in model.parameters():
            p.grad = None
        return loss.detach()

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        losses = _train(torch.compile(step, fullgraph=True, backend="aot_eager"), gamma.step)
    assert min(losses[-5:]) < losses[0] / 2
    assert all(row.flip_rate > 0 for row in optimizer.report(quiet=True))
    assert optimizer.state[model[0].weight]["step"] == 100
