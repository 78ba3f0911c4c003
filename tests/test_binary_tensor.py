"""BinaryTensor as an ordinary parameter of stock torch."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import bop2nd_fast as bf
from bop2nd_fast import BinaryTensor, Layout
from bop2nd_fast.nn import BinaryConv2d, BinaryLinear

SHAPES = [((5, 40), 1), ((3, 33, 3, 3), 1), ((7,), 0), ((2, 3, 64), -1)]


@pytest.mark.parametrize(("shape", "dim"), SHAPES)
def test_pack_unpack(shape: tuple[int, ...], dim: int) -> None:
    x = torch.randn(shape)
    packed = bf.pack(x, dim)
    assert packed.shape == x.shape and packed.dtype == x.dtype and packed.numel() == x.numel()
    assert torch.equal(packed.unpack(), torch.where(x < 0, -1.0, 1.0))
    assert packed.unpack(torch.bfloat16).dtype == torch.bfloat16
    assert packed.words.dtype == torch.int32 and packed.words.is_contiguous()
    assert packed.stride() == packed.unpack().stride(), "walk order is the order in memory"


def test_size_is_packed_not_logical() -> None:
    packed = bf.pack(torch.randn(64, 1024))
    assert (
        packed.numel() * packed.itemsize == 32 * packed.nbytes == 32 * packed.words.untyped_storage().nbytes()
    )


def test_parameter_backward_and_accumulation() -> None:
    layer = BinaryLinear(40, 5)
    assert isinstance(layer.weight, nn.Parameter) and isinstance(layer.weight, BinaryTensor)
    x = torch.randn(3, 40)
    layer(x).square().sum().backward()
    assert type(layer.weight.grad) is torch.Tensor and layer.weight.grad.shape == (5, 40)
    once = layer.weight.grad.clone()
    layer(x).square().sum().backward()
    assert torch.equal(layer.weight.grad, 2 * once)
    layer.zero_grad()
    assert layer.weight.grad is None
    layer(x).square().sum().backward()
    layer.zero_grad(set_to_none=False)
    assert layer.weight.grad is not None and not layer.weight.grad.any()


def test_gradient_of_unpack_and_of_arithmetic() -> None:
    weight = nn.Parameter(bf.pack(torch.randn(4, 40)))
    (3 * weight.unpack()).sum().backward()
    assert torch.equal(weight.grad, torch.full((4, 40), 3.0))
    weight.grad = None
    (weight * 2).sum().backward()
    assert torch.equal(weight.grad, torch.full((4, 40), 2.0))


def test_named_parameters_and_clip_grad_norm() -> None:
    model = nn.Sequential(BinaryLinear(40, 8), nn.BatchNorm1d(8), BinaryLinear(8, 3))
    assert [n for n, p in model.named_parameters() if isinstance(p, BinaryTensor)] == ["0.weight", "2.weight"]
    model(torch.randn(4, 40)).square().sum().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.125)
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert norm.item() == pytest.approx(0.125, rel=1e-4)


def test_state_dict_round_trip_keeps_bits_packed() -> None:
    source, target = BinaryConv2d(33, 4, 3), BinaryConv2d(33, 4, 3)
    assert not torch.equal(source.weight, target.weight)
    state = source.state_dict()
    assert isinstance(state["weight"], BinaryTensor)
    address = target.weight.words.data_ptr()
    target.load_state_dict(state)
    assert torch.equal(source.weight, target.weight) and target.weight.words.data_ptr() == address


def test_load_dense_signs_and_refuse_other_values() -> None:
    layer = BinaryLinear(40, 5)
    dense = torch.where(torch.randn(5, 40) < 0, -1.0, 1.0)
    layer.load_state_dict({"weight": dense})
    assert torch.equal(layer.weight.unpack(), dense)
    with pytest.raises(RuntimeError, match=r"neither \+1 nor -1"):
        layer.load_state_dict({"weight": dense * 0.5})
    assert torch.equal(layer.weight.unpack(), dense)


def test_save_and_load_in_a_process_that_only_imports_us(tmp_path: Path) -> None:
    layer = BinaryConv2d(33, 4, 3)
    torch.save({"state": layer.state_dict(), "parameter": layer.weight}, tmp_path / "x.pt")
    code = (
        "import sys, torch, bop2nd_fast\n"
        "x = torch.load(sys.argv[1], weights_only=True)\n"
        "p = x['parameter']\n"
        "assert isinstance(p, torch.nn.Parameter) and p.requires_grad\n"
        "assert type(p).__name__ == 'BinaryTensor' and torch.equal(p, x['state']['weight'])\n"
        "print(p.words.flatten().tolist())\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x.pt")], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == str(layer.weight.words.flatten().tolist())
    assert (tmp_path / "x.pt").stat().st_size < 33 * 4 * 9 * 4 + 4096, "the file holds words, not floats"


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_deepcopy_and_pickle(copier: object) -> None:
    layer = BinaryLinear(40, 5)
    twin = copier(layer)  # type: ignore[operator]
    assert isinstance(twin.weight, nn.Parameter) and isinstance(twin.weight, BinaryTensor)
    assert torch.equal(twin.weight, layer.weight)
    twin.weight.words[0, 0] ^= 1
    assert not torch.equal(twin.weight, layer.weight), "copies share no memory"


def test_to_dtype_and_device() -> None:
    layer = BinaryLinear(40, 5)
    words = layer.weight.words.clone()
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16 and torch.equal(layer.weight.words, words)
    assert isinstance(layer.weight, nn.Parameter) and layer.weight.requires_grad
    meta = layer.to("meta")
    assert meta.weight.device.type == "meta" and meta.weight.words.device.type == "meta"
    packed = bf.pack(torch.randn(2, 33))
    assert packed.to("cpu") is packed or torch.equal(packed.to("cpu"), packed)
    assert type(packed.to(torch.int64)) is torch.Tensor


def test_repr_shows_values_and_layout() -> None:
    text = repr(bf.pack(torch.tensor([[1.0, -1.0]])))
    assert "[ 1., -1.]" in text and "shape=(1, 2)" in text and "packed_dim=1" in text


def test_out_of_place_falls_back_to_dense() -> None:
    packed = bf.pack(torch.tensor([1.0, -2.0, 3.0]))
    assert torch.equal(packed + 1, torch.tensor([2.0, 0.0, 2.0]))
    assert (packed == torch.tensor([1.0, -1.0, -1.0])).tolist() == [True, True, False]
    assert packed.sum().item() == 1.0 and packed.view(3, 1).shape == (3, 1)
    target = torch.zeros(3)
    target.copy_(packed)
    assert target.tolist() == [1.0, -1.0, 1.0]


@pytest.mark.parametrize(
    "write",
    [
        lambda t: t.zero_(),
        lambda t: t.add_(1),
        lambda t: t.mul_(torch.rand(2, 40)),
        lambda t: nn.init.kaiming_uniform_(t),
        lambda t: t.copy_(torch.full((2, 40), 0.5)),
        lambda t: t.__setitem__((0, 0), 0.5),
        lambda t: t.view(-1).fill_(0.5),
        lambda t: t[0].zero_(),
        lambda t: t.t()[1:].normal_(),
        lambda t: t.unbind()[1].add_(1),
        lambda t: torch.add(torch.ones(2, 40), 1, out=t),
    ],
)
def test_lossy_in_place_writes_raise_and_change_nothing(write: object) -> None:
    packed = bf.pack(torch.randn(2, 40))
    words = packed.words.clone()
    with pytest.raises((RuntimeError, ValueError), match="BinaryTensor"):
        write(packed)  # type: ignore[operator]
    assert torch.equal(packed.words, words)


def test_views_read_the_values_and_carry_gradients() -> None:
    weight = nn.Parameter(bf.pack(torch.randn(4, 40)))
    dense = weight.unpack().detach()
    assert torch.equal(weight[1], dense[1]) and torch.equal(weight.t()[3:5], dense.t()[3:5])
    x = torch.randn(3, 40)
    out = nn.functional.linear(x, weight)
    assert torch.equal(out, nn.functional.linear(x, dense)) and type(out) is torch.Tensor
    out.sum().backward()
    assert torch.allclose(weight.grad, x.sum(0).expand(4, 40), atol=1e-6)
    assert type(weight.grad) is torch.Tensor


def test_setting_items_to_signs() -> None:
    packed = bf.pack(torch.ones(2, 3))
    packed[0, 1:] = torch.tensor([-1.0, -1.0])
    assert packed.unpack().tolist() == [[1, -1, -1], [1, 1, 1]]


def test_words_must_fit_the_layout() -> None:
    layout = Layout((5, 40), 1, torch.float32)
    with pytest.raises(ValueError, match=r"\(5, 2\)"):
        BinaryTensor(torch.zeros(5, 3, dtype=torch.int32), layout)
    with pytest.raises(ValueError, match="int32"):
        BinaryTensor(torch.zeros(5, 2), layout)
    with pytest.raises(ValueError, match="version 2"):
        Layout((5, 40), 1, torch.float32, version=2)
    with pytest.raises(ValueError, match="axis 2"):
        Layout((5, 40), 2, torch.float32)
    with pytest.raises(TypeError, match="floating"):
        bf.pack(torch.ones(3, dtype=torch.int64))
    with pytest.raises(IndexError):
        bf.pack(torch.ones(3), dim=1)


def test_layout_as_plain_values() -> None:
    layout = Layout((5, 40), 1, torch.bfloat16)
    values = layout.to_dict()
    assert Layout.from_dict(values) == layout
    with pytest.raises(ValueError, match="contradicts"):
        Layout.from_dict({**values, "length": 41})
    with pytest.raises(ValueError, match="dtype"):
        Layout.from_dict({**values, "dtype": "float33"})
    with pytest.raises(ValueError, match="version"):
        Layout.from_dict({**values, "version": 2})


def test_compile_forward_and_backward_without_graph_breaks() -> None:
    model = nn.Sequential(
        BinaryConv2d(3, 8, 3, input_quantizer=None), nn.BatchNorm2d(8), BinaryConv2d(8, 4, 3)
    )
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True)
    x = torch.randn(2, 3, 9, 9)
    for step in range(2):
        for net in (model, compiled):
            net(x).square().mean().backward()
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-5), (step, name)


def test_blocked_words_follow_the_version_of_the_words() -> None:
    packed = bf.pack(torch.randn(4, 40))
    first = packed.blocked_words()
    if first is None:
        pytest.skip("the reference has no use for re-laid weights")
    assert packed.blocked_words() is first
    packed.words.bitwise_not_()
    second = packed.blocked_words()
    assert second is not first and not torch.equal(first, second)


def test_backward_through_weights_that_changed_meanwhile_raises() -> None:
    layer = BinaryLinear(40, 5)
    loss = layer(torch.randn(3, 40)).square().sum()
    loss.backward(retain_graph=True)
    bf.optim.Bop(layer.parameters(), gamma=1.0, threshold=0.0).step()
    x = torch.randn(3, 40, requires_grad=True)
    loss = layer(x).square().sum()
    bf.optim.Bop(layer.parameters(), gamma=1.0, threshold=0.0).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_save_to_memory() -> None:
    buffer = io.BytesIO()
    packed = bf.pack(torch.randn(2, 3, 5), 1)
    torch.save(packed, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=True), packed)
