"""convert(): the packed model's predictions are the trained model's, bit for bit, whatever the network."""

from __future__ import annotations

import copy
import pickle
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bop2nd_fast as bf
from bop2nd_fast.inference import ConversionError, PackedModel, convert
from bop2nd_fast.nn import BinaryConv2d, BinaryLinear
from tests.inference_models import assert_identical, images, kinds, wild_batch_norms


def converted(model: nn.Module, *shape: int, others: list[tuple[int, ...]] | None = None) -> PackedModel:
    """Convert on one input, compare on others (of other batch and image sizes where given)."""
    wild_batch_norms(model)
    packed = convert(model, images((2, *shape), seed=1))
    for other in [(1, *shape), (5, *shape), *(others or [])]:
        assert_identical(packed, model, images(other))
    return packed


# ------------------------------------------------------------------------------------------- BinaryNet

FUSED = [
    "signed_conv2d",
    "packed_conv2d",
    "pool_bits",
    "packed_conv2d",
    "packed_conv2d",
]


@cache
def binarynet(
    width: int, image_size: int, first_padding: int, channels: int, padding_value: int
) -> tuple[nn.Module, PackedModel]:
    """Converted once for all backends."""
    model = bf.models.BinaryNet(
        width=width,
        image_size=image_size,
        in_channels=channels,
        padding_value=padding_value,
        first_padding=first_padding,
    )
    return model, converted(model, channels, image_size, image_size)


@pytest.mark.parametrize("padding_value", [0, 1, -1])
@pytest.mark.parametrize(("width", "image_size", "first_padding", "channels"), [(4, 32, 0, 3), (11, 8, 1, 1)])
def test_binarynet(
    cpu_backend: str, width: int, image_size: int, first_padding: int, channels: int, padding_value: int
) -> None:
    model, packed = binarynet(width, image_size, first_padding, channels, padding_value)
    packed = copy.deepcopy(packed)
    for batch in (1, 5):
        assert_identical(packed, model, images((batch, channels, image_size, image_size)))
    assert kinds(packed)[: len(FUSED)] == FUSED, "everything between the first and the last layer is fused"
    assert kinds(packed)[-5:] == ["flatten_bits", *["packed_linear"] * 3, "batch_norm"]


def test_binarynet_of_odd_width() -> None:
    """33, 66, 132 channels: every layer has bits left over in its last word."""
    converted(bf.models.BinaryNet(width=33, image_size=16, first_padding=0), 3, 16, 16)


def test_no_real_values_between_fused_layers() -> None:
    """All that flows between the input and the last dots are int32 words."""
    model = bf.models.BinaryNet(width=4, image_size=8, in_channels=1, first_padding=1)
    packed = converted(model, 1, 8, 8)
    seen: dict[str, torch.dtype] = {}
    for name, layer in packed.layers.items():
        layer.register_forward_hook(lambda m, a, out, name=name: seen.__setitem__(name, out.dtype))
    packed(images((1, 1, 8, 8)))
    real = [name for name, dtype in seen.items() if dtype != torch.int32]
    assert real == ["dense9"]


@pytest.mark.parametrize(
    ("model", "size"),
    [(bf.models.BiRealNet18(5, width=8), 64), (bf.models.XNORNet(5, width=3), 224)],
    ids=["bi-real-net", "xnornet"],
)
def test_other_networks(model: nn.Module, size: int) -> None:
    packed = converted(model, 3, size, size)
    assert kinds(packed).count("packed_conv2d") == (16 if isinstance(model, bf.models.BiRealNet18) else 6)


def test_bi_real_net_needs_real_values_between_layers() -> None:
    packed = converted(bf.models.BiRealNet18(5, width=8, padding_value=1), 3, 32, 32, others=[(1, 3, 47, 40)])
    assert kinds(packed).count("pack") == 16 and "pool_bits" not in kinds(packed)
    assert all(layer.threshold is None for layer in packed.layers.values() if hasattr(layer, "threshold"))


# ------------------------------------------------------------------------------------------- chains


def chain(
    *between: nn.Module, channels: int = 20, groups: int = 1, bias: bool = False, **conv: Any
) -> nn.Module:
    """Real pixels -> binary convolution -> what is given -> binary convolution -> real values."""
    return nn.Sequential(
        BinaryConv2d(3, 24, 3, padding=1, bias=bias, **conv),
        *between,
        BinaryConv2d(24, channels, 3, padding=1, padding_value=-1, groups=groups),
        nn.BatchNorm2d(channels),
    )


