"""Runs in the tree it is started in: builds that tree's contenders and times them on request.

Speaks JSON lines: requests on standard input, answers on standard output. Needs of the tree only the registry
of cases, so that one worker serves an old commit and a new one.
"""

from __future__ import annotations

import gc
import json
import os
import sys

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # whatever a contender prints must not mix with the answers
sys.path[0] = os.getcwd()

import torch  # noqa: E402

from benchmarks.registry import OURS, VARIANT, GateError, Unavailable, cases  # noqa: E402
from benchmarks.timing import Sampler, cpu_sampler, cuda_sampler  # noqa: E402


def reply(**values: object) -> None:
    answers.write(json.dumps(values) + "\n")
    answers.flush()


def build(suite: str, name: str, quick: bool) -> tuple[bool, dict[str, Sampler], list[str]]:
    """Whether the case is timed in inference mode, samplers of our contenders, checked, and who failed."""
    samplers: dict[str, Sampler] = {}
    failed: list[str] = []
    try:
        case = next((c for c in cases([suite], quick=quick) if c.name == name), None)
    except ValueError as error:  # an old commit without the suite
        return False, samplers, [str(error)]
    if case is None:
        return False, samplers, failed
    torch.set_num_threads(case.threads or torch.get_num_threads())
    for contender in case.contenders():
        if contender.role not in (OURS, VARIANT) or (quick and contender.slow):
            continue
        try:
            made = contender.make()
            made.check()
        except Unavailable:
            continue
        except GateError as error:
            failed.append(f"{contender.name}: {error}")
            continue
        if made.run is not None:
            on_gpu = getattr(case, "device", "cpu") == "cuda"  # old commits know CPUs alone
            samplers[contender.name] = cuda_sampler([made.run]) if on_gpu else cpu_sampler(made.run)
    return case.inference, samplers, failed


def main() -> None:
    threads = torch.get_num_threads()
    reply(ready=True)
    inference = False
    samplers: dict[str, Sampler] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "suite" in request:
            samplers.clear()
            gc.collect()
            torch.set_num_threads(threads)
            with torch.no_grad():
                inference, samplers, failed = build(request["suite"], request["case"], request["quick"])
            reply(contenders=list(samplers), failed=failed)
            continue
        with torch.no_grad(), torch.inference_mode(inference):
            reply(seconds=samplers[request["run"]](request["n"]))


main()
