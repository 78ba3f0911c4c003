"""BinaryTensor: a tensor of +1 / -1 that stores one bit per element in int32 words.

A wrapper subclass: its shape, dtype and strides are those of the logical tensor, so it can be an
``nn.Parameter`` that ``loss.backward()`` gives a dense gradient; its memory is ``.words``. What cannot be
done on words falls back to the unpacked values where a user expects a new tensor (printing, comparison,
arithmetic); an in-place write that would lose information raises.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from . import backends

WORD_BITS = 32
LAYOUT_VERSION = 1
# What torch's operators do to a BinaryTensor other than unpack it: filled by binary_tensor_ops and
# binary_tensor_shards.
HANDLERS: dict[Any, Callable[..., Any]] = {}


@dataclass(frozen=True)
class Layout:
    """How the elements of a logical tensor lie in words. Travels with the tensor and with the file.

    Element ``e`` along the packed axis ``dim`` is bit ``e % 32`` (least significant first) of word
    ``e // 32``; bit 1 means -1; tail bits are 0. Words are stored contiguously, packed axis last.
    """

    shape: tuple[int, ...]
    dim: int
    dtype: torch.dtype
    version: int = LAYOUT_VERSION

    def __post_init__(self) -> None:
        if self.version != LAYOUT_VERSION:
            raise ValueError(
                f"layout version {self.version} is not known; this package reads {LAYOUT_VERSION}"
            )
        if not 0 <= self.dim < len(self.shape):
            raise ValueError(f"packed axis {self.dim} is not an axis of shape {self.shape}")
        if not self.dtype.is_floating_point:
            raise ValueError(f"a BinaryTensor has a floating dtype, not {self.dtype}")

    @property
    def length(self) -> int:
        """Elements along the packed axis."""
        return self.shape[self.dim]

    @property
    def words_shape(self) -> tuple[int, ...]:
        """Shape of the words: the other axes in order, then ``ceil(length / 32)``."""
        rest = self.shape[: self.dim] + self.shape[self.dim + 1 :]
        return (*rest, -(-self.length // WORD_BITS))

    @property
    def strides(self) -> tuple[int, ...]:
        """Logical strides with the packed axis innermost (channels-last for a convolution weight)."""
        order = [d for d in range(len(self.shape)) if d != self.dim] + [self.dim]
        strides, step = [0] * len(self.shape), 1
        for d in reversed(order):
            strides[d] = step
            step *= max(self.shape[d], 1)
        return tuple(strides)

    def with_dtype(self, dtype: torch.dtype) -> Layout:
        return Layout(self.shape, self.dim, dtype, self.version)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a file."""
        return {
            "version": self.version,
            "shape": list(self.shape),
            "dim": self.dim,
            "length": self.length,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Layout:
        """Inverse of :meth:`to_dict`; raises ``ValueError`` on unknown or contradicting values."""
        dtype = getattr(torch, str(values.get("dtype")), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"unknown dtype {values.get('dtype')!r} in a layout")
        layout = Layout(tuple(values["shape"]), int(values["dim"]), dtype, int(values["version"]))
        if layout.length != values["length"]:
            raise ValueError(f"length {values['length']} contradicts shape {layout.shape}, axis {layout.dim}")
        return layout


class BinaryTensor(Tensor):
    """A tensor of +1 / -1 in packed words. Make one with :func:`pack`.

    Args:
        words: int32, contiguous, shape ``layout.words_shape``; tail bits must be 0.
        layout: logical shape, packed axis and dtype.

    Raises:
        ValueError: words of another dtype or of a count that does not fit the logical shape.
    """

    words: Tensor
    bit_layout: Layout

    @staticmethod
    def __new__(cls, words: Tensor, layout: Layout, requires_grad: bool = False) -> BinaryTensor:
        if words.dtype != torch.int32:
            raise ValueError(f"words must be int32, got {words.dtype}")
        if tuple(words.shape) != layout.words_shape:
            raise ValueError(
                f"words of shape {tuple(words.shape)} do not fit logical shape {layout.shape} packed along "
                f"axis {layout.dim}: that takes {layout.words_shape}"
            )
        return torch.Tensor._make_wrapper_subclass(
            cls,
            layout.shape,
            strides=layout.strides,
            dtype=layout.dtype,
            device=words.device,
            requires_grad=requires_grad,
            storage_size=words.nbytes,
        )

    def __init__(self, words: Tensor, layout: Layout, requires_grad: bool = False) -> None:
        self.words = words
        self.bit_layout = layout
        self._blocked: tuple[tuple[Any, ...], Tensor] | None = None

    # ---------------------------------------------------------------- reading

    def unpack(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense +1 / -1 tensor in ``dtype`` (default: this tensor's). Differentiable."""
        layout = self.bit_layout
        result: Tensor = torch.ops.bop2nd.unpack_bits(
            self, layout.length, layout.dim, dtype=dtype or self.dtype
        )
        return result

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes of the packed words (the dense tensor would take ``numel() * itemsize``)."""
        return self.words.nbytes

    def blocked_words(self, groups: int = 1) -> Tensor | None:
        """Words re-laid for the CPU kernels, kept until the words change (their version counter tells).

        None where it would not be used or could go stale: other devices, inside a compiler's trace, on
        tensors made in inference mode (they have no version counter).
        """
        words = self.words
        if not backends.wants_blocked(words) or torch.compiler.is_compiling() or words.is_inference():
            return None
        key = (words._version, words.data_ptr(), groups)
        if self._blocked is None or self._blocked[0] != key:
            self._blocked = (key, torch.ops.bop2nd.block_weight(words, groups))
        return self._blocked[1]

    def forget_blocked_words(self) -> None:
        """The words were changed in a way their version counter does not tell."""
        self._blocked = None

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        layout = self.bit_layout
        values = "..." if self.words.is_meta or is_traced(self.words) else str(self.unpack().detach())
        return (
            f"{type(self).__name__}({values.removeprefix('tensor(').removesuffix(')')}, "
            f"shape={layout.shape}, packed_dim={layout.dim}, dtype={layout.dtype}, device={self.device}"
            f"{', requires_grad=True' if self.requires_grad else ''})"
        )

    # ------------------------------------------------- what torch asks of a subclass

    def __tensor_flatten__(self) -> tuple[list[str], Layout]:
        return ["words"], self.bit_layout

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], layout: Layout, size: Any, stride: Any
    ) -> BinaryTensor:
        return BinaryTensor(inner["words"], layout)

    def is_contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> bool:
        """Whether the memory is one block without gaps: always, for the words are (FSDP2 asks)."""
        return memory_format == torch.contiguous_format or super().is_contiguous(memory_format=memory_format)

    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[Tensor, ...], None]:
        """What FSDP2 sends for this block of rows: its words."""
        return (self.words,), None

    def fsdp_post_all_gather(
        self,
        outputs: tuple[Tensor, ...],
        metadata: None,
        param_dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """The whole weight from everyone's words, without a copy; ``out`` is the one made the first time."""
        return binary_tensor_shards.gathered_rows(self, outputs[0], param_dtype, out)

    def __reduce_ex__(self, protocol: Any) -> Any:
        layout = self.bit_layout
        is_param = isinstance(self, torch.nn.Parameter)
        owns_storage = self.words.untyped_storage().nbytes() == self.words.nbytes
        args = (
            self.words if owns_storage else self.words.clone(),  # a block of rows does not drag its padding
            layout.shape,
            layout.dim,
            layout.dtype,
            layout.version,
            self.requires_grad,
            is_param,
        )
        return _rebuild_binary_tensor, args

    def __deepcopy__(self, memo: dict[int, Any]) -> BinaryTensor:
        if id(self) in memo:
            return memo[id(self)]
        if not self.is_leaf:
            raise RuntimeError("only BinaryTensors that are leaves of the graph can be deep-copied")
        copy = BinaryTensor(self.words.clone(), self.bit_layout, self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copy._is_param = True
        if self.grad is not None:
            copy.grad = self.grad.clone()
        memo[id(self)] = copy
        return copy

    def _stable_hash_for_caching(self) -> str:
        return f"BinaryTensor{self.bit_layout}"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "bop2nd":
            return _call_on_words(func, args, kwargs)
        handler = HANDLERS.get(func)
        if handler is not None:
            return handler(func, *args, **kwargs)
        return call_on_values(func, args, kwargs)

    def __setitem__(self, index: Any, value: Any) -> None:
        dense = self.unpack().detach()
        dense[index] = value
        self.detach().copy_(dense)  # raises unless the values are +-1


def _rebuild_binary_tensor(
    words: Tensor,
    shape: tuple[int, ...],
    dim: int,
    dtype: torch.dtype,
    version: int,
    requires_grad: bool,
    is_param: bool,
) -> BinaryTensor:
    """Unpickle: plain arguments only, so that ``torch.load(weights_only=True)`` can call it."""
    tensor = BinaryTensor(words, Layout(tuple(shape), dim, dtype, version), requires_grad)
    if is_param:
        tensor._is_param = True
    return tensor


torch.serialization.add_safe_globals([BinaryTensor, _rebuild_binary_tensor])


def pack(x: Tensor, dim: int = -1) -> BinaryTensor:
    """Pack the signs of ``x`` along ``dim`` into a :class:`BinaryTensor` of the same shape and dtype.

    ``sign(x)`` is -1 where ``x < 0`` and +1 elsewhere (so for +-0.0 and NaN too). ``dim`` is the axis a
    dot product runs over: 1 for the weight of a linear layer ``[out, in]`` or a convolution ``OIHW``.

    Raises:
        TypeError: ``x`` is not a floating point tensor.
        IndexError: ``x`` has no axis ``dim``.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"pack takes a floating point tensor, got {getattr(x, 'dtype', type(x))}")
    if not -x.dim() <= dim < x.dim():
        raise IndexError(f"a tensor of {x.dim()} axes has no axis {dim}")
    dim %= x.dim()
    words = torch.ops.bop2nd.pack_bits(x.detach(), dim)
    return BinaryTensor(words, Layout(tuple(x.shape), dim, x.dtype))


def check_plus_minus_one(x: Tensor, what: str) -> None:
    """Raise ``ValueError`` unless every element of ``x`` is +1 or -1. Synchronises."""
    bad = x.detach().abs() != 1
    if bool(bad.any()):
        raise ValueError(f"{what}: {int(bad.sum())} of {x.numel()} values are neither +1 nor -1")


# ------------------------------------------------------------------------------------- dispatch


def is_traced(words: Tensor) -> bool:
    return torch.compiler.is_compiling() or type(words) is not Tensor


class UnpackedView(Tensor):
    """What a view operation on a BinaryTensor returns: its values, unpacked, to read only.

    The bits have no floats to alias, so a write into such a view would be lost; it raises instead.
    """

    dense: Tensor

    @staticmethod
    def __new__(cls, dense: Tensor) -> UnpackedView:
        return torch.Tensor._make_wrapper_subclass(
            cls, dense.shape, strides=dense.stride(), dtype=dense.dtype, device=dense.device
        )

    def __init__(self, dense: Tensor) -> None:
        self.dense = dense

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self.dense})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["dense"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: None, size: Any, stride: Any) -> UnpackedView:
        return UnpackedView(inner["dense"])

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return call_on_values(func, args, kwargs or {})


def _values(t: Any) -> Any:
    if isinstance(t, BinaryTensor):
        return t.unpack()
    return t.dense if isinstance(t, UnpackedView) else t


def call_on_values(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The fallback: run ``func`` on unpacked values, unless it would write into a BinaryTensor."""
    if func._schema.is_mutable:
        _refuse_lossy_write(func, args, kwargs)
    result = func(*pytree.tree_map(_values, args), **pytree.tree_map(_values, kwargs))
    if func._schema.is_mutable or all(r.alias_info is None for r in func._schema.returns):
        return result
    return pytree.tree_map_only(Tensor, UnpackedView, result)


def _call_on_words(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run one of our operators on the words, handing it the re-laid weight when there is one."""
    named = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    weight = named.get("weight")
    takes_blocked = any(a.name == "blocked" for a in func._schema.arguments)
    if takes_blocked and named.get("blocked") is None and isinstance(weight, BinaryTensor):
        named["blocked"] = weight.blocked_words(named.get("groups", 1))
    return func(**pytree.tree_map_only(BinaryTensor, lambda t: t.words, named))


def _refuse_lossy_write(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A write into a BinaryTensor other than ``copy_`` would need values that one bit cannot hold."""
    for i, spec in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(spec.name)
        values = value if isinstance(value, (list, tuple)) else [value]
        written = spec.alias_info is not None and spec.alias_info.is_write
        if written and any(isinstance(v, (BinaryTensor, UnpackedView)) for v in values):
            raise RuntimeError(
                f"{func} would write arbitrary values into a BinaryTensor, which holds only signs. Use "
                "copy_() with +1/-1 values, an optimizer of bop2nd_fast.optim, or unpack() for a dense copy."
            )


# Last, for they build on the names above: the modules that fill HANDLERS.
from . import binary_tensor_ops, binary_tensor_shards  # noqa: E402, F401
