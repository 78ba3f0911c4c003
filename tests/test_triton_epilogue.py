"""The whole epilogue of Triton's products against its formula, operation by operation."""

from __future__ import annotations

import pytest
import torch

from tests.triton_device import DEVICE, runnable

if reason := runnable():
    pytest.skip(reason, allow_module_level=True)
from bop2nd_fast import reference
from bop2nd_fast.kernels import binary_linear, epilogue


@pytest.mark.parametrize("activation", ["none", "relu", "prelu"])
@pytest.mark.parametrize("outputs", [33, 64])
def test_every_operand_at_once(activation: str, outputs: int) -> None:
    x, w = torch.randn(5, 70, device=DEVICE), torch.randn(outputs, 70, device=DEVICE)
    words, weights = reference.pack_bits(x), reference.pack_bits(w)
    dot, _ = reference.binary_linear_packed(words, weights, 70)
    names = ("scale", "shift", "slope", "post_shift", "sign_shift")
    given = {name: torch.randn(outputs, device=DEVICE) for name in names}
    residual = torch.randn(5, outputs, device=DEVICE)
    value = dot.clamp(-7, 9) * given["scale"]
    value = value + given["shift"]
    value = value + residual
    if activation == "relu":
        value = torch.where(value < 0, 0.0, value)
    if activation == "prelu":
        value = torch.where(value < 0, value * given["slope"], value)
    if activation != "prelu":
        del given["slope"]
    value = value + given["post_shift"]
    bits = reference.pack_bits(value + given["sign_shift"])
    asked = {**given, "low": -7, "high": 9, "relu": activation == "relu", "residual": residual}
    got = binary_linear.binary_linear_packed(words, weights, 70, signs=True, **asked)
    assert torch.equal(got[0], value) and torch.equal(got[1], bits)
    to = epilogue.outputs_for(dot, tuple(dot.shape), signs=True, **asked)
    epilogue.finish(dot, to)  # the same from dots in memory
    assert torch.equal(to.reals, value) and torch.equal(to.signs, bits)
