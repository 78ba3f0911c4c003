"""Parts of a packed model that the C++ runtime runs as one operator, ``torch.ops.bop2nd.run_packed``.

A part holds steps whose results have the same bits there and in torch: everything on words, products by
signs (of bytes as well), elementwise operators. Other sums of real numbers (convolutions, dense layers, batch
norms, means, softmax) are rounded in another order there, so torch's own operators stay between the parts. A
packed model gives the same bits and strides with parts and without. Parts serve models of profile ``bits`` on
CPUs, where nobody watches the single steps (``why_single_steps``).

C++ reads weights as they were re-laid beside the words (``binary_tensor/memory.py``) and all other tensors
where they lie. A part is made of weights that nobody else can write, and made anew once a tensor may be
another one.
"""

from __future__ import annotations

import ctypes
import json
import math
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import backends
from ..binary_tensor import BinaryTensor
from . import graph_json as gj
from . import operators
from .graph import Ref, Step, map_leaves, references
from .kinds import LAYERS
from .packed_layer import PackedLayer
from .packed_writer import describe_layer
from .program import Program

if TYPE_CHECKING:
    from .packed_model import PackedModel

_SIGNED = ("signed_conv2d", "signed_linear")
_PRODUCTS = ("packed_conv2d", "packed_linear", *_SIGNED)
_ON_WORDS = ("packed_conv2d", "packed_linear", "regroup", "flatten_bits", "pool_bits")
_EXACT_LAYERS = (*_PRODUCTS, "pack", "regroup", "flatten_bits", "pool_bits", "max_pool")
_BROADCASTING = operators.full_names("add.Tensor sub.Tensor mul.Tensor div.Tensor")
_EXACT = _BROADCASTING | operators.full_names(
    "neg relu leaky_relu prelu hardtanh clamp cat flatten.using_ints view reshape"
)
_FEWEST = 2  # steps of a part: one alone is as fast by itself
_KEPT = 256  # sets of input shapes of which a part knows the strides of its outputs

backends.define_native(
    "run_packed(int part, Tensor[] inputs, int[] strides) -> Tensor[]",
    "the parts of a PackedModel that have the same bits in C++ (PackedModel.explain, PackedModel.engine)",
)

# ------------------------------------------------------------------------------------------- what a value is

REAL, WORDS, INT8, UINT8, NUMBER = "real", "words", "int8", "uint8", "number"
Values = dict[str, Any]  # name of a value -> one of these (REAL: fp32), a tuple of them, or None: anything
_DTYPES = {REAL: "float32", WORDS: "int32", INT8: "int8", UINT8: "uint8"}
_INPUTS = {torch.float32: REAL, torch.int8: INT8, torch.uint8: UINT8}


def _values_of(steps: Sequence[Step], layers: Mapping[str, Any], model: PackedModel) -> Values:
    """What every step gives, as far as it is known before a run."""
    values: Values = {}
    for name, t in model.constants.items():
        values[name] = REAL if _is_plain(t) and t.dtype == torch.float32 else None
    specs = iter(model.inputs)
    for step in steps:
        if step.kind == "input":
            values[step.name] = _INPUTS.get(next(specs).dtype)
        elif step.kind == "layer":
            values[step.name] = _result_of(layers[str(step.target)], step, values)
        elif step.kind == "operator":
            values[step.name] = _result(step, values)
    return values


def _result_of(layer: Any, step: Step, values: Values) -> Any:
    if type(layer) is not LAYERS.get(getattr(layer, "kind", "")):
        return None
    read = {values[name] for name in references(step)}
    if layer.kind in _PRODUCTS:
        emits: dict[str, Any] = {"values": REAL, "signs": WORDS, "both": (REAL, WORDS)}
        return emits[str(layer._emits)]
    if layer.kind == "pack":
        return WORDS
    if layer.kind == "quantize_rows":
        return INT8, REAL
    if layer.kind == "constant":
        return REAL if layer.value.dtype == torch.float32 else None
    if layer.kind in ("real_conv2d", "real_linear", "max_pool"):
        return REAL if read == {REAL} else None
    return WORDS if layer.kind in _ON_WORDS and read == {WORDS} else None


