"""PackedModel: the converted network as a short list of steps that a person can read and a file can hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .layers import dtype_name
from .packed_layer import PackedLayer


@dataclass(frozen=True)
class Ref:
    """The result of an earlier step, inside the arguments of a later one."""

    name: str


@dataclass(frozen=True)
class Step:
    """One line of the graph. ``target`` is a layer's name, a function, or the name of a tensor method."""

    name: str
    kind: Literal["input", "layer", "function", "method", "output"]
    target: str | Callable[..., Any] = ""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class InputSpec:
    """What an input of the model must be: ``shape`` of the example, and its dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def check(self, value: Any, index: int) -> None:
        """Raise unless rank, dtype and (of images and rows) the channels are those of the example."""
        if not isinstance(value, Tensor):
            raise TypeError(f"input {index} must be a tensor, got {type(value).__name__}")
        n_axes = len(self.shape)
        wanted = ["N", *map(str, self.shape[1:])] if n_axes != 4 else ["N", str(self.shape[1]), "H", "W"]
        fits = value.dim() == n_axes and (n_axes not in (2, 4) or value.shape[1] == self.shape[1])
        if not fits:
            raise ValueError(f"input {index} must be [{', '.join(wanted)}], got shape {tuple(value.shape)}")
        if value.dtype != self.dtype:
            raise TypeError(f"input {index} must be {self.dtype}, as in the conversion; got {value.dtype}")


@dataclass(frozen=True)
class LayerReport:
    """Bytes of one layer: as it is held here and in the file, and as fp32 parameters of the trained model."""

    layer: str
    kind: str
    bytes_packed: int
    bytes_fp32: int


class PackedModel(nn.Module):
    """A network for inference only, made by :func:`bop2nd_fast.inference.convert` or ``load``.

    Call it as the trained model was called; it runs under ``torch.inference_mode`` and gives bit for bit the
    trained model's results in eval mode (converted with ``exact=False``: up to rounding). The batch size is
    free, and so is the image size where the trained model left it free. It computes in the dtype it was
    converted in: convert again rather than cast it.
    """

    def __init__(
        self, steps: Sequence[Step], layers: dict[str, nn.Module], inputs: Sequence[InputSpec]
    ) -> None:
        super().__init__()
        self.steps = tuple(steps)
        self.inputs = tuple(inputs)
        self.layers = nn.ModuleDict(layers)
        self._last_use = _last_uses(self.steps)
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> PackedModel:
        """Stays in eval mode; raises ``RuntimeError`` when asked to train."""
        if mode:
            raise RuntimeError("a PackedModel is for inference only; train the model it was converted from")
        return self

    @torch.inference_mode()
    def forward(self, *inputs: Tensor) -> Any:
        """Run the steps in order.

        Raises:
            TypeError, ValueError: inputs of another number, rank, channel count, dtype or device.
        """
        if len(inputs) != len(self.inputs):
            raise TypeError(f"this model takes {len(self.inputs)} input(s), got {len(inputs)}")
        device = next((t.device for t in self.buffers()), None)
        for index, (value, spec) in enumerate(zip(inputs, self.inputs, strict=True)):
            spec.check(value, index)
            if device is not None and value.device != device:
                raise ValueError(f"input {index} is on {value.device}, the model on {device}")
        values: dict[str, Any] = {}
        remaining = iter(inputs)
        for step, finished in zip(self.steps, self._last_use, strict=True):
            if step.kind == "input":
                values[step.name] = next(remaining)
                continue
            args = _resolve(step.args, values)
            if step.kind == "output":
                return args[0]
            kwargs = _resolve(step.kwargs, values)
            if step.kind == "layer":
                values[step.name] = self.layers[str(step.target)](*args, **kwargs)
            elif step.kind == "method":
                values[step.name] = getattr(args[0], str(step.target))(*args[1:], **kwargs)
            else:
                assert callable(step.target)
                values[step.name] = step.target(*args, **kwargs)
            for name in finished:
                del values[name]
        raise AssertionError("a graph without an output")

    def prepare(self) -> PackedModel:
        """Build what the kernels in use want kept beside the words (calls would do it when needed)."""
        for layer in self.layers.values():
            weight = getattr(layer, "weight", None)
            if isinstance(layer, PackedLayer) and weight is not None:
                weight.blocked_words(layer.config.get("groups", 1))
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of all words, thresholds and real parameters."""
        return sum(row.bytes_packed for row in self.report())

    def report(self) -> list[LayerReport]:
        """One row for every layer that holds something."""
        rows = []
        for name, layer in self.layers.items():
            packed = sum(t.nbytes for t in (*layer.parameters(), *layer.buffers()))
            if isinstance(layer, PackedLayer):
                row = LayerReport(name, layer.kind, packed, layer.config.get("fp32_bytes", 0))
            else:
                row = LayerReport(name, type(layer).__name__, packed, fp32_bytes(layer))
            if row.bytes_packed or row.bytes_fp32:
                rows.append(row)
        return rows

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all. See ``file_format``.

        Raises:
            ValueError: the model has a module or function that a file cannot hold; the message names it.
        """
        from .file_format import save

        save(self, path)

    def __repr__(self) -> str:
        fp32 = sum(row.bytes_fp32 for row in self.report())
        shapes = ", ".join(f"{list(s.shape)} {dtype_name(s.dtype)}" for s in self.inputs)
        head = f"PackedModel(  # {self.nbytes:,} bytes, in fp32 {fp32:,}; converted for {shapes}"
        width = max(len(step.name) for step in self.steps)
        lines = [f"  {step.name:<{width}} = {self._line(step)}" for step in self.steps]
        return "\n".join([head, *lines, ")"])

    def _line(self, step: Step) -> str:
        operands = ", ".join([*map(_text, step.args), *(f"{k}={_text(v)}" for k, v in step.kwargs.items())])
        if step.kind == "layer":
            layer = self.layers[str(step.target)]
            if isinstance(layer, PackedLayer):
                return f"{layer.kind}({operands})  # {layer.describe()}"
            return f"{type(layer).__name__}({operands})  # {layer.extra_repr()}"
        name = step.target if isinstance(step.target, str) else getattr(step.target, "__name__", step.target)
        return f"{name}({operands})" if name else step.kind + (f" {operands}" if operands else "")


def fp32_bytes(module: nn.Module) -> int:
    """Bytes of a module's real parameters and buffers if they were fp32 (counters left out)."""
    tensors = [*module.parameters(), *module.buffers()]
    return 4 * sum(t.numel() for t in tensors if t.is_floating_point())


