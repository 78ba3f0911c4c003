"""``build_cuda.py``: finding a toolkit and what it compiles for, and installations that go on without CUDA.

Toolkits are folders with a fake ``nvcc``; the builder is torch's own, on an extension of two small files.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.modules import build_cuda

ROOT = Path(__file__).resolve().parent.parent
NVCC = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release {release}, V{release}.88" ;;
  --list-gpu-arch) for n in {known}; do echo compute_$n; done ;;
  --dryrun) echo '#$ _THERE_={home}/bin' >&2 ;;
  *) echo "nvcc fatal: this one cannot compile" >&2; exit 1 ;;
esac
"""
KNOWN_13 = "75 80 86 87 88 89 90 100 110 103 120 121"
NGC = "7.5 8.0 8.6 9.0 10.0 12.0+PTX"


def _pairs(known: str) -> frozenset[tuple[int, int]]:
    return frozenset((int(n[:-1]), int(n[-1])) for n in known.split())


def _program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def _toolkit(home: Path, known: str = KNOWN_13, release: str = "13.0", library: str = "lib64") -> Path:
    _program(home / "bin" / "nvcc", NVCC.format(release=release, known=known, home=home))
    (home / "include").mkdir()
    (home / "include" / "cuda_runtime.h").touch()
    (home / library).mkdir(parents=True)
    (home / library / "libcudart.so").touch()
    return home


@pytest.fixture(autouse=True)
def nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "BOP2ND_BUILD_CUDA"):
        monkeypatch.setenv(name, "")  # what is set during the test is undone after it
        monkeypatch.delenv(name)
    monkeypatch.setattr("torch.version.cuda", "13.0")


# ------------------------------------------------------------------------------------ architectures


@pytest.mark.parametrize(
    ("wanted", "known", "kept"),
    [
        (build_cuda.ARCHITECTURES, KNOWN_13, "8.0;8.6;8.9;9.0;10.0+PTX;12.0+PTX"),
        (NGC, KNOWN_13, "8.0;8.6;9.0;10.0;12.0+PTX"),
        (build_cuda.ARCHITECTURES, "70 75 80 86 87 89 90", "8.0;8.6;8.9;9.0+PTX"),  # CUDA 12.0 to 12.6
        (build_cuda.ARCHITECTURES, "75 80 86", "8.0;8.6+PTX"),
        (NGC, "75 80 90", "8.0;9.0+PTX"),
        ("8.0;9.0", "80 90", "8.0;9.0"),  # nobody wanted PTX
        ("7.5+PTX;9.0a", KNOWN_13, "9.0a+PTX"),
        ("Turing Hopper", KNOWN_13, "Hopper"),
        ("native", "80 90", "8.0;9.0+PTX"),
        ("8.0, 9.0+PTX;", KNOWN_13, "8.0;9.0+PTX"),
    ],
)
def test_only_what_kernels_and_nvcc_know_is_compiled(wanted: str, known: str, kept: str) -> None:
    assert build_cuda.buildable(wanted, _pairs(known)) == kept


@pytest.mark.parametrize(
    ("wanted", "known"), [("7.0;7.5+PTX", KNOWN_13), ("Volta", KNOWN_13), ("9.0", "75 80")]
)
def test_a_list_of_which_nothing_stays_is_refused(wanted: str, known: str) -> None:
    with pytest.raises(build_cuda.UnfitError, match=r"need 8\.0 or above"):
        build_cuda.buildable(wanted, _pairs(known))


# ------------------------------------------------------------------------------------ finding a toolkit


def test_a_link_on_the_path_leads_to_the_real_toolkit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = _toolkit(tmp_path / "opt" / "cuda")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").symlink_to(home / "bin" / "nvcc")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert build_cuda.find().home == home


