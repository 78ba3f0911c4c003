"""Choosing a backend: what is possible, forcing, restoring, and refusing with reasons."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from bop2nd_fast import backends


def test_report_names_every_backend_with_a_reason() -> None:
    rows = {status.name: status for status in backends.report()}
    assert set(rows) == set(backends.NAMES) - {"cpu"}
    assert rows["reference"].available
    for status in rows.values():
        assert status.note, f"{status.name} says neither what it is nor why it is missing"
        assert status.available == (backends.why_not(status.name) is None)
    assert rows[backends.active("cpu")].active


def test_use_is_a_context_manager_and_restores() -> None:
    before = backends.active("cpu")
    with backends.use("reference"):
        assert backends.active("cpu") == backends.forced() == "reference"
        served = backends.calls()["reference"]
        torch.ops.bop2nd.pack_bits(torch.randn(40))
        assert backends.calls()["reference"] == served + 1
    assert backends.active("cpu") == before and backends.forced() is None
    served = backends.calls()[before]
    torch.ops.bop2nd.pack_bits(torch.randn(40))
    assert backends.calls()[before] == served + 1


def test_a_forced_backend_also_holds_inside_compiled_code() -> None:
    pack = torch.compile(lambda x: torch.ops.bop2nd.pack_bits(x), fullgraph=True)
    x = torch.randn(40)
    pack(x)
    with backends.use("reference"):
        served = backends.calls()["reference"]
        pack(x)
        assert backends.calls()["reference"] == served + 1


def test_unknown_and_impossible_backends_are_refused_with_reasons() -> None:
    before = backends.forced()
    with pytest.raises(backends.BackendError, match=r"'sse2'.*reference"):
        backends.use("sse2")
    impossible = [name for name in backends.NAMES if backends.why_not(name)]
    assert impossible, "no machine runs every backend at once"
    for name in impossible:
        reason = backends.why_not(name)
        assert reason is not None
        with pytest.raises(backends.BackendError) as error:
            backends.use(name)
        assert reason in str(error.value)
    assert backends.forced() == before


def test_environment_variable_forces_and_refuses() -> None:
    def run(name: str) -> subprocess.CompletedProcess[str]:
        code = "from bop2nd_fast import backends; print(backends.active('cpu'))"
        env = {**os.environ, "BOP2ND_BACKEND": name}
        return subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
        )

    assert run("reference").stdout.strip() == "reference"
    refused = run("nonsense")
    assert refused.returncode != 0 and "BackendError" in refused.stderr and "'nonsense'" in refused.stderr


def test_explain_names_backend_and_why() -> None:
    text = backends.explain("binary_linear", (1, 1024), (1024, 1024))
    assert text.startswith("binary_linear on [1, 1024] x [1024, 1024] (cpu): " + backends.active("cpu"))
    with backends.use("reference"):
        for op in ("binary_linear", "binary_linear_backward"):
            assert backends.explain(op).startswith(f"{op} (cpu): reference, ")
    text = backends.explain("binary_conv2d_backward")
    assert text.startswith("binary_conv2d_backward (cpu): " + backends.active("cpu"))
    with pytest.raises(ValueError, match="no operator 'conv9'"):
        backends.explain("conv9")


def test_forcing_beside_running_calls() -> None:
    code = """
import threading, time, torch, bop2nd_fast as bf
torch.set_num_threads(1)
layer, x, stop, wrong = bf.nn.BinaryLinear(100, 60), torch.randn(5, 100), [], []
expected = layer(x).detach()

def read():
    while not stop:
        loss = layer(x).square().sum()
        loss.backward()
        with torch.no_grad():
            if not torch.equal(layer(x), expected):
                wrong.append(1)

threads = [threading.Thread(target=read) for _ in range(3)]
[t.start() for t in threads]
end = time.time() + 3
while time.time() < end:
    for name in ("reference", bf.backends.active()):
        with bf.backends.use(name):
            pass
stop.append(1)
[t.join() for t in threads]
assert not wrong
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_errors_of_a_forced_backend_keep_their_words() -> None:
    x = torch.ops.bop2nd.pack_bits(torch.randn(2, 40))
    with backends.use("reference"), pytest.raises((RuntimeError, ValueError), match="one is needed"):
        torch.ops.bop2nd.binary_linear_packed(x, x, 40, values=False, signs=False)
