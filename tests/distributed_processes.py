"""Several processes on gloo for the tests: started from a server that has imported torch once.

A plain ``spawn`` imports torch in every process (seconds each); a ``fork`` of the test process would copy its
threads. The fork server is a clean process of its own.
"""

from __future__ import annotations

import datetime
import io
import multiprocessing
import multiprocessing.connection
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

_context = multiprocessing.get_context("forkserver")
# torch._dynamo: the first optimizer would import it, which takes seconds
_context.set_forkserver_preload(
    ["torch._dynamo", "torch.distributed.fsdp", "bop2nd_fast", "pytest", __name__]
)


def start(target: Callable[..., Any], *args: Any) -> Any:
    """A process that runs ``target(*args)``, started in milliseconds."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    process = _context.Process(target=target, args=args, daemon=True)
    process.start()
    return process


def pipe() -> Any:
    """(receiving end, sending end)."""
    return _context.Pipe(duplex=False)


def run(worker: Callable[..., Any], world_size: int, *args: Any, seconds: float = 100) -> list[Any]:
    """``worker(rank, world_size, *args)`` in ``world_size`` processes of one gloo group; their results.

    Raises:
        AssertionError: a worker failed (with its traceback) or did not end in time; all are ended then.
    """
    with tempfile.TemporaryDirectory() as directory:
        store, pipes, processes = Path(directory) / "store", [], []
        try:
            for rank in range(world_size):
                ours, theirs = pipe()
                processes.append(start(_main, worker, rank, world_size, str(store), theirs, args))
                theirs.close()
                pipes.append(ours)
            return _collect(pipes, time.monotonic() + seconds)
        finally:
            for process in processes:
                process.join(timeout=5)
                process.kill()
                process.join()


def _collect(pipes: list[Any], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = multiprocessing.connection.wait(waiting, timeout=max(0, deadline - time.monotonic()))
        assert ready, f"ranks {sorted(set(range(len(pipes))) - set(results))} did not end in time"
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                failure, saved = pipe.recv()
            except EOFError:
                failure = "it died"
            assert failure is None, f"rank {rank}: {failure}"
            results[rank] = torch.load(io.BytesIO(saved), weights_only=False)
    return [results[rank] for rank in range(len(pipes))]


def _main(
    worker: Callable[..., Any], rank: int, world_size: int, store: str, pipe: Any, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=60),
        )
        result = worker(rank, world_size, *args)
        dist.barrier()
        dist.destroy_process_group()
        saved = io.BytesIO()
        torch.save(result, saved)  # pickled, tensors would be handles on memory of this process
        pipe.send((None, saved.getvalue()))
    except BaseException:
        pipe.send((traceback.format_exc(), None))
        raise


class WireBytes(TorchDispatchMode):
    """Counts the bytes this process hands to each collective: ``by_name[operator name] -> [bytes, ...]``."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            sent = args[1] if name in ("_allgather_base_", "_reduce_scatter_base_") else args[0]
            tensors = [sent] if isinstance(sent, torch.Tensor) else sent
            n_bytes = sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))
            self.by_name.setdefault(name, []).append(n_bytes)
        return func(*args, **(kwargs or {}))
