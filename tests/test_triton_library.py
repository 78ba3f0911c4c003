"""GPUs and machines that Triton's kernels cannot run on: said early and loudly, and others stand in."""

from __future__ import annotations

import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bop2nd_fast import backends, triton_library

if reason := triton_library.missing():
    pytest.skip(reason, allow_module_level=True)


def gpus(patch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    """A machine with these GPUs, as torch tells it."""
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    patch.setattr(torch.cuda, "get_device_capability", lambda index=0: capabilities[index])
    patch.setattr(torch.cuda, "get_device_name", lambda index=0: f"chip {index}")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """A GPU, a compiler, Python's headers and no interpreter; the backends are as before afterwards."""
    include, binaries = tmp_path / "include", tmp_path / "bin"
    include.mkdir()
    binaries.mkdir()
    (include / "Python.h").touch()
    gcc = binaries / "gcc"
    gcc.write_text("#!/bin/sh\n")
    gcc.chmod(0o755)
    monkeypatch.setenv("PATH", str(binaries))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(sysconfig, "get_paths", lambda *_: {"include": str(include)})
    monkeypatch.setattr(triton_library, "_starts", lambda: False)
    monkeypatch.setattr(backends, "_triton_unfit", None)
    gpus(monkeypatch, (9, 0))
    yield monkeypatch
    monkeypatch.undo()
    backends.use("auto")


def test_a_gpu_with_a_compiler_is_fit(machine: pytest.MonkeyPatch) -> None:
    assert triton_library.unfit() is None and backends.why_not("triton") is None
    gpus(machine, (8, 0), (12, 0))
    assert triton_library.unfit() is None


@pytest.mark.parametrize("capabilities", [[(7, 5)], [(9, 0), (7, 0)]])
def test_old_gpus_are_named(machine: pytest.MonkeyPatch, capabilities: list[tuple[int, int]]) -> None:
    gpus(machine, *capabilities)
    old = len(capabilities) - 1
    text = f"8.0, cuda:{old} (chip {old}) has {'.'.join(map(str, capabilities[old]))}"
    assert text in (backends.why_not("triton") or "")
    with pytest.raises(backends.BackendError, match="need compute capability"):
        backends.use("triton")


def without_compiler(patch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    (tmp_path / "bin/gcc").unlink()
    return "no C compiler (gcc or clang)"


def without_the_named_compiler(patch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    patch.setenv("CC", "gcc-99")
    return "no C compiler (gcc-99)"


def without_headers(patch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    (tmp_path / "include/Python.h").unlink()
    return "no Python.h in"


def with_an_old_gpu(patch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    gpus(patch, (7, 5))
    return "chip 0) has 7.5"


LACKING: list[Any] = [without_compiler, without_the_named_compiler, without_headers, with_an_old_gpu]


@pytest.mark.parametrize("lack", LACKING)
def test_others_stand_in_loudly(machine: pytest.MonkeyPatch, tmp_path: Path, lack: Any) -> None:
    what = lack(machine, tmp_path)
    assert what in (triton_library.unfit() or "")
    machine.setattr(backends._cuda, "missing", "not built")
    with pytest.warns(RuntimeWarning, match="plain torch serves CUDA tensors instead") as warned:
        backends._settle_cuda()
    assert what in str(warned[0].message)
    assert backends.active("cuda") == "reference" and what in (backends.why_not("triton") or "")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)  # the kernel that is registered for CUDA
    served, x = backends.calls(), torch.tensor([[-1.0, 2.0, -0.5]])
    assert torch.ops.bop2nd.pack_bits.default.redispatch(keys, x, -1).tolist() == [[5]]
    assert backends.calls()["reference"] == served["reference"] + 1
    assert what in next(row.note for row in backends.report() if row.name == "triton")


def test_files_that_were_compiled_before_will_do(machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_compiler(machine, tmp_path)
    machine.setattr(triton_library, "_starts", lambda: True)
    assert triton_library.unfit() is None


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable"),
        subprocess.CalledProcessError(1, ["gcc", "main.c"]),
        FileNotFoundError("gcc-99"),
    ],
)
def test_a_launch_that_cannot_be_compiled_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    from bop2nd_fast.kernels import pack_bits

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(pack_bits, "pack_bits", fail)
    with pytest.raises(backends.BackendError, match=r"python3-dev.*use\('reference'\)") as raised:
        backends._triton_launcher("pack_bits")(torch.zeros(3), -1)
    assert raised.value.__cause__ is error


def test_other_errors_of_a_launch_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from bop2nd_fast.kernels import pack_bits

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(pack_bits, "pack_bits", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        backends._triton_launcher("pack_bits")(torch.zeros(3), -1)


def test_devices_are_not_asked_at_import(monkeypatch: pytest.MonkeyPatch) -> None:
    queued: list[Any] = []
    monkeypatch.setattr(torch.cuda, "_lazy_call", queued.append)
    monkeypatch.setattr(triton_library, "unfit", lambda: pytest.fail("asked at import"))
    monkeypatch.delenv("BOP2ND_BACKEND", raising=False)
    backends.start()
    assert queued == [backends._settle_cuda]
