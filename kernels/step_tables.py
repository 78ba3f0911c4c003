"""The two tables a launch of the step reads: where the tensors are, and which words each program steps.

Row of the address table, int64 ``[tensors, 8]``: addresses of weight, gradient, m and v (0 without v), row
length in weights, words per row, index of the tensor in the call, 0. Row of the chunk table, int32
``[programs, 4]``: row of the address table, first word, end, 1 where the words are whole and all addresses
are on 16 bytes. Dense weights count as one row of ``numel`` weights.

Both are built on the host and kept on the device. An address table belongs to a stream and to all that it was
made of; new addresses cost one asynchronous copy of 64 bytes per tensor from pinned memory, ordered before
the step on that stream. A chunk table depends on shapes alone and serves every stream: the host waits once,
when it is made, until it is filled.

In a CUDA graph a copy is a node that runs at every replay. So what is made in a capture is never kept for
others (it is not filled before the first replay), every capture records copies of its own, and their pinned
source lives as long as the process: slices of one arena, which eager steps take, because a capture may not.
"""

from __future__ import annotations

import operator
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .grid import check_index
from .tuning import step_chunk_words

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_DTYPES = ((torch.int32, *_FLOATS), _FLOATS, (torch.float32, torch.bfloat16))  # weight, gradient, moments
_KINDS = ("weight", "grad", "exp_avg", "exp_avg_sq")
Dtypes = tuple[torch.dtype, torch.dtype, torch.dtype]
Shapes = tuple[tuple[int, int], ...]  # words of each tensor, and how many of them are whole and aligned


@dataclass(frozen=True, eq=False)
class Launch:
    """One kernel launch: its tables on the device, and the dtypes of weights, gradients and moments."""

    chunks: Tensor
    table: Tensor
    dtypes: Dtypes


