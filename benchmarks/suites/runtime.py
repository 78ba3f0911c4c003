"""Suite ``runtime``: packed networks in the C++ runtime, inside torch and without it, and as processes.

The library without torch is what ``make runtime`` leaves in ``build/runtime``, the wheel what ``make wheel``
leaves in ``dist``; without them their contenders are missing. Rates count the multiply-accumulates of the
packed products alone, over the whole time; what bounds them are the convolutions among these in a warm loop.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import bop2nd_fast as bf
from bop2nd_fast.inference import PackedModel
from bop2nd_fast.stamp import ROOT

from .. import larq_adapter
from ..float_network import floating
from ..goals import Formula, Goal, Record, contender, goal, over, share
from ..networks import BINARYNET, BIREALNET
from ..registry import (
    BASELINE,
    BOUND,
    OURS,
    VARIANT,
    Case,
    Contender,
    GateError,
    Prepared,
    Suite,
    Unavailable,
)
from . import inference

PARTS, STEPS = "torch, parts (run_packed)", "torch, step by step"
RUNTIME, PROGRAM, IN_TORCH = "libbop2nd_runtime", "C program", "Python with torch"
FP32, FP32_LAST, LARQ = inference.FP32, inference.FP32_LAST, "Larq, pads with +1"
ONNX, ONNX_INT8 = "onnxruntime, fp32", "onnxruntime, int8"
PRODUCTS, AT_ONCE = "its convolutions alone, 8 images", 8
PROCESS = "process start to first prediction"
_BUILD = ROOT / "build" / "runtime"
_SIZES = {BINARYNET: ((128, 32, 1), (128, 32, 64)), BIREALNET: ((64, 224, 1),)}


def cases(quick: bool) -> list[Case]:
    sizes = {BINARYNET: ((16, 16, 2),)} if quick else _SIZES
    runs = [
        _case(f"{network}, {image}x{image}, batch {batch}", network, (width, image, batch), _contenders)
        for network, rows in sizes.items()
        for width, image, batch in rows
    ]
    processes = [
        _case(f"{PROCESS}, {network}", network, sizes[network][0], _processes)
        for network in sizes
        if not quick
    ]
    return runs + processes


def _case(name: str, network: str, size: tuple[int, int, int], contenders: Callable[..., Any]) -> Case:
    width, image, batch = size
    return Case(
        suite="runtime",
        op="run_packed",
        name=name,
        shapes={"width": width, "image_size": image, "batch": batch},
        unit="1/s" if name.startswith(PROCESS) else "GMAC/s",
        contenders=partial(contenders, network, *size),
        networks=(network,),
        inference=True,
    )


def _packed(network: str, model: nn.Module, x: Tensor) -> PackedModel:
    """With fused shortcuts where there are some."""
    return bf.inference.convert(model, x[:1], exact=network == BINARYNET)


def _contenders(network: str, width: int, image: int, batch: int) -> list[Contender]:
    model = inference.build(network, width, image)
    x = torch.randn(batch, 3, image, image)
    packed = _packed(network, model, x)
    macs = sum(macs for _, _, macs in _products(packed, x, ("packed_conv2d", "packed_linear")))
    alone = _products(packed, x[:1].repeat(AT_ONCE, 1, 1, 1), ("packed_conv2d",))

    def entry(name: str, role: str, make: Callable[[], Prepared], **more: Any) -> Contender:
        return Contender(name, role, make, operations=macs, **more)

    return [
        entry(PARTS, OURS, partial(_in_torch, packed, x, "auto")),
        entry(STEPS, VARIANT, partial(_in_torch, _packed(network, model, x), x, "steps")),
        entry(RUNTIME, VARIANT, partial(_in_library, packed, x), slow=True),
        entry(FP32, BASELINE, partial(inference.make_float, model, x)),
        entry(FP32_LAST, BASELINE, partial(inference.make_float, model, x, last=True)),
        *(_others(entry, network, model, x) if batch == 1 else []),
        Contender(
            PRODUCTS,
            BOUND,
            partial(_one_after_another, alone),
            operations=sum(macs for _, _, macs in alone),
            threads=1,
        ),
    ]


def _others(
    entry: Callable[..., Contender], network: str, model: nn.Module, x: Tensor
) -> Iterator[Contender]:
    """Of one image: of many, fp32 rounds some first sum of most to the other side of zero."""
    yield entry(ONNX, BASELINE, partial(_in_onnxruntime, model, x), slow=True)
    yield entry(ONNX_INT8, BASELINE, partial(_in_onnxruntime, model, x, int8=True), slow=True)
    if network == BIREALNET and x.shape[-1] == 224:
        yield entry(LARQ, BASELINE, partial(_in_larq, model, x), slow=True)


def _in_larq(model: nn.Module, x: Tensor) -> Prepared:
    padded = bf.models.BiRealNet18(padding_value=1).eval()
    padded.load_state_dict(model.state_dict())
    # One image, and sums of the stem in another order: a few signs turn (11 % of the norm were seen).
    return larq_adapter.birealnet18(padded, x, lambda output: inference.close(output, padded(x), 0.2))


def _products(
    packed: PackedModel, x: Tensor, kinds: tuple[str, ...]
) -> list[tuple[nn.Module, tuple[Any, ...], int]]:
    """Packed layers of these kinds, what they are called with, and their multiply-accumulates, padded taps
    included."""
    found: list[tuple[nn.Module, tuple[Any, ...], int]] = []

    def note(layer: Any, given: Any, output: Any) -> None:
        values = output[0] if isinstance(output, tuple) else output
        outputs = layer.weight.shape[0]
        pixels = values.shape[:-1].numel() if values.dtype == torch.int32 else values.numel() // outputs
        found.append((layer, given, pixels * layer.weight.numel()))

    layers: Any = packed.layers.values()
    hooks = [layer.register_forward_hook(note) for layer in layers if getattr(layer, "kind", "") in kinds]
    packed(x)
    for hook in hooks:
        hook.remove()
    return found


def _one_after_another(calls: list[tuple[nn.Module, tuple[Any, ...], int]]) -> Prepared:
    def run() -> list[Any]:
        return [layer(*given) for layer, given, _ in calls]

    return Prepared(lambda: f"{len(run())} layers", run)


def _in_torch(packed: PackedModel, x: Tensor, engine: str) -> Prepared:
    def check() -> str:
        packed.engine = "steps"
        wanted = packed(x)
        packed.engine = engine
        for _ in range(3):
            if not torch.equal(packed(x), wanted):
                raise GateError("differs from the single steps")
        return packed.explain().partition("\n")[0]

    return Prepared(check, lambda: packed(x))


# ------------------------------------------------------------------------- the library without torch


class _Tensor(ctypes.Structure):
    """``bop2nd_tensor`` of include/bop2nd_runtime.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("n_axes", ctypes.c_int32),
        ("shape", ctypes.c_int64 * 16),
        ("strides", ctypes.c_void_p),
    ]


