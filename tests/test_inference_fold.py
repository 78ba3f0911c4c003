"""Thresholds: worked by hand, and against the trained modules on values they were not derived from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bop2nd_fast.inference import fold as fold_module
from bop2nd_fast.inference.fold import Folded, Stage, fold

CPU = torch.device("cpu")


def norm(mean: list[float], var: list[float], weight: list[float], bias: list[float]) -> nn.BatchNorm1d:
    module = nn.BatchNorm1d(len(mean), eps=0.0).eval()
    with torch.no_grad():
        for own, given in zip(
            (module.running_mean, module.running_var, module.weight, module.bias),
            (mean, var, weight, bias),
            strict=True,
        ):
            own.copy_(torch.tensor(given))
    return module


def rows(*functions: object) -> list[Stage]:
    return [Stage(function, "rows") for function in functions]


def folded(
    channels: int, reach: int, before: list[Stage], after: list[Stage], pooled: bool = False
) -> Folded:
    result = fold(channels, reach, torch.float32, CPU, before, after, pooled)
    assert result is not None
    return result


def test_by_hand() -> None:
    # y = dot - 2; y = -(dot - 2); y = dot / 2 + 1.5; y = -0.5 always; y = +0.5 always
    module = norm([2, 2, 0, 0, 0], [1, 1, 4, 1, 1], [1, -1, 1, 0, 0], [0, 0, 1.5, -0.5, 0.5])
    result = folded(5, 6, [], rows(module))
    # y < 0: dot < 2; dot > 2, so -dot < -2; dot < -3; all of -6..6; none
    assert result.threshold.tolist() == [2, -2, -3, 7, -6]
    assert result.flip.tolist() == [False, True, False, False, False]


def test_zero_is_positive() -> None:
    """sign(-0.0) and sign(NaN) are +1: -0.0 from dot 0 under a negative scale, NaN from a bad variance."""
    module = norm([0, 0, 0], [1, 1, -1], [1, -1, 1], [0, 0, 0])
    result = folded(3, 3, [], rows(module))
    assert result.threshold.tolist() == [0, 0, -3]
    assert result.flip.tolist() == [False, True, False]
    empty = folded(1, 4, [], [])  # nothing between the layers: sign(dot)
    assert empty.threshold.tolist() == [0] and not empty.flip.any()


def test_direction_of_pools() -> None:
    """AND where what follows the pool rises, OR where it falls; what precedes it does not matter."""
    falling = norm([0.5] * 2, [1] * 2, [-1] * 2, [0] * 2)
    rising = norm([0.5] * 2, [1] * 2, [1] * 2, [0] * 2)
    assert folded(2, 5, [], rows(rising), True).pool_any.tolist() == [False, False]
    assert folded(2, 5, [], rows(falling), True).pool_any.tolist() == [True, True]
    assert folded(2, 5, rows(falling), [], True).pool_any.tolist() == [False, False]
    both = folded(2, 5, rows(falling), rows(falling), True)
    assert both.pool_any.tolist() == [True, True] and both.flip.tolist() == [False, False]


def test_what_no_threshold_can_say() -> None:
    assert fold(2, 5, torch.float32, CPU, [], rows(lambda x: x.abs() - 2.5), False) is None
    assert fold(2, 5, torch.float32, CPU, rows(lambda x: (x - 1).abs()), [], True) is None, "not monotone"
    assert fold(2, 5, torch.float32, CPU, rows(lambda x: x * float("nan")), [], True) is None, "NaN in a pool"
    assert fold(2, 5, torch.float32, CPU, rows(lambda x: (x - 1).abs()), [], False) is not None


def test_slices_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table cut into slices gives the same as one piece, also where the sign changes on the seam."""
    module = norm([-3.0, -2.0, -1.0, 0.0, 1.0, 2.0], [1] * 6, [1, -1] * 3, [0] * 6)
    whole = folded(6, 9, rows(module), [], True)
    monkeypatch.setattr(fold_module, "SLICE_VALUES", 24)  # 4 dots a slice
    cut = folded(6, 9, rows(module), [], True)
    for name in ("threshold", "flip", "pool_any"):
        assert torch.equal(getattr(whole, name), getattr(cut, name))
    assert fold(6, 9, torch.float32, CPU, [], rows(lambda x: x.abs() - 3.5), False) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [1, 5, 33, 64])
def test_against_the_modules(channels: int, dtype: torch.dtype) -> None:
    """Random batch norms: the rule equals the sign of the module's own output on every dot."""
    reach = 200
    module = nn.BatchNorm1d(channels).eval()
    with torch.no_grad():
        module.running_mean.normal_(0, 40)
        module.running_var.uniform_(0, 900)
        module.weight.normal_()
        module.bias.normal_()
    module.to(dtype)
    result = fold(channels, reach, dtype, CPU, [], rows(module), False)
    assert result is not None
    dots = torch.arange(-reach, reach + 1)
    with torch.no_grad():
        expected = module(dots[:, None].expand(-1, channels).to(dtype).contiguous()) < 0
    signed = torch.where(result.flip, -dots[:, None], dots[:, None])
    assert torch.equal(signed < result.threshold, expected)
    assert result.flip.any() or channels == 1
    assert result.threshold.dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 3, 8, 17, 33, 64])
def test_batch_norm_does_not_depend_on_the_memory_format(channels: int, dtype: torch.dtype) -> None:
    """What folding relies on: contiguous, channels-last and 2-d inputs of any size agree in bits."""
    module, flat = nn.BatchNorm2d(channels).eval(), nn.BatchNorm1d(channels).eval()
    with torch.no_grad():
        module.running_mean.normal_(0, 5)
        module.running_var.uniform_(0, 9)
        module.weight.normal_()
        module.bias.normal_()
    flat.load_state_dict(module.state_dict())
    module.to(dtype), flat.to(dtype)
    x = (torch.randn(3, channels, 7, 9) * 30).round().to(dtype)

    def as_rows(y: Tensor) -> Tensor:
        return y.permute(0, 2, 3, 1).reshape(-1, channels)

    with torch.no_grad():
        expected = flat(as_rows(x))
        assert torch.equal(as_rows(module(x)), expected)
        assert torch.equal(as_rows(module(x.contiguous(memory_format=torch.channels_last))), expected)
        part = x[:, :, 2:5, 1:2]
        rest = expected.view(3, 7, 9, channels)[:, 2:5, 1:2].reshape(-1, channels)
        assert torch.equal(as_rows(module(part.contiguous())), rest)
        assert torch.equal(as_rows(module(part.contiguous(memory_format=torch.channels_last))), rest)
