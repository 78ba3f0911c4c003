"""What the processes of test_distributed.py do: named functions, which a new process can import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import bop2nd_fast as bf
from bop2nd_fast.optim import Bop2ndOrder, ReplicaMismatchError, broadcast_parameters, check_replicas
from bop2nd_fast.optim.distributed import local_tensor

from .distributed_processes import WireBytes


def network(seed: int) -> nn.Sequential:
    """Small: convolutions (channels-last words), a dense layer of 5 rows (uneven blocks), batch norm."""
    torch.manual_seed(seed)
    return nn.Sequential(
        bf.nn.BinaryConv2d(3, 40, 3, padding=1, input_quantizer=None),
        nn.BatchNorm2d(40),
        bf.nn.BinaryConv2d(40, 8, 3, padding=1),
        nn.Flatten(),
        bf.nn.BinaryLinear(8 * 16, 5),
        nn.BatchNorm1d(5),
    )


def optimizers(model: nn.Module) -> tuple[Bop2ndOrder, torch.optim.Optimizer]:
    binary, real = bf.optim.split_parameters(model)
    return Bop2ndOrder(binary, gamma=1e-2, sigma=1e-2, threshold=0.05), torch.optim.Adam(real, lr=1e-3)


def batch(seed: int, rows: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, 4, 4, generator=generator), torch.randint(0, 5, (rows,), generator=generator)


def train(model: nn.Module, opts: tuple[Any, ...], steps: range, rank: int) -> int:
    """Steps on this rank's own data; returns the flips."""
    flips = torch.zeros(2, dtype=torch.int64)
    for step in steps:
        images, labels = batch(1000 * rank + step)
        F.cross_entropy(model(images), labels).backward()
        for optimizer in opts:
            optimizer.step()
            optimizer.zero_grad()
        flips += sum(torch.tensor([c.candidates, c.flips]) for c in opts[0].telemetry())
    return int(flips[1])


# ----------------------------------------------------------------------------------------- DDP


def ddp(rank: int, world_size: int) -> dict[str, Any]:
    model = network(seed=rank)
    mismatch = _mismatch(model)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    check_replicas(model, buffers=True)
    own = network(seed=0)
    assert all(torch.equal(a, b) for a, b in zip(_bits(model), _bits(own), strict=True))

    _no_sync(wrapped, rank, world_size)
    is_bucket_view = all(p.grad is not None and p.grad._is_view() for p in model.parameters())
    wrapped.zero_grad()

    opts = optimizers(model)
    flips = train(wrapped, opts, range(200), rank)
    n_checked = sum(check_replicas(x) for x in (model, *opts))

    flipped = model[4].weight.words
    if rank == world_size - 1:
        flipped[3, 1] ^= 1 << 7
    return {
        "before": mismatch,
        "is_bucket_view": is_bucket_view,
        "flips": flips,
        "n_checked": n_checked,
        "one_bit": _mismatch(model),
        "bf16": _bf16_hook(rank),
        "start_bytes": _start_bytes(rank),
    }


def _mismatch(model: nn.Module) -> str:
    try:
        check_replicas(model)
    except ReplicaMismatchError as error:
        return str(error)
    return ""


def _bits(model: nn.Module) -> list[Tensor]:
    return [p.words if isinstance(p, bf.BinaryTensor) else p.detach() for p in model.parameters()]


def _no_sync(wrapped: DistributedDataParallel, rank: int, world_size: int) -> None:
    """Two accumulated micro-batches give the mean over ranks of the two gradients' sum."""
    alone = network(seed=0)
    for p, q in zip(alone.parameters(), wrapped.parameters(), strict=True):
        p.data.copy_(q.data)
    with wrapped.no_sync():
        _loss(wrapped, 2 * rank).backward()
    _loss(wrapped, 2 * rank + 1).backward()
    for seed in range(2 * world_size):
        _loss(alone, seed).backward()
    for (name, p), q in zip(wrapped.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad / world_size, rtol=1e-4, atol=1e-5, msg=name)


