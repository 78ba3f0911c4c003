"""What people put around binary layers: modules, functions and methods of torch convert, save and load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bop2nd_fast.inference import convert, load
from bop2nd_fast.nn import BinaryConv2d, BinaryLinear
from tests.inference_models import wild_batch_norms

# Modules on images [N, 8, 6, 6] behind a binary convolution.
IMAGES: dict[str, Callable[[], nn.Module]] = {
    "AdaptiveAvgPool2d": lambda: nn.AdaptiveAvgPool2d((2, 3)),
    "AdaptiveMaxPool2d": lambda: nn.AdaptiveMaxPool2d(2),
    "AlphaDropout": lambda: nn.AlphaDropout(),
    "AvgPool2d": lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    "BatchNorm2d": lambda: nn.BatchNorm2d(8),
    "CELU": lambda: nn.CELU(),
    "ChannelShuffle": lambda: nn.ChannelShuffle(4),
    "CircularPad2d": lambda: nn.CircularPad2d(1),
    "ConstantPad2d": lambda: nn.ConstantPad2d(2, 1.5),
    "Conv2d": lambda: nn.Conv2d(8, 4, 3, padding="same"),
    "Conv2d circular": lambda: nn.Conv2d(8, 4, 3, padding=1, padding_mode="circular"),
    "Conv2d depthwise": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(8, 4, 3, stride=2, output_padding=1),
    "Dropout2d": lambda: nn.Dropout2d(),
    "ELU": lambda: nn.ELU(),
    "Flatten": lambda: nn.Flatten(),
    "Fold": lambda: nn.Sequential(nn.Unfold(2), nn.Fold((6, 6), 2)),
    "GELU": lambda: nn.GELU(approximate="tanh"),
    "GLU": lambda: nn.GLU(dim=1),
    "GroupNorm": lambda: nn.GroupNorm(4, 8),
    "Hardshrink": lambda: nn.Hardshrink(),
    "Hardsigmoid": lambda: nn.Hardsigmoid(),
    "Hardswish": lambda: nn.Hardswish(),
    "Hardtanh": lambda: nn.Hardtanh(-2, 3),
    "Identity": lambda: nn.Identity(),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(8, affine=True),
    "InstanceNorm2d with statistics": lambda: nn.InstanceNorm2d(8, track_running_stats=True),
    "LPPool2d": lambda: nn.LPPool2d(2, 2),
    "LayerNorm": lambda: nn.LayerNorm([8, 6, 6]),
    "LeakyReLU": lambda: nn.LeakyReLU(),
    "LocalResponseNorm": lambda: nn.LocalResponseNorm(3),
    "LogSigmoid": lambda: nn.LogSigmoid(),
    "LogSoftmax": lambda: nn.LogSoftmax(1),
    "MaxPool2d": lambda: nn.MaxPool2d(2),
    "Mish": lambda: nn.Mish(),
    "PReLU": lambda: nn.PReLU(8),
    "PixelShuffle": lambda: nn.PixelShuffle(2),
    "PixelUnshuffle": lambda: nn.PixelUnshuffle(2),
    "RReLU": lambda: nn.RReLU(),
    "ReLU": lambda: nn.ReLU(inplace=True),
    "ReLU6": lambda: nn.ReLU6(),
    "ReflectionPad2d": lambda: nn.ReflectionPad2d(2),
    "ReplicationPad2d": lambda: nn.ReplicationPad2d(1),
    "SELU": lambda: nn.SELU(),
    "SiLU": lambda: nn.SiLU(),
    "Sigmoid": lambda: nn.Sigmoid(),
    "Softmax": lambda: nn.Softmax(1),
    "Softmax2d": lambda: nn.Softmax2d(),
    "Softmin": lambda: nn.Softmin(1),
    "Softplus": lambda: nn.Softplus(),
    "Softshrink": lambda: nn.Softshrink(),
    "Softsign": lambda: nn.Softsign(),
    "Tanh": lambda: nn.Tanh(),
    "Tanhshrink": lambda: nn.Tanhshrink(),
    "Threshold": lambda: nn.Threshold(0.5, -1),
    "Unflatten": lambda: nn.Unflatten(1, (2, 4)),
    "Upsample": lambda: nn.Upsample(scale_factor=2, mode="nearest"),
    "Upsample bilinear": lambda: nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
    "Upsample bicubic": lambda: nn.Upsample(size=(9, 7), mode="bicubic"),
    "UpsamplingBilinear2d": lambda: nn.UpsamplingBilinear2d(scale_factor=2),
    "ZeroPad2d": lambda: nn.ZeroPad2d((1, 0, 2, 0)),
}
# Modules on rows [N, 12] or sequences [N, 5, 12] behind a binary dense layer.
SEQUENCES: dict[str, Callable[[], nn.Module]] = {
    "Bilinear": lambda: _Twice(nn.Bilinear(12, 12, 4)),
    "CosineSimilarity": lambda: _Twice(nn.CosineSimilarity(-1)),
    "GRU": lambda: _First(nn.GRU(12, 7, batch_first=True, bidirectional=True)),
    "LSTM": lambda: _First(nn.LSTM(12, 7, num_layers=2, batch_first=True)),
    "LayerNorm": lambda: nn.LayerNorm(12),
    "Linear": lambda: nn.Linear(12, 3),
    "MultiheadAttention": lambda: _Attention(),
    "PairwiseDistance": lambda: _Twice(nn.PairwiseDistance()),
    "RMSNorm": lambda: nn.RMSNorm(12),
    "RNN": lambda: _First(nn.RNN(12, 7, batch_first=True)),
    "TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(12, 3, 16, batch_first=True),
}


class _Twice(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x.flip(0) + 1)


class _First(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(12, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


class _Calls(nn.Module):
    """A binary layer, then a function of what it gives."""

    def __init__(self, body: nn.Module, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.body, self.function = body, function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.body(x))


# Functions and methods of y [2, 8, 6, 6]; those that need another rank reshape first.
FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "abs": lambda y: y.abs(),
    "adaptive_avg_pool1d": lambda y: F.adaptive_avg_pool1d(y[0], 3),
    "adaptive_max_pool2d": lambda y: F.adaptive_max_pool2d(y, (2, 2)),
    "add alpha": lambda y: torch.add(y, y, alpha=2),
    "add_": lambda y: y.clone().add_(1).mul_(2).sub_(0.5).div_(3),
    "addcmul": lambda y: torch.addcmul(y, y, y, value=0.5),
    "addmm": lambda y: torch.addmm(y[0, 0], y[0, 1], y[0, 2]),
    "all any": lambda y: ((y > 0).all(1), (y > 0).any(dim=2)),
    "amax amin": lambda y: (y.amax((2, 3)), y.amin(1)),
    "arange": lambda y: y + torch.arange(6, dtype=y.dtype),
    "argmax argmin": lambda y: (y.argmax(1), y.argmin(-1)),
    "argsort": lambda y: y.argsort(1),
    "as bool": lambda y: (y > 0) & ~(y > 3) | (y == 1) ^ (y != 2),
    "atan2": lambda y: torch.atan2(y, y + 1),
    "avg_pool1d": lambda y: F.avg_pool1d(y[0], 2),
    "batch_norm": lambda y: F.batch_norm(y, torch.zeros(8), torch.ones(8)),
    "bmm": lambda y: torch.bmm(y[0], y[1].transpose(1, 2)),
    "broadcast_to": lambda y: y[:1].broadcast_to(3, 8, 6, 6),
    "bucketize": lambda y: torch.bucketize(y, torch.tensor([-1.0, 0.0, 4.0])),
    "cat": lambda y: torch.cat((y, y.relu(), y), 1),
    "cdist": lambda y: torch.cdist(y[0], y[1]),
    "ceil floor round": lambda y: (y / 3).ceil() + torch.floor(y / 3) * 2 + (y / 3).round() * 4,
    "trunc frac": lambda y: ((y / 3).trunc(), torch.frac(y / 3)),
    "chunk": lambda y: y.chunk(3, 1)[-1],
    "clamp": lambda y: y.clamp(min=-1).clamp(max=2).clamp(0, 1.5),
    "clamp_min": lambda y: y.clamp_min(0),
    "comparison": lambda y: (y > 1).float() + (y <= 0) * 2.0,
    "concat": lambda y: torch.concat([y, y], dim=-1),
    "contiguous": lambda y: y.contiguous(memory_format=torch.channels_last),
    "cos sin tan": lambda y: y.cos() + y.sin() + torch.tan(y),
    "cumprod": lambda y: (y / 8).cumprod(1),
    "cumsum": lambda y: y.cumsum(2),
    "diagonal": lambda y: y.diagonal(dim1=2, dim2=3),
    "div": lambda y: y / 3 + torch.div(y, 2, rounding_mode="floor") + y // 3,
    "dropout": lambda y: F.dropout(y, 0.5, training=False),
    "einsum": lambda y: torch.einsum("nchw,ndhw->ncd", y, y),
    "einsum trace": lambda y: torch.einsum("ii->i", y[0, 0]),
    "elu celu selu": lambda y: F.elu(y) + F.celu(y) + F.selu(y),
    "embedding": lambda y: F.embedding((y[:, 0] > 0).long(), y[0, 0]),
    "eq where": lambda y: torch.where(y == y.amax(1, True), y, torch.zeros_like(y)),
    "erf exp expm1": lambda y: y.erf() + (y / 8).exp() + torch.expm1(y / 8),
    "expand": lambda y: y[:, :1].expand(-1, 8, -1, -1) + y,
    "expand_as": lambda y: y.mean((2, 3), keepdim=True).expand_as(y),
    "flatten": lambda y: y.flatten(1),
    "flip": lambda y: y.flip(2, 3),
    "float double half": lambda y: (y.double().float() + y.half().float()),
    "full": lambda y: y * torch.full((6,), 2.0) + y.new_full((1,), 3),
    "gather": lambda y: y.gather(1, (y > 0).long()),
    "gelu": lambda y: F.gelu(y),
    "getitem": lambda y: y[:, 1:-1:2, None, ..., -2],
    "getitem tensor": lambda y: y[:, torch.tensor([3, 1, 1])],
    "glu": lambda y: F.glu(y, 1),
    "grid_sample": lambda y: F.grid_sample(y, y[:, :2].permute(0, 2, 3, 1) / 8, align_corners=False),
    "group_norm": lambda y: F.group_norm(y, 2),
    "hardtanh hardswish hardsigmoid": lambda y: F.hardtanh(y) + F.hardswish(y) + F.hardsigmoid(y),
    "index_select": lambda y: y.index_select(1, torch.tensor([0, 7, 2])),
    "instance_norm": lambda y: F.instance_norm(y),
    "interpolate": lambda y: F.interpolate(y, scale_factor=1.5, mode="bilinear", align_corners=False),
    "interpolate area": lambda y: F.interpolate(y, size=(3, 4), mode="area"),
    "interpolate nearest-exact": lambda y: F.interpolate(y, size=(9, 9), mode="nearest-exact"),
    "isnan": lambda y: torch.isnan(y) | y.isinf(),
    "kthvalue": lambda y: y.kthvalue(2, 1).values,
    "layer_norm": lambda y: F.layer_norm(y, (6,)),
    "leaky_relu": lambda y: F.leaky_relu(y, 0.2),
    "lerp": lambda y: torch.lerp(y, y + 1, 0.3),
    "linspace": lambda y: y * torch.linspace(-1, 1, 6),
    "log": lambda y: (y.abs() + 1).log() + torch.log1p(y.abs()) + (y.abs() + 1).log2(),
    "log_softmax": lambda y: F.log_softmax(y, 1),
    "logical": lambda y: torch.logical_and(y > 0, torch.logical_not(y > 3)),
    "logsumexp": lambda y: y.logsumexp(1),
    "masked_fill": lambda y: y.masked_fill(y > 2, float("-inf")),
    "matmul": lambda y: torch.matmul(y, y.transpose(-1, -2)),
    "matmul operator": lambda y: y @ y[0, 0],
    "max dim": lambda y: y.max(1).values + y.max(dim=1)[1],
    "max min": lambda y: y.max() - y.min(),
    "maximum minimum": lambda y: torch.maximum(y, -y) + torch.minimum(y, y * 2),
    "mean": lambda y: y.mean((-2, -1)),
    "median": lambda y: y.median(1).values,
    "mish silu softplus": lambda y: F.mish(y) + F.silu(y) + F.softplus(y),
    "movedim": lambda y: y.movedim(1, -1),
    "narrow": lambda y: y.narrow(1, 2, 3),
    "neg": lambda y: -y,
    "norm": lambda y: y.norm(dim=1) + torch.linalg.vector_norm(y, dim=1),
    "normalize": lambda y: F.normalize(y, dim=1),
    "one plus": lambda y: 1 + y - (2 - y) * 3,
    "ones zeros": lambda y: y + torch.ones(6) - torch.zeros(1),
    "pad": lambda y: F.pad(y, (1, 2, 0, 1)),
    "pad circular": lambda y: F.pad(y, (1, 1, 1, 1), mode="circular"),
    "pad reflect": lambda y: F.pad(y, (1, 1, 1, 1), mode="reflect"),
    "pad replicate": lambda y: F.pad(y, (1, 1, 2, 0), mode="replicate"),
    "permute": lambda y: y.permute(0, 2, 3, 1),
    "pixel_shuffle": lambda y: F.pixel_shuffle(y, 2),
    "pow": lambda y: y**2 + y.abs().pow(0.5) + y.square(),
    "prelu": lambda y: F.prelu(y, torch.full((8,), 0.1)),
    "prod": lambda y: (y / 8).prod(1),
    "reciprocal": lambda y: (y.abs() + 1).reciprocal() + (y.abs() + 1).rsqrt(),
    "relu": lambda y: torch.relu(y) + y.relu() + F.relu6(y),
    "relu_": lambda y: F.relu_(y.clone()),
    "remainder": lambda y: y % 3 + torch.fmod(y, 2),
    "repeat": lambda y: y.repeat(1, 2, 1, 1),
    "repeat_interleave": lambda y: y.repeat_interleave(2, dim=1),
    "reshape": lambda y: y.reshape(2, 4, -1),
    "reshape_as": lambda y: y.flatten(1).reshape_as(y),
    "roll": lambda y: y.roll((1, 2), (2, 3)),
    "rot90": lambda y: y.rot90(1, (2, 3)),
    "rsub": lambda y: torch.rsub(y, 1),
    "scaled_dot_product_attention": lambda y: F.scaled_dot_product_attention(y, y, y),
    "scatter": lambda y: torch.zeros_like(y).scatter(1, y.argmax(1, keepdim=True), 1.0),
    "select": lambda y: y.select(1, 3),
    "sigmoid": lambda y: y.sigmoid() + torch.sigmoid(y) + F.logsigmoid(y),
    "sign": lambda y: y.sign() + torch.sgn(y),
    "size": lambda y: y.reshape(y.size(0), y.shape[1] // 2, -1) * y.size(-1),
    "softmax": lambda y: y.softmax(1) + F.softmax(y, dim=-1),
    "sort": lambda y: y.sort(1, descending=True).values,
    "split": lambda y: torch.cat(y.split(3, 1)[::-1], 1),
    "split sizes": lambda y: y.split([3, 5], 1)[1],
    "sqrt": lambda y: y.abs().sqrt(),
    "squeeze": lambda y: torch.squeeze(y.mean(1, keepdim=True), 1) + y[:, :1].squeeze(1),
    "stack": lambda y: torch.stack((y, -y), 1),
    "std var": lambda y: y.std(1) + y.var((2, 3), unbiased=False).mean(),
    "sum": lambda y: y.sum() + y.sum(1) + y.sum((2, 3), keepdim=True)[:, 0],
    "swapaxes": lambda y: y.swapaxes(1, 2),
    "t": lambda y: y[0, 0].t() + y[0, 0].T,
    "take_along_dim": lambda y: torch.take_along_dim(y, y.argsort(1), 1),
    "tanh": lambda y: y.tanh() + F.tanhshrink(y) + F.softsign(y),
    "tensor_split": lambda y: y.tensor_split(3, 1)[0],
    "tile": lambda y: y.tile(2),
    "to dtype": lambda y: y.to(torch.float64).to(torch.float32),
    "topk": lambda y: y.topk(3, 1).values,
    "transpose": lambda y: y.transpose(1, 2),
    "tril triu": lambda y: y.tril() + y.triu(1),
    "type_as": lambda y: (y > 0).type_as(y),
    "unbind": lambda y: y.unbind(1)[2],
    "unflatten": lambda y: y.unflatten(1, (2, -1)),
    "unfold": lambda y: F.unfold(y, 3) .sum(1) + 0 * F.unfold(y, 3)[:, 0],
    "unfold method": lambda y: y.unfold(2, 3, 2),
    "unsqueeze": lambda y: y.unsqueeze(1),
    "view": lambda y: y.contiguous().view(2, -1),
    "view_as": lambda y: y.contiguous().view(2, -1).view_as(y.flatten(1)),
    "where scalar": lambda y: torch.where(y > 0, 1.0, y),
}  # fmt: skip


def check(model: nn.Module, shape: tuple[int, ...], folder: Path) -> None:
    torch.manual_seed(0)
    # torch rounds a recurrent network in another way where its parameters require gradients
    wild_batch_norms(model).eval().requires_grad_(False)
    x = torch.randn(shape)
    with torch.no_grad():
        expected = model(x)
    packed = convert(model, x)
    assert any(getattr(layer, "kind", "").startswith("packed_") for layer in packed.layers.values())
    packed.save(folder / "model.safetensors")
    loaded = load(folder / "model.safetensors")
    for one in (packed, loaded, loaded):  # twice: the first call of a loaded model goes step by step
        torch.testing.assert_close(one(x), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", IMAGES)
def test_modules_on_images(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    check(nn.Sequential(BinaryConv2d(3, 8, 3, padding=1), IMAGES[name]()), (2, 3, 6, 6), tmp_path)


@pytest.mark.parametrize("name", SEQUENCES)
def test_modules_on_sequences(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    check(nn.Sequential(BinaryLinear(6, 12), SEQUENCES[name]()), (2, 5, 6), tmp_path)


def test_embedding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 6, padding_idx=0), BinaryLinear(6, 5)).eval()
    ids = torch.tensor([[0, 3, 19], [7, 7, 1]])
    packed = convert(model, ids)
    packed.save(tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "model.safetensors")(ids), model(ids))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    check(_Calls(BinaryConv2d(3, 8, 3, padding=1), FUNCTIONS[name]), (2, 3, 6, 6), tmp_path)
