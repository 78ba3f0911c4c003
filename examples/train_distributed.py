"""Train BinaryNet with several processes: replicas (DDP) or sharded parameters (FSDP2).

    torchrun --nproc-per-node 2 examples/train_distributed.py --mode ddp
    torchrun --nproc-per-node 4 examples/train_distributed.py --mode fsdp --checkpoints out/digits

NCCL where there are GPUs (one per process), gloo otherwise. Started again with the same ``--checkpoints``, on
any number of processes, it goes on from the last finished epoch.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import bop2nd_fast as bf
from bop2nd_fast import checkpoint
from bop2nd_fast import data as data_sets


def main() -> None:
    arguments = parse()
    device = start_processes()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    images, labels, test_images, test_labels = (x.to(device) for x in data(arguments.data))

    torch.manual_seed(0)  # of the initial weights: the same everywhere
    model: nn.Module = bf.models.BinaryNet(
        width=arguments.width, image_size=8, in_channels=1, first_padding=1
    ).to(device)
    if arguments.mode == "fsdp":
        for layer in model.children():
            if any(p.requires_grad for p in layer.parameters()):
                fully_shard(layer)  # gathers one layer's words at a time
        fully_shard(model)
    binary, real = bf.optim.split_parameters(model)
    optimizers = [
        bf.optim.Bop2ndOrder(binary, gamma=1e-3, sigma=1e-2, threshold=2e-2),
        torch.optim.Adam(real, lr=0.01),
    ]
    first = 0
    if arguments.checkpoints:
        first = checkpoint.resume_sharded(arguments.checkpoints, model, optimizers)
    wrapped = model
    if arguments.mode == "ddp":
        bf.optim.broadcast_parameters(model)  # 1 bit per weight; DDP's own start would send 32
        wrapped = DistributedDataParallel(model, init_sync=False, gradient_as_bucket_view=True)

    for epoch in range(first, arguments.epochs):
        model.train()
        generator = torch.Generator().manual_seed(epoch)
        order = torch.randperm(len(labels), generator=generator)  # the same everywhere; each takes its share
        n_steps = len(order) // (arguments.batch_size * world_size)
        shares = order[: n_steps * arguments.batch_size * world_size].view(n_steps, world_size, -1)
        for chosen in shares[:, rank].to(device):
            loss = F.cross_entropy(wrapped(images[chosen]), labels[chosen])
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        average_statistics(model)
        if arguments.mode == "ddp":
            bf.optim.check_replicas(model, buffers=True)  # raises if the processes have drifted apart
        if arguments.checkpoints:
            checkpoint.save_sharded(arguments.checkpoints, epoch + 1, model, optimizers)
        accuracy = evaluate(model, test_images, test_labels)
        if rank == 0:
            print(f"epoch {epoch + 1}: loss {loss.item():.3f}, test accuracy {accuracy:.1%}", flush=True)
    dist.barrier()  # nobody leaves while others may still be talking to it
    dist.destroy_process_group()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", choices=["ddp", "fsdp"], default="ddp")
    parser.add_argument("--data", choices=["digits", "synthetic"], default="digits")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=25, help="per process")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--checkpoints", help="directory, the same for all processes")
    return parser.parse_args()


def start_processes() -> torch.device:
    """Join the group that torchrun describes in the environment; returns this process's device."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
        return device
    dist.init_process_group("gloo")
    return torch.device("cpu")


def data(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images fp32 ``[N, 1, 8, 8]`` with labels int64 ``[N]``."""
    if name == "digits":
        digits = data_sets.digits()
        return digits.train_images, digits.train_labels, digits.test_images, digits.test_labels
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randn(10, 1, 8, 8, generator=generator)
    labels = torch.randint(0, 10, (1200,), generator=generator)
    images = prototypes[labels] + torch.randn(1200, 1, 8, 8, generator=generator)
    return images[:900], labels[:900], images[900:], labels[900:]


@torch.no_grad()
def average_statistics(model: nn.Module) -> None:
    """Batch norm's running statistics saw only this process's data: take the mean over all."""
    for buffer in model.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= dist.get_world_size()


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of right answers. Every process must call it: sharded layers gather their weights."""
    model.eval()
    return float((model(images).argmax(1) == labels).double().mean())


if __name__ == "__main__":
    main()
