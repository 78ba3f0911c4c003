"""What packed products are asked to emit in tests: every operand of the epilogue, alone and together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

Asked = dict[str, Any]


def epilogues(shape: tuple[int, ...], device: str = "cpu") -> Iterator[Asked]:
    """Requests for outputs ``shape``; ``reference.epilogue`` says what they mean."""
    generator = torch.Generator().manual_seed(sum(shape))
    n = shape[-1]
    scale, shift = (torch.randn(n, generator=generator).to(device) for _ in range(2))
    threshold = torch.randint(-9, 10, (n,), generator=generator, dtype=torch.int32).to(device)
    yield {}
    yield {"values": False, "signs": True, "threshold": threshold}
    yield {"values": False, "signs": True, "threshold": threshold, "dtype": torch.bfloat16}
    yield {"shift": shift, "dtype": torch.float16}
    yield {"scale": scale, "values": False, "signs": True}
    yield {"signs": True}
    yield {"signs": True, "threshold": threshold, "scale": scale, "dtype": torch.bfloat16}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        residual = torch.randn(shape, generator=generator).to(device, dtype)
        yield {"signs": True, "scale": scale, "shift": shift, "residual": residual, "dtype": dtype}
    yield {"residual": residual.float(), "shift": shift, "values": False, "signs": True}
    slope, post_shift, sign_shift = (torch.randn(n, generator=generator).to(device) for _ in range(3))
    yield {"low": 0}
    yield {"low": -3, "high": 4, "scale": scale, "signs": True, "dtype": torch.bfloat16}
    yield {"high": -1, "threshold": threshold, "signs": True}
    yield {"scale": scale, "shift": shift, "relu": True}
    yield {"slope": slope, "signs": True, "dtype": torch.float16}
    yield {"slope": slope, "shift": shift, "post_shift": post_shift, "values": False, "signs": True}
    yield {"post_shift": post_shift, "sign_shift": sign_shift, "signs": True}
    yield {"sign_shift": sign_shift, "values": False, "signs": True}
    everything = {"low": -7, "high": 9, "scale": scale, "shift": shift, "residual": residual, "slope": slope}
    shifts = {"post_shift": post_shift, "sign_shift": sign_shift}
    yield {**everything, **shifts, "signs": True, "dtype": residual.dtype}
    yield {**everything, **shifts, "signs": True, "residual": residual.float()}


def refused_epilogues(shape: tuple[int, ...], device: str = "cpu") -> Iterator[tuple[Asked, str]]:
    """Requests that must raise, and what the message says."""
    n = shape[-1]
    yield {"values": False}, "one is needed"
    yield {"threshold": torch.zeros(n, dtype=torch.int32, device=device)}, "thresholds belong to signs"
    yield {"signs": True, "threshold": torch.zeros(n, device=device)}, "threshold must be"
    yield {"scale": torch.ones(n + 1, device=device)}, "scale must be"
    yield {"shift": torch.ones(n, dtype=torch.float64, device=device)}, "shift must be"
    yield {"residual": torch.ones(shape, device=device), "dtype": torch.bfloat16}, "residual must be"
    yield {"residual": torch.ones(shape[::-1], device=device)}, "residual must be"
    yield {"slope": torch.ones(n, device=device), "relu": True}, "one activation"
    yield {"slope": torch.ones(n + 1, device=device)}, "slope must be"
    yield {"post_shift": torch.ones(n, dtype=torch.float64, device=device)}, "post_shift must be"
    yield {"sign_shift": torch.ones(1, n, device=device), "signs": True}, "sign_shift must be"
    yield {"sign_shift": torch.ones(n, device=device)}, "sign_shift belongs to signs"
    yield {"low": 1, "high": 0}, "in this order"
    yield {"low": -(2**25)}, "in this order and within"
