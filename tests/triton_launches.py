"""Launch the Triton kernels on a GPU that is not there: ``python tests/triton_launches.py 90``.

A driver in the place of Triton's says what the GPU is and takes the launches. So the launchers run as they
would, with Triton's own specialisation of their arguments and a real compilation, and nothing is executed. A
JSON line for each scene: the kernels it compiled and the grids it launched.

A program of its own, because a process that runs Triton's interpreter cannot compile.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bop2nd_fast import reference
from bop2nd_fast.kernels import (
    binary_conv2d,
    binary_linear,
    bop_step,
    conv_backward,
    linear_backward,
    pack_bits,
    quantize_rows,
    signed_conv2d,
    signed_linear,
    step_tables,
)
from tests.fake_cuda import FakeCuda, OnCuda, on_cuda

Scene = Callable[[], object]
launches: list[tuple[str, tuple[int, int, int]]] = []
compiled: list[str] = []


class _Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        self.name = metadata.name
        compiled.append(self.name)

    def __call__(self, x: int, y: int, z: int, *rest: Any) -> None:
        assert 0 < x < 2**31 and 0 < y < 65536 and 0 < z < 65536, "invalid argument"
        launches.append((self.name, (x, y, z)))


class _Utils:
    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        return {"max_shared_mem": 99 << 10, "multiprocessor_count": 132, "warpSize": 32}

    @staticmethod
    def load_binary(*_: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 64, 0, 1024


class _Driver:
    launcher_cls, utils = _Launcher, _Utils

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 1

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_device_interface(self) -> Any:
        return torch.cuda


class Huge(OnCuda):
    """A tensor that this machine has no memory for: a view of one element that says it is contiguous."""

    def is_contiguous(self, *_: Any, **__: Any) -> bool:  # type: ignore[override]
        return True

    def contiguous(self, *_: Any, **__: Any) -> Huge:  # type: ignore[override]
        return self

    def movedim(self, *axes: int) -> torch.Tensor:  # type: ignore[override]
        return self.as_subclass(OnCuda).movedim(*axes)


def huge(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Device memory of any shape, never read."""
    return on_cuda(torch.zeros(1, dtype=dtype).expand(shape)).as_subclass(Huge)


def step(shape: tuple[int, ...]) -> Scene:
    def run() -> None:
        words = reference.pack_bits(torch.randn(shape))
        tensors = (words, torch.randn(shape), torch.randn(shape), torch.rand(shape))
        lists = [[on_cuda(t)] for t in tensors]
        hyper, counts = on_cuda(torch.zeros(4)), on_cuda(torch.zeros(1, 2, dtype=torch.int64))
        bop_step.bop_step_(*lists, hyper, counts)

    return run


