"""What the model itself does is what the packed one does, however it is written, wrapped and called."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bop2nd_fast.inference import ConversionError, convert, tails
from bop2nd_fast.nn import BinaryConv2d, BinaryLinear
from tests.inference_models import kinds

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(2))


def body() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), BinaryLinear(32, 4))


def result(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return model(*args, **kwargs)


# ------------------------------------------------------------------------------------------- hooks and Python


def with_pre_hook() -> nn.Module:
    model = body()
    model.register_forward_pre_hook(lambda module, args: (args[0] * 3 - 1,))
    return model


def with_hook_that_knows_keywords() -> nn.Module:
    model = body()
    model.register_forward_hook(lambda module, args, kwargs, out: out * 2, with_kwargs=True)
    return model


def with_replaced_forward() -> nn.Module:
    model = body().train()
    old = model.forward
    model.forward = lambda x: old(x) + 1  # type: ignore[method-assign]
    return model


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = body(), nn.Linear(4, 3)


class Branch(Own):
    def forward(self, x: Tensor) -> Tensor:
        assert x.dim() == 2
        if isinstance(x, Tensor):
            x = x * 3 - 1
        return self.head(self.body(x))


class Autocast(Own):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.head(self.body(x)).float()


class TwoNames(Own):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 1
        z = y
        z += 1
        return self.body(y) + y.sum(1, keepdim=True)


class WritesItsInput(Own):
    def forward(self, x: Tensor) -> Tensor:
        x.relu_()
        return self.body(x) + x[:, :4]


class Remembers(Own):
    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.body(x)
        return self.seen * 2


class Parametrized(Own):
    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.head)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        with_pre_hook,
        with_hook_that_knows_keywords,
        with_replaced_forward,
        Branch,
        Autocast,
        TwoNames,
        WritesItsInput,
        Remembers,
        Parametrized,
    ],
)
def test_what_python_does(make: Callable[[], nn.Module], exact: bool) -> None:
    torch.manual_seed(1)
    model = make()
    packed = convert(model, X, exact=exact)
    given = X.clone()
    actual = packed(given)
    assert torch.equal(given, X), "a packed model leaves its inputs alone"
    expected = result(model.eval(), X.clone())
    assert torch.equal(actual, expected) if exact else torch.allclose(actual, expected, atol=1e-4)
    assert "packed_linear" in kinds(packed)
    assert not hasattr(model, "seen") or type(model.seen) is Tensor, "nothing of the tracing stays behind"


def test_a_model_that_has_run_with_gradients() -> None:
    model = Remembers()
    model(X)
    assert torch.equal(convert(model, X)(X), result(model.eval(), X))


# ------------------------------------------------------------------------------------------- names

TAKEN = ["conv_last", "conv_pack", "conv_both", "conv_signs", "conv_pool", "conv_flatten", "conv_weight"]
TAKEN += ["output", "update", "training", "input", "size", "condition", "keys", "conv_1"]


class Named(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        setattr(self, name if name not in ("training",) else "training_", nn.Conv2d(3, 16, 3, padding=1))
        self.first = getattr(self, name if name not in ("training",) else "training_")
        self.conv, self.norm = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.body = BinaryConv2d(16, 16, 3, padding=1)
        self.body_signs, self.body_both = BinaryConv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)

    def forward(self, input: Tensor) -> Tensor:
        a = self.first(input)
        b = self.body(self.norm(self.conv(a)) + a) + a
        return self.body_both(self.body_signs(b)) + b


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", TAKEN)
def test_names_meet_no_other(name: str, exact: bool) -> None:
    torch.manual_seed(4)
    model, x = Named(name).eval(), torch.randn(2, 3, 6, 6)
    packed = convert(model, x, exact=exact)
    names = [s.name for s in packed.steps] + list(packed.constants)
    assert len(names) == len(set(names))
    error = packed(x) - result(model, x)
    assert float(error.norm()) <= (0 if exact else 0.05 * float(packed(x).norm()))


# ------------------------------------------------------------------------------------------- signatures


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = BinaryLinear(16, 8)


class Temperature(Layer):
    def forward(self, x: Tensor, temperature: float = 1.0) -> Tensor:
        return self.a(x) / temperature


class Mask(Layer):
    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 2.0) -> Tensor:
        y = self.a(x) * scale
        return y if mask is None else y * mask


class Arguments(Layer):
    def forward(self, *xs: Tensor, **kwargs: Any) -> Any:
        y = sum(self.a(x) for x in xs)
        return y * kwargs["by"] if "by" in kwargs else y


Pair = collections.namedtuple("Pair", "logits features")


class Containers(Layer):
    def forward(self, batch: dict[str, Any]) -> Any:
        y = self.a(batch["x"]) + batch["more"][0]
        return collections.OrderedDict(pair=Pair(y, batch["x"]), list=[y, (None, 3)])


def test_defaults() -> None:
    model = Temperature().eval()
    packed = convert(model, X)
    assert torch.equal(packed(X), result(model, X)) and torch.equal(packed(X, 1.0), result(model, X))
    with pytest.raises(ValueError, match=r"temperature was 1\.0"):
        packed(X, temperature=2.0)
    assert torch.equal(convert(model, (X, 2.0))(x=X, temperature=2.0), result(model, X, 2.0))


def test_optional_and_keyword_only() -> None:
    model, mask = Mask().eval(), torch.rand(4, 8)
    assert torch.equal(convert(model, X)(X), result(model, X))
    for example in ({"x": X, "mask": mask, "scale": 3.0}, {"mask": mask, "scale": 3.0, "x": X}):
        packed = convert(model, example)
        assert torch.equal(packed(X, mask, scale=3.0), result(model, X, mask, scale=3.0))
        assert torch.equal(packed(scale=3.0, mask=mask, x=X), result(model, X, mask, scale=3.0))
        with pytest.raises((TypeError, ValueError), match="mask"):
            packed(X, scale=3.0)


def test_any_arguments() -> None:
    model = Arguments().eval()
    assert torch.equal(convert(model, (X, X + 1))(X, X - 1), result(model, X, X - 1))
    with pytest.raises(TypeError):
        convert(model, (X, X))(X)


def test_containers_in_and_out() -> None:
    model, batch = Containers().eval(), {"x": X, "more": [torch.ones(8)]}
    packed = convert(model, [batch])
    expected, actual = result(model, batch), packed(batch)
    assert isinstance(actual, dict) and isinstance(actual["pair"], tuple)
    assert torch.equal(actual["pair"][0], expected["pair"].logits) and actual["list"][1] == (None, 3)


def test_examples_that_are_none() -> None:
    with pytest.raises(TypeError, match=r"torch\.from_numpy"):
        convert(body(), np.zeros((2, 16), np.float32))
    with pytest.raises(TypeError, match=r"torch\.from_numpy"):
        convert(body(), [np.zeros((2, 16), np.float32)])
    with pytest.raises(TypeError, match="tensor, a sequence of positional arguments or a dict"):
        convert(body(), 3)
    with pytest.raises(TypeError, match="argument"):
        convert(body(), (X, X))


# ------------------------------------------------------------------------------------------- wrappers, modes


def network() -> nn.Module:
    return nn.Sequential(BinaryConv2d(3, 32, 3), nn.BatchNorm2d(32), BinaryConv2d(32, 8, 3)).eval()


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        torch.compile,
        torch.optim.swa_utils.AveragedModel,
        lambda m: nn.DataParallel(torch.compile(m)),  # type: ignore[type-var]
        lambda m: nn.Sequential(torch.compile(m)),
        nn.SyncBatchNorm.convert_sync_batchnorm,
    ],
    ids=["data_parallel", "compiled", "averaged", "both", "inside", "sync_batch_norm"],
)
def test_wrappers(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model, x = network(), torch.randn(2, 3, 8, 8)
    packed = convert(wrap(model), x)
    assert kinds(packed) == [
        "pack",
        "packed_conv2d",
        "packed_conv2d",
        "contiguous",
    ]
    assert torch.equal(packed(x), result(model, x))


def test_modes_around_the_conversion() -> None:
    model, x = network(), torch.randn(1, 3, 8, 8)
    expected = result(model, x)
    for mode in (torch.inference_mode, torch.enable_grad, torch.no_grad, contextlib.nullcontext):
        with mode():
            packed = convert(model, x)
        assert torch.equal(packed(x), expected)
        assert packed(torch.cat([x, x])).shape[0] == 2, "a batch of one leaves the batch free"
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ConversionError, match="under autocast"):
        convert(model, x)
    with torch.device("meta"):
        empty = network()
    with pytest.raises(ConversionError, match="on the meta device"):
        convert(empty, x)


class Counts(Own):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1  # type: ignore[operator]
        return self.body(x)


class Random(Own):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x + torch.rand_like(x))


class Fourier(Own):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(torch.linalg.svd(x, full_matrices=False)[0] @ torch.ones(4, 16))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Counts(), "changes count in every call"),
        (Random(), "random"),
        (Fourier(), r"not an operator that a packed model can run .*torch\.linalg\.svd\(x"),
    ],
)
def test_what_no_packed_model_can_do_is_refused(model: nn.Module, message: str) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items() if type(v) is Tensor}
    with pytest.raises(ConversionError, match=message):
        convert(model, X)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


# ----------------------------------------------------------------------------------- rounding is judged


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu = nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(inplace=True)
        self.c1, self.c2 = (BinaryConv2d(32, 32, 3, padding=1) for _ in range(2))
        self.b1, self.b2 = nn.BatchNorm2d(32), nn.BatchNorm2d(32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        out = self.b1(self.c1(y)) + y
        self.relu(out)
        return self.b2(self.c2(out)) + out


def test_in_place_after_an_addition() -> None:
    torch.manual_seed(0)
    x, net = torch.randn(2, 3, 12, 12), Residual().eval()
    off = ((convert(net, x, exact=False)(x) - result(net, x)).abs() > 1e-3).float().mean()
    assert float(off) < 0.02


@pytest.mark.parametrize("factor", [1.001, -1.0, 0.0])
def test_a_layer_that_is_wrong_is_noticed(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    original = tails.fit

    def wrong(*args: Any) -> Any:
        fitted = original(*args)
        return None if fitted is None else (fitted[0] * factor, fitted[1])

    monkeypatch.setattr(tails, "fit", wrong)
    torch.manual_seed(0)
    with pytest.raises(ConversionError, match=r"exact=False: .*more than the"):
        convert(Residual().eval(), torch.randn(2, 3, 12, 12), exact=False)


def test_a_packed_tensor_is_packed_once_and_a_layer_held_once() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.loop = BinaryLinear(64, 64), BinaryLinear(64, 64), BinaryLinear(64, 64)
            self.fc = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            y = self.q(x) + self.k(x) + self.loop(x)
            for _ in range(4):
                y = y + self.loop(torch.relu(self.fc(y)))
            return y

    packed = convert(Loop().eval(), torch.randn(2, 64))
    assert kinds(packed).count("pack") == 5 and kinds(packed).count("packed_linear") == 7
    assert sum(layer.kind == "packed_linear" for layer in packed.layers.values()) == 3
    assert len(packed.constants) == 2