@pytest.mark.parametrize(
    "between",
    [
        [],
        [nn.BatchNorm2d(24)],
        [nn.BatchNorm2d(24, affine=False), nn.Hardtanh()],
        [nn.MaxPool2d(2), nn.BatchNorm2d(24)],
        [nn.BatchNorm2d(24), nn.MaxPool2d(2)],
        [nn.BatchNorm2d(24), nn.MaxPool2d(2), nn.BatchNorm2d(24), nn.Hardtanh()],
        [nn.MaxPool2d(3, stride=2, padding=1), nn.BatchNorm2d(24)],
        [
            nn.MaxPool2d((3, 2), stride=(2, 1), padding=(1, 0), dilation=(2, 3), ceil_mode=True),
            nn.BatchNorm2d(24),
        ],
        [nn.MaxPool2d(3, stride=2, ceil_mode=True), nn.BatchNorm2d(24)],
        [nn.BatchNorm2d(24), nn.Dropout(0.5), nn.Identity(), nn.PReLU(24)],
        [nn.ReLU(inplace=True), nn.BatchNorm2d(24)],
        [nn.Hardtanh(-40, 40), nn.BatchNorm2d(24), nn.LeakyReLU(0.1), nn.BatchNorm2d(24)],
    ],
    ids=lambda modules: "-".join(type(m).__name__ for m in modules) or "nothing",
)
@pytest.mark.parametrize("bias", [False, True])
def test_fused_chains(between: list[nn.Module], bias: bool) -> None:
    model = chain(*(copy.deepcopy(m) for m in between), bias=bias)
    if bias:
        nn.init.normal_(model[0].bias, std=3)
    packed = converted(model, 3, 9, 11, others=[(2, 3, 14, 8)])
    pools = ["pool_bits"] * any(isinstance(m, nn.MaxPool2d) for m in between)
    end = ["batch_norm", "contiguous"]  # channels-last inside, and out as the model's images lie
    assert kinds(packed) == ["pack", "packed_conv2d", *pools, "packed_conv2d", *end]


