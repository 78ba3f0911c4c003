"""bop2nd_fast: train and run binarized neural networks with packed 1-bit weights in PyTorch."""

from . import backends, reference
from .binary_tensor import BinaryTensor, Layout, pack
from . import ops  # noqa: I001  (operators are defined before devices register kernels for them)

backends.start()

from . import inference, models, nn, optim  # noqa: E402


__version__ = "0.1.0"
__all__ = [
    "BinaryTensor",
    "Layout",
    "backends",
    "inference",
    "models",
    "nn",
    "ops",
    "optim",
    "pack",
    "reference",
]
