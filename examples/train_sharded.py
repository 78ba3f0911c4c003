"""Train a recipe with sharded parameters (FSDP2): a loop of one's own, on the library's parts.

    torchrun --nproc-per-node 4 examples/train_sharded.py --checkpoints out/digits

NCCL where there are GPUs (one per process), gloo otherwise. Started again with the same ``--checkpoints``, on
any number of processes, it goes on from the last finished epoch. Replicas need no program of one's own:
``torchrun -m bop2nd_fast train digits`` trains data-parallel.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard

import bop2nd_fast as bf
from bop2nd_fast import checkpoint
from bop2nd_fast.train_replicas import join_processes


def main() -> None:
    arguments = parse()
    device = join_processes("cuda" if torch.cuda.is_available() else "cpu")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    recipe = bf.recipes.get("digits").replace(
        epochs=arguments.epochs, width=arguments.width, batch_size=arguments.batch_size
    )
    digits = bf.data.digits()
    loader = bf.data.loader(digits, recipe.batch_size, seed=0, device=device, share=(rank, world_size))

    model = recipe.model(digits, seed=0).to(device)  # the same weights everywhere
    for layer in model.children():
        if any(p.requires_grad for p in layer.parameters()):
            fully_shard(layer)  # gathers one layer's words at a time
    fully_shard(model)
    optimizer, schedulers = recipe.preset.build(model, loader.steps_per_epoch)
    optimizers = [optimizer.binary, optimizer.real]  # type: ignore[attr-defined]
    first = 0
    if arguments.checkpoints:
        first = checkpoint.resume_sharded(arguments.checkpoints, model, optimizers)

    for epoch in range(first, recipe.epochs):
        model.train()
        for images, labels in loader.train(epoch + 1):
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            for scheduler in schedulers:
                scheduler.step()
        average_statistics(model)
        if arguments.checkpoints:
            checkpoint.save_sharded(arguments.checkpoints, epoch + 1, model, optimizers)
        model.eval()
        with torch.no_grad():  # every process: sharded layers gather their weights
            correct = model(digits.test_images.to(device)).argmax(1).cpu() == digits.test_labels
        if rank == 0:
            accuracy = float(correct.double().mean())
            print(f"epoch {epoch + 1}: loss {loss.item():.3f}, test accuracy {accuracy:.1%}", flush=True)
    dist.barrier()  # nobody leaves while others may still be talking to it
    dist.destroy_process_group()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=32, help="of all processes together")
    parser.add_argument("--checkpoints", help="directory, the same for all processes")
    return parser.parse_args()


@torch.no_grad()
def average_statistics(model: nn.Module) -> None:
    """Batch norm's running statistics saw only this process's data: take the mean over all."""
    for buffer in model.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= dist.get_world_size()


if __name__ == "__main__":
    main()
