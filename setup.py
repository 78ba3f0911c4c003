"""Builds ``bop2nd_fast._C`` with torch's cpp_extension; everything else is in pyproject.toml.

One build serves several torch versions (LibTorch stable ABI, torch >= 2.11) and Python versions (limited
API, >= 3.10). Without a C++ compiler the package installs without ``_C`` and says so. BOP2ND_BUILD_CUDA is
0, 1 or auto (the default): whether ``_C_cuda`` is built as well.
"""

from __future__ import annotations

import glob
import os
import shutil
import sys

from setuptools import find_packages, setup

TORCH_TARGET = "0x020b000000000000"
PYTHON_TARGET = "0x030A0000"
PACKAGES = [*find_packages(include=["bop2nd_fast", "bop2nd_fast.*"]), "bop2nd_fast.kernels"]
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    # Results are bit-identical on every backend: no fused multiply-add.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wall",
    "-Wno-unknown-pragmas",
    # gcc 12 warns about its own intrinsics
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
    f"-DPy_LIMITED_API={PYTHON_TARGET}",
]


def compiler() -> str | None:
    """The C++ compiler torch's builder will use, or None."""
    wanted = os.environ.get("CXX", "").split()
    return shutil.which(wanted[0]) if wanted else shutil.which("c++") or shutil.which("g++")


def with_cuda() -> bool:
    """Whether to build csrc/cuda."""
    choice = os.environ.get("BOP2ND_BUILD_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        sys.exit(f"BOP2ND_BUILD_CUDA={choice!r}: allowed are 0, 1 and auto")
    sources = glob.glob("csrc/cuda/*.cu")
    if choice == "1" and not sources:
        sys.exit("BOP2ND_BUILD_CUDA=1: this source tree has no CUDA sources")
    if choice == "0" or not sources:
        return False
    from torch.utils.cpp_extension import CUDA_HOME

    if choice == "1" and CUDA_HOME is None:
        sys.exit("BOP2ND_BUILD_CUDA=1: this torch is a CPU build, or no CUDA toolkit was found (CUDA_HOME)")
    return CUDA_HOME is not None


def cuda_library() -> list:
    """``_C_cuda``, a library of its own: it only loads where torch has CUDA."""
    if not with_cuda():
        return []
    from torch.utils.cpp_extension import CUDAExtension

    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;8.6;8.9;9.0;10.0;12.0+PTX")
    sources = sorted([*glob.glob("csrc/register_cuda*.cpp"), *glob.glob("csrc/cuda/*.cu")])
    flags = {"cxx": FLAGS, "nvcc": ["-std=c++17", "-O3", "--fmad=false", "--threads=2"]}
    return [CUDAExtension("bop2nd_fast._C_cuda", sources, extra_compile_args=flags, py_limited_api=True)]


def extension() -> dict:
    """The arguments of ``setup`` that concern ``_C``."""
    if compiler() is None:
        print("=" * 88, file=sys.stderr)
        print("bop2nd_fast: no C++ compiler, installing WITHOUT compiled kernels (_C).", file=sys.stderr)
        print("Everything works, slowly: install g++ or clang++ (or set CXX) and reinstall.", file=sys.stderr)
        print("=" * 88, file=sys.stderr)
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    sources = sorted([*glob.glob("csrc/cpu/*.cpp"), "csrc/register_cpu.cpp", "csrc/cuda/explain.cpp"])
    module = CppExtension("bop2nd_fast._C", sources, extra_compile_args={"cxx": FLAGS}, py_limited_api=True)
    return {
        "ext_modules": [module, *cuda_library()],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


# The sources of the kernels lie beside the package: bop2nd_fast/kernels is a link for checkouts only.
setup(packages=PACKAGES, package_dir={"bop2nd_fast.kernels": "kernels"}, **extension())