def test_a_script_on_the_path_is_asked_where_its_toolkit_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = _toolkit(tmp_path / "opt" / "cuda", library="targets/x86_64-linux/lib")
    _program(tmp_path / "bin" / "nvcc", f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    found = build_cuda.find()
    assert found.home == home and found.release == (13, 0)
    assert found.libraries == home / "targets" / "x86_64-linux" / "lib"


def test_cuda_home_is_obeyed_and_what_it_lacks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = _toolkit(tmp_path / "cuda")
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert build_cuda.find().architectures == _pairs(KNOWN_13)
    (home / "lib64" / "libcudart.so").unlink()
    (home / "include" / "cuda_runtime.h").unlink()
    with pytest.raises(build_cuda.UnfitError, match=r"lacks include/cuda_runtime\.h, lib64/libcudart\.so"):
        build_cuda.find()


@pytest.mark.parametrize(
    "text", ["#!/bin/sh\nexit 3\n", "#!/bin/sh\necho hello\n", "no program at all\x00\x01"]
)
def test_an_nvcc_that_does_not_answer_is_refused(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = _toolkit(tmp_path / "cuda")
    _program(home / "bin" / "nvcc", text)
    monkeypatch.setenv("CUDA_HOME", str(home))
    with pytest.raises(build_cuda.UnfitError, match=r"failed|names neither"):
        build_cuda.find()


# ------------------------------------------------------------------------------------ choosing


def test_what_is_chosen_is_named_to_the_builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(_toolkit(tmp_path / "cuda", known="75 80 90")))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", NGC)
    assert build_cuda.choose() is not None
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "8.0;9.0+PTX"
    monkeypatch.setenv("BOP2ND_BUILD_CUDA", "0")
    assert build_cuda.choose() is None


@pytest.mark.parametrize(
    ("release", "known", "reason"),
    [("12.4", KNOWN_13, "must agree in the first number"), ("13.0", "50 75", "need 8.0 or above")],
)
def test_an_unfit_toolkit_is_told_and_left_or_ends_it(
    release: str,
    known: str,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(_toolkit(tmp_path / "cuda", known, release)))
    assert build_cuda.choose() is None
    told = capsys.readouterr().err
    assert "WITHOUT CUDA C++ kernels" in told and reason in told and "=" * 80 in told
    monkeypatch.setenv("BOP2ND_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match=f"BOP2ND_BUILD_CUDA=1: .*{reason}"):
        build_cuda.choose()


def test_a_cpu_torch_is_no_reason_to_warn_but_to_refuse(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.version.cuda", None)
    assert build_cuda.choose() is None and capsys.readouterr().err == ""
    monkeypatch.setenv("BOP2ND_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match="CPU build"):
        build_cuda.choose()
    monkeypatch.setenv("BOP2ND_BUILD_CUDA", "yes")
    with pytest.raises(SystemExit, match="allowed are 0, 1 and auto"):
        build_cuda.choose()


# ------------------------------------------------------------------------------------ building

SETUP = """
import sys
sys.path.insert(0, {root!r})
import torch
torch.version.cuda = "13.0"
torch.cuda._is_compiled, torch.cuda.is_available = lambda: True, lambda: False  # as torch's builder asks
import build_cuda
toolkit = build_cuda.choose()
from setuptools import setup
from torch.utils.cpp_extension import CppExtension, CUDAExtension
builder = build_cuda.tolerant_builder()
libraries = [CppExtension("bop2nd_fast._C", ["plain.cpp"], py_limited_api=True)]
if toolkit is not None:
    libraries.append(CUDAExtension(build_cuda.NAME, ["kernel.cu"], py_limited_api=True))
setup(name="small", packages=[], ext_modules=libraries,
      cmdclass={{"build_ext": builder.with_options(use_ninja={ninja})}})
"""
MODULE = """
#include <Python.h>
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", 0, -1, 0, 0, 0, 0, 0};
  return PyModule_Create(&definition);
}
"""


@pytest.mark.parametrize("ninja", [True, False])
@pytest.mark.parametrize("choice", ["auto", "1"])
def test_a_build_that_fails_under_nvcc_goes_on_without_it(choice: str, ninja: bool, tmp_path: Path) -> None:
    home = _toolkit(tmp_path / "cuda")
    (tmp_path / "plain.cpp").write_text(MODULE)
    (tmp_path / "kernel.cu").write_text("__global__ void kernel() {}\n")
    (tmp_path / "bop2nd_fast").mkdir()
    (tmp_path / "setup.py").write_text(SETUP.format(root=str(ROOT), ninja=ninja))
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", "built"],
        cwd=tmp_path,
        env={**os.environ, "CUDA_HOME": str(home), "BOP2ND_BUILD_CUDA": choice},
        capture_output=True,
        text=True,
        check=False,
    )
    output = done.stdout + done.stderr
    built = sorted(path.name.partition(".")[0] for path in (tmp_path / "built").rglob("*.so"))
    assert "this one cannot compile" in output
    if choice == "1":
        assert done.returncode != 0
    else:
        assert done.returncode == 0, output
        assert "WITHOUT CUDA C++ kernels" in output and built == ["_C"]


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({"CXX": "ccache c++", "CC": "ccache gcc"}, ("c++", "gcc")),
        ({"CXX": "/usr/bin/ccache no_such_compiler"}, None),
        ({"CXX": "no_such_compiler"}, None),
        ({"CXX": "c++ -m64"}, ("c++ -m64", None)),
    ],
)
def test_a_launcher_before_the_compiler_is_not_the_compiler(
    variables: dict[str, str], found: tuple[str, str | None] | None
) -> None:
    program = (
        "import os, setuptools; setuptools.setup = lambda **_: None\n"
        "space = {'__file__': 'setup.py'}; exec(open('setup.py').read(), space)\n"
        "print(space['compiler']() is not None, os.environ.get('CXX'), os.environ.get('CC'), sep='|')"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**environment, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    there, cxx, cc = done.stdout.strip().split("|")
    assert there == str(found is not None)
    if found is not None:
        assert (cxx, cc) == (found[0], str(found[1]))
    else:
        assert "WITHOUT compiled kernels" in done.stderr