def _loss(model: nn.Module, seed: int) -> Tensor:
    model.train()
    images, labels = batch(seed)
    return F.cross_entropy(model(images), labels)


def compress(state, bucket):
    """torch's hook under another name: by its own, DDP refuses it on gloo."""
    return bf16_compress_hook(state, bucket)


def _bf16_hook(rank: int) -> int:
    model = network(seed=0)
    wrapped = DistributedDataParallel(model)
    wrapped.register_comm_hook(None, compress)
    opts = optimizers(model)
    flips = train(wrapped, opts, range(10), rank)
    _loss(wrapped, rank).backward()
    for p in model.parameters():
        assert p.grad is not None and torch.equal(p.grad, p.grad.bfloat16().float())
    check_replicas(model)
    check_replicas(opts[0])
    return flips


def _start_bytes(rank: int) -> tuple[int, int]:
    """Bytes DDP's own start sends, and those of ``broadcast_parameters``."""
    with WireBytes() as by_ddp:
        DistributedDataParallel(network(seed=rank))
    model = network(seed=rank)
    with WireBytes() as by_us:
        broadcast_parameters(model)
        DistributedDataParallel(model, init_sync=False)
    check_replicas(model, buffers=True)
    return sum(by_ddp.by_name["broadcast_"]), sum(by_us.by_name["broadcast_"])


# ----------------------------------------------------------------------------------------- FSDP2


def shard(model: nn.Sequential, **options: Any) -> nn.Sequential:
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer, **options)
    return fully_shard(model, **options)


