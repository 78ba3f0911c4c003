"""One part of a packed model: some steps that C++ runs as one operator, ``torch.ops.bop2nd.run_packed``.

C++ reads weights as they were re-laid beside the words (``binary_tensor/memory.py``) and all other tensors
where they lie: at every call it looks whether they still lie there.
"""

from __future__ import annotations

import ctypes
import functools
import json
import warnings
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..binary_tensor import BinaryTensor
from . import graph_json as gj
from .graph import Ref, Step, map_leaves
from .packed_layer import PackedLayer
from .packed_writer import describe_layer
from .program import Program

# What a value is; REAL: fp32.
REAL, WORDS, INT8, UINT8, NUMBER = "real", "words", "int8", "uint8", "number"
DTYPES = {REAL: "float32", WORDS: "int32", INT8: "int8", UINT8: "uint8"}
NORM = "aten.batch_norm.default"
KEPT = 256  # sets of input shapes of which a part knows the strides of its outputs

backends.define_native(
    "run_packed(int part, Tensor[] held, Tensor[] inputs, int[] strides) -> Tensor[]",
    "the parts of a PackedModel that have the same bits in C++ (PackedModel.explain, PackedModel.engine)",
)
_run_packed = torch.ops.bop2nd.run_packed.default


class _Tensor(ctypes.Structure):
    """``bop2nd_part_tensor`` of csrc/register_runtime.cpp."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("blocked", ctypes.c_void_p),
        ("groups", ctypes.c_int64),
        ("is_words", ctypes.c_int32),
        ("n_axes", ctypes.c_int32),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
    ]


class Part:
    """Some steps as one callable: tensors that they read -> tensors that others read.

    Inputs of new shapes go through the single steps, which judge their sizes and say how outputs lie. So does
    everything once a tensor lies elsewhere than C++ was told: the part is ``stale`` then.
    """

    def __init__(
        self,
        name: str,
        steps: Sequence[Step],
        layers: Mapping[str, PackedLayer],
        constants: Mapping[str, Tensor],
        inputs: Mapping[str, str],
        outputs: Sequence[str],
        laid: Mapping[tuple[int, int], Tensor],
    ) -> None:
        """``inputs``: name -> ``REAL``, ``WORDS``, ...

        ``laid``: id of a weight and groups -> its words re-laid.
        """
        given = [Step(name, "input") for name in inputs]
        result = Step("output", "output", "", (tuple(map(Ref, outputs)),))
        graph = [*given, *steps, result]
        self.name = name
        self.steps = tuple(steps)
        self.stale = False
        self._single = Program(graph, layers, list(constants))
        self._constants = list(constants.values())
        self._strides: dict[Any, list[int] | None] = {}
        self._laid = tuple(laid.values())  # C++ has the addresses
        fused = any(step.target == NORM for step in steps) and bool(torch_fuses_norms())
        self._number, self._held = _new_part(graph, layers, constants, inputs, laid, fused)
        weakref.finalize(self, backends.free_part, self._number)

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        key = tuple([(x.shape, x.stride()) for x in inputs])
        strides = self._strides.get(key, [])
        if strides:
            try:
                if found := _run_packed(self._number, self._held, inputs, strides):
                    return found
                self.stale = True
            except ValueError as error:
                text = f"part of a packed model stays step by step: {error}"
                warnings.warn(text, RuntimeWarning, stacklevel=2)
                strides = self._strides[key] = None
        results: Sequence[Tensor] = self._single.run(self._constants, None, inputs)
        if strides is not None:
            if len(self._strides) >= KEPT:
                self._strides.clear()
            dense = all(map(_is_dense, results))
            self._strides[key] = [n for t in results for n in t.stride()] if dense else None
        return results


def _is_dense(t: Tensor) -> bool:
    """Whether every element has a place of its own, without gaps."""
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size != 1 and stride != expected:
            return t.numel() == 0
        expected *= size
    return True


def _new_part(
    graph: Sequence[Step],
    layers: Mapping[str, PackedLayer],
    constants: Mapping[str, Tensor],
    inputs: Mapping[str, str],
    laid: Mapping[tuple[int, int], Tensor],
    fused_norms: bool,
) -> tuple[int, list[Tensor]]:
    """Hand a graph to C++: its number there, and the tensors that it reads.

    Values and layers go under short names: those of a model may be any text.
    """
    values = {name: f"v{i}" for i, name in enumerate([*constants, *(step.name for step in graph)])}
    called = {name: f"l{i}" for i, name in enumerate(layers)}
    tensors = {f"constants.{values[name]}": t.detach() for name, t in constants.items()}
    described = {called[name]: describe_layer(called[name], layer, tensors) for name, layer in layers.items()}

    def renamed(tree: Any) -> Any:
        return map_leaves(tree, lambda leaf: Ref(values[leaf.name]) if isinstance(leaf, Ref) else leaf)

    def short(step: Step) -> Step:
        target = called[str(step.target)] if step.kind == "layer" else step.target
        return Step(values[step.name], step.kind, target, renamed(step.args), renamed(step.kwargs))

    by_name = {called[name]: layer for name, layer in layers.items()}
    described_inputs: list[dict[str, Any]] = [
        {"name": values[name], "shape": [], "free": [], "dtype": DTYPES[what]}
        for name, what in inputs.items()
    ]
    text = {
        "signature": {"parameters": [], "call": {}},
        "inputs": described_inputs,
        "constants": [values[name] for name in constants],
        "layers": described,
        "steps": [gj.encode_step(short(step), by_name) for step in graph],
    }
    own: dict[str, Any] = {f"constants.{values[name]}": t for name, t in constants.items()}
    for name, layer in by_name.items():
        of_layer = {**layer._buffers, **layer._parameters}
        own |= {f"layers.{name}.{key}": t for key, t in of_layer.items()}
    held: list[Tensor] = []  # C++ asks at every call whether they still lie where they were
    given = (_Tensor * len(tensors))()
    for to, (name, tensor) in zip(given, tensors.items(), strict=True):
        to.name, to.data = name.encode(), tensor.data_ptr()
        to.is_words, to.n_axes = tensor.dtype == torch.int32, tensor.dim()
        to.shape = (ctypes.c_int64 * max(1, tensor.dim()))(*tensor.shape)
        found = own[name]
        if isinstance(found, BinaryTensor):
            to.groups = groups = by_name[name.split(".")[1]].config.get("groups", 1)
            to.blocked = laid[id(found), groups].data_ptr()
            found = found.memory.words  # only read
        held.append(found)
    return backends.new_part(json.dumps(text, allow_nan=False), given, fused_norms), held


@functools.cache
def torch_fuses_norms() -> bool | None:
    """Whether torch makes batch norms of fused multiply-adds on this machine; None: in no way that C++ knows.

    It depends on what torch was built for and runs on, so both are tried on random numbers.
    """
    rows = ("weight", "bias", "mean", "variance")
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")

    def alike(fused: bool, shape: tuple[int, ...], memory_format: torch.memory_format) -> bool:
        constants = {name: draw(shape[1]) for name in rows}
        constants["variance"] = constants["variance"].abs() + 0.01
        x = draw(shape).contiguous(memory_format=memory_format)
        norm = Step("norm", "operator", NORM, (Ref("x"), *map(Ref, rows), False, 0.1, 1e-5, True))
        graph = [Step("x", "input"), norm, Step("output", "output", "", ((Ref("norm"),),))]
        wanted = torch.ops.aten.batch_norm.default(x, *constants.values(), False, 0.1, 1e-5, True)
        number, held = _new_part(graph, {}, constants, {"x": REAL}, {}, fused)
        try:
            (found,) = _run_packed(number, held, [x], list(wanted.stride()))
        finally:
            backends.free_part(number)
        return torch.equal(found, wanted)

    plain, last = torch.contiguous_format, torch.channels_last
    tried = [
        ((1, 10), plain), ((70, 37), plain), ((4, 19, 9), plain), ((2, 37, 5, 7), plain),
        ((2, 37, 5, 7), last), ((3, 64, 8, 8), plain), ((3, 64, 8, 8), last), ((1, 70, 1, 1), plain),
        ((2, 1, 40, 40), last),
    ]  # fmt: skip
    for fused in (True, False):
        if all(alike(fused, shape, memory_format) for shape, memory_format in tried):
            return fused
    return None