def _result(step: Step, values: Values) -> Any:
    target = str(step.target)
    if target == "getitem":
        source, index = _item(step)
        several = values.get(source)
        return several[index] if isinstance(several, tuple) and index < len(several) else None
    if target.startswith(("int.", "float.", "require.", "aten.sym_size.")):
        return NUMBER
    given = operators.bind(operators.find(target), step.args, step.kwargs)
    read = {values[name] for name in references(step)}
    real = target in operators.BITS and given.get("dtype") is None and read <= {REAL, NUMBER}
    return REAL if real else None


def _item(step: Step) -> tuple[str, int]:
    """The step and index that a getitem names by a reference and a number."""
    source, index = step.args
    plain = isinstance(source, Ref) and type(index) is int and index >= 0
    return (source.name, index) if plain else ("", 0)


# ------------------------------------------------------------------------------------- steps that are exact


def _is_exact(step: Step, layers: Mapping[str, Any], values: Values, own: set[str]) -> bool:
    """Whether C++ makes the same bits of a step. ``own``: the steps that it would run along with."""
    if values.get(step.name) is None:
        return False
    if step.kind == "layer":
        layer = layers[str(step.target)]
        return layer.kind in _EXACT_LAYERS and _takes(layer, step, values)
    if step.kind != "operator":
        return False
    if step.target == "getitem":
        return _item(step)[0] in own
    return step.target in _EXACT and _takes_reals(step, values)


def _takes(layer: PackedLayer, step: Step, values: Values) -> bool:
    given = layer.bind(step.args, step.kwargs)
    of_signed = layer.config["input"] if layer.kind in _SIGNED else REAL
    wanted = {"words": WORDS, "input": of_signed, "residual": REAL, "input_scale": REAL}
    fits = all(
        isinstance(v, Ref) and values[v.name] == wanted.get(k) for k, v in given.items() if v is not None
    )
    weight = getattr(layer, "weight", None)
    return fits and (weight is None or weight.numel() > 0)


def _takes_reals(step: Step, values: Values) -> bool:
    """Whether an operator's tensors are real, and all other arguments numbers that are written down."""
    given = operators.bind(operators.find(str(step.target)), step.args, step.kwargs)
    tensors = {"self", "tensors", "weight"} | ({"other"} if isinstance(given.get("other"), Ref) else set())
    leaves: list[Any] = []
    for name, value in given.items():
        if name in tensors:
            held = value if name == "tensors" else [value]
            if not isinstance(held, (list, tuple)) or not held:
                return False
            if not all(isinstance(v, Ref) and values[v.name] == REAL for v in held):
                return False
        else:
            map_leaves(value, leaves.append)
    numbers = all(v is None or (type(v) in (int, float) and not math.isnan(v)) for v in leaves)
    return numbers and given.get("alpha", 1) == 1  # with another alpha torch may fuse


# --------------------------------------------------------------------------------------------------- a part


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


class _Seen(NamedTuple):
    """A tensor as it was found in its module."""

    owner: dict[str, Tensor | None]
    name: str
    tensor: Tensor | None
    groups: int
    state: Any  # of weights: how they are re-laid, None while somebody else may write them

    @classmethod
    def all_of(cls, module: nn.Module) -> list[_Seen]:
        owners: tuple[dict[str, Any], ...] = (module._buffers, module._parameters)
        groups = module.config.get("groups", 1) if isinstance(module, PackedLayer) else 1
        return [cls(o, n, t, groups, _state(t, groups)) for o in owners for n, t in o.items()]


def _same(seen: Iterable[_Seen]) -> bool:
    """Whether all of them would be found again as they were. In one loop: every call of a model asks."""
    for owner, name, tensor, groups, state in seen:
        if owner.get(name) is not tensor:
            return False
        if tensor is None:
            continue
        now = _state(tensor, groups)
        if now is not state and (isinstance(tensor, BinaryTensor) or now != state):
            return False
    return True


def _state(t: Tensor | None, groups: int) -> Any:
    """Another one once C++ has to look anew: it holds weights re-laid, and the places of other tensors."""
    if t is None:
        return True
    if isinstance(t, BinaryTensor):
        return t.memory.blocked(groups)
    return (t.data_ptr(), t.dtype, t.shape) if _is_plain(t) else None


def _is_plain(t: Tensor) -> bool:
    return type(t) in (Tensor, nn.Parameter) and t.is_cpu and t.is_contiguous()


