"""What the processes of test_distributed.py do: named functions, which a new process can import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import bop2nd_fast as bf
from bop2nd_fast.optim import Bop2ndOrder, ReplicaMismatchError, broadcast_parameters, check_replicas
from bop2nd_fast.optim.distributed import local_tensor
from bop2nd_fast.train import Trainer

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


# ----------------------------------------------------------------------------------------- collectives


def collectives(rank: int, world_size: int) -> None:
    """Whatever moves tensors moves signs, also between packed and dense ones; whatever sums them raises."""
    mine, zeros = signs_of(rank), bf.pack(torch.ones(6, 40), 1)
    everyone = [signs_of(r) for r in range(world_size)]

    for held in (mine.clone(), mine.unpack()) if rank == 0 else (zeros.unpack(), zeros.clone()):
        dist.broadcast(held, 0)  # packed on one rank, dense on the others, and the other way round
        assert torch.equal(held, everyone[0])
    held = mine.clone()
    work = dist.broadcast(held, 1, async_op=True)
    work.wait()
    assert torch.equal(held, everyone[1])

    gathered = [zeros.clone() if r % 2 else zeros.unpack() for r in range(world_size)]
    dist.all_gather(gathered, mine)
    assert all(map(torch.equal, gathered, everyone))
    under_each_other = bf.pack(torch.ones(6 * world_size, 40), 1)
    dist.all_gather_into_tensor(under_each_other, mine)
    assert torch.equal(under_each_other, torch.cat([x.unpack() for x in everyone]))

    into = [zeros.clone() for _ in range(world_size)] if rank == 0 else None
    dist.gather(mine, into, 0)
    assert into is None or all(map(torch.equal, into, everyone))
    received = zeros.clone()
    dist.scatter(received, everyone if rank == 1 else None, 1)
    assert torch.equal(received, mine)
    swapped = [zeros.clone() for _ in range(world_size)]
    dist.all_to_all(swapped, [signs_of(10 * rank + r) for r in range(world_size)])
    assert all(torch.equal(x, signs_of(10 * r + rank)) for r, x in enumerate(swapped))
    rows = bf.pack(torch.ones(world_size, 40), 1)
    dist.all_to_all_single(rows, mine[:world_size])
    assert torch.equal(rows, torch.stack([x.unpack()[rank] for x in everyone]))

    if rank == 0:
        dist.send(mine, 1)
    elif rank == 1:
        dense = torch.zeros(6, 40)
        dist.recv(dense, 0)
        assert torch.equal(dense, everyone[0].unpack())

    block = signs_of(1).new_zeros(6, 40)
    before = mine.words.clone()
    for refused in (
        lambda: dist.all_reduce(mine),
        lambda: dist.reduce(mine, 0),
        lambda: dist.reduce_scatter(mine, everyone),
        lambda: dist.reduce_scatter_tensor(mine, under_each_other),
        lambda: dist.recv(mine, 0),
        lambda: dist.all_reduce(mine.view(-1)),
        lambda: dist.broadcast(mine.t(), 0),
        lambda: dist.broadcast(block, 0),
    ):
        with pytest.raises((RuntimeError, ValueError), match=r"BinaryTensor|block"):
            refused()
    assert torch.equal(mine.words, before)


def signs_of(seed: int) -> bf.BinaryTensor:
    return bf.pack(torch.randn(6, 40, generator=torch.Generator().manual_seed(seed)), 1)


def distributed_tensors(rank: int, world_size: int) -> None:
    """A whole packed weight becomes blocks of rows on every rank, and whole again."""
    mesh = init_device_mesh("cpu", (world_size,))
    for rows in (6, 5):
        whole = bf.pack(signs_of(3).unpack()[:rows], 1)
        sharded = distribute_tensor(whole, mesh, [Shard(0)])
        expected = whole.unpack().chunk(world_size)
        assert torch.equal(
            dense(sharded.to_local()), expected[rank] if rank < len(expected) else whole.unpack()[:0]
        )
        assert torch.equal(dense(sharded), whole.unpack())
        copies = distribute_tensor(whole, mesh, [Replicate()])
        assert torch.equal(dense(copies), whole.unpack())


def full_state_dict(rank: int, world_size: int, from_rank0: bool) -> None:
    """A packed state dict, as ``torch.save(model.state_dict())`` made it, into a sharded model."""
    whole = network(seed=5)
    state = whole.state_dict() if rank == 0 or not from_rank0 else {}
    model = shard(network(seed=6))
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=from_rank0)
    set_model_state_dict(model, state, options=options)
    for (name, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert isinstance(local_tensor(p), bf.BinaryTensor) == isinstance(q, bf.BinaryTensor), name
        assert torch.equal(dense(p), dense(q)), name
    images, _ = batch(rank)
    assert torch.equal(model.eval()(images), whole.eval()(images))
    alone = shard(nn.Sequential(bf.nn.BinaryLinear(40, 6)))
    set_model_state_dict(alone, {"0.weight": signs_of(0)} if state else {}, options=options)
    assert torch.equal(dense(alone[0].weight), signs_of(0).unpack())


# ----------------------------------------------------------------------------------------- the training loop


def training_loop(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """A whole run, and one that the last process asks to stop in the middle of an epoch, resumed."""
    digits = bf.data.digits()
    recipe = bf.recipes.get("digits").replace(epochs=2, width=4, batch_size=128)

    def trainer(out: str | None) -> Trainer:
        return Trainer(recipe, digits, seed=3, out=out, report_every=3)

    whole = trainer(None)
    whole.run()
    check_replicas(whole.model, buffers=True)
    stopped = trainer(folder)
    with pytest.raises(KeyboardInterrupt):
        for record in stopped.records():
            if record.step == 13 and rank == world_size - 1:
                stopped.interrupt()
    resumed = trainer(folder)
    assert resumed.restore() == 16  # asked for after the report at 13, agreed on at the next one
    resumed.run()
    check_replicas(resumed.model, buffers=True)
    check_replicas(resumed.optimizer)
    return {
        "bits": [_bits(it.model) for it in (whole, resumed)],
        "history": [[(e.test_accuracy, e.layers) for e in it.history] for it in (whole, resumed)],
        "losses": [[e.loss for e in it.history] for it in (whole, resumed)],
    }
