"""What a network is made of and what it costs: one row per layer, from one call on an example.

Operators are counted where they run (``TorchDispatchMode``) and belong to the innermost module that called
them, so a user's own modules and packed models are counted like ours. Multiply-accumulates of torch's
operators are torch's own figures (``torch.utils.flop_counter``, half of them); fused recurrent layers and
attention run as the products they are made of while they are counted. What torch has no figure for
(``nn.Bilinear``, a user's own operators) counts as nothing.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import backends
from .binary_tensor import BinaryTensor
from .inference import PackedModel
from .inference.packed_layer import PackedLayer
from .nn import Quantizer

_KINDS = {"binary": "binary", "signed": "signed"}  # of our products, by the first word of their names


@dataclass
class Row:
    """One layer. Shapes are those of the call; bytes are of parameters (a packed layer's tensors).

    ``binary_macs``: +-1 times +-1; ``signed_macs``: +-1 weights times real or 8-bit inputs; ``real_macs``.
    ``bytes_saved``: held for the backward pass of a training step. ``seconds``: of a call, and
    ``kernel_share`` the share of it that its products take when they run alone in a loop; None unless
    measured.
    """

    name: str
    kind: str
    input: tuple[int, ...] = ()
    output: tuple[int, ...] = ()
    binary_macs: int = 0
    signed_macs: int = 0
    real_macs: int = 0
    binary_parameters: int = 0
    real_parameters: int = 0
    bytes_packed: int = 0
    bytes_fp32: int = 0
    bytes_saved: int = 0
    kernel: str = ""
    seconds: float | None = None
    kernel_share: float | None = None

    @property
    def bops(self) -> float:
        """Operations as papers count them: binary multiply-accumulates / 64 + the others."""
        return self.binary_macs / 64 + self.signed_macs + self.real_macs


@dataclass
class Summary:
    """The rows in the order of the calls; ``str`` gives a Markdown table."""

    rows: list[Row]
    batch: int

    @property
    def total(self) -> Row:
        total = Row("total", "")
        for entry in dataclasses.fields(Row):
            values = [getattr(row, entry.name) for row in self.rows]
            if entry.name == "seconds" and any(v is not None for v in values):
                total.seconds = sum(v for v in values if v is not None)
            elif entry.type == "int":
                setattr(total, entry.name, sum(values))
        return total

    def to_json(self) -> str:
        rows = [{**dataclasses.asdict(row), "bops": row.bops} for row in (*self.rows, self.total)]
        return json.dumps({"batch": self.batch, "rows": rows[:-1], "total": rows[-1]}, indent=1)

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Headings and one row of text per layer, the total last; columns without a value are left out."""
        rows = [*self.rows, self.total]
        columns: list[tuple[str, Callable[[Row], str]]] = [
            ("layer", lambda r: r.name),
            ("kind", lambda r: r.kind),
            ("input", lambda r: _shape(r.input)),
            ("output", lambda r: _shape(r.output)),
            ("binary MACs", lambda r: _count(r.binary_macs)),
            ("1-bit x real MACs", lambda r: _count(r.signed_macs)),
            ("real MACs", lambda r: _count(r.real_macs)),
            ("BOPs", lambda r: _count(r.bops)),
            ("1-bit weights", lambda r: _count(r.binary_parameters)),
            ("real weights", lambda r: _count(r.real_parameters)),
            ("bytes", lambda r: _count(r.bytes_packed)),
            ("in fp32", lambda r: _count(r.bytes_fp32)),
            ("saved for backward", lambda r: _count(r.bytes_saved)),
            ("ms", lambda r: "" if r.seconds is None else f"{r.seconds * 1e3:.3f}"),
            ("kernel's share", lambda r: "" if r.kernel_share is None else f"{r.kernel_share:.0%}"),
            ("kernel", lambda r: r.kernel.partition(",")[0]),
        ]
        texts = [(title, [text(row) for row in rows]) for title, text in columns]
        kept = [(title, column) for title, column in texts if any(column)]
        return [title for title, _ in kept], [list(row) for row in zip(*(c for _, c in kept), strict=True)]

    def __str__(self) -> str:
        titles, rows = self.cells()
        head = f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}\n"
        return head + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def summary(model: nn.Module, *example: Any, timed: bool = False, repeats: int = 20) -> Summary:
    """Call ``model`` on an example and say what every layer is and costs.

    Nothing changes: training mode, batch statistics, gradients and torch's random state stay as they were.

    Args:
        model: any module, also a ``PackedModel``.
        example: its positional arguments; the first tensor's first axis is the batch.
        timed: also measure every layer (a median over ``repeats`` calls) and its products alone.

    Raises:
        ValueError: no example, or no call of the model.
    """
    tensors = [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]
    if not tensors:
        raise ValueError("a summary needs an example: summary(model, torch.zeros(1, 3, 32, 32))")
    packed = isinstance(model, PackedModel)
    seen = model if packed else copy.deepcopy(model)
    watch = _Watch(seen)
    with torch.random.fork_rng({t.device for t in tensors if t.is_cuda}):  # dropout draws
        with _unfused(), watch.calls(), torch.no_grad(), _Operators(watch):
            seen.eval()(*example)
        rows = watch.finished()
        if not packed:
            _saved(seen, example, watch)
        if timed:
            _time(seen, example, watch, repeats)
    if isinstance(model, PackedModel):
        rows += [
            Row(r.layer, r.kind, bytes_packed=r.bytes_packed, bytes_fp32=r.bytes_fp32)
            for r in model.report()
            if r.kind == "constant"
        ]
    return Summary(rows, tensors[0].shape[0])


