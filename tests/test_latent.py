"""Latent weights: layers against the binary ones, numbers by hand, Adam's clipping, to bits and back."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bop2nd_fast as bf
from bop2nd_fast.models import BinaryNet, BiRealNet18, XNORNet
from bop2nd_fast.nn import BinaryConv2d, BinaryLinear, LatentConv2d, LatentLinear, binarized
from bop2nd_fast.optim import Bop2ndOrder, LatentAdam, MixedOptimizer, from_latent, presets


def test_a_dense_layer_by_hand() -> None:
    layer = LatentLinear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.5, -0.25, 0.0], [-0.0, 0.75, -1.0]]))  # signs + - + and + + -
    x = torch.tensor([[2.0, 1.0, -0.5]], requires_grad=True)  # signs + + -
    y = layer(x)
    assert y.tolist() == [[-1.0, 3.0]]
    y.backward(torch.tensor([[10.0, 1.0]]))
    assert layer.weight.grad.tolist() == [[10, 10, -10], [1, 1, -1]], "the sign's gradient passes unchanged"
    assert x.grad.tolist() == [[0.0, -9.0, 9.0]], "nothing where |x| > 1; at 1 it passes"


GEOMETRIES: list[dict[str, Any]] = [
    {"padding": 1},
    {"padding": 1, "padding_value": 1, "input_quantizer": "approx_sign"},
    {"padding": (2, 0), "padding_value": -1, "stride": 2, "groups": 3, "bias": True},
    {"padding": 1, "input_quantizer": None, "dilation": 2},
]


@pytest.mark.parametrize("settings", GEOMETRIES, ids=str)
def test_a_convolution_is_the_binary_one(settings: dict[str, Any]) -> None:
    latent = LatentConv2d(6, 9, 3, **settings)
    binary = binarized(nn.Sequential(latent))[0]  # type: ignore[index]
    assert type(binary) is BinaryConv2d and binary.extra_repr() == latent.extra_repr()
    ends = []
    for layer in (latent, binary):
        x = torch.randn(2, 6, 9, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        ends.append((y.detach(), x.grad, layer.weight.grad))
    with torch.no_grad():
        torch.testing.assert_close(latent(x), ends[1][0], rtol=0, atol=0)  # packed where nothing is recorded
    exact = settings.get("input_quantizer", "") is not None
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=0 if exact else 1e-5, atol=0 if exact else 1e-5)
    for a, b in zip(ends[0][1:], ends[1][1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_rows_of_any_rank_and_an_rsign() -> None:
    latent = LatentLinear(40, 5, bias=True, input_quantizer=bf.nn.RSign(40))
    binary = binarized(nn.Sequential(latent))[0]  # type: ignore[index]
    assert type(binary) is BinaryLinear
    x = torch.randn(2, 3, 40)
    assert torch.equal(latent(x), binary(x)) and latent(x).shape == (2, 3, 5)


def test_half_precision_passes_at_one() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        layer = LatentLinear(4, 1, dtype=dtype)
        above = 1 + torch.finfo(dtype).eps
        x = torch.tensor([[1.0, -1.0, above, -above]], dtype=dtype, requires_grad=True)
        layer(x).backward()
        assert [g != 0 for g in x.grad[0].tolist()] == [True, True, False, False]


def test_binarized_keeps_names_sharing_and_the_original() -> None:
    model = nn.Sequential(LatentLinear(8, 8), nn.BatchNorm1d(8), LatentLinear(8, 8))
    model[2].weight = model[0].weight
    before = copy.deepcopy(model.state_dict())
    binary = binarized(model)
    assert [n for n, _ in binary.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert binary[0].weight is binary[2].weight and isinstance(binary[0].weight, bf.BinaryTensor)  # type: ignore[index]
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert type(model[0]) is LatentLinear
    with pytest.raises(ValueError, match="no layers with latent weights"):
        binarized(nn.Linear(2, 2))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_a_latent_network_packs_like_its_bits(norm: str, exact: bool) -> None:
    torch.manual_seed(2)
    model = BinaryNet(8, image_size=16, weights="latent", norm=norm).eval()
    x = torch.randn(3, 3, 16, 16)
    packed = [bf.inference.convert(m, x, exact=exact) for m in (model, binarized(model))]
    assert torch.equal(packed[0](x), packed[1](x))
    sizes = [sum(row.bytes_packed for row in p.report()) for p in packed]
    assert sizes[0] == sizes[1] < 4 * sum(p.numel() for p in model.parameters()) / 6


def test_layer_norm_by_hand() -> None:
    norm = bf.nn.LayerNorm2d(2)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, 1.0]))
        norm.bias.copy_(torch.tensor([0.0, 5.0]))
    image = torch.tensor([[[[1.0, 0.0]], [[3.0, 0.0]]]])  # one row of two pixels: channels (1, 3) and (0, 0)
    far = 1 / (1 + 1e-3) ** 0.5
    expected = [[[[-2 * far, 0.0]], [[far + 5, 5.0]]]]
    torch.testing.assert_close(norm(image), torch.tensor(expected))


def test_options_that_there_are_not() -> None:
    with pytest.raises(ValueError, match="norm must be 'batch' or 'layer', got 'group'"):
        BinaryNet(norm="group")
    for network, allowed in (
        (BinaryNet, "'binary' or 'latent'"),
        (BiRealNet18, "'binary' or 'latent' or 'real'"),
        (XNORNet, "'binary' or 'latent'"),
    ):
        with pytest.raises(ValueError, match=f"weights must be {allowed}, got 'none'"):
            network(weights="none")


# ------------------------------------------------------------------------------------------- optimizers


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).sum().backward()
    optimizer.step()


def test_adam_clips_latent_weights_alone() -> None:
    model = nn.Sequential(LatentLinear(4, 3), nn.Linear(3, 1))
    optimizer = LatentAdam(model, lr=3.0, fused=True)
    x = torch.full((2, 4), 0.5)
    trained(model, optimizer, x)
    assert model[0].weight.abs().unique().tolist() == [1.0], "a step of 3 ends at the bounds"
    assert model[1].weight.abs().max() > 1
    for again in (copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))):
        trained(*again, x)
        assert again[0][0].weight.abs().max() == 1, "a copy clips too"
    resumed = LatentAdam(model, lr=1.0)
    resumed.load_state_dict(optimizer.state_dict())
    assert [group.get("clip") for group in resumed.param_groups] == [1.0, None]


def test_the_presets_adam_is_for_latent_weights() -> None:
    model = XNORNet(3, width=3, weights="latent")
    preset = presets.Preset(
        "x", "xnornet", "imagenet", "Adam", None, 2, 8, {"lr": presets.Constant(0.1)}, 5e-7
    )
    optimizer, _ = preset.build(model, 10)
    assert isinstance(optimizer, LatentAdam)
    found = [(g.get("clip"), g["weight_decay"], len(g["params"])) for g in optimizer.param_groups]
    n_rest = len(list(model.parameters())) - 6 - 2
    assert found == [(1.0, 0, 6), (None, 1e-6, 2), (None, 0, n_rest)]


def test_first_moments_from_latent_weights_by_hand() -> None:
    """Gradient 1, gamma 1/2 and c = 2: the weight at 0.25 flips at the first step, that at 0.75 later."""
    latent = nn.Sequential(LatentLinear(3, 1, input_quantizer=None))
    with torch.no_grad():
        latent[0].weight.copy_(torch.tensor([[0.25, 0.75, -0.5]]))
    binary = binarized(latent)
    optimizer = Bop2ndOrder(binary.parameters(), gamma=0.5, sigma=0.5, threshold=1e-9)
    from_latent(optimizer, binary, latent, c=2.0)
    (weight,) = binary.parameters()
    assert optimizer.state[weight]["exp_avg"].tolist() == [[-0.5, -1.5, 1.0]]
    seen = []
    for _ in range(3):
        weight.grad = torch.ones(1, 3)
        optimizer.step()
        seen.append(weight.unpack().tolist()[0])
    # m: -0.5 -> 0.25; -1.5 -> -0.25 -> 0.375; 1 stays 1, whose sign is not the weight's
    assert seen == [[-1, 1, -1], [-1, -1, -1], [-1, -1, -1]]


def test_from_latent_refuses_and_changes_nothing() -> None:
    latent = BinaryNet(4, image_size=10, weights="latent")
    binary = binarized(latent)
    optimizer = MixedOptimizer(binary, binary=functools.partial(Bop2ndOrder, gamma=0.1, sigma=0.1))
    with pytest.raises(ValueError, match="c must be a finite number"):
        from_latent(optimizer, binary, latent, c=-1.0)
    with pytest.raises(ValueError, match=r"conv1\.weight: the latent network has shape"):
        from_latent(optimizer, binary, BinaryNet(8, image_size=10, weights="latent"), c=1.0)
    with pytest.raises(ValueError, match="signs of the latent weights are not those"):
        with torch.no_grad():
            latent.get_parameter("dense9.weight").neg_()
        from_latent(optimizer, binary, latent, c=1.0)
    assert all(not state["exp_avg"].any() for p, state in optimizer.state.items() if "exp_avg" in state)


def test_images_of_bytes_reach_a_latent_first_layer() -> None:
    """Where nothing is recorded it is the product of signs and images that a binary first layer is."""
    model = nn.Sequential(
        LatentConv2d(3, 8, 3, input_quantizer=None, bias=True),
        nn.BatchNorm2d(8),
        LatentConv2d(8, 4, 3),
        nn.Flatten(),
        LatentLinear(4 * 4, 5),
    ).eval()
    bytes = torch.randint(0, 256, (2, 3, 6, 6), dtype=torch.uint8)
    bits, same_bits = (
        bf.inference.convert(m, bytes, image_bytes=True)(bytes) for m in (model, binarized(model))
    )
    assert torch.equal(bits, same_bits)
    real = LatentLinear(70, 5, input_quantizer=None).eval()
    x = torch.randn(3, 70)
    with torch.no_grad():
        assert torch.equal(real(x), binarized(nn.Sequential(real))(x))


def test_8_bit_inputs_are_refused() -> None:
    layer = LatentLinear(4, 2, input_quantizer="int8")
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded), pytest.raises(ValueError, match="8-bit inputs are no signs"):
            layer(torch.ones(1, 4))
