"""Parts of a packed model that the C++ runtime runs as one operator, ``torch.ops.bop2nd.run_packed``.

A part holds steps whose results have the same bits there and in torch: everything on words, products by
signs (of bytes as well) and batch norms of them, elementwise operators. Other sums of real numbers
(convolutions, dense layers, means, softmax) are rounded in another order there, so torch's own operators stay
between the parts. A packed model gives the same bits and strides with parts and without. Parts serve models
of profile ``bits`` on CPUs, where nobody watches the single steps (``why_single_steps``).

A part (``part.py``) is made of weights that nobody else can write, and made anew once a tensor may be another
one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, repeat, starmap, zip_longest
from operator import attrgetter, contains, is_
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import backends
from ..binary_tensor import BinaryTensor
from . import operators
from .graph import InputSpec, Ref, Step, map_leaves, references
from .kinds import LAYERS
from .packed_layer import PackedLayer
from .part import DTYPES, INT8, KEPT, NORM, NUMBER, REAL, UINT8, WORDS, Part, torch_fuses_norms
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

# ------------------------------------------------------------------------------------------- what a value is

Values = dict[str, Any]  # name of a value -> one of these (REAL: fp32), a tuple of them, or None: anything
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


def _is_exact(
    step: Step, layers: Mapping[str, Any], values: Values, makers: Mapping[str, Step], own: set[str]
) -> bool:
    """Whether C++ makes the same bits of a step.

    ``makers``: the steps by name. ``own``: those that it would run along with.
    """
    if values.get(step.name) is None:
        return False
    if step.kind == "layer":
        layer = layers[str(step.target)]
        return layer.kind in _EXACT_LAYERS and _takes(layer, step, values)
    if step.kind != "operator":
        return False
    if step.target == "getitem":
        return _item(step)[0] in own
    if step.target == NORM:
        return _is_norm_of_product(step, layers, values, makers) and torch_fuses_norms() is not None
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


def _is_norm_of_product(
    step: Step, layers: Mapping[str, Any], values: Values, makers: Mapping[str, Step]
) -> bool:
    """Of a product's sums, which lie densely: torch rounds batch norms of other tensors in several ways."""
    given = operators.bind(operators.find(str(step.target)), step.args, step.kwargs)
    rows = [given[k] for k in ("weight", "bias") if given[k] is not None]
    rows += [given[k] for k in ("running_mean", "running_var")]
    if not all(isinstance(v, Ref) and values[v.name] == REAL for v in rows):
        return False
    maker = makers.get(given["input"].name) if isinstance(given["input"], Ref) else None
    if maker is None or maker.kind != "layer" or values[maker.name] != REAL:
        return False
    numbers = type(given["eps"]) is float and given["training"] is False
    return numbers and layers[str(maker.target)].kind in _PRODUCTS


class _Seen(NamedTuple):
    """The tensors of some modules as they were found. What C++ has the addresses of, it compares itself."""

    owners: tuple[dict[str, Any], ...]  # what they lie in, by name
    values: tuple[Any, ...]
    weights: tuple[tuple[BinaryTensor, int, Tensor | None], ...]  # groups, and how the words are re-laid

    @classmethod
    def of(cls, layers: Iterable[PackedLayer], *others: dict[str, Any]) -> _Seen:
        owners, weights = [*others], []
        for layer in layers:
            groups = layer.config.get("groups", 1)
            own: tuple[dict[str, Any], ...] = (layer._buffers, layer._parameters)
            owners += own
            binary = (t for owner in own for t in owner.values() if isinstance(t, BinaryTensor))
            weights += [(t, groups, t.memory.blocked(groups)) for t in binary]
        values = [t for owner in owners for t in owner.values()]
        return cls(tuple(owners), tuple(values), tuple(weights))

    def fits(self) -> bool:
        """Whether C++ can take all tensors where they lie, and nobody else can write the weights."""
        plain = (t for t in self.values if isinstance(t, Tensor) and not isinstance(t, BinaryTensor))
        return all(map(_is_plain, plain)) and all(blocked is not None for _, _, blocked in self.weights)

    def same(self) -> bool:
        """Whether everything would be found again as it was. Every call asks: few of Python's own loops."""
        found: Iterable[Any] = chain.from_iterable(map(_VALUES, self.owners))
        if not all(starmap(is_, zip_longest(found, self.values))):
            return False
        return all(t.memory.blocked(groups) is blocked for t, groups, blocked in self.weights)


