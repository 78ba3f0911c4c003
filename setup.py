"""Builds ``bop2nd_fast._C`` with torch's cpp_extension; everything else is in pyproject.toml.

One build serves several torch versions (LibTorch stable ABI, torch >= 2.11) and Python versions (limited
API, >= 3.10). Without a C++ compiler the package installs without ``_C`` and says so. Whether ``_C_cuda`` is
built as well: build_cuda.py.
"""

from __future__ import annotations

import glob
import os
import shutil
import sys

from setuptools import find_packages, setup

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # setuptools' backend does not
import build_cuda

TORCH_TARGET = "0x020b000000000000"
PYTHON_TARGET = "0x030A0000"
PACKAGES = [*find_packages(include=["bop2nd_fast", "bop2nd_fast.*"]), "bop2nd_fast.kernels"]
LAUNCHERS = ("ccache", "sccache")
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
    """The C++ compiler torch's builder will use, or None.

    A launcher in CC or CXX ("ccache g++") is taken off: torch takes CXX for one word and finds ccache itself.
    """
    for name in ("CC", "CXX"):
        words = os.environ.get(name, "").split()
        if len(words) > 1 and os.path.basename(words[0]) in LAUNCHERS:
            os.environ[name] = " ".join(words[1:])
    wanted = os.environ.get("CXX", "").split()
    return shutil.which(wanted[0]) if wanted else shutil.which("c++") or shutil.which("g++")


def cuda_library() -> list:
    """``_C_cuda``, a library of its own: it only loads where torch has CUDA."""
    toolkit = build_cuda.choose()
    if toolkit is None:
        return []
    from torch.utils.cpp_extension import CUDAExtension

    sources = sorted(["csrc/register_cuda.cpp", *glob.glob("csrc/cuda/*.cu")])
    flags = {"cxx": FLAGS, "nvcc": ["-std=c++17", "-O3", "--fmad=false", "--threads=2"]}
    library = CUDAExtension(
        build_cuda.NAME,
        sources,
        extra_compile_args=flags,
        library_dirs=[str(toolkit.libraries)],
        py_limited_api=True,
    )
    return [library]


def extension() -> dict:
    """The arguments of ``setup`` that concern ``_C``."""
    if compiler() is None:
        if os.environ.get("BOP2ND_BUILD_CUDA") == "1":
            sys.exit("BOP2ND_BUILD_CUDA=1: there is no C++ compiler (or CXX names none)")
        build_cuda.banner(
            "bop2nd_fast: no C++ compiler, installing WITHOUT compiled kernels (_C).",
            "Everything works, slowly: install g++ or clang++ (or set CXX) and reinstall.",
        )
        return {}
    cuda = cuda_library()  # first: it names the toolkit to torch's builder
    from torch.utils.cpp_extension import CppExtension

    runtime = set(glob.glob("csrc/runtime/*.cpp")) - {"csrc/runtime/api.cpp"}
    bindings = ["csrc/register_cpu.cpp", "csrc/register_runtime.cpp", "csrc/cuda/explain.cpp"]
    sources = sorted([*glob.glob("csrc/cpu/*.cpp"), *runtime, *bindings])
    module = CppExtension("bop2nd_fast._C", sources, extra_compile_args={"cxx": FLAGS}, py_limited_api=True)
    return {
        "ext_modules": [module, *cuda],
        "cmdclass": {"build_ext": build_cuda.tolerant_builder()},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


# The sources of the kernels lie beside the package: bop2nd_fast/kernels is a link for checkouts only.
setup(packages=PACKAGES, package_dir={"bop2nd_fast.kernels": "kernels"}, **extension())
