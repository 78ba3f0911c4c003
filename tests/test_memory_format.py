"""Convolutions by signs return the memory format of their input, as torch's own do: eager, traced, packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bop2nd_fast as bf

LAST = torch.channels_last
FORMATS = (torch.contiguous_format, LAST)
QUANTIZERS = ("ste_sign", "rsign", None, "int8")


def layer(channels: int, quantizer: str | None, **more: Any) -> bf.nn.BinaryConv2d:
    chosen: Any = bf.nn.RSign(channels) if quantizer == "rsign" else quantizer
    return bf.nn.BinaryConv2d(channels, 8, 3, input_quantizer=chosen, **more)


# of one channel torch's own addition, which RSign is, forgets the format
@pytest.mark.parametrize(
    ("channels", "quantizer"), [(40, q) for q in QUANTIZERS] + [(1, q) for q in QUANTIZERS if q != "rsign"]
)
def test_layers_lay_images_as_torch_does(cpu_backend: str, channels: int, quantizer: str | None) -> None:
    ours, torchs = layer(channels, quantizer, bias=True), nn.Conv2d(channels, 8, 3)
    values = torch.randn(2, channels, 9, 7)
    results = []
    for layout in FORMATS:
        mine, theirs = (values.clone().to(memory_format=layout).requires_grad_() for _ in range(2))
        output, wanted = ours(mine), torchs(theirs)
        assert output.stride() == wanted.stride()
        assert layout is LAST or output.view(2, -1).shape == (2, 8 * 7 * 5)
        output.square().sum().backward()
        wanted.square().sum().backward()
        assert mine.grad is not None and theirs.grad is not None and ours.weight.grad is not None
        assert channels == 1 or mine.grad.stride() == theirs.grad.stride()
        results.append((output, mine.grad, ours.weight.grad.clone()))
        ours.weight.grad = None
    signs = quantizer in ("ste_sign", "rsign")
    for a, b in zip(*results, strict=True):  # torch sums gradients of real inputs
        torch.testing.assert_close(a, b, rtol=0 if signs else 1e-3, atol=0 if signs else 1e-3)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("quantizer", ["ste_sign", None])
def test_no_images(quantizer: str | None, layout: torch.memory_format) -> None:
    x = torch.randn(0, 40, 9, 7).to(memory_format=layout).requires_grad_()
    output = layer(40, quantizer)(x)
    output.sum().backward()
    assert output.view(0, 280).shape == (0, 280) and x.grad is not None and x.grad.shape == x.shape


class Residual(nn.Module):
    """Values of both formats meet; one operator rounds by place, and three outputs are seen."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 32, 3, padding=1), bf.nn.BinaryConv2d(32, 32, 3, padding=1)
        self.norm, self.last = nn.BatchNorm2d(32), bf.nn.BinaryConv2d(64, 8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.stem(x)
        z = self.norm(self.conv(y)) + y
        w = self.last(torch.cat([z, y], 1))
        return w.flatten(1).sigmoid(), w, nn.functional.avg_pool2d(z.relu(), 2)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("layout", FORMATS)
def test_packed_models_return_the_formats_of_their_models(layout: torch.memory_format, exact: bool) -> None:
    model = Residual().eval()
    x = torch.randn(2, 3, 12, 10).to(memory_format=layout)
    wanted = model(x)
    packed = bf.inference.convert(model, x, exact=exact)
    for got, value in zip(packed(x), wanted, strict=True):
        assert got.shape == value.shape and got.stride() == value.stride()
        assert torch.equal(got, value) or not exact
    copies = [s for s in packed.steps if s.target == "aten.contiguous.default"]
    inside = {(True, LAST): 0, (False, LAST): 0, (True, torch.contiguous_format): 3}
    assert len(copies) == inside.get((exact, layout), len(copies)), copies


def test_networks_read_both_formats_alike() -> None:
    for make in (
        lambda: bf.models.BinaryNet(width=32),
        lambda: bf.models.BiRealNet18(10, width=32, cifar=True),
    ):
        model: Any = make().eval()
        x = torch.randn(2, 3, 32, 32)
        assert torch.equal(model(x), model(x.to(memory_format=LAST)))


def test_compiled_and_exported_layers_lay_images_alike() -> None:
    model = nn.Sequential(layer(40, "ste_sign"), nn.ReLU()).eval().requires_grad_(False)
    for layout in FORMATS:
        x = torch.randn(2, 40, 9, 7).to(memory_format=layout)
        wanted = model(x)
        exported = torch.export.export(model, (x,)).module()(x)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
        for got in (exported, compiled):
            assert torch.equal(got, wanted) and got.stride() == wanted.stride()
