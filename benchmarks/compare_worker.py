"""Runs in the tree it is started in: builds that tree's contenders and times them on request.

Speaks JSON lines: requests on standard input, answers on standard output. Needs of the tree only the registry
of cases, so that one worker serves an old commit and a new one.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # whatever a contender prints must not mix with the answers
sys.path[0] = os.getcwd()

import torch  # noqa: E402

from benchmarks.registry import OURS, VARIANT, Prepared, Unavailable, cases  # noqa: E402


def reply(**values: object) -> None:
    answers.write(json.dumps(values) + "\n")
    answers.flush()


def build(suite: str, name: str, quick: bool) -> tuple[bool, dict[str, Prepared]]:
    """Whether the case is timed in inference mode, and our contenders of it, prepared and checked."""
    case = next((c for c in cases([suite], quick=quick) if c.name == name), None)
    if case is None:
        return False, {}
    torch.set_num_threads(case.threads or torch.get_num_threads())
    prepared: dict[str, Prepared] = {}
    for contender in case.contenders():
        if contender.role not in (OURS, VARIANT) or (quick and contender.slow):
            continue
        try:
            made = contender.make()
        except Unavailable:
            continue
        made.check()
        if made.run is not None:
            prepared[contender.name] = made
    return case.inference, prepared


def main() -> None:
    threads = torch.get_num_threads()
    reply(ready=True)
    inference = False
    prepared: dict[str, Prepared] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "suite" in request:
            for made in prepared.values():
                if made.close is not None:
                    made.close()
            prepared.clear()
            gc.collect()
            torch.set_num_threads(threads)
            with torch.no_grad():
                inference, prepared = build(request["suite"], request["case"], request["quick"])
            reply(contenders=list(prepared))
            continue
        run = prepared[request["run"]].run
        assert run is not None  # see `build`
        with torch.no_grad(), torch.inference_mode(inference):
            start = time.perf_counter()
            for _ in range(request["n"]):
                run()
            seconds = time.perf_counter() - start
        reply(seconds=seconds)


main()