class _Arena:
    """Pinned memory for tables made in a capture, where none may be allocated.

    ``wanted``: bytes that an eager step makes sure of, twice what the tables so far take.
    """

    def __init__(self) -> None:
        self.wanted = 1 << 19
        self._memory: Tensor | None = None
        self._left = self._used = 0

    def refill(self) -> None:
        """Have as much room as is wanted, outside a capture. Slices keep an older memory alive for graphs."""
        if self._left < self.wanted:
            self._left, self._used = 2 * self.wanted, 0  # so not again after every capture
            self._memory = torch.empty(self._left, dtype=torch.uint8, pin_memory=True)

    def take(self, rows: Tensor) -> Tensor:
        """A pinned copy of ``rows``; raises RuntimeError where no eager step has made room for it."""
        n_bytes = rows.numel() * rows.element_size()
        if self._memory is None or self._left < n_bytes:
            raise RuntimeError(
                "step once outside the CUDA graph before capturing: the tables of this step need pinned "
                "memory, which a capture cannot allocate"
            )
        taken = self._memory[self._used : self._used + n_bytes].view(rows.dtype).view(rows.shape)
        self._used += -(-n_bytes // 64) * 64
        self._left = self._memory.numel() - self._used
        return taken.copy_(rows)


_MAX_PLANS = 4096  # one parameter to a plan is common: target_flip_rate, steps in the backward pass
_lock = threading.Lock()  # autograd's threads step in the backward pass, one for each GPU
# Keyed by device, stream, addresses, shapes and dtypes of a call's tensors. Least recently used goes first.
_plans: OrderedDict[Any, list[Launch]] = OrderedDict()
# Keyed by device and the shapes that make the chunks: survives new gradient addresses.
_chunk_tables: OrderedDict[Any, Tensor] = OrderedDict()
_arena = _Arena()
_captured: list[Tensor] = []  # what graphs read at every replay: pinned sources, and chunk tables


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _upload(rows: Tensor, device: torch.device, capturing: bool) -> Tensor:
    """Host table -> device table, by an asynchronous copy from pinned memory."""
    if device.type != "cuda":
        return rows
    if not capturing:  # torch keeps the pinned memory until the copy is done
        return rows.pin_memory().to(device, non_blocking=True)
    source = _arena.take(rows)
    _captured.append(source)
    return source.to(device, non_blocking=True)


# --------------------------------------------------------------------------------------------- chunks


def _chunk_rows(slot: int, n_words: int, whole_words: int, chunk_words: int) -> Tensor:
    """int32 ``[chunks, 4]`` of one tensor: its first ``whole_words`` words linearly, then the others."""
    parts = []
    for begin, end, linear in ((0, whole_words, 1), (whole_words, n_words, 0)):
        first = torch.arange(begin, end, chunk_words, dtype=torch.int64)
        last = (first + chunk_words).clamp(max=end)
        parts.append(
            torch.stack([torch.full_like(first, slot), first, last, torch.full_like(first, linear)], 1)
        )
    return torch.cat(parts).to(torch.int32)


def _chunks_for(shapes: Shapes, device: torch.device, capturing: bool) -> Tensor:
    key = (device, shapes)
    table = _chunk_tables.get(key)
    if table is None:
        size = step_chunk_words(sum(n for n, _ in shapes))
        rows = [_chunk_rows(slot, n, whole, size) for slot, (n, whole) in enumerate(shapes)]
        table = _upload(torch.cat(rows).contiguous(), device, capturing)
        if capturing:
            return table
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        _chunk_tables[key] = table
        _arena.wanted += 2 * (16 * table.shape[0] + 64 * len(shapes))
        if len(_chunk_tables) > _MAX_PLANS:
            _chunk_tables.popitem(last=False)
    elif capturing:
        _captured.append(table)
    elif device.type == "cuda":  # made on another stream, perhaps: not to be used again before ours is done
        table.record_stream(torch.cuda.current_stream(device))
    return table


# --------------------------------------------------------------------------------------------- addresses


def _check_tensor(i: int, tensors: tuple[Tensor, ...], device: torch.device) -> None:
    """The kernel trusts addresses, so everything behind them is checked when a table is made."""
    weight, grad, *moments = tensors
    for kind, tensor in zip(_KINDS, tensors, strict=False):
        if tensor.device != device:
            raise ValueError(f"tensor {i}: {kind} is on {tensor.device}, the first weight is on {device}")
        if not tensor.is_contiguous():
            raise ValueError(
                f"tensor {i}: {kind} {tuple(tensor.shape)} with strides {tensor.stride()} is not contiguous"
            )
    for kind, moment in zip(_KINDS[2:], moments, strict=False):
        if moment.numel() != grad.numel():
            raise ValueError(f"tensor {i}: {kind} has {moment.numel()} elements, grad has {grad.numel()}")
        if moment.dtype != moments[0].dtype:
            raise ValueError(f"tensor {i}: exp_avg is {moments[0].dtype}, {kind} is {moment.dtype}")
    for kind, tensor, allowed in zip(_KINDS, tensors, _DTYPES, strict=False):
        if tensor.dtype not in allowed:
            raise ValueError(f"tensor {i}: {kind} is {tensor.dtype}, allowed are {allowed}")
    if weight.dtype != torch.int32 and weight.numel() != grad.numel():
        raise ValueError(f"tensor {i}: weight has {weight.numel()} elements, grad has {grad.numel()}")
    if weight.dtype == torch.int32 and grad.dim() == 0:
        raise ValueError(f"tensor {i}: the gradient of a packed weight needs at least one axis")


def _check_scalars(scalars: Sequence[Tensor | None], n: int, device: torch.device) -> None:
    wanted = (
        ("hyper", torch.float32, 4),
        ("counts", torch.int64, 2 * n),
        ("inv_scale", torch.float32, 1),
        ("found_inf", torch.float32, 1),
        ("seed", torch.int64, 2),
    )
    for (name, dtype, numel), t in zip(wanted, scalars, strict=True):
        if t is None:
            continue
        if t.dtype != dtype or t.numel() != numel or not t.is_contiguous() or t.device != device:
            raise ValueError(
                f"{name} must be {numel} x {dtype} on {device}, contiguous; it is {t.dtype} {list(t.shape)} "
                f"on {t.device}"
            )


def _row_of(i: int, weight: Tensor, grad: Tensor, addresses: tuple[int, ...]) -> tuple[list[int], Any]:
    """Table row of tensor ``i``, and its words and how many of them are whole and on 16-byte addresses."""
    n = grad.numel()
    packed = weight.dtype == torch.int32
    length = grad.shape[-1] if packed else n
    words_per_row = -(-length // 32)
    n_words = weight.numel() if packed else words_per_row
    check_index(n_words, f"words of weights in tensor {i}")
    if packed and n_words * length != n * words_per_row:
        raise ValueError(f"tensor {i}: {n_words} words do not hold {n} weights in rows of {length}")
    aligned = all(address % 16 == 0 for address in addresses)
    whole = n // 32 if aligned and (length % 32 == 0 or not packed) else 0
    return [*addresses, length, words_per_row, i, 0], (n_words, whole)


def _build(
    columns: Sequence[list[Tensor]],
    scalars: Sequence[Tensor | None],
    device: torch.device,
    capturing: bool,
) -> list[Launch]:
    """Check everything, group the tensors by dtypes and make one launch of each group."""
    tensors = list(zip(*columns, strict=True))
    _check_scalars(scalars, len(tensors), device)
    classes: dict[Dtypes, tuple[list[list[int]], list[tuple[int, int]]]] = {}
    for i, group in enumerate(tensors):
        _check_tensor(i, group, device)
        weight, grad, *moments = group
        if grad.numel() == 0:
            continue
        addresses = tuple(t.data_ptr() for t in group) + (0,) * (2 - len(moments))
        rows, shapes = classes.setdefault((weight.dtype, grad.dtype, moments[0].dtype), ([], []))
        row, shape = _row_of(i, weight, grad, addresses)
        rows.append(row)
        shapes.append(shape)
    return [
        Launch(
            _chunks_for(tuple(shapes), device, capturing),
            _upload(torch.tensor(rows, dtype=torch.int64), device, capturing),
            dtypes,
        )
        for dtypes, (rows, shapes) in classes.items()
    ]


def _key(columns: Sequence[list[Tensor]], device: torch.device) -> Any:
    """All that a table is made of. Once in every step, so in loops that run in C."""
    stream = torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
    every = [tensor for column in columns for tensor in column]
    return (
        device, stream, len(columns),
        *map(Tensor.data_ptr, every), *map(_dtype_of, every), *map(Tensor.is_contiguous, every),
        *map(Tensor.numel, every), *map(_shape_of, columns[1]),
    )  # fmt: skip


_dtype_of, _shape_of = operator.attrgetter("dtype"), operator.attrgetter("shape")


def plan(
    columns: Sequence[list[Tensor]], scalars: Sequence[Tensor | None], device: torch.device
) -> list[Launch]:
    """The launches for these tensors, from the cache while no address, shape, dtype or stream has changed.

    ``columns``: weights, gradients and one or two lists of moments. ``scalars``: hyper, counts, inv_scale,
    found_inf and seed, which are only checked. Nothing is changed.

    Raises:
        ValueError: tensors that the kernel would misread; RuntimeError: a capture before any eager step.
    """
    with _lock:
        if _capturing(device):
            return _build(columns, scalars, device, True)
        key = _key(columns, device)
        launches = _plans.get(key)
        if launches is None:
            launches = _plans[key] = _build(columns, scalars, device, False)
            if len(_plans) > _MAX_PLANS:
                _plans.popitem(last=False)
        else:
            _plans.move_to_end(key)
        if device.type == "cuda":
            _arena.refill()
        return launches
