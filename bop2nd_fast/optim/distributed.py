"""Many processes: a sharded tensor's local part, equal starts, and the proof that replicas are equal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..binary_tensor import BinaryTensor

_CHUNK = 1 << 20  # words hashed at a time: the temporaries take 8 bytes per word


class ReplicaMismatchError(RuntimeError):
    """Processes that should hold the same parameters do not; the message names the first one that differs."""


def local_tensor(x: Tensor) -> Tensor:
    """What this process holds of ``x``: the local block of a DTensor (FSDP2), otherwise ``x`` itself."""
    if not hasattr(x, "to_local"):
        return x
    with torch.no_grad():  # the block itself; with gradients it would be an alias that autograd tracks
        return x.to_local()


@torch.no_grad()
def broadcast_parameters(model: nn.Module, source: int = 0, group: Any = None) -> None:
    """Give all processes the parameters and buffers of rank ``source``; binary ones travel as words.

    For ``DistributedDataParallel(model, init_sync=False)``: DDP's own start sends unpacked weights, 32 times
    the bytes.
    """
    for _, x in _named_tensors(model, buffers=True):
        dist.broadcast(x.words if isinstance(x, BinaryTensor) else x.detach(), source, group=group)


@torch.no_grad()
def check_replicas(model_or_params: Any, group: Any = None, buffers: bool = False) -> int:
    """Prove that all processes of ``group`` hold the same bits; returns how many tensors were compared.

    Every tensor is reduced to a 64-bit checksum that depends on each word and its place; the checksums'
    minimum and maximum over the group must agree. A single changed word always shows, several do with a
    probability of 1 - 2^-64. Sends 32 bytes per tensor. Synchronises.

    Args:
        model_or_params: a module, an optimizer (its state), a mapping of names to tensors (a ``state_dict``),
            or an iterable of tensors or of (name, tensor).
        group: process group; for parameters sharded in a 2-d mesh, that of the replicating axis.

        buffers: compare a module's buffers too. Batch norm's running statistics differ between processes
            after a forward pass: each saw its own data.

    Raises:
        ReplicaMismatchError: on every rank, naming the first tensor that differs.
        ValueError: sharded tensors without a ``group``: their blocks are meant to differ.
    """
    named = list(_named_tensors(model_or_params, buffers))
    if group is None and any(hasattr(x, "to_local") for _, x in named):
        raise ValueError(
            "sharded parameters have no replicas in the whole world; pass the group of the mesh axis "
            "that replicates them, for example mesh['replicate'].get_group()"
        )
    device = local_tensor(named[0][1]).device if named else torch.device("cpu")
    count = torch.tensor([len(named), -len(named)], device=device)
    dist.all_reduce(count, dist.ReduceOp.MAX, group=group)
    if count[0] != -count[1]:
        raise ReplicaMismatchError(f"between {-int(count[1])} and {int(count[0])} tensors on different ranks")
    if not named:
        return 0
    sums = torch.stack([checksum(local_tensor(x)).to(device) for _, x in named])
    # maximum and minimum in one reduction: ~x = -x - 1 turns the order around without overflow
    both = torch.stack([sums, ~sums])
    dist.all_reduce(both, dist.ReduceOp.MAX, group=group)
    different = (both[0] != ~both[1]).nonzero().flatten().tolist()
    if different:
        name = named[different[0]][0]
        raise ReplicaMismatchError(
            f"{name} is not the same on all ranks ({len(different)} of {len(named)} tensors differ)"
        )
    return len(named)


def checksum(x: Tensor) -> Tensor:
    """int64 0-dim: ``sum over i of (x_i + 1) * odd(i) mod 2^64`` over the words of ``x`` and its shape.

    ``x_i`` are the packed words, or the elements' bits; ``odd(i)`` is a scrambled odd number, so that the
    factor is invertible and every position counts differently.
    """
    words = _bits(x)
    total = _weighted_sum(torch.tensor([*x.shape, len(x.shape)], device=words.device), 0)
    for start in range(0, words.numel(), _CHUNK):
        total += _weighted_sum(words[start : start + _CHUNK].long(), start + 64)
    return total


def _weighted_sum(values: Tensor, start: int) -> Tensor:
    i = torch.arange(start, start + values.numel(), device=values.device)
    i = (i ^ (i >> 31)) * -7046029254386353131  # splitmix64's steps; int64 arithmetic wraps around
    i = (i ^ (i >> 29)) * -4658895280553007687
    return ((values + 1) * ((i ^ (i >> 32)) | 1)).sum()


def _bits(x: Tensor) -> Tensor:
    """The memory of ``x`` in logical order as a flat integer tensor."""
    if isinstance(x, BinaryTensor):
        return x.words.reshape(-1)
    x = x.detach().contiguous().reshape(-1)
    if x.is_complex():
        x = torch.view_as_real(x).reshape(-1)
    if x.is_floating_point():
        x = x.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    return x


def _named_tensors(source: Any, buffers: bool) -> Iterator[tuple[str, Tensor]]:
    if isinstance(source, nn.Module):
        yield from source.named_parameters()
        if buffers:
            yield from source.named_buffers()
    elif isinstance(source, torch.optim.Optimizer):
        params = [p for group in source.param_groups for p in group["params"]]
        yield from _nested("state", [source.state.get(p, {}) for p in params])
    elif isinstance(source, Mapping):
        yield from _nested("", source)
    else:
        entries: Iterable[Any] = source
        for i, entry in enumerate(entries):
            yield (entry[0], entry[1]) if isinstance(entry, tuple) else (f"parameter {i}", entry)


def _nested(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _nested(f"{name}.{key}" if name else str(key), item)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _nested(f"{name}[{i}]", item)
