"""Memory of some work on the CPU, measured in a process of its own (a suite's ``main`` is that process).

Two figures, because each misses something:

* ``allocator_peak``: the highest sum of live bytes in torch's CPU allocator while the work runs, from the
  profiler's record of every allocation. Exact and reproducible; it does not see scratch space that
  libraries take from ``malloc`` themselves.
* ``rss_growth``: how much the process's peak resident set grew over its size after the imports and a small
  warm-up. Sees everything, page-sized, and depends on how ``malloc`` reuses what was freed.

And one of a forward pass: ``saved_for_backward``, the bytes of all distinct storages that autograd keeps,
parameters left out.
"""

from __future__ import annotations

import gc
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import bop2nd_fast as bf
from bop2nd_fast.stamp import ROOT


def allocator_peak(work: Callable[[], object]) -> int:
    """Highest sum of live bytes that ``work`` had from torch's CPU allocator, over what was live before."""
    on_cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=on_cpu, profile_memory=True) as prof:
        work()
    assert prof.profiler is not None and prof.profiler.kineto_results is not None
    changes = [
        (event.start_ns(), event.nbytes())
        for event in prof.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU
    ]
    in_time = sorted(changes, key=lambda change: change[0])
    return max(itertools.accumulate((n for _, n in in_time), initial=0))


def rss_growth(work: Callable[[], object]) -> int:
    """Growth of the peak resident set while ``work`` ran, over the resident set before (Linux)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, of the imports, starts anew
    before = _status_bytes("VmRSS")
    work()
    return _status_bytes("VmHWM") - before


def _status_bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found.group(1)) * 1024


def saved_by_kind(model: nn.Module, x: Tensor) -> dict[str, int]:
    """Bytes of the distinct storages that one forward pass in training mode keeps, by the class of the layer
    that kept a storage first, the most first."""
    kept: dict[str, int] = {}
    for row in bf.summary(model, x).rows:
        kept[row.kind] = kept.get(row.kind, 0) + row.bytes_saved
    return dict(sorted(((k, n) for k, n in kept.items() if n), key=lambda item: -item[1]))


def saved_for_backward(model: nn.Module, x: Tensor) -> int:
    """The same of all layers."""
    return sum(saved_by_kind(model, x).values())


def peaks(work: Callable[[], object]) -> dict[str, int]:
    """Both figures of ``work``, which is run twice."""
    growth = rss_growth(work)
    gc.collect()
    return {"allocator_peak": allocator_peak(work), "rss_growth": growth}


def in_own_process(module: str, *arguments: object) -> dict[str, int]:
    """What ``python -m module arguments`` prints as JSON in its last line, from a fresh process.

    Raises:
        RuntimeError: the process failed; with its last line.
    """
    command = [sys.executable, "-W", "ignore", "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command[1:])} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])
