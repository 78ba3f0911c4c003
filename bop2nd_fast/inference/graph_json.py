"""A graph as JSON and back: argument trees, steps, the signature and the inputs.

``docs/packed_file.md`` is the specification. What JSON does not know is an object with one key:
``{"ref": name}``, ``{"tuple": [...]}``, ``{"dict": [[key, value], ...]}``, ``{"float": "inf"}``,
``{"dtype": "float32"}``, ``{"memory_format": "channels_last"}``. Reading refuses whatever is not listed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from . import operators
from .graph import PARAMETER_KINDS, REQUIRED, InputSpec, Parameter, Ref, Signature, Step, dtype_name
from .tensor_file import TEXT_LIMIT

DEPTH_LIMIT = 64
DTYPES = {
    dtype_name(dtype): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
        torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip
_MEMORY_FORMATS = {
    str(form).removeprefix("torch."): form
    for form in (
        torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d,
    )
}  # fmt: skip
_SPECIAL = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


# ------------------------------------------------------------------------------------------- trees


def encode(tree: Any, what: str, depth: int = 0) -> Any:
    """Arguments as JSON.

    Raises:
        ValueError: a value that a file cannot hold; ``what`` says where.
    """
    if depth > DEPTH_LIMIT:
        raise ValueError(f"{what} is nested more than {DEPTH_LIMIT} deep")

    def inner(value: Any) -> Any:
        return encode(value, what, depth + 1)

    if tree is None or type(tree) is bool or (type(tree) is int and -(2**63) <= tree < 2**63):
        return tree
    if type(tree) is float:
        return tree if math.isfinite(tree) else {"float": str(tree)}
    if type(tree) is str:
        return text(tree, what)
    if isinstance(tree, Ref):
        return {"ref": text(tree.name, what)}
    if isinstance(tree, torch.dtype) and tree in DTYPES.values():
        return {"dtype": dtype_name(tree)}
    if isinstance(tree, torch.memory_format):
        return {"memory_format": str(tree).removeprefix("torch.")}
    if isinstance(tree, slice):
        return {"slice": [inner(v) for v in (tree.start, tree.stop, tree.step)]}
    if tree is Ellipsis:
        return {"ellipsis": True}
    if isinstance(tree, tuple):
        return {"tuple": [inner(v) for v in tree]}
    if isinstance(tree, list):
        return [inner(v) for v in tree]
    if isinstance(tree, dict):
        return {"dict": [[inner(k), inner(v)] for k, v in tree.items()]}
    raise ValueError(f"{what} has a value of type {type(tree).__name__} ({tree!r}), which a file cannot hold")


def decode(tree: Any, depth: int = 0) -> Any:
    """The inverse of :func:`encode`; raises ``ValueError`` for anything else."""
    if depth > DEPTH_LIMIT:
        raise ValueError(f"arguments nested more than {DEPTH_LIMIT} deep")
    if isinstance(tree, list):
        return [decode(v, depth + 1) for v in tree]
    if isinstance(tree, str):
        return text(tree, "an argument")
    if not isinstance(tree, dict):
        return tree
    if len(tree) != 1:
        raise ValueError(f"an argument with the keys {sorted(tree)}, one is allowed")
    ((key, value),) = tree.items()
    if key == "ref":
        return Ref(text(value, "a reference"))
    if key in _CHOICES:
        if not isinstance(value, str) or value not in _CHOICES[key]:
            raise ValueError(f"unknown {key} {value!r}")
        return _CHOICES[key][value]
    if key == "ellipsis":
        return Ellipsis
    if key not in ("tuple", "dict", "slice") or not isinstance(value, list):
        raise ValueError(f"unknown argument {key!r}")
    values = [decode(v, depth + 1) for v in value]
    if key == "tuple":
        return tuple(values)
    if key == "slice":
        return slice(*values)
    if not all(isinstance(v, list) and len(v) == 2 and _is_key(v[0]) for v in values):
        raise ValueError("a dict is a list of pairs, its keys are text or numbers")
    if len({k for k, _ in values}) != len(values):
        raise ValueError("a dict with a key twice")
    return dict(values)


_CHOICES: dict[str, dict[str, Any]] = {"float": _SPECIAL, "dtype": DTYPES, "memory_format": _MEMORY_FORMATS}


def _is_key(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float, bool))


def text(value: Any, what: str) -> str:
    """A name or a text argument: printable, of bounded length."""
    if not isinstance(value, str) or len(value) > TEXT_LIMIT or not value.isprintable():
        raise ValueError(f"{what} must be printable text of at most {TEXT_LIMIT} characters, got {value!r}")
    return value


def fields(value: Any, names: tuple[str, ...], what: str) -> list[Any]:
    """The values of an object that has exactly these fields."""
    if not isinstance(value, dict) or value.keys() != set(names):
        got = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"{what} has the fields {got}, not {list(names)}")
    return [value[name] for name in names]


def typed(value: Any, kind: type, what: str) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{what} must be of type {kind.__name__}, got {value!r}")
    return value


# ------------------------------------------------------------------------------------------- steps


def encode_step(step: Step, layers: Mapping[str, Any]) -> dict[str, Any]:
    what = f"step {step.name!r}"
    described: dict[str, Any] = {"name": text(step.name, what), "kind": step.kind}
    if step.kind == "output":
        return described | {"value": encode(step.args[0], what)}
    if step.kind == "input":
        return described
    if step.kind == "layer":
        described["layer"] = step.target
        layer = layers[str(step.target)]
        return described | {"arguments": _encode_all(layer.bind(step.args, step.kwargs), what)}
    described["operator"] = step.target
    found = operators.find(str(step.target))
    if found.schema is None:
        return described | {"arguments": [encode(a, what) for a in step.args]}
    given = operators.bind(found, step.args, step.kwargs)
    return described | {"arguments": _encode_all(operators.explicit(found, given), what)}


def _encode_all(values: dict[str, Any], what: str) -> dict[str, Any]:
    return {name: encode(value, what) for name, value in values.items()}


def decode_step(described: Any, layers: dict[str, Any]) -> Step:
    if not isinstance(described, dict):
        raise ValueError("a step is no JSON object")
    name, kind = text(described.get("name"), "a step's name"), described.get("kind")
    what = f"step {name!r}"
    if kind == "output":
        return Step(name, "output", "", (decode(fields(described, ("name", "kind", "value"), what)[2]),))
    if kind == "input":
        fields(described, ("name", "kind"), what)
        return Step(name, "input")
    if kind == "operator":
        target, arguments = fields(described, ("name", "kind", "operator", "arguments"), what)[2:]
        found = operators.find(typed(target, str, what))
        if found.schema is None:
            return Step(name, "operator", target, tuple(decode(typed(arguments, list, what))))
        return Step(name, "operator", target, *operators.unbind(found, _decode_all(arguments, what)))
    if kind == "layer":
        called = text(described.get("layer"), what)
        layer = layers.get(called)
        if layer is None:
            raise ValueError(f"{what} calls layer {called!r}, which is not in the file")
        target, arguments = fields(described, ("name", "kind", "layer", "arguments"), what)[2:]
        return Step(name, "layer", target, layer.unbind(_decode_all(arguments, what)))
    raise ValueError(f"{what} is of unknown kind {kind!r}")


def _decode_all(values: Any, what: str) -> dict[str, Any]:
    return {text(name, what): decode(value) for name, value in typed(values, dict, what).items()}


# ------------------------------------------------------------------------------- inputs and signature


def encode_input(name: str, spec: InputSpec) -> dict[str, Any]:
    free = [size is None for size in spec.axes]
    dtype = encode(spec.dtype, f"input {name!r}")["dtype"]
    return {"name": name, "shape": list(spec.shape), "free": free, "dtype": dtype}


def decode_input(described: Any) -> tuple[str, InputSpec]:
    name, shape, free, dtype = fields(described, ("name", "shape", "free", "dtype"), "an input")
    what = f"input {text(name, 'an input')!r}"
    sizes_fit = isinstance(shape, list) and all(type(s) is int and 0 <= s < 2**48 for s in shape)
    if not sizes_fit or not isinstance(free, list) or len(free) != len(shape) or len(shape) > 16:
        raise ValueError(f"{what} has the shape {shape} and free axes {free}")
    for value in free:
        typed(value, bool, what)
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{what} is of unknown dtype {dtype!r}")
    return name, InputSpec(tuple(shape), DTYPES[dtype], tuple(free))


def encode_signature(signature: Signature) -> dict[str, Any]:
    parameters = []
    for parameter in signature.parameters:
        what = f"parameter {parameter.name!r}"
        described = {"name": parameter.name, "kind": parameter.kind}
        if parameter.default is not REQUIRED:
            described["default"] = encode(parameter.default, f"the default of {what}")
        parameters.append(described)
    return {"parameters": parameters, "call": _encode_all(signature.call, "the example's call")}


def decode_signature(described: Any) -> Signature:
    parameters, call = fields(described, ("parameters", "call"), "the signature")
    return Signature(
        tuple(map(_decode_parameter, typed(parameters, list, "the parameters"))),
        _decode_all(call, "the call"),
    )


def _decode_parameter(described: Any) -> Parameter:
    if not isinstance(described, dict):
        raise ValueError("a parameter is no JSON object")
    has_default = "default" in described
    names = ("name", "kind", "default") if has_default else ("name", "kind")
    name, kind = fields(described, names, "a parameter")[:2]
    if kind not in PARAMETER_KINDS:
        raise ValueError(f"parameter {name!r} is of unknown kind {kind!r}")
    return Parameter(
        text(name, "a parameter"), kind, decode(described["default"]) if has_default else REQUIRED
    )