def fsdp_layout(rank: int, world_size: int) -> None:
    """Rows, words on the wire, moments, gradients."""
    whole, model = network(seed=3), shard(network(seed=3))
    opts = optimizers(model)
    assert len(opts[0].param_groups[0]["params"]) == 3
    for i in (0, 2, 4):
        weight, full = model[i].weight, whole[i].weight
        block = local_tensor(weight)
        assert isinstance(block, bf.BinaryTensor)
        expected = list(full.words.chunk(world_size)) + [full.words[:0]] * world_size
        assert torch.equal(block.words, expected[rank])
        for moment in ("exp_avg", "exp_avg_sq"):
            state = opts[0].state[weight][moment]
            assert local_tensor(state).shape == block.shape and state.shape == full.shape
        assert torch.equal(dense(weight), full.unpack())

    images, labels = batch(rank)
    with WireBytes() as wire:
        out = model(images)
        forward = {name: list(sizes) for name, sizes in wire.by_name.items()}
        F.cross_entropy(out, labels).backward()
    assert torch.equal(out, whole(images))
    rows = [-(-whole[i].weight.shape[0] // world_size) for i in (0, 2, 4)]
    # words per row: 9 taps of ceil(3 / 32), 9 taps of ceil(40 / 32), 128 / 32; batch norms: weight and bias
    norms = [2 * 4 * -(-n // world_size) for n in (40, 5)]
    sent = [rows[0] * 9 * 4, norms[0], rows[1] * 18 * 4, rows[2] * 4 * 4, norms[1]]
    assert forward == {"_allgather_base_": sent}, (forward, sent)
    assert sent[3] * 8 == rows[2] * 128  # 1 bit per weight
    scattered = sorted(wire.by_name["_reduce_scatter_base_"])
    per_row = [27, 2, 360, 128, 2]
    counts = [rows[0], -(-40 // world_size), rows[1], rows[2], -(-5 // world_size)]
    assert scattered == sorted(4 * world_size * n * k for n, k in zip(counts, per_row, strict=True))
    for p in model.parameters():
        assert local_tensor(p.grad).shape == local_tensor(p).shape


def integer_network() -> nn.Sequential:
    """Its gradients are integers, hence exact whatever the order of summation: no batch norm, linear loss."""
    torch.manual_seed(7)
    return nn.Sequential(
        bf.nn.BinaryConv2d(3, 8, 3, padding=1, input_quantizer=None),
        nn.Hardtanh(-1e6, 1e6),
        bf.nn.BinaryConv2d(8, 40, 3, padding=1),
        nn.Flatten(),
        bf.nn.BinaryLinear(40 * 16, 37),
        bf.nn.BinaryLinear(37, 6),
    )


def integer_loss(model: nn.Module, step: int, part: int, n_parts: int) -> Tensor:
    """This part's share of a batch of 8, times ``n_parts``: the mean over ranks is the whole batch's sum."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(-1, 2, (8, 3, 4, 4), generator=generator).float()
    weights = torch.randint(-2, 3, (8, 6), generator=generator).float()
    images, weights = images.chunk(n_parts)[part], weights.chunk(n_parts)[part]
    return (model(images) * weights).sum() * n_parts


def integer_optimizer(model: nn.Module) -> Bop2ndOrder:
    return Bop2ndOrder(model.parameters(), gamma=0.1, sigma=0.1, threshold=0.3, bias_correction="adam")


def integer_steps(model: nn.Module, optimizer: Bop2ndOrder, steps: range, part: int, n_parts: int) -> int:
    flips = 0
    for step in steps:
        integer_loss(model, step, part, n_parts).backward()
        optimizer.step()
        optimizer.zero_grad()
        flips += sum(c.flips for c in optimizer.telemetry())
    return flips


def fsdp_train(
    rank: int, world_size: int, load: str | None, save: str | None, steps: range
) -> dict[str, Tensor]:
    """Train from the start or a distributed checkpoint; returns every weight and moment, gathered."""
    model = shard(integer_network())
    optimizer = integer_optimizer(model)
    if load is not None:
        for p in model.parameters():  # forget the start
            local_tensor(p).words.zero_()
        distributed_load(model, optimizer, load)
    integer_steps(model, optimizer, steps, rank, world_size)
    if save is not None:
        distributed_save(model, optimizer, save)
    return gathered(model, optimizer)


def distributed_save(model: nn.Module, optimizer: Any, path: str) -> None:
    states = get_state_dict(model, optimizer)
    dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=path)


def distributed_load(model: nn.Module, optimizer: Any, path: str) -> None:
    states = get_state_dict(model, optimizer)
    state = {"model": states[0], "optimizer": states[1]}
    dcp.load(state, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def gathered(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    result = {}
    for name, p in model.named_parameters():
        result[name] = dense(p)
        for key, value in optimizer.state.get(p, {}).items():
            result[f"{name}.{key}"] = dense(value)
    return result


def dense(x: Tensor) -> Tensor:
    """A plain contiguous copy of all of ``x``: gathered, unpacked."""
    x = x.detach()
    x = x.full_tensor() if isinstance(x, DTensor) else x
    return (x.unpack() if isinstance(x, bf.BinaryTensor) else x).clone(memory_format=torch.contiguous_format)


def fsdp_real(rank: int, world_size: int, directory: str) -> int:
    """An ordinary network with batch norm and Adam, same world size: resumed bit for bit."""
    path = str(Path(directory) / "real")
    model = shard(network(seed=1))
    opts = optimizers(model)
    train(model, opts, range(4), rank)
    distributed_save(model, opts, path)
    flips = train(model, opts, range(4, 12), rank)

    again = shard(network(seed=2))
    opts_again = optimizers(again)
    distributed_load(again, opts_again, path)
    train(again, opts_again, range(4, 12), rank)
    for mine, other in zip(opts, opts_again, strict=True):  # running statistics are each rank's own
        kept, resumed = gathered(model, mine), gathered(again, other)
        assert kept.keys() == resumed.keys() and len(kept) > 7
        for name, value in kept.items():
            assert torch.equal(resumed[name], value), name
    return flips
