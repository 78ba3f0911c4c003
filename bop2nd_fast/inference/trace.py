"""The user's model as a functional graph of our and torch's operators, seen by ``torch.export``.

Whatever the model does in Python (hooks, branches, defaults, closures, writes in place under two names,
autocast) has happened when the graph stands there. Sizes stay free where the model leaves them free; a branch
on a size in the user's code becomes a condition that the packed model checks on every call. Conditions of
torch's own operators need no check: the operators judge their arguments again.
"""

from __future__ import annotations

import io
import linecache
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument

from .canonical import Canonical
from .examples import ConversionError, Example, plain
from .fold import Form, form_of

_TORCH = Path(torch.__file__).parent
_OURS = Path(__file__).parent.parent
# What export raises on code that runs eagerly: its own errors (RuntimeErrors), or Python's where a stand-in
# for a tensor or a size meets code that looks too closely.
_EXPORT_ERRORS = (
    RuntimeError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    AssertionError,
)
_DECIDES = re.compile(
    r"\b(if|while|assert|and|or|not|in|is|min|max|sorted|bool|any|all|match|case|filter)\b|[=!<>]=|[<>]|%"
)
PRODUCTS = (torch.ops.bop2nd.binary_conv2d.default, torch.ops.bop2nd.binary_linear.default)


@dataclass(frozen=True)
class ValueInfo:
    """What the example input made of one value; ``form`` is None for strides that fusion does not know."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    form: Form | None

    @staticmethod
    def of(value: Tensor) -> ValueInfo:
        return ValueInfo(tuple(value.shape), value.dtype, value.device, form_of(value))


@dataclass
class Traced:
    """A functional graph in the order it runs, and what is known about each value.

    A product of signs stands for its first result (the dots). ``constants`` are values that depend on no
    input. ``sizes`` holds the size of every axis of an input as a symbol, or as the number it is fixed to.
    """

    graph: fx.Graph
    constants: dict[fx.Node, Any]
    inputs: list[fx.Node]
    output: Any
    sizes: list[list[Any]]
    conditions: list[sympy.Basic]
    leaves: set[str]  # paths of modules without children
    info: dict[fx.Node, ValueInfo] = field(default_factory=dict)

    def tensor(self, node: Any) -> Tensor | None:
        """The value of a constant node."""
        value = self.constants.get(node) if isinstance(node, fx.Node) else None
        return value if isinstance(value, Tensor) else None

    def product(self, node: Any) -> bool:
        """Whether a node is a product of signs with weights that are constants."""
        return isinstance(node, fx.Node) and node.target in PRODUCTS and self.tensor(node.args[1]) is not None

    def values(
        self, tensors: Sequence[Tensor], product: Callable[[fx.Node, tuple[Any, ...]], Any] | None = None
    ) -> Iterator[tuple[fx.Node, Any, dict[fx.Node, Any]]]:
        """Run on these inputs: every node, its value, and the values that are still to be read.

        ``product`` runs products of signs in place of the operator itself.
        """
        alive: dict[fx.Node, Any] = dict(zip(self.inputs, tensors, strict=True)) | self.constants
        last: dict[fx.Node, fx.Node] = {a: node for node in self.graph.nodes for a in node.all_input_nodes}
        for node in self.graph.nodes:
            if node.op == "output":
                break
            if node not in alive and node.op == "placeholder":
                continue  # an argument that is no tensor: its value is where it was used
            if node in self.constants:
                continue
            if node.op == "call_function":
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), alive.__getitem__)
                if node.target in PRODUCTS:
                    alive[node] = (product(node, args) if product else node.target(*args, **kwargs))[0]
                else:
                    alive[node] = node.target(*args, **kwargs)
            yield node, alive[node], alive
            for used in node.all_input_nodes:
                if last.get(used) is node and used not in self.constants:
                    alive.pop(used, None)

    def run(self, tensors: Sequence[Tensor]) -> Any:
        """The graph's result as plain tuples, lists and dicts."""
        alive: dict[fx.Node, Any] = dict(zip(self.inputs, tensors, strict=True)) | self.constants
        for _, _, found in self.values(tensors):
            alive = found
        return pytree.tree_map_only(fx.Node, alive.__getitem__, self.output)

    def observe(self, tensors: Sequence[Tensor]) -> None:
        """Note shape, dtype and memory format of every value on these inputs."""
        for node, value, _ in self.values(tensors):
            if isinstance(value, Tensor):
                self.info[node] = ValueInfo.of(value)


def trace(model: nn.Module, example: Example, n_free: int | None = None) -> Traced:
    """The graph of a model that is in eval mode and wants no gradients; the first ``n_free`` axes are free.

    Raises:
        ConversionError: export fails, or the model changes its own buffers; the message has the user's line.
    """
    example = example.clone()  # export leaves marks on the tensors it was given
    tensors = torch.export.ShapesCollection()
    for tensor in example.tensors():
        free = range(tensor.dim())[:n_free]
        tensors[tensor] = {i: Dim.AUTO if i in free else Dim.STATIC for i in range(tensor.dim())}
    shapes = (
        tensors.dynamic_shapes(model, example.args, example.kwargs)
        if example.tensors() and n_free != 0
        else None
    )
    with _silence():
        try:
            exported = torch.export.export(
                model, example.args, example.kwargs, dynamic_shapes=shapes, strict=False
            )
            program = exported.run_decompositions({})
        except _EXPORT_ERRORS as error:
            raise ConversionError(f"{type(model).__name__} cannot be traced: {_told(error)}") from error
    return _Reader(model, program).read()


