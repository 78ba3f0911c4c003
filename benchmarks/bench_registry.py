"""The registry's cases on tiny sizes under pytest-benchmark: ``pytest benchmarks --benchmark-only -q``.

Quick to run while working on a kernel, and comparable between commits with ``--benchmark-autosave`` and
``--benchmark-compare``. The committed results come from ``python -m benchmarks.run``.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.registry import BOUND, SUITES, Case, Contender, Unavailable, cases

ENTRIES = [
    pytest.param(case, contender, id=f"{case.suite}-{case.name}-{contender.name}")
    for case in cases(SUITES, quick=True)
    for contender in case.contenders()
    if not contender.slow and contender.role != BOUND
]


@pytest.mark.benchmark(min_rounds=3, max_time=0.05, warmup=False)
@pytest.mark.parametrize(("case", "contender"), ENTRIES)
def test_bench(case: Case, contender: Contender, benchmark) -> None:  # type: ignore[no-untyped-def]
    before = torch.get_num_threads()
    torch.set_num_threads(contender.threads or case.threads or before)
    try:
        with torch.no_grad():
            try:
                prepared = contender.make()
            except Unavailable as reason:
                pytest.skip(str(reason))
            prepared.check()
            assert prepared.run is not None
            benchmark.group = f"{case.suite}: {case.name}"
            with torch.inference_mode(case.inference):
                benchmark(prepared.run)
    finally:
        torch.set_num_threads(before)