def map_leaves(tree: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to the leaves of nested lists, tuples, dicts and slices, which become plain ones."""
    if isinstance(tree, (list, tuple)):
        mapped = [map_leaves(v, function) for v in tree]
        return tuple(mapped) if isinstance(tree, tuple) else mapped
    if isinstance(tree, dict):
        return {key: map_leaves(v, function) for key, v in tree.items()}
    if isinstance(tree, slice):
        return slice(
            map_leaves(tree.start, function), map_leaves(tree.stop, function), map_leaves(tree.step, function)
        )
    return function(tree)


def _resolve(tree: Any, values: dict[str, Any]) -> Any:
    return map_leaves(tree, lambda leaf: values[leaf.name] if isinstance(leaf, Ref) else leaf)


def _text(tree: Any) -> str:
    return str(map_leaves(tree, lambda leaf: _Bare(leaf.name) if isinstance(leaf, Ref) else leaf))


class _Bare(str):
    """A string that shows without quotes inside a container."""

    def __repr__(self) -> str:
        return str(self)


def _last_uses(steps: Sequence[Step]) -> list[tuple[str, ...]]:
    """For every step, the results nobody needs after it: they are dropped, as they would be in Python."""
    seen: set[str] = set()
    result: list[tuple[str, ...]] = []
    for step in reversed(steps):
        used = references(step)
        own = set() if step.kind in ("input", "output") else {step.name}
        result.append(tuple((used | own) - seen))
        seen |= used | {step.name}
    return result[::-1]


def references(step: Step) -> set[str]:
    """Names of the results a step reads."""
    names: set[str] = set()

    def note(leaf: Any) -> None:
        if isinstance(leaf, Ref):
            names.add(leaf.name)

    map_leaves((step.args, step.kwargs), note)
    return names
