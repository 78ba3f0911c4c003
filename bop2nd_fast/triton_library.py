"""The Triton kernels as a backend: which operators have launchers, and whether the GPUs here can run them.

Importing this imports no Triton and touches no device.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import torch

LAUNCHERS = {
    "bop_step_": "bop_step",
    "pack_bits": "pack_bits",
    "pack_bits_ste": "pack_bits",
    "unpack_bits": "pack_bits",
    "apply_mask_": "pack_bits",
    "binary_linear": "binary_linear",
    "binary_conv2d": "binary_conv2d",
    "binary_linear_packed": "binary_linear",
    "binary_conv2d_packed": "binary_conv2d",
    "binary_linear_backward": "linear_backward",
    "binary_conv2d_backward": "conv_backward",
    "signed_linear": "signed_linear",
    "signed_conv2d": "signed_conv2d",
    "quantize_rows": "quantize_rows",
}
WAY_OUT = (
    "install a C compiler (gcc or clang, or name one in CC) and Python's headers (python3-dev or "
    "python3-devel), or choose another backend: bop2nd_fast.backends.use('cuda') or use('reference'), "
    "BOP2ND_BACKEND=reference"
)


def missing() -> str | None:
    """Why there are no Triton kernels at all, or None."""
    return None if importlib.util.find_spec("triton") else "the package 'triton' is not installed"


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter (TRITON_INTERPRET=1), so on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unfit() -> str | None:
    """Why the kernels cannot run on every GPU that torch sees, or None if they can. Starts CUDA."""
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        if major < 8:
            name = torch.cuda.get_device_name(index)
            return f"Triton's kernels need compute capability 8.0, cuda:{index} ({name}) has {major}.{minor}"
    lacking = _lacking()
    if lacking is None or _starts():
        return None
    return f"Triton compiles a C file before its first launch, and {lacking}; {WAY_OUT}"


def _lacking() -> str | None:
    """What a C file with Python in it could not be compiled without."""
    named = os.environ.get("CC")
    compilers = [named] if named else ["gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        return f"there is no C compiler ({' or '.join(compilers)})"
    scheme = sysconfig.get_default_scheme()  # Debian's posix_local has no headers: as Triton does it
    scheme = "posix_prefix" if scheme == "posix_local" else scheme
    headers = Path(sysconfig.get_paths(scheme)["include"])
    return None if (headers / "Python.h").is_file() else f"there is no Python.h in {headers}"


def _starts() -> bool:
    """Whether Triton starts all the same, with a file it compiled earlier or a compiler of its own."""
    from triton.runtime import driver

    try:
        return driver.active.get_current_device() >= 0
    except (RuntimeError, OSError, subprocess.CalledProcessError):
        return False


def compiler_failed(error: BaseException) -> str | None:
    """A hint, where ``error`` of a launch says that the C file could not be compiled; else None."""
    about_compiler = isinstance(error, (subprocess.CalledProcessError, FileNotFoundError))
    if not about_compiler and "C compiler" not in str(error):
        return None
    return f"Triton could not compile the C file that launches its kernels ({error}); {WAY_OUT}"