@contextmanager
def _silence() -> Iterator[None]:
    """Without torch's remarks on the way: what matters of them is in the error."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class _Reader:
    """An exported program as a :class:`Traced`."""

    def __init__(self, model: nn.Module, program: Any) -> None:
        self.model, self.program = model, program
        self.graph: fx.Graph = program.graph_module.graph
        self.inputs: list[fx.Node] = []
        self.constants: dict[fx.Node, Any] = {}

    def read(self) -> Traced:
        self._placeholders()
        outputs = self._outputs()
        output_node = next(n for n in self.graph.nodes if n.op == "output")
        output_node.args = (tuple(outputs),)
        Canonical(self.graph, self.constants).run()
        (flat,) = output_node.args
        assert isinstance(flat, tuple)
        tree = plain(pytree.tree_unflatten(list(flat), self.program.call_spec.out_spec))
        values = [node.meta["val"] for node in self.inputs]
        sizes = [[getattr(getattr(s, "node", s), "expr", s) for s in value.shape] for value in values]
        symbols = {s for axes in sizes for s in axes if isinstance(s, sympy.Symbol)}
        for axes in sizes:  # what is no symbol by itself (2 * s, say) is taken as the example has it
            axes[:] = [s if s in symbols or isinstance(s, int) else None for s in axes]
        leaves = {name for name, module in self.model.named_modules() if not list(module.children())}
        conditions = list(self._conditions(values))
        return Traced(self.graph, self.constants, self.inputs, tree, sizes, conditions, leaves)

    def _placeholders(self) -> None:
        nodes = {node.name: node for node in self.graph.nodes if node.op == "placeholder"}
        for spec in self.program.graph_signature.input_specs:
            if not isinstance(spec.arg, TensorArgument):
                if spec.kind is not InputKind.USER_INPUT:
                    raise ConversionError(f"a model that holds {spec.target} (no tensor) cannot be packed")
                continue
            node = nodes[spec.arg.name]
            if spec.kind is InputKind.USER_INPUT:
                self.inputs.append(node)
            else:
                held = {**self.program.constants, **self.program.state_dict}
                self.constants[node] = held[spec.target].detach()
                node.meta["path"] = spec.target

    def _outputs(self) -> list[Any]:
        node = next(n for n in self.graph.nodes if n.op == "output")
        outputs: list[Any] = []
        for value, spec in zip(node.args[0], self.program.graph_signature.output_specs, strict=True):
            if spec.kind is OutputKind.USER_OUTPUT:
                outputs.append(value)
            elif spec.kind is not OutputKind.USER_INPUT_MUTATION:  # what it does to its arguments is lost
                raise ConversionError(
                    f"the model changes {spec.target} in every call, also in eval mode: a packed model has "
                    "no state"
                )
        return outputs

    def _conditions(self, values: Sequence[Any]) -> Iterator[sympy.Basic]:
        """What the user's code asked about sizes, as it was true of the example."""
        environments = [s.node.shape_env for v in values for s in v.shape if isinstance(s, torch.SymInt)]
        for guard in environments[0].guards if environments else ():
            if _asked_by_user(guard.sloc.framework_loc):
                yield environments[0].simplify(guard.expr.xreplace(environments[0].replacements))


def _asked_by_user(frame: Any) -> bool:
    """Whether a line of Python decided on a size, and not one of torch's operators or of ours.

    Operators in C++ leave the frame of the line that calls them, which then has no sign of a decision.
    """
    if frame is None or isinstance(frame, str):
        return True
    place = Path(frame.filename)
    machinery = place.is_relative_to(_TORCH) and not place.is_relative_to(_TORCH / "nn")
    if machinery or place.is_relative_to(_OURS):
        return False
    return not frame.line or bool(_DECIDES.search(frame.line))


def _told(error: BaseException) -> str:
    """The first lines of an error of torch.export and the user's line it speaks of."""
    text = str(error).strip().split("\n\n")[0]
    frames, place = [], error.__traceback__
    while place is not None:
        frames.append((place.tb_frame.f_code.co_filename, place.tb_lineno))
        place = place.tb_next
    user = [
        f for f in frames if not Path(f[0]).is_relative_to(_TORCH) and not Path(f[0]).is_relative_to(_OURS)
    ]
    inside = [f for f in user if os.path.isfile(f[0])]
    where = ""
    if inside:
        file, number = inside[-1]
        where = f" ({file}, line {number}: {linecache.getline(file, number).strip()})"
    return f"{type(error).__name__}: {text[:600]}{where}"


def line_of(node: fx.Node) -> str:
    """Where the user's code asked for a node: `` (file, line n: code)``, or nothing if that is not known."""
    trace_lines = (node.meta.get("stack_trace") or "").strip().split("\n")
    for place, code in zip(trace_lines[-2::-1], trace_lines[:0:-1], strict=False):
        if place.strip().startswith("File ") and "<eval_with_key>" not in place:
            return f" ({place.strip()}: {code.strip()})"
    return ""
