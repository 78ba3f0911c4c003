"""The summary of a network: counts by hand, nothing of the model changed, the command line's forms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import bop2nd_fast as bf
from bop2nd_fast.cli import app
from bop2nd_fast.models import BinaryNet
from bop2nd_fast.network_summary import _count


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        bf.nn.BinaryConv2d(8, 40, 3, stride=2, padding=1, groups=2),
        nn.BatchNorm2d(40),
        nn.Flatten(),
        bf.nn.BinaryLinear(40 * 4 * 4, 10),
        bf.nn.BinaryLinear(10, 5, input_quantizer=None),
    )


def test_counts_by_hand() -> None:
    found = bf.summary(small(), torch.randn(2, 3, 8, 8))
    rows = {row.name: row for row in found.rows}
    assert list(rows) == ["0", "1", "2", "3", "4", "5"] and found.batch == 2
    assert rows["0"].real_macs == 2 * 8 * 64 * 3 * 9
    assert rows["0"].real_parameters == 8 * 27 + 8 and rows["0"].bytes_fp32 == 4 * (8 * 27 + 8)
    assert rows["1"].binary_macs == 2 * 40 * 16 * 4 * 9 and rows["1"].real_macs == 0
    assert (rows["1"].input, rows["1"].output) == ((2, 8, 8, 8), (2, 40, 4, 4))
    assert rows["1"].binary_parameters == 40 * 4 * 9
    assert (rows["1"].bytes_packed, rows["1"].bytes_fp32) == (40 * 9 * 4, 40 * 4 * 9 * 4)
    assert rows["4"].binary_macs == 2 * 640 * 10 and rows["4"].bytes_packed == 10 * 20 * 4
    assert rows["5"].signed_macs == 2 * 10 * 5 and rows["5"].binary_macs == 0
    assert found.total.binary_macs == rows["1"].binary_macs + rows["4"].binary_macs
    assert found.total.bops == found.total.binary_macs / 64 + rows["0"].real_macs + rows["5"].signed_macs
    assert rows["1"].kernel and not rows["0"].kernel and rows["1"].seconds is None


class Attention(nn.Module):
    def forward(self, q: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(q, q, q)


def test_fused_recurrence_and_attention_are_counted_by_hand() -> None:
    lstm = bf.summary(nn.LSTM(16, 32, batch_first=True), torch.randn(2, 5, 16)).rows[0]
    assert lstm.real_macs == 2 * 5 * 4 * 32 * (16 + 32)  # four gates, from input and state
    assert bf.summary(Attention(), torch.randn(2, 4, 5, 8)).rows[0].real_macs == 2 * (2 * 4 * 5 * 5 * 8)
    encoder = bf.summary(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), torch.randn(2, 5, 32))
    projections, products = 2 * 5 * 4 * 32 * 32, 2 * (2 * 4 * 5 * 5 * 8)
    assert encoder.total.real_macs == projections + products + 2 * 5 * 2 * 32 * 64


def test_the_ways_of_torch_stay_as_they_were() -> None:
    def ways() -> list[bool]:
        cuda, mha = torch.backends.cuda, torch.backends.mha
        found = [torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled, mha.get_fastpath_enabled()]
        return [*found, cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()]

    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert not torch.backends.mkldnn.enabled
            raise ArithmeticError

    before = ways()
    bf.summary(Attention(), torch.randn(2, 4, 5, 8))
    with pytest.raises(ArithmeticError):
        bf.summary(Fails(), torch.zeros(1))
    assert ways() == before


@pytest.mark.parametrize(
    ("n", "text"), [(0, ""), (999, "999"), (999.7, "1 k"), (999_499, "999 k"), (999_700, "1 M"), (2e9, "2 G")]
)
def test_counts_have_three_digits(n: float, text: str) -> None:
    assert _count(n) == text


def test_what_a_training_step_saves_by_hand() -> None:
    layer = bf.nn.BinaryLinear(96, 32)
    words = 5 * 3 * 4  # of a packed input; as many of the mask, where a gradient goes on through it
    assert bf.summary(layer, torch.randn(5, 96)).rows[0].bytes_saved == words
    assert bf.summary(layer, torch.randn(5, 96, requires_grad=True)).rows[0].bytes_saved == 2 * words
    row = bf.summary(nn.Linear(96, 32), torch.randn(5, 96)).rows[0]
    assert row.bytes_saved == 5 * 96 * 4


def test_nothing_of_the_model_changes() -> None:
    model = small().append(nn.Dropout(0.5))
    model[2].eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.get_rng_state()
    bf.summary(
        model, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), timed=True, repeats=2
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model] == [True, True, False, *([True] * (len(model) - 3))]
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]), name
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("exact", [True, False])
def test_a_packed_model_has_the_products_of_the_trained_one(exact: bool) -> None:
    model, x = BinaryNet(width=8, image_size=18, num_classes=3), torch.randn(2, 3, 18, 18)
    trained = bf.summary(model, x).total
    packed = bf.inference.convert(model.eval(), x, exact=exact)
    found = bf.summary(packed, x)
    assert (found.total.binary_macs, found.total.signed_macs) == (trained.binary_macs, trained.signed_macs)
    assert found.total.bytes_packed == packed.nbytes
    assert found.total.bytes_fp32 == sum(row.bytes_fp32 for row in packed.report())


def test_times_are_measured_when_asked() -> None:
    found = bf.summary(small(), torch.randn(2, 3, 8, 8), timed=True, repeats=3)
    assert all(row.seconds is not None and row.seconds > 0 for row in found.rows)
    assert found.rows[1].kernel_share is not None and found.rows[2].kernel_share is None


def test_an_example_is_needed() -> None:
    with pytest.raises(ValueError, match="needs an example"):
        bf.summary(small())


def run(*arguments: Any) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["summary", *map(str, arguments)])
    return result.exit_code, result.output


def test_command_line(tmp_path: Path) -> None:
    status, text = run("digits", "--format", "json", "--batch", 3)
    plain = json.loads(text)
    assert status == 0 and plain["batch"] == 3 and plain["total"]["binary_macs"] > 0
    model = BinaryNet(width=8, image_size=18, num_classes=3).eval()
    file, picture = tmp_path / "m.safetensors", tmp_path / "layers.png"
    bf.inference.convert(model, torch.randn(1, 3, 18, 18)).save(file)
    status, text = run(file, "--format", "markdown", "--time", "--picture", picture)
    assert status == 0 and text.startswith("| layer | kind |") and "| ms |" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    status, text = run(file)
    assert status == 0 and "BOPs" in text


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    status, text = run("digit")
    assert status == 2 and "no recipe and no file" in text and "digits" in text
    other = tmp_path / "x.pt"
    other.write_bytes(b"nothing")
    assert run(other)[0] == 2
    assert run(other, "--width", 3)[0] == 2
    assert run("digits", "--picture", other)[0] == 2 and other.read_bytes() == b"nothing"
