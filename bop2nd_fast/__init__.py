"""bop2nd_fast: train and run binarized neural networks with packed 1-bit weights in PyTorch."""

from . import backends, ops, reference
from .binary_tensor import BinaryTensor, Layout, pack

backends.start()  # kernels are registered once the operators they serve are defined

from . import inference, models, nn, optim, recipes  # noqa: E402
from .network_summary import summary  # noqa: E402

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
    "recipes",
    "reference",
    "summary",
]