def _library() -> Path:
    path = _BUILD / "libbop2nd_runtime.so"
    if not path.exists():
        raise Unavailable("not built: make runtime")
    return path


def _in_library(packed: PackedModel, x: Tensor) -> Prepared:
    library = ctypes.CDLL(str(_library()))
    library.bop2nd_last_error.restype = ctypes.c_char_p
    network, context = ctypes.c_void_p(), ctypes.c_void_p()
    given, result = _Tensor(x.data_ptr(), 0, x.dim()), _Tensor()
    given.shape[: x.dim()] = list(x.shape)

    def must(status: int) -> None:
        if status != 0:
            raise GateError(library.bop2nd_last_error().decode())

    with tempfile.TemporaryDirectory() as folder:
        packed.save(path := Path(folder) / "model.safetensors")
        must(library.bop2nd_load_file(str(path).encode(), None, ctypes.byref(network)))
    must(library.bop2nd_context_new(network, 1, ctypes.byref(context)))
    call = (context, ctypes.byref(given), 1, ctypes.byref(result), 1)

    def check() -> str:
        must(library.bop2nd_run(*call))
        wanted = packed(x)
        got = torch.empty_like(wanted)
        ctypes.memmove(got.data_ptr(), result.data, got.nbytes)
        return inference.close(got, wanted)

    def close() -> None:
        library.bop2nd_context_free(context)
        library.bop2nd_free(network)

    return Prepared(check, lambda: (library.bop2nd_run(*call), x)[0], close=close)


