"""Which implementation of an operator runs: what can run here, why the rest cannot, and how to force one.

An operator is defined once (``define``, called by ``ops/``) with its plain-torch reference, which serves
every device. Faster implementations are registered for a device with torch's dispatcher: the C++ extension
``_C`` for CPUs (it picks the instruction set), Triton launchers for CUDA. :func:`use` forces one, also
inside compiled code: the kernels of ``_C`` ask whether they are to hand their operands on to Python, so that
nothing is registered anew beside calls on CPU tensors; for CUDA tensors registrations are overridden.
"""

from __future__ import annotations

import collections
import ctypes
import importlib
import importlib.util
import math
import os
import re
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import gpu_dispatch, triton_library
from .cuda_library import OPS as CUDA_OPS
from .cuda_library import CudaLibrary
from .gpu_dispatch import SIGNED
from .kernels import tuning
from .kernels.geometry import output_size, pair

NAMESPACE = "bop2nd"

_library = torch.library.Library(NAMESPACE, "DEF")
# The same operators once more, as Python serves them: where the kernels of _C hand operands on to.
_python_library = torch.library.Library(f"{NAMESPACE}_python", "DEF")
_references: dict[str, Callable[..., Any]] = {}
_natives: dict[str, str] = {}  # operators that only C++ has -> what they are
_forced_functions: dict[str, Callable[..., Any]] = {}  # what runs instead of the references
_python_calls: collections.Counter[str] = collections.Counter()


class BackendError(RuntimeError):
    """An unknown or impossible backend was asked for; the message lists what is possible and why."""


# ------------------------------------------------------------------------- defining operators


