"""What torch and other libraries do to a parameter beside training it: raw memory, modes, casts, .data."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bop2nd_fast as bf
from bop2nd_fast import BinaryTensor
from bop2nd_fast.nn import BinaryConv2d, BinaryLinear

# ------------------------------------------------------------------ memory that is not there


@pytest.mark.parametrize(
    "access",
    [
        lambda t: t.data_ptr(),
        lambda t: t.storage(),
        lambda t: torch.from_dlpack(t),
        lambda t: np.from_dlpack(t),
        lambda t: torch.utils.dlpack.to_dlpack(t),
        lambda t: t.apply_(lambda x: -x),
        lambda t: t.map_(torch.ones(2, 40), lambda x, y: y),
        lambda t: torch.ones(2, 40).map_(t, lambda x, y: y),
        lambda t: t.untyped_storage()[0],
        lambda t: t.untyped_storage().fill_(0),
        lambda t: torch._C._to_dlpack(t),
        lambda t: t.view(-1).data_ptr(),
        lambda t: t.t().untyped_storage()[0],
    ],
)
def test_asking_for_dense_memory_raises(access: Callable[[Tensor], Any]) -> None:
    packed = bf.pack(torch.randn(2, 40))
    words = packed.words.clone()
    with pytest.raises((TypeError, RuntimeError, BufferError, IndexError)):
        access(packed)
    assert torch.equal(packed.words, words)


def test_values_for_numpy_and_python() -> None:
    packed = bf.pack(torch.tensor([[1.0, -2.0, 3.0]]))
    assert packed.tolist() == [[1, -1, 1]]
    array = packed.numpy()
    assert array.tolist() == [[1, -1, 1]] and not array.flags.writeable
    assert np.asarray(packed, dtype=np.int8).tolist() == [[1, -1, 1]]
    assert np.sign(packed.detach()).tolist() == [[1, -1, 1]]
    with pytest.raises(RuntimeError, match="detach"):
        nn.Parameter(packed).numpy()


def test_shared_memory() -> None:
    layer = BinaryLinear(70, 4)
    before = layer.weight.unpack()
    assert not layer.weight.is_shared()
    layer.share_memory()
    layer.weight.untyped_storage().share_memory_()
    assert layer.weight.is_shared() and torch.equal(layer.weight.unpack(), before)


def test_safetensors_say_how_to_save(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    state = nn.Sequential(BinaryLinear(8, 4), BinaryConv2d(3, 4, 3)).state_dict()
    with pytest.raises(TypeError, match=r"bop2nd_fast.*\.words.*torch\.save"):
        safetensors.save_file(state, tmp_path / "model.safetensors")
    assert not (tmp_path / "model.safetensors").exists()


# ------------------------------------------------------------------ assignments to .data


def test_data_is_replaced_with_bits_dtype_and_grad() -> None:
    layer = BinaryLinear(40, 6)
    weight = layer.weight
    weight.grad = torch.ones(6, 40)
    held = weight.detach()
    old, new = weight.unpack().detach(), -weight.unpack().detach()
    weight.data = new
    assert layer.weight is weight and weight.requires_grad and isinstance(weight, nn.Parameter)
    assert torch.equal(weight.unpack(), new) and torch.equal(held.unpack(), old)
    assert weight.grad is not None
    other = bf.pack(old.bfloat16(), 1)
    weight.data = other
    assert weight.dtype == torch.bfloat16 and torch.equal(weight.unpack(torch.float32), old)
    other.copy_(new.bfloat16())
    assert torch.equal(weight.unpack(torch.float32), new), "as torch's: the same memory"
    weight.data.copy_(old)
    assert torch.equal(weight.unpack(torch.float32), old)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (torch.ones(6, 41), ValueError),
        (torch.ones(240), ValueError),
        (torch.full((6, 40), 0.5), ValueError),
        (torch.zeros(6, 40), ValueError),
        (torch.ones(6, 40, dtype=torch.int64), TypeError),
        (bf.pack(torch.ones(40, 6)), ValueError),
        (None, TypeError),
    ],
)
def test_data_that_does_not_fit_is_refused(value: Any, error: type[Exception]) -> None:
    layer = BinaryLinear(40, 6)
    words, x = layer.weight.words.clone(), torch.randn(2, 40)
    y = layer(x)
    with pytest.raises(error):
        layer.weight.data = value
    assert torch.equal(layer.weight.words, words) and layer.weight.shape == (6, 40)
    assert torch.equal(layer(x), y)


def test_perturbed_weights_are_refused() -> None:
    """What SAM, Lookahead and averagers do: a step that leaves the signs."""
    layer = BinaryLinear(40, 6)
    words = layer.weight.words.clone()
    vector = nn.utils.parameters_to_vector(layer.parameters()).detach()
    for write in (
        lambda: nn.utils.vector_to_parameters(0.9 * vector, layer.parameters()),
        lambda: layer.weight.data.add_(torch.full((6, 40), 0.05)),
        lambda: torch._foreach_add_([layer.weight.detach()], 0.1),
        lambda: torch._foreach_lerp_([layer.weight.detach()], [torch.ones(6, 40)], 0.5),
        lambda: torch._foreach_copy_(
            [torch.zeros(2), layer.weight.detach()], [torch.ones(2), torch.zeros(6, 40)]
        ),
        lambda: layer.weight.data.lerp_(torch.ones(6, 40), 0.5),
    ):
        with pytest.raises((RuntimeError, ValueError), match="BinaryTensor"):
            write()
        assert torch.equal(layer.weight.words, words)
    nn.utils.vector_to_parameters(-vector, layer.parameters())
    assert torch.equal(nn.utils.parameters_to_vector(layer.parameters()), -vector)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64,), (3, 5), (2, 3, 4, 5), (70000,)])
def test_dense_weights_are_looked_at_before_every_step(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight = nn.Parameter(torch.ones(shape, dtype=dtype))
    if len(shape) == 4:
        weight = nn.Parameter(weight.detach().contiguous(memory_format=torch.channels_last))
    optimizer = bf.optim.Bop2ndOrder([weight], gamma=0.5, sigma=0.5, threshold=0.0)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    for bad in (0.3, 0.0, float("nan"), 1.0078125, float("inf"), -2.0):
        good = weight.detach().clone()
        weight.data.view(-1)[-1:].fill_(bad) if weight.is_contiguous() else weight.data[-1, -1].fill_(bad)
        moments = {k: v.clone() for k, v in optimizer.state[weight].items()}
        with pytest.raises(ValueError, match=r"neither \+1 nor -1"):
            optimizer.step()
        assert all(torch.equal(moments[k], v) for k, v in optimizer.state[weight].items())
        weight.data.copy_(good)
        optimizer.step()


# ------------------------------------------------------------------ modes, casts, meta tensors


def train_once(model: nn.Module, x: Tensor) -> None:
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if isinstance(p, BinaryTensor))


@pytest.mark.parametrize(
    "inside",
    [
        lambda m: m.to("cpu"),
        lambda m: m.to(torch.float32),
        lambda m: m.cpu(),
        lambda m: m.half().float(),
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: m.load_state_dict(m.state_dict()),
        lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True) and None,
        lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.clone())),
        lambda m: setattr(m[0].weight, "data", m[0].weight.clone()),
    ],
)
def test_a_model_that_was_touched_in_inference_mode_still_trains(inside: Callable[[Any], Any]) -> None:
    model, x = nn.Sequential(BinaryLinear(40, 6), BinaryLinear(6, 3)), torch.randn(2, 40)
    with torch.inference_mode():
        before = model(x)
        inside(model)
        assert torch.equal(model(x), before)
    assert isinstance(model[0].weight, BinaryTensor) and isinstance(model[0].weight, nn.Parameter)
    assert torch.equal(model(x), before)
    train_once(model, x)
    bf.optim.Bop(model.parameters(), gamma=1.0, threshold=0.0).step()
    assert not torch.equal(model(x), before)


def test_models_made_in_inference_mode_train() -> None:
    with torch.inference_mode():
        model = BinaryConv2d(3, 4, 3)
        state = model.state_dict()
        packed, scratch = bf.pack(torch.randn(3, 40)), torch.zeros(3, 40)
        assert (packed + 1).shape == packed.flatten(0).reshape(3, 40).shape and not packed.is_inference()
        scratch.copy_(packed)
    train_once(model, torch.randn(2, 3, 5, 5))
    model.load_state_dict(state)


def test_casts() -> None:
    layer, x = BinaryLinear(40, 6), torch.randn(2, 40)
    expected = layer(x).detach()
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(copy.deepcopy(layer).to(dtype)(x.to(dtype)), expected.to(dtype))
    train_once(layer.half(), x.half())


def test_doubles_are_refused_in_the_users_words(cpu_backend: str) -> None:
    for layer, x in (
        (BinaryLinear(16, 4), torch.randn(2, 16)),
        (BinaryConv2d(3, 4, 3), torch.randn(1, 3, 5, 5)),
    ):
        layer(x)
        with pytest.raises(TypeError, match=r"float64.*x\.float\(\)"):
            layer(x.double())


def test_meta_models_become_real() -> None:
    with torch.device("meta"):
        model = bf.models.BinaryNet(width=8, image_size=10)
    assert "..." in repr(model.conv2.weight)
    model.to_empty(device="cpu")
    source = bf.models.BinaryNet(width=8, image_size=10)
    assert [type(p) for p in model.parameters()] == [type(p) for p in source.parameters()]
    model.load_state_dict(source.state_dict())
    x = torch.randn(2, 3, 10, 10)
    assert torch.equal(model.eval()(x), source.eval()(x))
    again = copy.deepcopy(model).to("meta")
    again.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(again.eval()(x), source(x))


@pytest.mark.parametrize("shape", [(8, 6, 3, 3), (8, 40), (8, 40, 1, 1)])
def test_reshaping_gives_values(shape: tuple[int, ...]) -> None:
    weight = nn.Parameter(bf.pack(torch.randn(shape), 1))
    dense = weight.unpack().detach()
    for change in (
        lambda t: t.flatten(1),
        lambda t: t.flatten(),
        lambda t: t.reshape(4, -1),
        lambda t: t.reshape(-1),
        lambda t: t.contiguous().view(2, -1) if t.dim() == 2 else t.reshape(2, -1),
        lambda t: t.view(t.shape),
        lambda t: t.view_as(t),
        lambda t: t.unsqueeze(0).squeeze(0),
        lambda t: t.unflatten(0, (2, 4)),
    ):
        assert torch.equal(change(weight) + 0, change(dense)), change
        with torch.inference_mode():
            assert torch.equal(change(weight) + 0, change(dense))
    weight.flatten(1).sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, torch.ones_like(dense))


def test_a_packed_teachers_results_may_be_targets() -> None:
    teacher = nn.Sequential(BinaryLinear(40, 32), nn.BatchNorm1d(32), BinaryLinear(32, 3)).eval()
    student, x = nn.Linear(40, 3), torch.randn(4, 40)
    packed = bf.inference.convert(teacher, x)
    target = packed(x)
    assert not target.is_inference() and torch.equal(target, teacher(x))
    (student(x) * target).sum().backward()
    assert student.weight.grad is not None
    with torch.inference_mode():
        assert torch.equal(packed(x), target)


# ------------------------------------------------------------------ accelerate


def test_accelerate_makes_empty_models() -> None:
    accelerate = pytest.importorskip("accelerate")
    with accelerate.init_empty_weights():
        model = nn.Sequential(BinaryConv2d(3, 4, 3), nn.Flatten(), BinaryLinear(36, 2))
    assert all(p.is_meta for p in model.parameters())
    assert isinstance(model[0].weight, BinaryTensor) and isinstance(model[0].weight, nn.Parameter)
    source = nn.Sequential(BinaryConv2d(3, 4, 3), nn.Flatten(), BinaryLinear(36, 2))
    model.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(model(x), source(x))
    train_once(model, x)


def test_accelerate_offloads_to_the_cpu() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(BinaryConv2d(3, 4, 3), nn.Flatten(), BinaryLinear(36, 2))
    x = torch.randn(2, 3, 5, 5)
    expected = model(x).detach()
    accelerate.cpu_offload(model, execution_device="cpu")
    assert all(p.is_meta for p in model.parameters())
    assert torch.equal(model(x), expected) and torch.equal(model(x), expected)
