"""Larq Compute Engine, driven through its own Python interpreter in a process of its own.

Its wheel needs TensorFlow and an older NumPy, so it lives in an environment beside this one:

    python3.11 -m venv larq && larq/bin/pip install -r benchmarks/requirements-larq.txt
    python -m benchmarks.run --suite conv --larq-python larq/bin/python

The worker (``larq_worker.py``) builds a Larq model (one layer or Bi-Real-Net-18) with our weights, converts
and runs it on our input and times itself, so that the pipe between the processes is not measured.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import bop2nd_fast as bf

from .networks import ConvShape
from .registry import GateError, Prepared, Unavailable
from .worker import Worker

SCRIPT = Path(__file__).with_name("larq_worker.py")

_interpreter: str = sys.executable


def use_interpreter(python: str) -> None:
    """The Python that has larq_compute_engine; the default is this one."""
    global _interpreter
    _interpreter = python


def convolution(shape: ConvShape, x: Tensor, weight: Tensor, expected: Tensor) -> Prepared:
    """A binary convolution that pads with +1, one thread.

    Raises:
        Unavailable: no interpreter with larq_compute_engine, or a shape it cannot express.
    """
    if shape.padding not in (0, (shape.kernel - 1) // 2 * shape.dilation) or shape.dilation != 1:
        raise Unavailable("TensorFlow's 'same' and 'valid' paddings cannot express this convolution")
    if shape.padding and shape.stride != 1 and shape.side % shape.stride == 0:
        raise Unavailable("TensorFlow's 'same' padding with a stride pads other sides than torch does")

    def check(output: Tensor) -> str:
        output = output.permute(0, 3, 1, 2)
        if output.shape != expected.shape or not torch.equal(output, expected):
            raise GateError("its result differs from the reference's with padding value +1")
        return "equal to the reference with padding value +1"

    return _prepared(x, [_last(weight)], check, network=False, stride=shape.stride, same=shape.padding > 0)


def birealnet18(model: nn.Module, x: Tensor, check: Callable[[Tensor], str]) -> Prepared:
    """A Bi-Real-Net-18 in eval mode that pads with +1, one thread. ``check`` sees its output.

    Raises:
        Unavailable: no interpreter with larq_compute_engine.
    """
    return _prepared(x, list(_weights(model)), check, network=True)


def _weights(model: nn.Module) -> Iterator[Tensor]:
    """Of all layers in their order, as Keras takes them."""
    for layer in model.modules():
        if isinstance(layer, bf.nn.BinaryConv2d):
            yield _last(layer.weight.unpack())
        elif isinstance(layer, nn.Conv2d):
            yield _last(layer.weight)
        elif isinstance(layer, nn.BatchNorm2d):
            yield from (layer.weight, layer.bias, layer.running_mean, layer.running_var)  # type: ignore[misc]
        elif isinstance(layer, nn.Linear):
            yield from (layer.weight.T, layer.bias)


def _last(weight: Tensor) -> Tensor:
    """``[O, I, kH, kW]`` -> ``[kH, kW, I, O]``."""
    return weight.permute(2, 3, 1, 0)


def _prepared(x: Tensor, weights: list[Tensor], check: Callable[[Tensor], str], **request: Any) -> Prepared:
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "x.npy", x.permute(0, 2, 3, 1).contiguous().numpy())
        np.savez(Path(folder) / "weights.npz", *[w.detach().contiguous().numpy() for w in weights])
        handle = _ask(build=folder, **request)["handle"]
        output = torch.from_numpy(np.load(Path(folder) / "y.npy"))

    def sample(n: int) -> float:
        return float(_ask(run=handle, n=n)["seconds"])

    return Prepared(lambda: check(output), sample=sample, close=lambda: _ask(drop=handle))


def _ask(**request: Any) -> Any:
    try:
        if not _running().is_alive():
            stop()  # and start anew
        return _running().ask(**request)
    except RuntimeError as error:
        raise Unavailable(f"larq_compute_engine: {error}") from None


@functools.cache
def _running() -> Worker:
    """The worker, started at the first request; raises :class:`Unavailable` without the engine."""
    try:
        return Worker([_interpreter, "-I", str(SCRIPT)], stderr=subprocess.DEVNULL)
    except OSError as error:
        raise Unavailable(f"cannot start {_interpreter}: {error.strerror}") from None
    except RuntimeError as error:
        raise Unavailable(f"{error} (see benchmarks/requirements-larq.txt)") from None


def stop() -> None:
    """End the worker, if there is one."""
    if _running.cache_info().currsize:
        _running().close()
        _running.cache_clear()
