"""PackedModel: the converted network as a short list of steps that a person can read and a file can hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from . import packed_file
from .engine import Parted, explain, why_single_steps
from .graph import InputSpec, Ref, Signature, Step, dtype_name, map_leaves
from .memory import LIMIT, Gauge
from .packed_graph import PackedGraph, Profile
from .packed_layer import PackedLayer
from .packed_writer import save
from .program import Program

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class LayerReport:
    """Bytes of one layer: as it is held here and in the file, and as fp32 parameters of the trained model."""

    layer: str
    kind: str
    bytes_packed: int
    bytes_fp32: int


class Layers(nn.ModuleDict):
    """Layers by name. Any name without a dot will do: none is looked up as an attribute."""

    def add_module(self, name: str, module: nn.Module | None) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"layer {name!r} must be a module, got {type(module).__name__}")
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"a layer cannot have the name {name!r}")
        self._modules[name] = module

    def train(self, mode: bool = True) -> Layers:
        self.__dict__["training"] = mode  # a layer may have that name too
        for layer in self.values():
            layer.train(mode)
        return self


class Constants(nn.Module):
    """Parameters and buffers that the graph reads by themselves: they move and are saved with the model."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            if not name or "." in name:
                raise ValueError(f"a constant cannot have the name {name!r}")
            self._buffers[name] = tensor.detach()  # not register_buffer: any name will do, it is no attribute

    def tensors(self) -> Iterable[Tensor]:
        """In the order of their names."""
        return cast("Iterable[Tensor]", self._buffers.values())

    def items(self) -> Iterable[tuple[str, Tensor]]:
        return cast("Iterable[tuple[str, Tensor]]", self._buffers.items())

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def __getitem__(self, name: str) -> Tensor:
        return cast("Tensor", self._buffers[name])

    def __len__(self) -> int:
        return len(self._buffers)