@dataclass
class _Call:
    """What was seen of one module over all its calls."""

    row: Row
    products: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    entered: float = 0.0
    times: list[float] = field(default_factory=list)


class _Watch:
    """Which module runs, by hooks around every module but quantizers (they are their layer's)."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.calls_of: dict[str, _Call] = {}
        self.order: list[str] = []
        self.stack: list[str] = []
        self.fp32 = {r.layer: r.bytes_fp32 for r in model.report()} if isinstance(model, PackedModel) else {}

    @contextmanager
    def calls(self, timed: bool = False) -> Iterator[None]:
        with ExitStack() as hooks:
            for name, module in self.model.named_modules():
                if isinstance(module, Quantizer):
                    continue
                before, after = self._hooks(name or "(model)", module, timed)
                hooks.callback(module.register_forward_pre_hook(before).remove)
                hooks.callback(module.register_forward_hook(after, always_call=True).remove)
            yield
            self.stack.clear()

    def _hooks(self, name: str, module: nn.Module, timed: bool) -> tuple[Any, Any]:
        def before(_: nn.Module, args: Any) -> None:
            self.stack.append(name)
            call = self.call(name, module)
            if not timed and not call.row.input:
                call.row.input = _shape_of(args)
            call.entered = time.perf_counter()

        def after(_: nn.Module, __: Any, result: Any) -> None:
            call = self.calls_of[name]
            if timed:
                call.times.append(time.perf_counter() - call.entered)
            elif not call.row.output:
                call.row.output = _shape_of(result)
            self.stack.pop()

        return before, after

    def call(self, name: str, module: nn.Module) -> _Call:
        if name not in self.calls_of:
            label = name.removeprefix("layers.") if self.fp32 else name
            row = Row(label, module.kind if isinstance(module, PackedLayer) else type(module).__name__)
            _count_parameters(row, module)
            if self.fp32:
                row.bytes_fp32 = self.fp32.get(label, row.bytes_fp32)
            self.calls_of[name] = _Call(row)
            self.order.append(name)
        return self.calls_of[name]

    def finished(self) -> list[Row]:
        """Rows of what holds or computes something, in the order of the first call."""
        calls = [self.calls_of[name] for name in self.order]
        modules = dict(self.model.named_modules())
        leaves = {name for name, module in modules.items() if not any(True for _ in module.children())}
        kept = [c.row for c in calls if c.products or c.row.bytes_packed or c.row.name in leaves]
        return [row for row in kept if row.kind not in ("Identity", "PackedModel") or row.bops]


def _count_parameters(row: Row, module: nn.Module) -> None:
    """The module's own tensors, and those of its quantizers."""
    owners = [module, *(child for child in module.children() if isinstance(child, Quantizer))]
    for owner in owners:
        held: list[Tensor] = list(owner.parameters(recurse=False))
        if isinstance(module, PackedLayer):
            held += list(owner.buffers(recurse=False))
        for p in held:
            words = p.words if isinstance(p, BinaryTensor) else None
            if words is not None:
                row.binary_parameters += p.numel()
            elif p.is_floating_point():
                row.real_parameters += p.numel()
            row.bytes_packed += p.nbytes if words is None else words.nbytes
            row.bytes_fp32 += 4 * p.numel()


@contextmanager
def _unfused() -> Iterator[None]:
    """Within it, torch runs LSTMs and attention as matrix products, which can be counted."""
    fast = torch.backends.mha.get_fastpath_enabled()
    (onednn, *_) = torch.backends.mkldnn.set_flags(_enabled=False)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch.backends.mkldnn.set_flags(_enabled=onednn)


