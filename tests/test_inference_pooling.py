"""Max-pooling of real images in packed models: torch's bits and torch's strides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bop2nd_fast as bf
from bop2nd_fast.inference.pooling import MaxPool

POOLS = [
    {"kernel_size": [3, 3], "stride": [2, 2], "padding": [1, 1], "dilation": [1, 1], "ceil_mode": False},
    {"kernel_size": [2, 3], "stride": [2, 1], "padding": [0, 1], "dilation": [2, 1], "ceil_mode": True},
]


def images(dtype: torch.dtype) -> dict[str, Tensor]:
    x = torch.randn(2, 5, 9, 11).to(dtype)
    x[0, 1, 2, 3] = float("nan")
    x[1, 0, :, :] = float("-inf")
    return {
        "contiguous": x,
        "channels-last": x.contiguous(memory_format=torch.channels_last),
        "strided": torch.randn(2, 5, 9, 22).to(dtype)[..., ::2],
        "one channel": x[:, :1].contiguous(),
        "empty batch": x[:0],
        "one image": x[0],
    }


@pytest.mark.parametrize("pool", POOLS, ids=["3x3", "2x3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_as_torch(dtype: torch.dtype, pool: dict[str, Any]) -> None:
    for name, x in images(dtype).items():
        ours, theirs = MaxPool(**pool)(x), F.max_pool2d(x, **pool)
        assert torch.equal(ours.nan_to_num(7), theirs.nan_to_num(7)), name
        assert torch.equal(ours.isnan(), theirs.isnan()), name
        assert ours.stride() == theirs.stride(), name


def test_a_real_pool_of_a_model_is_converted(tmp_path: Any) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.MaxPool2d(3, stride=2, padding=1), bf.nn.BinaryConv2d(8, 4, 3, padding=1)
    ).eval()
    x = torch.randn(2, 3, 12, 12)
    packed = bf.inference.convert(model, x)
    assert [row.kind for row in packed.report()].count("max_pool") == 0, "it holds nothing"
    assert any(isinstance(layer, MaxPool) for layer in packed.layers.values())
    packed.save(tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(bf.inference.load(tmp_path / "model.safetensors")(x), model(x))