@pytest.mark.parametrize(
    ("between", "why"),
    [
        ([nn.Tanh(), nn.BatchNorm2d(24)], "torch's tanh may round by position"),
        ([nn.AvgPool2d(2)], "an average of dots is no threshold of each"),
        ([nn.BatchNorm2d(24, track_running_stats=False)], "statistics of the batch"),
        ([nn.MaxPool2d(2), nn.MaxPool2d(2), nn.BatchNorm2d(24)], "two pools"),
        ([nn.InstanceNorm2d(24)], "not known"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unfused_chains(between: list[nn.Module], why: str) -> None:
    packed = converted(chain(*between), 3, 9, 12)
    assert packed.layers["_0"].threshold is None, why
    assert kinds(packed).count("pack") == 2


@cache
def grouped(groups: int, padding_value: int) -> tuple[nn.Module, PackedModel]:
    model = nn.Sequential(
        BinaryConv2d(4 * groups, 8 * groups, (3, 2), (2, 1), (2, 1), (1, 2), groups, padding_value),
        nn.BatchNorm2d(8 * groups),
        BinaryConv2d(8 * groups, 12, 3, padding=1, groups=groups, padding_value=padding_value),
    )
    return model, converted(model, 4 * groups, 7, 8, others=[(2, 4 * groups, 9, 5)])


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("padding_value", [0, 1, -1])
def test_geometry(cpu_backend: str, groups: int, padding_value: int) -> None:
    """Groups whose channels do not fill words, stride, dilation, uneven padding and kernels."""
    model, packed = grouped(groups, padding_value)
    packed = copy.deepcopy(packed)
    for shape in ((1, 7, 8), (2, 9, 5)):
        assert_identical(packed, model, images((shape[0], 4 * groups, *shape[1:])))
    assert ("regroup" in kinds(packed)) == (groups > 1)


def test_whole_word_groups_need_no_regrouping() -> None:
    model = nn.Sequential(BinaryConv2d(3, 64, 3), nn.BatchNorm2d(64), BinaryConv2d(64, 6, 3, groups=2))
    assert kinds(converted(model, 3, 8, 8)) == ["pack", "packed_conv2d", "packed_conv2d", "contiguous"]


@cache
def flattening(channels: int, last: bool) -> tuple[nn.Module, PackedModel]:
    tail = [] if last else [nn.BatchNorm1d(40), BinaryLinear(40, 7)]
    model = nn.Sequential(
        BinaryConv2d(2, channels, 3),
        nn.BatchNorm2d(channels),
        nn.Flatten(),
        BinaryLinear(channels * 12, 40),
        *tail,
    )
    return model, converted(model, 2, 5, 6)


@pytest.mark.parametrize("channels", [1, 24, 32, 33])
@pytest.mark.parametrize("last", [False, True])
def test_flatten_permutes_the_dense_weight(cpu_backend: str, channels: int, last: bool) -> None:
    """NHWC words against a weight trained on NCHW features, with and without bits left over in each pixel."""
    model, packed = flattening(channels, last)
    packed = copy.deepcopy(packed)
    assert_identical(packed, model, images((4, 2, 5, 6)))
    assert kinds(packed)[:4] == ["pack", "packed_conv2d", "flatten_bits", "packed_linear"]
    assert packed.layers["_3"].config["padding_bits"] == 12 * (-channels % 32)


def test_flatten_to_one_pixel_then_batch_norm() -> None:
    """Batch norm over features is one over channels only where the image is a single pixel."""
    one = nn.Sequential(BinaryConv2d(2, 24, 5), nn.Flatten(), nn.BatchNorm1d(24), BinaryLinear(24, 9))
    assert kinds(converted(one, 2, 5, 5)) == ["pack", "packed_conv2d", "flatten_bits", "packed_linear"]
    many = nn.Sequential(BinaryConv2d(2, 24, 4), nn.Flatten(), nn.BatchNorm1d(96), BinaryLinear(96, 9))
    assert "flatten_bits" not in kinds(converted(many, 2, 5, 5))


def test_dense_layers_of_higher_rank_are_not_fused() -> None:
    """Batch norm over [N, T, K] normalises T: no threshold per output."""
    model = nn.Sequential(BinaryLinear(40, 33), nn.BatchNorm1d(6), BinaryLinear(33, 5))
    packed = converted(model, 6, 40)
    assert kinds(packed) == ["pack", "packed_linear", "batch_norm", "pack", "packed_linear"]


def test_dense_biases_and_real_inputs() -> None:
    model = nn.Sequential(
        BinaryLinear(9, 70, bias=True, input_quantizer=None),
        nn.BatchNorm1d(70),
        BinaryLinear(70, 50, bias=True, input_quantizer="approx_sign"),
        nn.Hardtanh(),
        BinaryLinear(50, 11, bias=True, input_quantizer="swish_sign"),
    )
    for layer in (model[0], model[2], model[4]):
        nn.init.normal_(layer.bias, std=2)
    assert kinds(converted(model, 9)) == ["signed_linear", "packed_linear", "packed_linear"]


# ------------------------------------------------------------------------------------------- users' models


class Functional(nn.Module):
    """How people write it: functions, a reshape by the batch size, a scale of their own, two readers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3)
        self.a, self.b, self.c = BinaryConv2d(12, 40, 3), BinaryConv2d(40, 40, 3), BinaryConv2d(40, 40, 3)
        self.scale = nn.Parameter(torch.randn(40, 1, 1))
        self.norm = nn.BatchNorm2d(40)
        self.update = nn.BatchNorm2d(40)  # also the name of a method of nn.ModuleDict
        self.dense = BinaryLinear(40 * 4, 33)
        self.out = nn.Linear(33, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x) * 0.5)
        x = F.max_pool2d(self.a(x), 2, padding=1)
        x = F.hardtanh(self.norm(x) * self.scale)
        y = self.update(self.b(x)) + self.c(x)
        y = torch.clamp(F.adaptive_avg_pool2d(y, 2), -1, 1)
        return F.log_softmax(self.out(self.dense(y.reshape(y.shape[0], -1))), dim=1)


def test_functional_model() -> None:
    packed = converted(Functional(), 3, 14, 14, others=[(2, 3, 20, 17)])
    assert kinds(packed).count("pack") == 2, "before a and before dense; b and c share bits"
    assert packed.layers["a"].threshold is not None and packed.layers["b"].threshold is None


def test_reshaping_by_batch_size_is_flattening() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.dense, self.last = (
                BinaryConv2d(2, 24, 3),
                BinaryLinear(216, 40),
                BinaryLinear(40, 9),
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.last(self.dense(x.reshape(x.size(0), -1)) - 1)

    packed = converted(Net(), 2, 5, 5)
    assert kinds(packed) == ["pack", "packed_conv2d", "flatten_bits", "packed_linear", "packed_linear"]


def test_two_inputs_and_two_outputs() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = BinaryLinear(10, 6), BinaryLinear(12, 6)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
            a = self.a(x)
            return {"sum": a + self.b(y), "parts": (a, a[:, 1:3])}

    model = Net()
    x, y = images((3, 10)), images((3, 12))
    packed = convert(model, (x, y))
    expected, actual = model(x, y), packed(x, y)
    assert torch.equal(actual["sum"], expected["sum"])
    assert isinstance(actual["parts"], tuple)
    assert all(torch.equal(p, q) for p, q in zip(actual["parts"], expected["parts"], strict=True))
    with pytest.raises(TypeError, match="missing a required argument"):
        packed(x)


class Doubled(BinaryLinear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Branching(nn.Module):
    """Takes another way for every input: no graph can say that."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = BinaryLinear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if bool(x.sum() > 0) else -self.inner(x)


def test_hooks_and_subclasses_are_seen_through() -> None:
    """A layer with a hook, a subclass with its own forward: fused like any other."""
    hooked = BinaryLinear(8, 8)
    hooked.register_forward_hook(lambda module, args, out: out + 0.5)
    model = nn.Sequential(Doubled(12, 8), nn.BatchNorm1d(8), hooked, BinaryLinear(8, 6))
    packed = converted(model, 12)
    assert kinds(packed) == ["pack", *["packed_linear"] * 3]


def test_what_cannot_be_traced_is_refused_with_the_line() -> None:
    model = nn.Sequential(BinaryLinear(12, 8), Branching())
    with pytest.raises(ConversionError, match=r"(?s)Sequential cannot be traced.*x\.sum\(\) > 0"):
        convert(model, images((2, 12)))
    with pytest.raises(ConversionError, match="sees through every module"):
        convert(model, images((2, 12)), leaves=(Branching,))


def test_a_single_layer() -> None:
    layer = BinaryConv2d(5, 6, 3, padding=1, padding_value=1)
    assert kinds(converted(layer, 5, 6, 6)) == ["pack", "packed_conv2d", "contiguous"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(cpu_backend: str, dtype: torch.dtype) -> None:
    """Dots of 1152 taps do not fit bf16: the rounding of the trained model is part of its thresholds."""
    model = nn.Sequential(
        BinaryConv2d(128, 40, 3),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(40),
        BinaryConv2d(40, 8, 3),
        nn.BatchNorm2d(8),
    )
    wild_batch_norms(model).to(dtype)
    x = images((2, 128, 10, 10)).to(dtype)
    packed = convert(model, x)
    assert_identical(packed, model, x)
    assert "pool_bits" in kinds(packed)
    with pytest.raises(TypeError, match=r"input input must be torch\.\w*float16, as in the conversion"):
        packed(x.float())


def test_signs_of_zero_and_nan() -> None:
    """Pixels of +-0.0 and NaN are +1, as in training; so is a batch norm of an impossible variance."""
    model = nn.Sequential(BinaryConv2d(3, 24, 3), nn.BatchNorm2d(24), BinaryConv2d(24, 8, 3))
    wild_batch_norms(model).eval()
    model[1].running_var[5] = -1.0
    x = images((2, 3, 8, 8))
    x[0, 0, :4], x[0, 1, 2:5], x[1, 2, 3:] = float("nan"), -0.0, 0.0
    packed = convert(model, x)
    assert_identical(packed, model, x)
    assert packed.layers["_0"].threshold is not None


# ------------------------------------------------------------------------------------------- the model itself


def test_the_given_model_is_left_as_it_was() -> None:
    model = wild_batch_norms(bf.models.BinaryNet(width=4, image_size=8, in_channels=1, first_padding=1))
    model.train()
    before = copy.deepcopy(model.state_dict())
    packed = convert(model, images((2, 1, 8, 8)))
    assert model.training and not packed.training
    for key, value in model.state_dict().items():
        left, right = (t.unpack() if isinstance(t, bf.BinaryTensor) else t for t in (value, before[key]))
        assert torch.equal(left, right), key
    with torch.no_grad():  # nothing is shared: training goes on without the packed model noticing
        expected = packed(images((2, 1, 8, 8)))
        for parameter in model.parameters():
            parameter.copy_(-parameter.detach() if parameter.dim() > 1 else parameter + 1)
        assert torch.equal(packed(images((2, 1, 8, 8))), expected)


def test_wrong_inputs_are_refused() -> None:
    model = wild_batch_norms(bf.models.BinaryNet(width=4, image_size=8, in_channels=1, first_padding=1))
    packed = convert(model, images((2, 1, 8, 8)))
    before = copy.deepcopy(packed.state_dict())
    with pytest.raises(ValueError, match=r"input input must be \[N, 1, H, W\], got shape \(2, 3, 8, 8\)"):
        packed(images((2, 3, 8, 8)))
    with pytest.raises(ValueError, match=r"input input must be \[N, 1, H, W\], got shape \(1, 8, 8\)"):
        packed(images((1, 8, 8)))
    with pytest.raises(
        ValueError, match="16 features takes 1 words per row, got 4: is the image of another size"
    ):
        packed(images((2, 1, 16, 16)))
    with pytest.raises(ValueError, match="smaller than the pooling window"):
        packed(images((2, 1, 4, 4)))
    with pytest.raises(
        TypeError, match=r"input input must be torch\.float32, as in the conversion; got torch\.int64"
    ):
        packed(torch.zeros(2, 1, 8, 8, dtype=torch.int64))
    with pytest.raises(TypeError, match="input input must be a tensor, got list"):
        packed([1.0])
    with pytest.raises(ValueError, match="input input is on meta, the model on cpu"):
        packed(torch.zeros(2, 1, 8, 8, device="meta"))
    for key, value in packed.state_dict().items():
        left, right = (t.words if isinstance(t, bf.BinaryTensor) else t for t in (value, before[key]))
        assert torch.equal(left, right), key
    assert_identical(packed, model, images((2, 1, 8, 8)))


def test_inference_only() -> None:
    packed = convert(wild_batch_norms(chain(nn.BatchNorm2d(24))), images((2, 3, 8, 8)))
    x = images((2, 3, 8, 8)).requires_grad_()
    assert not packed(x).is_inference() and not packed(x).requires_grad
    assert packed.eval() is packed
    assert packed.train() is packed and not packed.training
    teacher = nn.Sequential(packed, nn.Dropout()).train()
    assert not any(m.training for m in packed.modules()) and teacher.training and teacher[1].training
    assert not any(p.requires_grad for p in packed.parameters())


def test_repr_and_report() -> None:
    model = wild_batch_norms(bf.models.BinaryNet(width=8, image_size=8, in_channels=1, first_padding=1))
    packed = convert(model, images((2, 1, 8, 8)))
    shown = repr(packed)
    assert "conv2         = packed_conv2d(conv1)  # 8 -> 8, 3x3, padding 1x1 of 0, to bits" in shown
    assert "conv2_pool    = pool_bits(conv2)  # max over 2x2, both directions" in shown
    assert "output        = output norm9" in shown
    rows = {row.layer: row for row in packed.report()}
    assert rows["conv2"].bytes_packed == 8 * 9 * 4 + 8 * 4, "one word per tap, one threshold per channel"
    assert rows["conv2"].bytes_fp32 == 4 * (8 * 8 * 9 + 4 * 8), "weights and the batch norm that was folded"
    trained = sum(4 * p.numel() for p in model.parameters())
    statistics = sum(4 * b.numel() for name, b in model.named_buffers() if "running" in name)
    assert sum(row.bytes_fp32 for row in rows.values()) == trained + statistics
    assert packed.nbytes == sum(row.bytes_packed for row in rows.values())


def test_blocked_weights_are_kept(cpu_backend: str) -> None:
    """The kernels' copy of the weights is made once, with the model, and only where a kernel uses it."""
    packed = convert(wild_batch_norms(chain(nn.BatchNorm2d(24))), images((2, 3, 8, 8)))
    kept = [layer.weight.memory._kept for layer in packed.layers.values() if hasattr(layer, "threshold")]
    assert len(kept) == 2 and all((k is None) == (cpu_backend == "reference") for k in kept)
    packed(images((2, 3, 8, 8)))
    again = [layer.weight.memory._kept for layer in packed.layers.values() if hasattr(layer, "threshold")]
    assert all(a is b for a, b in zip(kept, again, strict=True))
    assert not any("blocked" in key for key in packed.state_dict())


def test_copies_and_empty_batches() -> None:
    model = wild_batch_norms(bf.models.BinaryNet(width=4, image_size=8, in_channels=1, first_padding=1))
    with (
        torch.inference_mode()
    ):  # a caller's mode does not reach the weights: their cache needs version counters
        packed = convert(model, images((1, 1, 8, 8)))
    assert not any(t.is_inference() for t in packed.buffers() if type(t) is Tensor)
    for copied in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), packed.to("cpu")):
        assert_identical(copied, model, images((2, 1, 8, 8)))
    assert packed(images((0, 1, 8, 8))).shape == (0, 10)
