"""``python -m benchmarks.profile``: its parts add up, and its tables come out."""

from __future__ import annotations

import pytest
import torch

import bop2nd_fast as bf
from benchmarks import memory, profile
from benchmarks.networks import ConvShape
from benchmarks.suites import train_step
from benchmarks.timing import QUICK

SIZES = (16, 4, 16)


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_parts_of_a_convolution_add_up():
    parts = profile.convolution_parts(ConvShape(1, 64, 8, 64, 3, padding=1), QUICK)
    whole = parts.pop("whole")
    assert set(parts) == {profile.CALL, profile.PACK, profile.PRODUCT, profile.OUTPUT, profile.REST}
    assert whole == pytest.approx(sum(parts.values()))
    assert parts[profile.CALL] > 0


@pytest.mark.parametrize(
    ("operator", "group"),
    [
        ("aten::convolution_backward", "convolution and product, backward (torch)"),
        ("bop2nd::binary_conv2d_backward", "binary layers, backward"),
        ("bop2nd::binary_conv2d", "binary layers, forward"),
        ("aten::mkldnn_convolution", "convolution and product, forward (torch)"),
        ("bop2nd::bop_step_", "optimizer step"),
        ("aten::native_batch_norm_backward", "batch norm"),
        ("aten::max_pool2d_with_indices", "pooling"),
        ("aten::sign", "sign with a straight-through estimator"),
        ("aten::argmax", profile.OTHER),
    ],
)
def test_operators_are_grouped_by_name(operator, group):
    assert profile.group_of(operator) == group


def test_a_training_step_is_grouped():
    groups = profile.step_groups(train_step.PACKED, *SIZES, steps=1)
    assert {"binary layers, forward", "batch norm", "pooling", "optimizer step"} <= set(groups)
    assert groups.get(profile.OTHER, 0.0) < 0.5 * sum(groups.values())


def test_saved_bytes_by_kind_are_all_saved_bytes():
    saved = profile.saved_bytes(train_step.PACKED, *SIZES)
    it = train_step.training(train_step.PACKED, *SIZES)
    assert sum(saved.values()) == memory.saved_for_backward(it.model, it.x)
    x = torch.randn(2, 64, 5, 5, requires_grad=True)
    layer = torch.nn.Sequential(bf.nn.BinaryConv2d(64, 32, 3, padding=1))
    assert memory.saved_by_kind(layer, x) == {"BinaryConv2d": x.numel() * 2 // 8}


def test_the_command_prints_three_tables(capsys):
    assert profile.main(["--quick"]) == 0
    printed = capsys.readouterr().out
    for text in ("3x3 convolutions", "training step", "batch norm", "kept for the backward", "BinaryConv2d"):
        assert text in printed