class _Operators(TorchDispatchMode):
    """Counts the products of the module that runs."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        macs = _macs(func, args, kwargs, result)
        if macs and self.watch.stack:
            call = self.watch.calls_of[self.watch.stack[-1]]
            kind = _product_kind(func)
            setattr(call.row, f"{kind}_macs", getattr(call.row, f"{kind}_macs") + macs)
            call.products.append((func, args, kwargs))
            if kind != "real":
                call.row.kernel = backends.explain(str(func.__name__).partition(".")[0]).partition(": ")[2]
        return result


def _product_kind(func: Any) -> str:
    name = func.__name__ if func.namespace == "bop2nd" else ""
    return _KINDS.get(name.partition("_")[0], "real")


def _macs(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Multiply-accumulates of one call; 0 for what is no product."""
    if func.namespace != "bop2nd":
        from torch.utils.flop_counter import flop_registry  # imports Triton

        packet = func.overloadpacket
        return flop_registry[packet](*args, **kwargs, out_val=result) // 2 if packet in flop_registry else 0
    name = str(func.__name__).partition(".")[0]
    if name not in PRODUCTS:
        return 0
    given = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    weight, input = given["weight"], given["input"]
    outputs = max((t.numel() for t in result if t.dim() == input.dim() and not _is_words(t)), default=0)
    if not outputs:  # signs alone: the words of the output, one axis of 32 elements each
        signs = next(t for t in result if t.numel())
        outputs = signs.numel() // signs.shape[-1] * weight.shape[0]
    if "linear" in name:
        return outputs * int(given.get("in_features", input.shape[-1]))
    channels = int(given.get("in_channels", input.shape[1])) // int(given.get("groups", 1))
    kernel = weight.shape[2:] if isinstance(weight, BinaryTensor) else weight.shape[1:3]
    return outputs * channels * int(kernel[0]) * int(kernel[1])


PRODUCTS = (
    *("binary_linear", "binary_conv2d", "binary_linear_packed", "binary_conv2d_packed"),
    *("signed_linear", "signed_conv2d"),
)


def _is_words(t: Tensor) -> bool:
    return t.dtype in (torch.int32, torch.int64, torch.uint8)


def _saved(model: nn.Module, example: tuple[Any, ...], watch: _Watch) -> None:
    """Bytes that a training step keeps for its backward pass, without parameters and buffers, each
    storage once.

    With a batch of one, batch norms are taken in eval mode.
    """
    held_anyway = (
        t.words if isinstance(t, BinaryTensor) else t for t in (*model.parameters(), *model.buffers())
    )
    own = {t.untyped_storage().data_ptr() for t in held_anyway}
    held: dict[int, Tensor] = {}

    def note(t: Tensor) -> Tensor:
        storage = (t.words if isinstance(t, BinaryTensor) else t).untyped_storage()
        if storage.data_ptr() not in own and storage.data_ptr() not in held and watch.stack:
            held[storage.data_ptr()] = t  # kept alive, so that no address comes twice
            watch.calls_of[watch.stack[-1]].row.bytes_saved += storage.nbytes()
        return t

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda t: t)
    model.train()
    if len(next(leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor))) == 1:
        for module in model.modules():  # torch trains none on a single value per channel
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
    with watch.calls(timed=True), torch.enable_grad(), hooks:
        model(*example)
    for call in watch.calls_of.values():
        call.times.clear()


def _time(model: nn.Module, example: tuple[Any, ...], watch: _Watch, repeats: int) -> None:
    """Median seconds of every module, and the share its products take in a loop of their own."""
    with torch.no_grad(), watch.calls(timed=True):
        for _ in range(repeats + 2):
            model.eval()(*example)
    for call in watch.calls_of.values():
        if not call.times:
            continue
        n_calls = max(1, len(call.times) // (repeats + 2))
        call.row.seconds = n_calls * statistics.median(call.times[2 * n_calls :])
        alone = 0.0
        with torch.inference_mode():
            for func, args, kwargs in call.products:
                samples = []
                for _ in range(repeats):
                    start = time.perf_counter()
                    func(*args, **kwargs)
                    samples.append(time.perf_counter() - start)
                alone += statistics.median(samples)
        if call.products and call.row.seconds:
            call.row.kernel_share = alone / call.row.seconds


def _shape_of(value: Any) -> tuple[int, ...]:
    return next((tuple(leaf.shape) for leaf in tree_leaves(value) if isinstance(leaf, Tensor)), ())


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _count(n: float) -> str:
    """``1.23 M``; nothing for 0."""
    if not n:
        return ""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= 0.9995 * size:  # as it is rounded: never 1e+03 of the next smaller unit
            return f"{n / size:.3g} {unit}"
    return f"{n:.3g}"