def _in_onnxruntime(model: nn.Module, x: Tensor, int8: bool = False) -> Prepared:
    try:
        import onnxruntime

        if int8:
            from onnxruntime import quantization
    except ImportError as error:
        raise Unavailable(str(error)) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    net = floating(model)
    file = _onnx(net, x)
    if int8:
        file = _quantized(file, x, quantization)
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}

    def check() -> str:
        if int8:
            if not np.isfinite(session.run(None, feed)[0]).all():
                raise GateError("its output is not finite")
            return "finite (8 bits round away the small sums whose sign decides)"
        with torch.inference_mode():
            return inference.close(torch.from_numpy(session.run(None, feed)[0]), net(x))

    return Prepared(check, lambda: session.run(None, feed))


def _quantized(file: bytes, x: Tensor, quantization: Any) -> bytes:
    """The ONNX file with 8-bit convolutions and dense layers, calibrated on ``x``."""

    class OnImages(quantization.CalibrationDataReader):
        def __init__(self, name: str) -> None:
            self.feeds = iter([{name: x.numpy()}])

        def get_next(self) -> Any:
            return next(self.feeds, None)

    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "given.onnx", Path(folder) / "made.onnx"
        given.write_bytes(file)
        quantization.shape_inference.quant_pre_process(given, given)
        name = quantization.quant_utils.load_model_with_shape_infer(given).graph.input[0].name
        quantization.quantize_static(given, made, OnImages(name), per_channel=True)
        return made.read_bytes()


def _onnx(net: nn.Module, x: Tensor) -> bytes:
    """The network as an ONNX file. The exporter asks for the package ``onnx`` at its end, for functions."""
    from torch.onnx._internal.torchscript_exporter import onnx_proto_utils

    before = onnx_proto_utils._add_onnxscript_fn
    onnx_proto_utils._add_onnxscript_fn = lambda model_bytes, custom_opsets: model_bytes
    try:
        with tempfile.TemporaryDirectory() as folder:
            torch.onnx.export(net, (x,), path := Path(folder) / "network.onnx", dynamo=False)
            return path.read_bytes()
    finally:
        onnx_proto_utils._add_onnxscript_fn = before


# ------------------------------------------------------------------------------------------------- processes

_SCRIPT = """
import sys
import numpy as np
import torch
import bop2nd_fast as bf
torch.set_num_threads(1)
print(int(bf.inference.load(sys.argv[1])(torch.from_numpy(np.load(sys.argv[2]))).argmax()))
"""


def _processes(network: str, width: int, image: int, batch: int) -> list[Contender]:
    def make(command: Callable[[], list[str]], memory: Callable[[], dict[str, int]]) -> Prepared:
        return _process(network, (width, image, batch), command(), memory)

    return [
        Contender(PROGRAM, OURS, partial(make, _program, _sizes), items=1, slow=True),
        Contender(IN_TORCH, BASELINE, partial(make, lambda: [sys.executable, "-c", _SCRIPT], dict), items=1),
    ]


def _program() -> list[str]:
    _library()
    if not (_BUILD / "predict").exists():
        raise Unavailable("not built: make runtime")
    return [str(_BUILD / "predict")]


def _sizes() -> dict[str, int]:
    """Bytes of the library without symbols, and of the wheel where there is one."""
    with tempfile.TemporaryDirectory() as folder:
        stripped = Path(folder) / "library"
        shutil.copy(_library(), stripped)
        subprocess.run(["strip", stripped], check=True)
        sizes = {"library": stripped.stat().st_size}
    wheels = sorted((ROOT / "dist").glob("bop2nd_runtime-*.whl"))
    return sizes | ({"wheel": wheels[-1].stat().st_size} if wheels else {})


