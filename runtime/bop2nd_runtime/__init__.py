"""Runs packed networks (1-bit weights) of ``bop2nd_fast`` where PyTorch is not: NumPy is all it needs.

    import bop2nd_runtime

    net = bop2nd_runtime.load("model.safetensors", threads=1)
    logits = net(images)  # float32 [N, C, H, W] in, float32 [N, classes] out
    print(net.describe())
    for step in net.profile(images):
        print(step.name, step.seconds, step.rate)

A file is a packed model of profile ``bits``: ``bop2nd pack``, or ``PackedModel.save`` of bop2nd_fast.
"""

from bop2nd_runtime._native import LimitError, PackedFileError, instruction_set, version
from bop2nd_runtime.network import Network, StepTime, TensorInfo, load

__version__ = version()
PackedFileError.__module__ = LimitError.__module__ = __name__
__all__ = [
    "LimitError",
    "Network",
    "PackedFileError",
    "StepTime",
    "TensorInfo",
    "instruction_set",
    "load",
]
