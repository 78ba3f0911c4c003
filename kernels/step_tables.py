"""The two tables a launch of the step reads: where the tensors are, and which words each program steps.

Row of the address table, int64 ``[tensors, 8]``: addresses of weight, gradient, m and v (0 without v), row
length in weights, words per row, index of the tensor in the call, 0. Row of the chunk table, int32
``[programs, 4]``: row of the address table, first word, end, 1 where the words are whole and all addresses
are on 16 bytes. Dense weights count as one row of ``numel`` weights.

Both are built on the host once and kept on the device, keyed by everything they depend on. A gradient at a
new address costs a new address table: one asynchronous copy of 64 bytes per tensor from pinned memory,
ordered before the step on the current stream. In a CUDA graph that copy is a node of the graph; table and
pinned source then live as long as the process. A caller who steps the same tensors on several streams has
to order these streams, as for the tensors themselves.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .tuning import step_chunk_words

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_DTYPES = ((torch.int32, *_FLOATS), _FLOATS, (torch.float32, torch.bfloat16))  # weight, gradient, moments


@dataclass(frozen=True, eq=False)
class Launch:
    """One kernel launch: its tables on the device, its dtypes, and the pinned source of the last copy."""

    chunks: Tensor
    table: Tensor
    staging: Tensor
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]


_MAX_PLANS = 64
# Keyed by device, addresses, shapes and dtypes of all tensors of a call. Least recently used goes first.
_plans: OrderedDict[Any, list[Launch]] = OrderedDict()
# Keyed by device and the shapes that make the chunks: survives new gradient addresses.
_chunk_tables: OrderedDict[Any, Tensor] = OrderedDict()
# Plans used inside a CUDA graph: the graph reads these tables at every replay, so they are never dropped.
_captured: dict[Any, list[Launch]] = {}


# Pinned buffers kept for tables that have to be made during capture, where none may be allocated.
_spares: dict[tuple[int, ...], list[Tensor]] = {}
_MAX_SPARES = 8


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _upload(rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Host table -> (device table, its pinned source). Pinned and asynchronous: the host does not wait.

    Raises RuntimeError in a capture that no eager step of as many tensors has gone before.
    """
    if device.type != "cuda":
        return rows, rows
    spares = _spares.setdefault(tuple(rows.shape), [])
    if _capturing(device):
        if not spares:
            raise RuntimeError("step once outside the CUDA graph, with the same parameters, before capturing")
        staging = spares.pop().copy_(rows)
    else:
        staging = rows.pin_memory()
        if len(spares) < _MAX_SPARES:
            spares.append(torch.empty_like(staging, pin_memory=True))
    return staging.to(device, non_blocking=True), staging


def _chunk_rows(slot: int, n_words: int, whole_words: int, chunk_words: int) -> Tensor:
    """int32 ``[chunks, 4]`` of one tensor: its first ``whole_words`` words linearly, then the others."""
    parts = []
    for begin, end, linear in ((0, whole_words, 1), (whole_words, n_words, 0)):
        first = torch.arange(begin, end, chunk_words, dtype=torch.int32)
        last = (first + chunk_words).clamp(max=end)
        parts.append(
            torch.stack([torch.full_like(first, slot), first, last, torch.full_like(first, linear)], 1)
        )
    return torch.cat(parts)


def _chunks_for(shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    key = (device, shapes)
    if key not in _chunk_tables:
        size = step_chunk_words(sum(n for n, _ in shapes))
        rows = [_chunk_rows(slot, n, whole, size) for slot, (n, whole) in enumerate(shapes)]
        _chunk_tables[key] = _upload(torch.cat(rows).contiguous(), device)[0]
        if len(_chunk_tables) > _MAX_PLANS:
            _chunk_tables.popitem(last=False)
    return _chunk_tables[key]


def _row_of(
    i: int, weight: Tensor, grad: Tensor, addresses: tuple[int, ...]
) -> tuple[list[int], tuple[int, int]]:
    """Table row of tensor ``i``, and its words and how many of them are whole and on 16-byte addresses."""
    n = grad.numel()
    packed = weight.dtype == torch.int32
    length = grad.shape[-1] if packed else n
    words_per_row = -(-length // 32)
    n_words = weight.numel() if packed else words_per_row
    if n_words >= 2**31:
        raise ValueError(f"tensor {i} has {n_words} words of weights, the kernel addresses at most 2**31 - 1")
    if packed and n_words * length != n * words_per_row:
        raise ValueError(f"tensor {i}: {n_words} words do not hold {n} weights in rows of {length}")
    aligned = all(address % 16 == 0 for address in addresses)
    whole = n // 32 if aligned and (length % 32 == 0 or not packed) else 0
    return [*addresses, length, words_per_row, i, 0], (n_words, whole)


def _build(tensors: list[tuple[Tensor, ...]], device: torch.device) -> list[Launch]:
    """Group the tensors by dtypes and make one launch of each group."""
    classes: dict[
        tuple[torch.dtype, torch.dtype, torch.dtype], tuple[list[list[int]], list[tuple[int, int]]]
    ] = {}
    for i, (weight, grad, *moments) in enumerate(tensors):
        if grad.numel() == 0:
            continue
        dtypes = (weight.dtype, grad.dtype, moments[0].dtype)
        if any(moment.dtype != moments[0].dtype for moment in moments):
            raise ValueError(f"tensor {i}: exp_avg is {moments[0].dtype}, exp_avg_sq is {moments[-1].dtype}")
        for kind, dtype, allowed in zip(("weight", "grad", "exp_avg"), dtypes, _DTYPES, strict=True):
            if dtype not in allowed:
                raise ValueError(f"tensor {i}: {kind} is {dtype}, allowed are {allowed}")
        addresses = tuple(t.data_ptr() for t in (weight, grad, *moments)) + (0,) * (2 - len(moments))
        rows, shapes = classes.setdefault(dtypes, ([], []))
        row, shape = _row_of(i, weight, grad, addresses)
        rows.append(row)
        shapes.append(shape)
    launches = []
    for dtypes, (rows, shapes) in classes.items():
        table, staging = _upload(torch.tensor(rows, dtype=torch.int64), device)
        launches.append(Launch(_chunks_for(tuple(shapes), device), table, staging, dtypes))
    return launches


def plan(tensors: list[tuple[Tensor, ...]], device: torch.device) -> list[Launch]:
    """The launches for these tensors, from the cache while no address, shape or dtype has changed."""
    key = (device, tuple((t.data_ptr(), t.dtype, t.shape) for group in tensors for t in group))
    launches = _plans.get(key)
    if launches is None:
        launches = _captured.get(key) or _build(tensors, device)
        _plans[key] = launches
        if len(_plans) > _MAX_PLANS:
            _plans.popitem(last=False)
    else:
        _plans.move_to_end(key)
    if _capturing(device):
        _captured[key] = launches
    return launches