def _is_plain(t: Tensor) -> bool:
    return type(t) in (Tensor, nn.Parameter) and t.is_cpu and t.is_contiguous()


# ------------------------------------------------------------------------------------------ a model in parts


def _with_parts(
    model: PackedModel, program: Program, laid: Mapping[tuple[int, int], Tensor]
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
        plain = inputs and outputs and all(values[n] in DTYPES for n in (*inputs, *outputs))
        if len(open_part) < _FEWEST or not plain:
            done.extend(open_part)
        else:
            used = {str(s.target): layers[str(s.target)] for s in open_part if s.kind == "layer"}
            held = {name: constants[name] for name in sorted(read & constants.keys())}
            name = f"part.{len(parts)}"  # no layer has a name with a dot
            while name in taken:
                name += "."
            part = Part(name, open_part, used, held, inputs, outputs, laid)
            parts.append(part)
            called[name] = part
            done.append(Step(name, "layer", name, tuple(map(Ref, inputs))))
            done.extend(Step(o, "operator", "getitem", (Ref(name), i)) for i, o in enumerate(outputs))
        open_part.clear()

    makers = {step.name: step for step in model.steps}
    for i, step in enumerate(model.steps):
        own = {s.name for s in open_part}
        if _is_exact(step, layers, values, makers, own):
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
    seen: _Seen | None  # None: somebody else may write a weight, or a tensor lies as C++ does not take it
    inputs: tuple[InputSpec, ...]
    judged: set[Any]  # inputs of these shapes passed all checks

    @classmethod
    def of(cls, program: Program, model: PackedModel) -> Parted:
        """Of a model on a CPU; one of profile ``torch`` stays as it is."""
        bits = model.profile.name == "bits"
        packed = (x for x in program.layers.values() if bits and isinstance(x, PackedLayer))
        exact = [x for x in packed if x.kind in _EXACT_LAYERS]
        parts: list[Part] = []
        run, steps = program, model.steps
        seen: _Seen | None = None
        if _Seen.of(exact).fits():
            of_model = (model._modules, model.layers._modules, model.constants._buffers)
            seen = _Seen.of(exact, *of_model)
            laid = {(id(t), groups): blocked for t, groups, blocked in seen.weights if blocked is not None}
            if bits and all((id(t), groups) in laid for t, groups, _ in seen.weights):
                made, layers, parts = _with_parts(model, program, laid)
                run, steps = Program(made, layers, program.constants) if parts else program, tuple(made)
        return cls(program, run, tuple(parts), steps, seen, model.inputs, set())

    def fresh(self) -> bool:
        """Whether the parts still are those of the model's layers and tensors."""
        return self.seen is not None and self.seen.same() and not any(part.stale for part in self.parts)

    def judge(self, model: PackedModel, args: Sequence[Tensor]) -> None:
        """From now on inputs of these shapes need no other look than :meth:`takes`."""
        if len(self.judged) >= KEPT:
            self.judged.clear()
        self.judged.add(_key(model, args))

    def takes(self, model: PackedModel, args: Sequence[Any]) -> bool:
        """Whether a call with these arguments is one that was judged before, of a model that is as it was."""
        return (
            self.seen is not None
            and self.seen.owners[0] is model._modules
            and self.inputs is model.inputs
            and why_single_steps(model, args) is None
            and _key(model, args) in self.judged
            and self.fresh()
        )


def _key(model: PackedModel, args: Sequence[Tensor]) -> Any:
    return model.memory_limit, *[(x.dtype, x.shape, x.stride()) for x in args]


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
        or any(chain.from_iterable(map(_HOOKS, layers)))
        or any(map(contains, map(_ATTRIBUTES, layers), repeat("forward")))
    )


_VALUES: Any = dict.values
_HOOKS = attrgetter("_forward_hooks", "_forward_pre_hooks")
_ATTRIBUTES = attrgetter("__dict__")


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
    if made is not None and made.seen is None:
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