def _process(
    network: str, size: tuple[int, int, int], command: list[str], memory: Callable[[], dict[str, int]]
) -> Prepared:
    folder = tempfile.TemporaryDirectory()
    width, image, batch = size
    model, x = inference.build(network, width, image), torch.randn(batch, 3, image, image)
    packed = _packed(network, model, x)
    files = [str(Path(folder.name) / name) for name in ("model.safetensors", "x.npy")]
    packed.save(files[0])
    np.save(files[1], x.numpy())
    wanted = str(int(packed(x).argmax()))

    def check() -> str:
        done = subprocess.run([*command, *files], capture_output=True, text=True, check=False)
        if done.stdout.split()[-1:] != [wanted]:
            raise GateError(f"says {done.stdout!r}, not {wanted}: {done.stderr[-200:]}")
        return "the class that torch predicts"

    def peak() -> dict[str, int]:
        return {"peak_resident": _resident([*command, *files])} | memory()

    def sample(n: int) -> float:
        return sum(_seconds([*command, *files]) for _ in range(n))

    return Prepared(check, sample=sample, memory=peak, close=folder.cleanup)


def _seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


# Linux counts what a process had before it started a program as the program's: started from a small process.
_RESIDENT = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


def _resident(command: list[str]) -> int:
    """Bytes of a process's largest resident set; at least those of a bare Python, about 10 MB."""
    done = subprocess.run(
        [sys.executable, "-S", "-c", _RESIDENT, *command], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


# ------------------------------------------------------------------------------------------------------ goals


def _memory(key: str) -> Formula:
    """MB of the C program's ``key``."""

    def formula(record: Record) -> float | None:
        held = ((contender(record, PROGRAM) or {}).get("memory") or {}).get(key)
        return None if held is None else held / 1e6

    return formula


def _milliseconds(record: Record) -> float | None:
    entry = contender(record, PROGRAM)
    return None if entry is None else 1e3 * entry["seconds"]["median"]


def _goals() -> tuple[Goal, ...]:
    one, many = f"{BINARYNET}, 32x32, batch 1", f"{BINARYNET}, 32x32, batch 64"
    large, process = f"{BIREALNET}, 224x224, batch 1", f"{PROCESS}, {BINARYNET}"
    fp32 = (FP32, FP32_LAST)

    def at_least(case: str, what: str, aim: float, formula: Formula, unit: str = "x") -> Goal:
        return goal("runtime", f"{case}: {what}", aim, formula, unit, start=case)

    def most(what: str, aim: float, network: str, formula: Formula, unit: str = "MB") -> Goal:
        start = f"{PROCESS}, {network}"
        return goal("runtime", what, aim, formula, unit, start=start, at_most=True)

    return (
        at_least(one, "runtime against single steps in torch", 3, over(STEPS, ours=RUNTIME)),
        at_least(one, "runtime against fp32", 20, over(*fp32, ours=RUNTIME)),
        at_least(one, "run_packed against single steps", 2.5, over(STEPS)),
        at_least(one, "runtime, share of the products' own rate", 60, share(RUNTIME, PRODUCTS), "%"),
        at_least(many, "runtime against single steps in torch", 1.2, over(STEPS, ours=RUNTIME)),
        at_least(large, "runtime against single steps in torch", 1.6, over(STEPS, ours=RUNTIME)),
        at_least(large, "runtime against fp32, channels-last", 8, over(FP32_LAST, ours=RUNTIME)),
        at_least(large, "runtime against onnxruntime fp32", 5, over(ONNX, ours=RUNTIME)),
        at_least(large, "runtime against onnxruntime int8", 2, over(ONNX_INT8, ours=RUNTIME)),
        at_least(large, "runtime against Larq Compute Engine 0.16", 8, over(LARQ, ours=RUNTIME)),
        most(f"{process}: C program", 50, BINARYNET, _milliseconds, "ms"),
        at_least(process, "C program against torch", 30, over(IN_TORCH)),
        most(f"{BIREALNET}: peak resident memory", 60, BIREALNET, _memory("peak_resident")),
        most("shared library without symbols", 1, BINARYNET, _memory("library")),
        most("wheel of bop2nd_runtime", 1.5, BINARYNET, _memory("wheel")),
    )


SUITE = Suite(
    cases,
    families={
        "fp32": (FP32, FP32_LAST),
        "onnxruntime": (ONNX, ONNX_INT8),
        "Larq": (LARQ,),
        "torch": (IN_TORCH,),
    },
    goals=_goals(),
)
