"""Reads and runs packed files of profile ``bits`` from docs/packed_file.md alone: numpy, json and hashlib.

Nothing of the package and nothing of torch is imported: it checks that the specification is complete.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np

Array = Any
DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2",
    "I8": "<i1", "U8": "<u1", "BOOL": "?",
}  # fmt: skip


def read(data: bytes) -> tuple[dict[str, str], dict[str, Any], dict[str, Array]]:
    """Metadata, graph and tensors, after every check of sections 1 to 3."""
    n = int.from_bytes(data[:8], "little")
    assert n % 8 == 0 and n <= 2**24
    header = json.loads(data[8 : 8 + n])
    metadata = header.pop("__metadata__")
    body, at, tensors = data[8 + n :], 0, {}
    digest = hashlib.sha256()
    for key in ("version", "profile", "graph"):
        digest.update(metadata[key].encode() + b"\0")
    for entry in sorted(header.values(), key=lambda e: e["data_offsets"]):
        assert entry["data_offsets"][0] == at
        at = entry["data_offsets"][1]
    assert at == len(body)
    for name in sorted(header, key=str.encode):
        entry = header[name]
        raw = body[slice(*entry["data_offsets"])]
        tensors[name] = np.frombuffer(raw, DTYPES[entry["dtype"]]).reshape(entry["shape"])
        digest.update(name.encode() + b"\0" + entry["dtype"].encode() + b"\0")
        for number in (len(entry["shape"]), *entry["shape"]):
            digest.update(number.to_bytes(8, "little"))
        digest.update(raw)
    assert digest.hexdigest() == metadata["sha256"]
    assert metadata["format"] == "bop2nd_fast.packed_model" and metadata["version"] == "2"
    graph = json.loads(metadata["graph"])
    check_layouts(graph, tensors)
    return metadata, graph, tensors


def check_layouts(graph: dict[str, Any], tensors: dict[str, Array]) -> None:
    """Every tensor belongs to something, every bit tensor to its layout."""
    assert set(graph) == {"signature", "inputs", "constants", "layers", "steps"}
    named = {f"constants.{name}" for name in graph["constants"]}
    for name, layer in graph["layers"].items():
        named |= {f"layers.{name}.{key}" for key in layer["tensors"]}
        for key, layout in layer["layouts"].items():
            words, shape, d = tensors[f"layers.{name}.{key}"], layout["shape"], layout["dim"]
            assert layout["version"] == 1 and layout["length"] == shape[d] and words.dtype == np.int32
            assert list(words.shape) == [*shape[:d], *shape[d + 1 :], -(-shape[d] // 32)]
            if shape[d] % 32:
                assert not (words[..., -1] >> (shape[d] % 32)).any()
    assert named == set(tensors)


# ------------------------------------------------------------------------------------------- words


def unpack(words: Array, length: int) -> Array:
    """``[..., ceil(length / 32)]`` -> +-1 integers ``[..., length]``."""
    bits = words[..., None].view(np.uint32) >> np.arange(32, dtype=np.uint32) & 1
    return 1 - 2 * bits.reshape(*words.shape[:-1], -1)[..., :length].astype(np.int64)


def pack(values: Array) -> Array:
    """Signs along the last axis -> words; NaN and zeros are +1."""
    length = values.shape[-1]
    bits = np.zeros((*values.shape[:-1], -(-length // 32) * 32), np.uint64)
    bits[..., :length] = values < 0
    words = (bits.reshape(*values.shape[:-1], -1, 32) << np.arange(32, dtype=np.uint64)).sum(-1)
    return words.astype(np.uint32).view(np.int32)


def windows(image: Array, kernel: Any, attributes: dict[str, Any], fill: Any, out: tuple[int, int]) -> Array:
    """``[N, H, W, ...]`` -> ``[N, Ho, Wo, kH, kW, ...]``."""
    (sy, sx), (py, px), (dy, dx) = (attributes[k] for k in ("stride", "padding", "dilation"))
    height = (out[0] - 1) * sy + (kernel[0] - 1) * dy + 1
    width = (out[1] - 1) * sx + (kernel[1] - 1) * dx + 1
    size = [max(height, image.shape[1] + py), max(width, image.shape[2] + px)]
    padded = np.full((image.shape[0], *size, *image.shape[3:]), fill, image.dtype)
    padded[:, py : py + image.shape[1], px : px + image.shape[2]] = image

    def tap(i: int, j: int) -> Array:
        y, x = (
            slice(i * dy, i * dy + (out[0] - 1) * sy + 1, sy),
            slice(j * dx, j * dx + (out[1] - 1) * sx + 1, sx),
        )
        return padded[:, y, x]

    rows = [[tap(i, j) for j in range(kernel[1])] for i in range(kernel[0])]
    return np.moveaxis(np.array(rows), (0, 1), (3, 4))


def convolved(image: Array, weight: Array, attributes: dict[str, Any], fill: Any) -> Array:
    """``[N, H, W, C]`` and ``[O, kH, kW, C / groups]`` -> ``[N, Ho, Wo, O]``."""
    groups, kernel = attributes["groups"], weight.shape[1:3]
    sizes = zip(
        image.shape[1:3], kernel, *(attributes[k] for k in ("stride", "padding", "dilation")), strict=True
    )
    out = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)
    taken = windows(image, kernel, attributes, fill, out)
    parts = zip(np.split(taken, groups, -1), np.split(weight, groups, 0), strict=True)
    return np.concatenate([np.einsum("nyxijc,oijc->nyxo", x, w) for x, w in parts], -1)


def emitted(
    dot: Array,
    attributes: dict[str, Any],
    t: dict[str, Array],
    residual: Array | None,
    input_scale: Array | None = None,
) -> Any:
    """What a product emits, channels last."""
    if "threshold" in t:
        return pack(np.where(dot < t["threshold"], -1, 1))
    value = dot.astype(np.float32)
    if attributes["emits"] is None:
        value = value if input_scale is None else value * input_scale
        return value + t["bias"] if "bias" in t else value
    low, high = attributes["low"], attributes["high"]
    value = value if low is None else np.maximum(value, np.float32(low))
    value = value if high is None else np.minimum(value, np.float32(high))
    value = value if input_scale is None else value * input_scale
    for name, operation in (("scale", np.multiply), ("shift", np.add)):
        value = operation(value, t[name]) if name in t else value
    value = value if residual is None else value + residual
    if attributes["relu"]:
        value = np.where(value < 0, np.float32(0), value)
    if "slope" in t:
        value = np.where(value < 0, value * t["slope"], value)
    value = value + t["post_shift"] if "post_shift" in t else value
    signs = pack(value + t["sign_shift"] if "sign_shift" in t else value)
    return {"values": value, "signs": signs, "both": (value, signs)}[attributes["emits"]]


def pool(image: Array, a: dict[str, Any], fill: Any, reduce: Callable[..., Array]) -> Array:
    out = []
    for n, k, s, p, d in zip(
        image.shape[1:3], *(a[x] for x in ("kernel_size", "stride", "padding", "dilation")), strict=True
    ):
        span = n + 2 * p - d * (k - 1) - 1
        o = -(-span // s) + 1 if a["ceil_mode"] else span // s + 1
        out.append(o - 1 if a["ceil_mode"] and (o - 1) * s >= n + p else o)
    taken = windows(image, a["kernel_size"], a, fill, (out[0], out[1]))
    return reduce(reduce(taken, axis=3), axis=3)


def last(image: Array) -> Array:
    return np.moveaxis(image, 1, -1)


def first(image: Array) -> Array:
    return np.moveaxis(image, -1, 1)


def run_layer(layer: dict[str, Any], t: dict[str, Array], x: dict[str, Any]) -> Any:
    kind, a = layer["kind"], layer["attributes"]
    weight = unpack(t["weight"], layer["layouts"]["weight"]["length"]) if "weight" in t else None
    if kind == "constant":
        return t["value"]
    operand = x["words"] if "words" in x else x["input"]
    if kind == "pack":
        if a["dim"] == -1:
            return pack(operand)
        return np.concatenate([pack(part) for part in np.split(last(operand), a["groups"], -1)], -1)
    if kind == "regroup":
        return np.concatenate([pack(v) for v in np.split(unpack(operand, a["length"]), a["groups"], -1)], -1)
    if kind == "flatten_bits":
        return operand.reshape(operand.shape[0], -1)
    if kind == "pool_bits":
        flip = t.get("decreasing", np.int32(0))
        return pool(operand ^ flip, a, -1, np.bitwise_and.reduce) ^ flip
    if kind == "max_pool":
        return first(pool(last(operand), a, -np.inf, np.max))
    if kind == "packed_conv2d":
        parts = np.split(operand, a["groups"], -1)
        signs = np.concatenate([unpack(part, weight.shape[-1]) for part in parts], -1)
        residual = last(x["residual"]) if "residual" in x else None
        result = emitted(convolved(signs, weight, a, a["padding_value"]), a, t, residual)
        if isinstance(result, tuple):
            return first(result[0]), result[1]
        return result if result.dtype == np.int32 else first(result)
    if kind == "real_conv2d":
        return first(convolved(last(operand), weight.astype(np.float32), a, 0) + t.get("bias", 0))
    if kind == "real_linear":
        return operand @ weight.T.astype(np.float32) + t.get("bias", 0)
    if kind == "quantize_rows":
        scale = np.abs(operand).max(-1 if a["per_row"] else None, keepdims=True) / np.float32(127)
        q = np.round(np.divide(operand, scale, out=np.zeros_like(operand), where=scale != 0))
        return np.clip(q, -127, 127).astype(np.int8), scale.reshape(-1) if a["per_row"] else scale.reshape(1)
    if kind in ("signed_conv2d", "signed_linear"):
        # Sums of real numbers have an order in the specification; here they agree to rounding.
        numbers = (
            operand if a["input"] == "real" else a["multiplier"] * operand.astype(np.int64) - a["zero_point"]
        )
        scale = x.get("input_scale")
        if kind == "signed_linear":
            return emitted(numbers @ weight.T, a, t, None, None if scale is None else scale.reshape(-1, 1))
        dot = convolved(last(numbers), weight, a, 0)
        result = emitted(dot, a, t, None, None if scale is None else scale.reshape(-1, 1, 1, 1))
        if isinstance(result, tuple):
            return first(result[0]), result[1]
        return result if result.dtype == np.int32 else first(result)
    assert kind == "packed_linear"
    dot = unpack(operand, weight.shape[1]) @ weight.T
    if "threshold" not in t and a["emits"] is None:
        dot = dot - a["padding_bits"]
    return emitted(dot, a, t, x.get("residual"))


# ------------------------------------------------------------------------------------------- operators


def softmax(self: Array, dim: int, dtype: None) -> Array:
    e = np.exp(self - self.max(dim, keepdims=True))
    return e / e.sum(dim, keepdims=True)


def batch_norm(
    input: Array, weight: Array, bias: Array, running_mean: Array, running_var: Array, eps: float, **_: Any
) -> Array:
    shape = (-1,) + (1,) * (input.ndim - 2)
    norm = (input - running_mean.reshape(shape)) / np.sqrt(running_var.reshape(shape) + eps)
    return norm * weight.reshape(shape) + bias.reshape(shape)


def conv2d(input: Array, weight: Array, bias: Array, **attributes: Any) -> Array:
    result = first(convolved(last(input), np.moveaxis(weight, 1, -1), attributes, 0))
    return result if bias is None else result + bias[:, None, None]


def avg_pool2d(
    self: Array, kernel_size: Any, stride: Any, count_include_pad: bool, divisor_override: Any, **a: Any
) -> Array:
    a |= {"kernel_size": kernel_size, "stride": stride or kernel_size, "dilation": [1, 1]}
    total = pool(last(self), a, 0, np.add.reduce)
    counts = np.ones_like(last(self)[:1, :, :, :1])
    divisor = math.prod(kernel_size) if count_include_pad else pool(counts, a, 0, np.add.reduce)
    return first(total / (divisor_override or divisor))


def adaptive(self: Array, output_size: list[int]) -> Array:
    for axis, o in zip((2, 3), output_size, strict=True):
        n = self.shape[axis]
        parts = [np.take(self, range(i * n // o, -(-(i + 1) * n // o)), axis) for i in range(o)]
        self = np.stack([part.mean(axis) for part in parts], axis)
    return self


def prelu(self: Array, weight: Array) -> Array:
    return np.where(self > 0, self, self * weight.reshape((-1,) + (1,) * (self.ndim - 2)))


def flatten(self: Array, start_dim: int, end_dim: int) -> Array:
    start, end = start_dim % self.ndim, end_dim % self.ndim
    return self.reshape(*self.shape[:start], -1, *self.shape[end + 1 :])


def expand(self: Array, size: list[int], implicit: bool) -> Array:
    own = (1,) * (len(size) - self.ndim) + self.shape
    return np.broadcast_to(self, [n if n != -1 else o for n, o in zip(size, own, strict=True)])


OPERATORS: dict[str, Callable[..., Any]] = {
    "aten.add.Tensor": lambda self, other, alpha: self + np.float32(alpha) * other,
    "aten.sub.Tensor": lambda self, other, alpha: self - np.float32(alpha) * other,
    "aten.mul.Tensor": lambda self, other: self * np.float32(other),
    "aten.div.Tensor": lambda self, other: self / np.float32(other),
    "aten.expand.default": expand,
    "aten.expand_as.default": lambda self, other: np.broadcast_to(self, other.shape),
    "aten.neg.default": lambda self: -self,
    "aten.relu.default": lambda self: np.maximum(self, 0),
    "aten.leaky_relu.default": lambda self, negative_slope: prelu(self, np.float32(negative_slope)),
    "aten.prelu.default": prelu,
    "aten.hardtanh.default": lambda self, min_val, max_val: np.clip(self, min_val, max_val),
    "aten.clamp.default": lambda self, min, max: np.clip(self, min, max),
    "aten.batch_norm.default": batch_norm,
    "aten.conv2d.default": conv2d,
    "aten.linear.default": lambda input, weight, bias: input @ weight.T + (0 if bias is None else bias),
    "aten.avg_pool2d.default": avg_pool2d,
    "aten.adaptive_avg_pool2d.default": adaptive,
    "aten.mean.dim": lambda self, dim, keepdim, dtype: self.mean(tuple(dim), keepdims=keepdim),
    "aten.softmax.int": softmax,
    "aten.log_softmax.int": lambda self, dim, dtype: np.log(softmax(self, dim, dtype)),
    "aten.cat.default": lambda tensors, dim: np.concatenate(tensors, dim),
    "aten.flatten.using_ints": flatten,
    "aten.view.default": lambda self, size: self.reshape(size),
    "aten.reshape.default": lambda self, shape: self.reshape(shape),
    "aten.permute.default": lambda self, dims: self.transpose(dims),
    "aten.contiguous.default": lambda self, memory_format: self,
    "aten.sym_size.int": lambda self, dim: self.shape[dim],
    "int.mul": lambda a, b: a * b,
    "getitem": lambda values, index: values[index],
}  # fmt: skip


def run(graph: dict[str, Any], tensors: dict[str, Array], inputs: dict[str, Array]) -> Any:
    """The output for the inputs by name."""
    known: dict[str, Any] = {name: tensors[f"constants.{name}"] for name in graph["constants"]}

    def tree(value: Any) -> Any:
        if isinstance(value, list):
            return [tree(v) for v in value]
        if not isinstance(value, dict):
            return value
        ((key, inner),) = value.items()
        if key == "ref":
            return known[inner]
        if key == "dict":
            return {tree(k): tree(v) for k, v in inner}
        assert key in ("tuple", "memory_format")
        return tuple(map(tree, inner)) if key == "tuple" else inner

    for step in graph["steps"]:
        if step["kind"] == "output":
            return tree(step["value"])
        if step["kind"] == "input":
            known[step["name"]] = inputs[step["name"]]
        elif step["kind"] == "layer":
            layer = graph["layers"][step["layer"]]
            own = {key: tensors[f"layers.{step['layer']}.{key}"] for key in layer["tensors"]}
            operands = {name: tree(v) for name, v in step["arguments"].items()}
            known[step["name"]] = run_layer(layer, own, operands)
        elif isinstance(step["arguments"], list):
            known[step["name"]] = OPERATORS[step["operator"]](*map(tree, step["arguments"]))
        else:
            arguments = {name: tree(v) for name, v in step["arguments"].items()}
            known[step["name"]] = OPERATORS[step["operator"]](**arguments)
    raise AssertionError("no output")