def linear(rows: int, features: int, outputs: int) -> Scene:
    def run() -> None:
        x, w = torch.zeros(rows, features), torch.zeros(outputs, -(-features // 32), dtype=torch.int32)
        binary_linear.binary_linear(on_cuda(x), on_cuda(w), True)

    return run


def linear_gradients(rows: int, features: int, outputs: int) -> Scene:
    def run() -> None:
        words = -(-features // 32)
        gradient = on_cuda(torch.zeros(rows, outputs, dtype=torch.bfloat16))
        signs, w = (on_cuda(torch.zeros(n, words, dtype=torch.int32)) for n in (rows, outputs))
        linear_backward.binary_linear_backward(gradient, signs, signs, w, features, True, True)

    return run


def convolution(batch: int, channels: int, side: int, outputs: int, groups: int = 1) -> Scene:
    def run() -> None:
        x = on_cuda(torch.zeros(batch, channels, side, side).contiguous(memory_format=torch.channels_last))
        w = on_cuda(torch.zeros(outputs, 3, 3, -(-channels // groups // 32), dtype=torch.int32))
        binary_conv2d.binary_conv2d(x, w, [1, 1], [1, 1], [1, 1], groups, 0, True)

    return run


def convolution_gradients(batch: int, channels: int, side: int, outputs: int) -> Scene:
    def run() -> None:
        words = -(-channels // 32)
        gradient = on_cuda(torch.zeros(batch, outputs, side, side))
        signs = on_cuda(torch.zeros(batch, side, side, words, dtype=torch.int32))
        w = on_cuda(torch.zeros(outputs, 3, 3, words, dtype=torch.int32))
        arguments = ([1, 1], [1, 1], [1, 1], 1, 0)
        conv_backward.binary_conv2d_backward(gradient, signs, signs, w, channels, *arguments, True, True)

    return run


def conv_epilogue() -> None:
    words = on_cuda(torch.zeros(2, 6, 6, 2, dtype=torch.int32))
    w = on_cuda(torch.zeros(64, 3, 3, 2, dtype=torch.int32))
    per_channel = {name: on_cuda(torch.zeros(64)) for name in ("scale", "shift")}
    binary_conv2d.binary_conv2d_packed(
        words, w, 64, [1, 1], [1, 1], [1, 1], 1, 1, signs=True, **per_channel,
        residual=on_cuda(torch.zeros(2, 6, 6, 64)),
    )  # fmt: skip


def conv_bits_of_groups() -> None:
    """Sign words that hold outputs of two groups."""
    words = on_cuda(torch.zeros(2, 6, 6, 2, dtype=torch.int32))
    w = on_cuda(torch.zeros(24, 3, 3, 1, dtype=torch.int32))
    slope = on_cuda(torch.zeros(24))
    arguments: Any = ([1, 1], [1, 1], [1, 1], 2, -1)
    binary_conv2d.binary_conv2d_packed(words, w, 64, *arguments, signs=True, low=0, slope=slope)


def pack_rows_of_an_embedding() -> None:
    pack_bits.pack_bits(huge(2_097_153, 64), 0)


def many_outputs() -> None:
    words, w = huge(16, 1, dtype=torch.int32), huge(4_300_000, 1, dtype=torch.int32)
    binary_linear.binary_linear_packed(words, w, 32, values=False, signs=True)


def many_features() -> None:
    words, w = huge(64, 270_000, dtype=torch.int32), huge(64, 270_000, dtype=torch.int32)
    gradient = huge(64, 64)
    linear_backward.binary_linear_backward(gradient, words, words.new_empty(0), w, 8_640_000, True, False)


def signed_rows(rows: int) -> Scene:
    def run() -> None:
        x, w = on_cuda(torch.zeros(rows, 512)), on_cuda(torch.zeros(256, 16, dtype=torch.int32))
        signed_linear.signed_linear(x, w, input_scale=on_cuda(torch.zeros(rows)))

    return run


def signed_image(batch: int) -> Scene:
    def run() -> None:
        x = on_cuda(torch.zeros(batch, 3, 4, 4, dtype=torch.uint8))
        w = on_cuda(torch.zeros(24, 3, 3, 1, dtype=torch.int32))
        signed_conv2d.signed_conv2d(x, w, [1, 1], [1, 1], [1, 1], 1, 2, 255)

    return run


def quantized() -> None:
    quantize_rows.quantize_rows(on_cuda(torch.zeros(3, 40)))


SCENES: dict[str, Scene] = {
    "step": step((64, 64)),
    "linear 1": linear(1, 512, 256),
    "linear 16": linear(16, 512, 256),
    "linear 100": linear(100, 512, 256),
    "linear 128, other rows": linear(128, 512, 256),
    "linear 96, other rows": linear(97, 512, 256),
    "linear gradients 100": linear_gradients(100, 512, 256),
    "linear gradients 128, other rows": linear_gradients(128, 512, 256),
    "convolution 16": convolution(16, 64, 7, 64),
    "convolution 5, other batch": convolution(5, 64, 7, 64),
    "convolution 1, other batch": convolution(1, 64, 7, 64),
    "depthwise convolution": convolution(1, 70_000, 3, 70_000, 70_000),
    "convolution gradients 16": convolution_gradients(16, 64, 7, 64),
    "convolution gradients 5, other batch": convolution_gradients(5, 64, 7, 64),
    "convolution, epilogue": conv_epilogue,
    "convolution, bits of groups": conv_bits_of_groups,
    "pack, an embedding along its rows": pack_rows_of_an_embedding,
    "signed rows 1": signed_rows(1),
    "signed rows 4, other rows": signed_rows(4),
    "signed convolution 5": signed_image(5),
    "signed convolution 16, other batch": signed_image(16),
    "quantize": quantized,
    "linear, millions of outputs": many_outputs,
    "linear gradient, millions of features": many_features,
}


def main(arch: int) -> None:
    patch = pytest.MonkeyPatch()
    fake = FakeCuda(patch)
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (arch // 10, arch % 10))
    driver.set_active(_Driver(arch))
    for name, scene in SCENES.items():
        launches.clear()
        compiled.clear()
        scene()
        fake.stream.synchronize()
        line = {"scene": name, "compiled": list(compiled), "launches": list(launches)}
        print(json.dumps(line), flush=True)
    assert triton.__version__ and step_tables._plans


if __name__ == "__main__":
    main(int(sys.argv[1]))
