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
