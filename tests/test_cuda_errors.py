"""What goes wrong on a GPU is told and leaves nothing behind: errors of the runtime, chips without code."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bop2nd_fast import backends, triton_library
from bop2nd_fast.cuda_library import CudaLibrary
from tests.modules import cuda_check as check

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "csrc" / "cuda"
RUNTIME = """
#pragma once
using cudaError_t = int;
constexpr int cudaSuccess = 0;
inline int last_error = 0;
inline cudaError_t cudaGetLastError() { int error = last_error; last_error = 0; return error; }
inline const char* cudaGetErrorString(cudaError_t) { return "no kernel image"; }
"""
PROGRAM = """
#include "error.cuh"
#include <cstring>
int fails() { return last_error = 209; }  // every failing runtime call leaves its error behind
int main() {
  using namespace bop2nd::cuda;
  if (text_of(cudaSuccess) || launch_error()) return 1;
  const char* text = text_of(fails());
  if (!text || std::strcmp(text, "no kernel image") || last_error) return 2;
  fails();
  if (!launch_error() || last_error) return 3;
  return 0;
}
"""


def test_an_error_of_the_runtime_is_told_once_and_taken_away(tmp_path: Path) -> None:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "cuda_runtime.h").write_text(RUNTIME)
    command = [compiler, "-std=c++17", f"-I{tmp_path}", f"-I{CUDA}", "-x", "c++", "-", "-o", tmp_path / "a"]
    built = subprocess.run(command, input=PROGRAM, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert subprocess.run([tmp_path / "a"], check=False).returncode == 0


@pytest.mark.timeout(900)
def test_every_call_that_fails_is_told_by_its_launcher() -> None:
    """On a runtime whose calls fail one by one: the launchers as they are, compiled by nvcc."""
    program = ROOT / "tests" / "cpp" / "cuda_failing_runtime.cpp"
    options = ["-O0", "-Xcicc", "-O0", "-arch=compute_80", "-code=compute_80", "--cudart=none", "--threads=2"]
    try:
        built = check.build_program("failing_runtime", [program, *sorted(CUDA.glob("*.cu"))], options)
    except check.ToolMissing as missing:
        pytest.skip(str(missing))
    done = subprocess.run([built], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# ------------------------------------------------------------------------------------ chips without code


class FakeSymbols:
    """Of a library that holds code for devices of these capabilities."""

    def __init__(self, capabilities: list[tuple[int, int]], built_for: set[tuple[int, int]]) -> None:
        self.capabilities, self.built_for = capabilities, built_for

    def bop2nd_cuda_calls(self) -> int:
        return 0

    def bop2nd_cuda_unusable(self, device: int) -> bytes | None:
        assert FakeDevice.current == device, "it is asked on the device in question"
        return None if self.capabilities[device] in self.built_for else b"no kernel image"


class FakeDevice:
    current = -1

    def __init__(self, index: int) -> None:
        self.index = index

    def __enter__(self) -> None:
        FakeDevice.current = self.index

    def __exit__(self, *_: object) -> None:
        FakeDevice.current = -1


def _library(
    monkeypatch: pytest.MonkeyPatch, capabilities: list[tuple[int, int]], built_for: set[tuple[int, int]]
) -> CudaLibrary:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "device", FakeDevice)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"chip {index}")
    library = CudaLibrary()
    library.missing, library.symbols = None, FakeSymbols(capabilities, built_for)  # type: ignore[assignment]
    return library


def test_every_device_is_asked_whether_the_library_has_code_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _library(monkeypatch, [(8, 0), (9, 0)], {(8, 0), (9, 0)}).why_not() is None
    reason = _library(monkeypatch, [(9, 0), (8, 0)], {(9, 0)}).why_not()  # 8.0 is enough, but not in it
    assert reason is not None
    assert "cuda:1 (chip 1, 8.0)" in reason and "no kernel image" in reason
    reason = _library(monkeypatch, [(7, 5)], {(8, 0)}).why_not()
    assert reason is not None and "chip 0, 7.5" in reason


@pytest.fixture
def unusable(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(backends, "_cuda", _library(monkeypatch, [(7, 5)], {(8, 0)}))
    monkeypatch.setattr(backends, "_spared", [])
    monkeypatch.setattr(triton_library, "unfit", lambda: None)  # tested in test_triton_library.py
    yield backends
    spared = backends._spared
    monkeypatch.undo()
    for library in spared:
        library._destroy()
    backends.use("auto")


def _packed_as_on_cuda(x: torch.Tensor) -> torch.Tensor:
    """``pack_bits`` by the kernel that is registered for CUDA tensors."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    packed: torch.Tensor = torch.ops.bop2nd.pack_bits.default.redispatch(keys, x, -1)
    return packed


@pytest.mark.parametrize("triton", [None, "Triton is not there"])
def test_kernels_that_cannot_run_are_taken_out_of_use_loudly(
    unusable: Any, triton: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_triton_missing", lambda: triton)
    assert backends.active("cuda") == ("triton" if triton is None else "cuda")
    served = "Triton" if triton is None else "plain torch"
    with pytest.warns(RuntimeWarning, match=f"not built for cuda:0.*{served} serves CUDA tensors"):
        backends._settle_cuda()
    assert backends.active("cuda") == ("triton" if triton is None else "reference")
    if triton is not None:
        served_before, x = backends.calls()["reference"], torch.tensor([[-1.0, 2.0, -0.5]])
        assert torch.equal(_packed_as_on_cuda(x), torch.tensor([[5]], dtype=torch.int32))
        assert backends.calls()["reference"] == served_before + 1
    assert "chip 0" in (backends.why_not("cuda") or "")
    with pytest.raises(backends.BackendError, match="not built for"):
        backends.use("cuda")


def test_kernels_that_can_run_stay_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_cuda", _library(monkeypatch, [(9, 0)], {(9, 0)}))
    monkeypatch.setattr(backends, "_spared", [])
    backends._settle_cuda()
    assert backends._spared == [] and backends.why_not("cuda") is None


def test_devices_are_not_asked_before_torch_starts_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    queued: list[Any] = []
    monkeypatch.setattr(torch.cuda, "_lazy_call", queued.append)
    monkeypatch.setattr(backends, "_cuda", _library(monkeypatch, [(9, 0)], {(9, 0)}))
    monkeypatch.setattr(backends._cuda, "why_not", lambda: pytest.fail("asked at import"))
    monkeypatch.delenv("BOP2ND_BACKEND", raising=False)
    backends.start()
    assert queued == [backends._settle_cuda]