class PackedModel(nn.Module):
    """A network for inference only, made by :func:`bop2nd_fast.inference.convert` or ``load``.

    Call it as the trained model was called; it runs under ``torch.inference_mode`` and gives bit for bit the
    trained model's results in eval mode (converted with ``exact=False``: up to rounding), as ordinary tensors
    without gradients: targets of a loss, for example. The batch size is
    free, and so is the image size where the trained model left it free. It computes in the dtype it was
    converted in: convert again rather than cast it.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        layers: dict[str, nn.Module],
        inputs: Sequence[InputSpec],
        constants: dict[str, Tensor] | None = None,
        signature: Signature | None = None,
        memory_limit: int | None = None,
    ) -> None:
        """``inputs`` in the order of the input steps; without a ``signature`` a call gives them by position.

        Raises:
            ValueError: a graph that cannot run: unknown references, layers or operators, wrong arguments.
        """
        super().__init__()
        self.steps = tuple(steps)
        self.inputs = tuple(inputs)
        names = [step.name for step in self.steps if step.kind == "input"]
        if len(names) != len(self.inputs):
            raise ValueError(f"the graph has {len(names)} inputs, {len(self.inputs)} are described")
        self._names = tuple(names)
        self.signature = Signature.positional(names) if signature is None else signature
        self.signature.check(names)
        self._labels = tuple(names if signature else map(str, range(len(names))))
        self._plain = self.signature.plain == self._names
        self.layers = Layers(layers)
        self.constants = Constants(constants or {})
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        self.memory_limit = memory_limit  # bytes, see memory.py; None: whatever the graph asks for
        self._program: Program | None = None
        self._gauge: Gauge | None = None
        self._parts: Parted | None = None
        self._engine = "auto"
        self._current_program()
        super().train(False)

    def train(self, mode: bool = True) -> PackedModel:
        """Stays in eval mode, also inside a module that is put in training mode (a teacher, say)."""
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> PackedModel:
        """Moves to other devices; a change of dtype (``half``, ``to(torch.float64)``) is refused at once."""
        for dtype in {t.dtype for t in self.state_dict().values() if t.is_floating_point()}:
            if (changed := fn(torch.empty(0, dtype=dtype)).dtype) != dtype:
                raise TypeError(
                    f"a PackedModel computes in the dtypes it was converted in, here {dtype_name(dtype)}, "
                    f"not in {dtype_name(changed)}: cast the trained model and convert it again"
                )
        return super()._apply(fn, recurse)

    def _current_program(self) -> Program:
        """The graph made ready to run, anew after a layer or constant was put in another's place."""
        program = self._program
        layers, constants = self.layers._modules, self.constants._buffers
        if program is None or program.layers != layers or program.constants != list(constants):
            present = {name: layer for name, layer in layers.items() if layer is not None}
            program = self._program = Program(self.steps, present, list(constants))
        return program

    def _device(self) -> torch.device | None:
        """Where the tensors are, None if there are none (in half the time of ``buffers()``)."""
        for module in (self.constants, *self.layers._modules.values()):
            assert module is not None
            for tensor in (*module._buffers.values(), *module._parameters.values()):
                if tensor is not None:
                    return tensor.device
        return None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_program": None, "_gauge": None, "_parts": None}

    @property
    def engine(self) -> str:
        """How calls run: ``"auto"``, or ``"steps"`` for one torch operator after the other everywhere.

        By default a model of profile ``bits`` on a CPU runs in parts of the C++ runtime (:meth:`explain`), to
        the same bits.

        Raises:
            ValueError: set to anything else.
        """
        return self._engine

    @engine.setter
    def engine(self, name: str) -> None:
        if name not in ("auto", "steps"):
            raise ValueError(f"a PackedModel's engine is 'auto' or 'steps', not {name!r}")
        self._engine = name

    def explain(self) -> str:
        """Which steps calls on the model's device would run as parts of the C++ runtime, or why none."""
        return explain(self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the steps in order.

        A model from a file looks at sizes first, once for every set of input shapes: see ``memory.py``.

        Raises:
            TypeError, ValueError: arguments of another number, shape, dtype, device or constant value than in
                the conversion.
        """
        made = self._parts
        if made is not None and not kwargs and made.takes(self, args):
            grad = torch.is_grad_enabled()
            torch._C._set_grad_enabled(False)  # a tenth of what entering inference mode takes
            try:
                return made.run.run(self.constants.tensors(), _CPU, args)
            finally:
                torch._C._set_grad_enabled(grad)
        with torch.inference_mode():
            result = self._run(args, kwargs)
        if torch.is_inference_mode_enabled():
            return result
        return _ordinary(result) if type(result) is Tensor else tree_map_only(Tensor, _ordinary, result)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        positional = self._plain and not kwargs and len(args) == len(self._names)
        if not positional:
            values = self.signature.bind(args, kwargs)
            args = tuple(values[name] for name in self._names)
        program = self._current_program()
        device = self._device()
        for name, value, spec in zip(self._labels, args, self.inputs, strict=True):
            spec.check(value, name)
            if device is None:
                device = value.device
            elif value.device != device:
                raise ValueError(f"input {name} is on {value.device}, the model on {device}")
        device = device or _CPU
        constants = self.constants.tensors()
        if self.memory_limit is not None:
            if self._gauge is None or self._gauge.program is not program:
                self._gauge = Gauge(program)
            if not self._gauge.knows(args, self.memory_limit):
                return self._gauge.run(list(constants), device, args, self.memory_limit)
        if why_single_steps(self, args) is not None:
            return program.run(constants, device, args)
        made = self._parts
        if made is None or made.program is not program or not made.fresh():
            made = self._parts = Parted.of(program, self)
        if positional:
            made.judge(self, args)
        return made.run.run(constants, device, args)

    @property
    def graph(self) -> PackedGraph:
        """The parts as they are now."""
        layers, constants = dict(self.layers.items()), dict(self.constants.items())
        return PackedGraph(self.steps, layers, self.inputs, constants, self.signature)

    @property
    def profile(self) -> Profile:
        """Which profile of the file format the model is of, and if it is ``torch``, because of what."""
        return self.graph.profile

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
        for name, constant in self.constants.items():
            bytes_fp32 = 4 * constant.numel() if constant.is_floating_point() else 0
            rows.append(LayerReport(name, "constant", constant.nbytes, bytes_fp32))
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
        """Write one safetensors file, whole or not at all. See ``packed_file``.

        Raises:
            ValueError: the model has a layer or a name that a file cannot hold; the message says which.
        """
        save(self.graph, path)

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
        name = step.target
        if step.kind == "operator":
            name = name.removeprefix("aten.").removesuffix(".default").removesuffix(".Tensor")
        return f"{name}({operands})" if name else step.kind + (f" {operands}" if operands else "")


def load(path: str | Path, device: torch.device | str = "cpu") -> PackedModel:
    """Read a packed model. Needs neither the class of the trained model nor anything but this package.

    The time is linear in the file's size, the memory at most 32 times it (re-laid weights of few outputs; a
    graph's text takes most). Calls of the model are bounded too: see ``PackedModel.memory_limit``.

    Raises:
        OSError: no such file, or one that cannot be read.
        PackedFileError: not a packed model, truncated or altered, of another format version, or one that
            contradicts itself.
    """
    with torch.inference_mode(False), torch.no_grad():
        g = packed_file.read(path)
        with packed_file.refusals(path):
            model = PackedModel(g.steps, dict(g.layers), g.inputs, dict(g.constants), g.signature, LIMIT)
    return model.to(device).prepare()


def fp32_bytes(module: nn.Module) -> int:
    """Bytes of a module's real parameters and buffers if they were fp32 (counters left out)."""
    tensors = [*module.parameters(), *module.buffers()]
    return 4 * sum(t.numel() for t in tensors if t.is_floating_point())


def _ordinary(x: Tensor) -> Tensor:
    """A tensor that autograd can save, which one made in inference mode is not."""
    return x.clone() if x.is_inference() else x


def _text(tree: Any) -> str:
    return str(map_leaves(tree, lambda leaf: _Bare(leaf.name) if isinstance(leaf, Ref) else leaf))


class _Bare(str):
    """A string that shows without quotes inside a container."""

    def __repr__(self) -> str:
        return str(self)