def define(schema: str, reference: Callable[..., Any]) -> str:
    """Define ``bop2nd::<schema>`` with its reference implementation for every device; return its name."""
    name = re.split(r"[(]", schema, maxsplit=1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _references[name] = _counted("reference", _on_dense_operands(reference))
    _library.impl(name, _python_server(name), "CompositeExplicitAutograd")
    _python_library.define(schema)
    _python_library.impl(name, _telling_errors(_python_server(name)), "CompositeExplicitAutograd")
    if (op := getattr(torch.ops.bop2nd, name).default)._schema.is_mutable:
        _library.impl(name, _bumping_versions(op), "ADInplaceOrView", with_keyset=True)
    return name


def define_native(schema: str, what: str) -> None:
    """Define ``bop2nd::<schema>`` that ``_C`` alone implements: it works on C++ objects. ``what`` it is."""
    _library.define(schema)
    _natives[schema.partition("(")[0]] = what


def _python_server(name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return _forced_functions.get(name, _references[name])(*args, **kwargs)

    return call


def _telling_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """For a function that ``_C`` calls: an error's text gets lost on the way through torch's stable ABI."""

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            if _extension.symbols is not None:
                _extension.symbols.bop2nd_tell(f"{type(error).__name__}: {error}".encode())
            raise

    return call


def _bumping_versions(op: Any) -> Callable[..., Any]:
    """Autograd must know what was written: a backward through values from before then raises.

    Raised when the write has ended: what a thread derives from the tensors beside it counts as older.
    """
    written = [i for i, a in enumerate(op._schema.arguments) if a.alias_info and a.alias_info.is_write]

    def call(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            with torch._C._AutoDispatchBelowADInplaceOrView():
                return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args, **kwargs)
        finally:
            for i in written:  # lists of tensors, or tensors; always positional
                torch.autograd.graph.increment_version(args[i])

    return call


def _on_dense_operands(function: Callable[..., Any]) -> Callable[..., Any]:
    """The fallback of every dispatch key is also called with tensors that its arithmetic does not know."""

    def call(*args: Any, **kwargs: Any) -> Any:
        for arg in (*args, *kwargs.values()):
            for t in arg if isinstance(arg, (list, tuple)) else (arg,):
                if isinstance(t, Tensor) and (
                    t.layout != torch.strided or t.is_quantized or t.is_complex() or t.is_nested
                ):
                    kind = "nested" if t.is_nested else t.dtype if t.layout == torch.strided else t.layout
                    raise TypeError(f"operands must be dense tensors of real numbers or words, got {kind}")
        return function(*args, **kwargs)

    return call


def _counted(backend: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        _python_calls[backend] += 1
        return function(*args, **kwargs)

    return call


# ------------------------------------------------------------------------- the C++ extension


class _Extension:
    """``_C`` and its control symbols (plain C, called through ctypes)."""

    def __init__(self) -> None:
        self.missing: str | None = None
        self.symbols: ctypes.CDLL | None = None
        self.instruction_sets: tuple[str, ...] = ()  # from the plainest to the best
        try:
            module = importlib.import_module("bop2nd_fast._C")
        except ImportError as error:
            self.missing = f"{type(error).__name__}: {error}"
            return
        symbols = ctypes.CDLL(str(module.__file__))
        symbols.bop2nd_isa_name.restype = ctypes.c_char_p
        symbols.bop2nd_isa_requires.restype = ctypes.c_char_p
        symbols.bop2nd_isa_calls.restype = ctypes.c_int64
        symbols.bop2nd_signed_loop.argtypes = (ctypes.c_int64, ctypes.c_int, ctypes.c_int)
        symbols.bop2nd_all_signs.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_uint32)
        symbols.bop2nd_part_new.restype = ctypes.c_int64
        symbols.bop2nd_part_new.argtypes = (ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32)
        symbols.bop2nd_part_error.restype = ctypes.c_char_p
        symbols.bop2nd_part_free.argtypes = (ctypes.c_int64,)
        self.symbols = symbols
        self.path = Path(str(module.__file__))
        count = symbols.bop2nd_isa_count()
        self.instruction_sets = tuple(symbols.bop2nd_isa_name(i).decode() for i in range(count))

    def supports(self, isa: str) -> bool:
        return self.symbols is not None and bool(
            self.symbols.bop2nd_isa_supported(self.instruction_sets.index(isa))
        )

    def active(self) -> str:
        assert self.symbols is not None
        return self.instruction_sets[self.symbols.bop2nd_isa_active()]


_extension = _Extension()
INSTRUCTION_SETS = _extension.instruction_sets  # the one list is csrc/cpu/dispatch.cpp's; none without `_C`
NAMES = ("reference", "cpu", *INSTRUCTION_SETS, "triton", "cuda")
if _extension.missing is not None:
    warnings.warn(
        f"bop2nd_fast runs on its plain-torch reference on CPUs, which is slow: the C++ extension is not "
        f"there ({_extension.missing}). Build it with 'pip install --no-build-isolation .'",
        RuntimeWarning,
        stacklevel=2,
    )


# ------------------------------------------------------------------------- CUDA C++, Triton

_cuda = CudaLibrary()  # registers its operators for CUDA tensors; Triton's go over them
_triton_default: torch.library.Library | None = None
_spared: list[torch.library.Library] = []  # references over CUDA C++ kernels that cannot run here

_triton_unfit: str | None = None  # why the GPUs cannot run Triton's kernels, once torch has started CUDA
_TRITON_LAUNCHERS = triton_library.LAUNCHERS


def _triton_missing() -> str | None:
    return triton_library.missing() or _triton_unfit


def _triton_launcher(op: str) -> Callable[..., Any]:
    """A launcher that imports its kernel file on its first call, or torch's way where tuning chose it."""

    def launch(*args: Any, **kwargs: Any) -> Any:
        module = importlib.import_module(f"bop2nd_fast.kernels.{_TRITON_LAUNCHERS[op]}")
        try:
            return getattr(module, op)(*args, **kwargs)
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            if (hint := triton_library.compiler_failed(error)) is None:
                raise
            raise BackendError(hint) from error

    counted = _counted("triton", launch)

    def choose(*args: Any, **kwargs: Any) -> Any:
        ours = tuning.BACKWARD[op].runs == "triton"
        return (counted if ours else _references[op])(*args, **kwargs)

    return choose if op in tuning.BACKWARD else counted


def start() -> None:
    """Register Triton for CUDA tensors and obey BOP2ND_BACKEND. Called once, after all ops are defined."""
    _prefer_triton(_triton_missing() is None)
    torch.cuda._lazy_call(_settle_cuda)  # when torch starts CUDA: before that, no device may be asked
    if name := os.environ.get("BOP2ND_BACKEND"):
        use(name)


def _settle_cuda() -> None:
    """Where a device cannot run a backend's kernels, take them out of use, loudly: others stand in."""
    global _triton_unfit
    reasons = []
    compiled = _triton_missing() is None and not triton_library.interpreted()
    if compiled and (reason := triton_library.unfit()) is not None:
        _triton_unfit = reason
        reasons.append(reason)
    if _cuda.missing is None and (reason := _cuda.why_not()) is not None:
        _cuda.missing = reason
        reasons.append(reason)
        _spared.append(_registered({op: _references[op] for op in CUDA_OPS}))
    if not reasons:
        return
    _prefer_triton(False)
    served = {"triton": "Triton", "cuda": "CUDA C++", "reference": "plain torch"}[active("cuda")]
    text = f"bop2nd_fast: {'; '.join(reasons)}. {served} serves CUDA tensors instead"
    warnings.warn(text, RuntimeWarning, stacklevel=2)
    _force(_forced or "auto")  # again, to lie over the references


def _prefer_triton(wanted: bool) -> None:
    """Put Triton's kernels over those of CUDA C++ where they are preferred, or take them away again."""
    global _triton_default
    if wanted and _triton_default is None:
        launchers = {op: _triton_launcher(op) for op in _TRITON_LAUNCHERS if _triton_goes_first(op)}
        _triton_default = _registered(launchers)
    elif not wanted and _triton_default is not None:
        _triton_default._destroy()
        _triton_default = None


def _triton_goes_first(op: str) -> bool:
    entry = gpu_dispatch.preferred(op)
    return _cuda.missing is not None or entry is None or entry.value == "triton"


# ------------------------------------------------------------------------- choosing


@dataclass(frozen=True)
class Status:
    """One backend: whether it can run here, on which devices, and what it needs or why it cannot."""

    name: str
    available: bool
    active: bool
    devices: str
    note: str


_overrides: list[torch.library.Library] = []
_forced: str | None = None


def why_not(name: str) -> str | None:
    """Why backend ``name`` cannot run here, or None if it can."""
    if name == "reference":
        return None
    if name in ("cpu", *INSTRUCTION_SETS):
        if _extension.symbols is None:
            return f"the C++ extension is not there ({_extension.missing})"
        if name == "cpu" or _extension.supports(name):
            return None
        requires = _extension.symbols.bop2nd_isa_requires(INSTRUCTION_SETS.index(name)).decode()
        return f"this processor lacks {requires}"
    if name == "triton":
        if (missing := _triton_missing()) is not None or triton_library.interpreted():
            return missing
        if torch.cuda.is_available():
            return triton_library.unfit()
        return "no CUDA device (TRITON_INTERPRET=1 would run it, slowly, on the CPU)"
    if name == "cuda":
        return _cuda.why_not()
    return f"there is no backend of that name; there are {', '.join(NAMES)}"


class use:
    """Force one backend by name, for all operators it has; ``use("auto")`` goes back to the best.

    Takes effect at once; as a context manager it restores what was forced before. The environment
    variable ``BOP2ND_BACKEND`` does the same at import.

    Raises:
        BackendError: the name is unknown or cannot run here; the message says what can, and why not the rest.
    """

    def __init__(self, name: str) -> None:
        self._previous = _forced or "auto"
        _force(name)

    def __enter__(self) -> use:
        return self

    def __exit__(self, *exception: object) -> None:
        _force(self._previous)


def _force(name: str) -> None:
    global _forced, _forced_functions
    if name != "auto" and (reason := why_not(name)) is not None:
        rest = "; ".join(f"{n}: {why_not(n) or 'possible'}" for n in NAMES)
        raise BackendError(f"backend {name!r} cannot be used: {reason}. ({rest})")
    isa = INSTRUCTION_SETS.index(name) if name in INSTRUCTION_SETS else -1
    if _extension.symbols is not None and _extension.symbols.bop2nd_isa_force(isa) != 0:
        raise BackendError(f"the extension refused instruction set {name!r}")
    launchers = {op: _triton_launcher(op) for op in _TRITON_LAUNCHERS} if name == "triton" else {}
    _forced_functions = launchers if triton_library.interpreted() else {}
    if _extension.symbols is not None:
        _extension.symbols.bop2nd_hand_on(name == "reference" or bool(_forced_functions))
    _override_cuda(_references if name == "reference" else launchers)
    _prefer_triton(name != "cuda" and _triton_missing() is None)
    _forced = None if name == "auto" else name


def _override_cuda(functions: dict[str, Callable[..., Any]]) -> None:
    """Put functions over what is registered for CUDA tensors. Not beside running calls on them."""
    for library in _overrides:
        library._destroy()
    _overrides.clear()
    if functions and torch.cuda.is_available():
        _overrides.append(_registered(functions))


def _registered(functions: dict[str, Callable[..., Any]]) -> torch.library.Library:
    """For CUDA tensors, over what is registered."""
    library = torch.library.Library(NAMESPACE, "IMPL")
    with warnings.catch_warnings():  # torch warns of any override; this one is asked for, and undone
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel.*")
        for op, function in functions.items():
            library.impl(op, function, "CUDA", allow_override=True)
    return library


def forced() -> str | None:
    """The backend that :func:`use` or BOP2ND_BACKEND forced, or None."""
    return _forced


def active(device: str = "cpu") -> str:
    """Name of the backend that serves tensors on ``device`` now (for CPUs: the instruction set)."""
    if _forced in ("reference", "triton"):
        return _forced
    if device == "cuda" and (_forced == "cuda" or _triton_missing() is not None):
        return "cuda" if _cuda.missing is None else "reference"
    if device == "cpu":
        return "reference" if _extension.symbols is None else _extension.active()
    return "triton" if device == "cuda" and _triton_missing() is None else "reference"


def wants_blocked() -> bool:
    """Whether the kernels that serve CPU tensors now make use of re-laid weights."""
    return _extension.symbols is not None and _forced not in ("reference", "triton")


_ONES = {torch.float32: (4, 0x3F800000), torch.bfloat16: (2, 0x3F80), torch.float16: (2, 0x3C00)}


def all_signs(x: Tensor) -> bool | None:
    """Whether a contiguous CPU tensor holds nothing but +1 and -1; None where nothing fast can tell."""
    one = _ONES.get(x.dtype)
    if _extension.symbols is None or one is None or not x.is_cpu or not x.is_contiguous():
        return None
    return bool(_extension.symbols.bop2nd_all_signs(x.data_ptr(), x.numel(), *one))


def calls() -> dict[str, int]:
    """Operator calls served so far, by backend; tests use it to check that what they forced really ran."""
    counts = {name: _python_calls[name] for name in ("reference", "triton")} | {"cuda": _cuda.calls()}
    if (symbols := _extension.symbols) is not None:
        counts |= {name: symbols.bop2nd_isa_calls(i) for i, name in enumerate(INSTRUCTION_SETS)}
    return counts


def extension() -> str:
    """Where the C++ extension lies, or why it is not there."""
    return f"missing: {_extension.missing}" if _extension.symbols is None else str(_extension.path)


def new_part(graph: str, tensors: ctypes.Array[Any], fused_norms: bool) -> int:
    """The number of a new part of a packed model, for ``bop2nd::run_packed``: see ``inference/part.py``.

    ``fused_norms``: batch norm is made of fused multiply-adds.

    Raises:
        ValueError: the graph does not describe one.
    """
    assert _extension.symbols is not None
    number = _extension.symbols.bop2nd_part_new(graph.encode(), tensors, len(tensors), fused_norms)
    if number == 0:
        raise ValueError(_extension.symbols.bop2nd_part_error().decode())
    return int(number)


def free_part(number: int) -> None:
    """The number of a part is not used again."""
    assert _extension.symbols is not None
    _extension.symbols.bop2nd_part_free(number)


def parallel() -> bool | None:
    """Whether the extension's loops use torch's threads (it was built with OpenMP); None without it."""
    return None if _extension.symbols is None else bool(_extension.symbols.bop2nd_openmp())


def report() -> list[Status]:
    """Every backend: can it run here, is it in use, what it needs or why it cannot run."""
    rows = []
    reasons = {name: why_not(name) for name in NAMES}  # first: asking a GPU may change what is in use
    in_use = {active("cpu"), active("cuda") if torch.cuda.is_available() else active("cpu")}
    for name in NAMES:
        if name == "cpu":
            continue  # an alias of the best instruction set
        devices = {"reference": "any", "triton": "cuda", "cuda": "cuda"}.get(name, "cpu")
        reason = reasons[name]
        note = reason or _what(name)
        rows.append(Status(name, reason is None, name in in_use, devices, note))
    return rows


def _what(name: str) -> str:
    if name in INSTRUCTION_SETS:
        assert _extension.symbols is not None
        return "C++: " + _extension.symbols.bop2nd_isa_requires(INSTRUCTION_SETS.index(name)).decode()
    return {
        "reference": "plain torch, the specification",
        "triton": "Triton kernels",
        "cuda": "CUDA C++ kernels",
    }.get(name, "")


def explain(
    op: str, *shapes: tuple[int, ...], device: str = "cpu", chip: str | None = None, **geometry: Any
) -> str:
    """Which implementation of ``op`` would run for operands of ``shapes``, and why.

    For ``device="cuda"`` a line for each GPU backend follows, with the kernel it would run, on any machine.

    Args:
        shapes: of the operands; for products the logical ones of input and weight.
        chip: for ``device="cuda"``: a name in ``gpu_dispatch.CHIPS`` or ``"sm_90"``; by default the GPU here.
        geometry: of a convolution: ``stride``, ``padding``, ``dilation``, ``padding_value``; of products with
            real or 8-bit inputs also ``dtype``, the input's (float32 if left out).

    Raises:
        ValueError: no such operator or chip, or shapes that do not fit the operator.
    """
    if op in _natives:
        serves = device == "cpu" and wants_blocked()
        return f"{op} ({device}): {f'C++, {active()}' if serves else 'not used'}: {_natives[op]}"
    if op not in _references:
        known = ", ".join(sorted({**_references, **_natives}))
        raise ValueError(f"there is no operator {op!r}; there are {known}")
    sizes = " x ".join("[" + ", ".join(map(str, s)) + "]" for s in shapes)
    asked = gpu_dispatch.chip_named(chip) if device == "cuda" else None
    chosen, why = _chosen(op, device)
    text = f"{op}{' on ' + sizes if sizes else ''} ({asked or device}): {chosen}, {why}"
    if device != "cuda":
        loop = (
            signed_loop(op, shapes, **geometry) if chosen in INSTRUCTION_SETS and len(shapes) == 2 else None
        )
        return text if loop is None else f"{text}; {SIGNED_LOOPS[loop]}"
    dtype = geometry.pop("dtype", torch.float32) if op in SIGNED else torch.float32
    work = gpu_dispatch.product(op, shapes, geometry)
    lines = [text]
    if op in _TRITON_LAUNCHERS:
        lines.append(f"triton: {gpu_dispatch.triton_kernel(op, work, asked, dtype)}")
    if op in CUDA_OPS:
        lines.append(f"cuda: {gpu_dispatch.cuda_kernel(op, work, asked, _extension.symbols)}")
    elif op in tuning.BACKWARD:
        lines.append(
            "cuda: torch's own kernels (cuBLAS, cuDNN) on operands that its kernels unpack tile by tile"
        )
    elif op in _TRITON_LAUNCHERS:
        lines.append("cuda: no kernel of its own, Triton's serves; where Triton cannot run, plain torch")
    return "\n  ".join(lines)


SIGNED_LOOPS = {  # in the order of SignedLoop in csrc/cpu/signed_product.h
    "few rows": "few rows: sums of four inputs looked up, weights read once",
    "sum tables": "tables of 16 sums of four inputs, for as many pixels as two vectors have lanes",
    "byte tiles": "tiles of bytes, signs turned into bytes in the caches",
    "byte lanes": "four products of bytes a lane, signs turned into bytes in the nearest cache",
}


def signed_loop(
    op: str, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype = torch.float32, **geometry: Any
) -> str | None:
    """Which of SIGNED_LOOPS multiplies real or 8-bit inputs of ``shapes``; None for other operators."""
    if op not in SIGNED or _extension.symbols is None:
        return None
    x, weight = shapes
    if op == "signed_linear":
        rows, dense = math.prod(x[:-1]), True
    else:
        sizes = [pair(geometry.get(k, d), k, d) for k, d in (("stride", 1), ("padding", 0), ("dilation", 1))]
        rows = x[0] * math.prod(map(output_size, x[2:], weight[2:], *sizes))
        dense = tuple(weight[1:]) == (x[1], 1, 1) and sizes[0] == (1, 1) and sizes[1] == (0, 0)
    loop = _extension.symbols.bop2nd_signed_loop(rows, int(dense), int(dtype.is_floating_point))
    return tuple(SIGNED_LOOPS)[loop]


def _chosen(op: str, device: str) -> tuple[str, str]:
    """The backend that serves ``op`` on ``device`` now, and why."""
    chosen = active(device)
    if op in tuning.BACKWARD and chosen in ("triton", "cuda"):
        if chosen != "triton":
            return "torch", "its libraries multiply operands that our kernels unpack tile by tile"
        choice = tuning.BACKWARD[op]
        return choice.runs, f"{choice.why} ({gpu_dispatch.timed(choice.measured)})"
    if _forced is None and chosen == "triton" and not _triton_goes_first(op):
        chosen = "cuda"
    if (chosen == "triton" and op not in _TRITON_LAUNCHERS) or (chosen == "cuda" and op not in CUDA_OPS):
        chosen = "reference"
    if _forced is not None:
        return (
            chosen,
            f"forced by use({_forced!r})" if chosen == _forced else f"{_forced} has no kernel for it",
        )
    if chosen in INSTRUCTION_SETS:
        return chosen, "the best instruction set this processor has"
    if chosen in ("triton", "cuda"):
        other = _cuda.missing if chosen == "triton" else _triton_missing()
        entry = gpu_dispatch.preferred(op)
        if other is not None or entry is None:
            return chosen, f"the GPU backend that is installed ({other or 'the other has no such kernel'})"
        return chosen, f"preferred: {entry.reason} ({gpu_dispatch.timed(entry.measured)})"
    missing = why_not("cpu") if device == "cpu" else active(device) == "reference" and _triton_missing()
    return chosen, missing or "no faster kernel is registered for it"


def gpu_table() -> list[gpu_dispatch.Limit]:
    """Every limit that decides which kernel runs on a GPU, with its reason and what measured it.

    Raises:
        BackendError: the C++ extension, which holds those of the CUDA C++ kernels, is not there.
    """
    if _extension.symbols is None:
        raise BackendError(f"the C++ extension is not there ({_extension.missing})")
    return gpu_dispatch.table(_extension.symbols)