class Part:
    """Some steps as one callable: tensors that they read -> tensors that others read.

    Inputs of new shapes go through the single steps, which judge their sizes and say how outputs lie.
    """

    def __init__(
        self,
        name: str,
        steps: Sequence[Step],
        layers: Mapping[str, PackedLayer],
        constants: Mapping[str, Tensor],
        inputs: Mapping[str, str],
        outputs: Sequence[str],
        seen: Sequence[_Seen],
    ) -> None:
        """``inputs``: name -> ``REAL``, ``WORDS``, ... ``seen``: all tensors of layers and constants."""
        given = [Step(name, "input") for name in inputs]
        result = Step("output", "output", "", (tuple(map(Ref, outputs)),))
        graph = [*given, *steps, result]
        self.name = name
        self.steps = tuple(steps)
        self.seen = tuple(seen)  # holds the memory that C++ has the addresses of
        self._single = Program(graph, layers, list(constants))
        self._constants = list(constants.values())
        self._strides: dict[Any, list[int] | None] = {}
        self._number = _new_part(graph, layers, constants, inputs, seen)
        weakref.finalize(self, backends.free_part, self._number)

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        key = tuple((x.shape, x.stride()) for x in inputs)
        strides = self._strides.get(key, [])
        if strides:
            try:
                return torch.ops.bop2nd.run_packed(self._number, inputs, strides)
            except ValueError as error:
                text = f"part of a packed model stays step by step: {error}"
                warnings.warn(text, RuntimeWarning, stacklevel=2)
                strides = self._strides[key] = None
        results: Sequence[Tensor] = self._single.run(self._constants, None, inputs)
        if strides is not None:
            if len(self._strides) >= _KEPT:
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
    seen: Sequence[_Seen],
) -> int:
    """Hand a graph to C++, its values and layers under short names: those of a model may be any text."""
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
        {"name": values[name], "shape": [], "free": [], "dtype": _DTYPES[what]}
        for name, what in inputs.items()
    ]
    text = {
        "signature": {"parameters": [], "call": {}},
        "inputs": described_inputs,
        "constants": [values[name] for name in constants],
        "layers": described,
        "steps": [gj.encode_step(short(step), by_name) for step in graph],
    }
    blocked = {id(s.owner): s for s in seen if isinstance(s.tensor, BinaryTensor)}
    given = (_Tensor * len(tensors))()
    for to, (name, tensor) in zip(given, tensors.items(), strict=True):
        to.name, to.data = name.encode(), tensor.data_ptr()
        to.is_words, to.n_axes = tensor.dtype == torch.int32, tensor.dim()
        to.shape = (ctypes.c_int64 * max(1, tensor.dim()))(*tensor.shape)
        if name.endswith(".weight") and (weight := blocked.get(id(by_name[name.split(".")[1]]._buffers))):
            to.blocked, to.groups = weight.state.data_ptr(), weight.groups
    return backends.new_part(json.dumps(text, allow_nan=False), given)


# ------------------------------------------------------------------------------------------ a model in parts


def _with_parts(
    model: PackedModel, program: Program, seen: Mapping[str, Sequence[_Seen]]
) -> tuple[list[Step], dict[str, Any], list[Part]]:
    """The graph with parts in the place of their steps: steps, layers, the parts among them.

    A step that nobody in the open part needs goes before it, so that parts are as long as can be.
    """
    layers: dict[str, Any] = program.layers
    constants = dict(model.constants.items())
    values = _values_of(model.steps, layers, model)
    done: list[Step] = []
    parts: list[Part] = []
    called: dict[str, Any] = dict(layers)
    open_part: list[Step] = []
    taken = {step.name for step in model.steps}  # any text

    def close(later: Sequence[Step]) -> None:
        own = {step.name for step in open_part}
        wanted = set().union(*map(references, later))
        read = {name for step in open_part for name in references(step)} - own
        inputs = {name: values[name] for name in sorted(read - constants.keys())}
        outputs = [step.name for step in open_part if step.name in wanted]
        plain = inputs and outputs and all(values[n] in _DTYPES for n in (*inputs, *outputs))
        if len(open_part) < _FEWEST or not plain:
            done.extend(open_part)
        else:
            used = {str(s.target): layers[str(s.target)] for s in open_part if s.kind == "layer"}
            held = {name: constants[name] for name in sorted(read & constants.keys())}
            of_layers = [s for name in used for s in seen[name]]
            of_constants = [s for s in seen[""] if s.name in held]
            name = f"part.{len(parts)}"  # no layer has a name with a dot
            while name in taken:
                name += "."
            part = Part(name, open_part, used, held, inputs, outputs, [*of_layers, *of_constants])
            parts.append(part)
            called[name] = part
            done.append(Step(name, "layer", name, tuple(map(Ref, inputs))))
            done.extend(Step(o, "operator", "getitem", (Ref(name), i)) for i, o in enumerate(outputs))
        open_part.clear()

    for i, step in enumerate(model.steps):
        own = {s.name for s in open_part}
        if _is_exact(step, layers, values, own):
            open_part.append(step)
            continue
        if not references(step).isdisjoint(own):
            close(model.steps[i:])
        done.append(step)
    return done, called, parts


