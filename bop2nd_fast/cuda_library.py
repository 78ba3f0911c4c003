"""``_C_cuda``: the CUDA C++ kernels' library and its control symbols (plain C, called through ctypes).

Loading it registers its operators for CUDA tensors; that touches no device. It is a library beside ``_C``
because it only loads where torch is a CUDA build.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import warnings

import torch

OPS = (
    "bop_step_",
    "pack_bits",
    "pack_bits_ste",
    "unpack_bits",
    "apply_mask_",
    "binary_linear",
    "binary_conv2d",
    "binary_linear_packed",
    "binary_conv2d_packed",
)
_MODULE = "bop2nd_fast._C_cuda"


class CudaLibrary:
    """The library if it is there; ``missing`` says why it is not (None: it is loaded)."""

    def __init__(self) -> None:
        self.missing: str | None = None
        self.symbols: ctypes.CDLL | None = None
        if importlib.util.find_spec(_MODULE) is None:
            needs = "a CUDA build of torch" if torch.version.cuda is None else "nvcc"
            self.missing = f"the CUDA C++ kernels were not built (installing them needs {needs})"
            return
        try:
            module = importlib.import_module(_MODULE)
        except ImportError as error:
            self.missing = f"the CUDA C++ kernels do not load ({error})"
            warnings.warn(f"bop2nd_fast: {self.missing}", RuntimeWarning, stacklevel=2)
            return
        symbols = ctypes.CDLL(str(module.__file__))
        symbols.bop2nd_cuda_calls.restype = ctypes.c_int64
        symbols.bop2nd_cuda_mma_peak.restype = ctypes.c_double
        symbols.bop2nd_cuda_unusable.restype = ctypes.c_char_p
        self.symbols = symbols

    def why_not(self) -> str | None:
        """Why these kernels cannot run on every device that torch sees, or None if they can.

        Not asked of the compute capability but of the driver: does the library hold code for the device?
        """
        if self.missing is not None:
            return self.missing
        if not torch.cuda.is_available():
            return "no CUDA device"
        assert self.symbols is not None
        for index in range(torch.cuda.device_count()):
            with torch.cuda.device(index):
                reason = self.symbols.bop2nd_cuda_unusable(index)
            if reason is not None:
                major, minor = torch.cuda.get_device_capability(index)
                device = f"cuda:{index} ({torch.cuda.get_device_name(index)}, {major}.{minor})"
                return f"the CUDA C++ kernels were not built for {device}: {reason.decode()}"
        return None

    def calls(self) -> int:
        """Operator calls served so far."""
        return 0 if self.symbols is None else int(self.symbols.bop2nd_cuda_calls())

    def mma_peak(self, n_iterations: int) -> float:
        """Enqueue the product's tensor-core instruction back to back on the current stream.

        Returns:
            The multiply-accumulates it stands for; time it with events to get the chip's peak.

        Raises:
            RuntimeError: the kernel could not be launched.
        """
        assert self.symbols is not None
        out = torch.zeros(1, dtype=torch.int32, device="cuda")
        stream = torch.cuda.current_stream().cuda_stream
        n_macs = float(
            self.symbols.bop2nd_cuda_mma_peak(
                ctypes.c_void_p(out.data_ptr()), n_iterations, out.device.index, ctypes.c_void_p(stream)
            )
        )
        if n_macs < 0:
            raise RuntimeError("the peak kernel could not be launched")
        return n_macs
