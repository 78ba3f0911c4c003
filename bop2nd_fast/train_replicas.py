"""What several processes that train replicas of one network have to agree on; one process alone agrees."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .optim import broadcast_parameters


def checked_device(name: str) -> str:
    """``name`` if this machine has such a device, else ValueError."""
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or not (index.isdigit() or name == kind):
        raise ValueError(f"unknown device {name!r}; allowed are cpu, cuda, cuda:0, cuda:1, ...")
    n_gpus = torch.cuda.device_count()
    if kind == "cuda" and int(index or 0) >= n_gpus:
        raise ValueError(f"device {name!r} is not there: torch sees {n_gpus} CUDA devices")
    return name


def join_processes(device: str) -> torch.device:
    """Under ``torchrun``: join its process group (NCCL for ``cuda``, gloo for ``cpu``); returns this
    process's device. Without it: just the device."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return torch.device(device)
    if torch.device(device).type == "cuda":
        own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(own)
        dist.init_process_group("nccl", device_id=own)
        return own
    dist.init_process_group("gloo")
    return torch.device(device)


class Replicas:
    """The processes of the default group, as the training loop sees them."""

    def __init__(self) -> None:
        joined = dist.is_available() and dist.is_initialized()
        self.share = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
        self.alone, self.first = not joined, self.share[0] == 0

    def wrap(self, model: nn.Module) -> Any:
        """The model to call in training: it averages gradients over the processes. All start as the first."""
        if self.alone:
            return model
        broadcast_parameters(model)  # 1 bit per weight; DDP's own start would send 32
        return DistributedDataParallel(model, init_sync=False, gradient_as_bucket_view=True)

    def share_statistics(self, model: nn.Module) -> None:
        """Buffers (batch norm's running statistics) become the first process's, which the file holds too."""
        if not self.alone:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def total(self, values: list[float]) -> list[float]:
        """Sums over the processes."""
        if self.alone:
            return values
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        sums = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(sums)
        return [float(x) for x in sums.tolist()]

    def mean(self, total: float, count: int) -> float:
        """``total / count``, each summed over the processes."""
        total, n = self.total([total, float(count)])
        return total / n

    def leave(self) -> None:
        """End the process group, once all have come here: nobody leaves while others may still talk to it."""
        if not self.alone:
            dist.barrier()
            dist.destroy_process_group()