class Parted(NamedTuple):
    """A program, and the same one with parts in it."""

    program: Program
    run: Program
    parts: tuple[Part, ...]
    steps: tuple[Step, ...]
    private: bool  # whether nobody else can write the weights, and all tensors lie as C++ takes them

    @classmethod
    def of(cls, program: Program, model: PackedModel) -> Parted:
        """Of a model on a CPU; one of profile ``torch`` stays as it is."""
        if model.profile.name != "bits":
            return cls(program, program, (), model.steps, True)
        exact = {n: x for n, x in program.layers.items() if getattr(x, "kind", "") in _EXACT_LAYERS}
        seen = {name: _Seen.all_of(layer) for name, layer in exact.items()}
        if any(s.state is None for found in seen.values() for s in found):
            return cls(program, program, (), model.steps, False)
        seen[""] = _Seen.all_of(model.constants)  # no layer has this name
        steps, layers, parts = _with_parts(model, program, seen)
        run = Program(steps, layers, program.constants) if parts else program
        return cls(program, run, tuple(parts), tuple(steps), True)

    def fresh(self) -> bool:
        return self.private and all(_same(part.seen) for part in self.parts)


def why_single_steps(model: PackedModel, inputs: Sequence[Tensor]) -> str | None:
    """Why a call with these inputs, on the model's device, would run step by step; None if in parts."""
    if model.engine == "steps":
        return "PackedModel.engine is 'steps'"
    if not all(type(x) is Tensor and x.is_cpu and x.layout == torch.strided for x in inputs):
        return "an input is no plain tensor on a CPU"
    if not backends.wants_blocked():
        return backends.why_not("cpu") or f"backend {backends.forced()!r} is forced"
    if _is_watched(model.layers._modules.values()):
        return "hooks, a mode, a transform or a trace look at single layers or operators"
    if torch.is_autocast_enabled("cpu"):
        return "autocast chooses the dtype of single operators"
    return None


def _is_watched(layers: Any) -> bool:
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.compiler.is_compiling()
        or nn.modules.module._has_any_global_hook()
        or any(x._forward_hooks or x._forward_pre_hooks or "forward" in x.__dict__ for x in layers)
    )


def explain(model: PackedModel) -> str:
    """What of a model runs as parts, line by line, or why nothing does."""
    device = model._device()
    program = model._current_program()
    why = why_single_steps(model, ())
    if device is not None and device.type != "cpu":
        why = f"the model is on {device}"
    if why is None and (profile := model.profile).name != "bits":
        why = f"the model is of profile 'torch': {profile.because[0]}"
    made = Parted.of(program, model) if why is None else None
    if made is not None and not made.private:
        why = "somebody else may write a weight (an alias of its words lives), or a tensor is no plain one"
    elif made is not None and not made.parts:
        why = f"no {_FEWEST} neighbouring steps have the same bits in C++"
    if made is None or why is not None:
        return f"step by step: {why}"
    n = sum(len(part.steps) for part in made.parts)
    total = sum(step.kind in ("layer", "operator") for step in model.steps)
    lines = [f"{n} of {total} steps in {len(made.parts)} parts (torch.ops.bop2nd.run_packed)"]
    parts = {part.name: part for part in made.parts}
    alone: list[str] = []
    for step in made.steps:
        if (part := parts.get(step.name)) is not None:
            lines += [*_by_themselves(alone), f"{step.name}: {', '.join(s.name for s in part.steps)}"]
            alone = []
        elif step.kind == "layer" or (step.kind == "operator" and not references(step) & parts.keys()):
            alone.append(step.name)
    return "\n  ".join([*lines, *_by_themselves(alone)])


def _by_themselves(names: Sequence[str]) -> list[str]:
    return [f"by itself: {', '.join(names)}"] if names else []
