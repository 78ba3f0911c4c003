"""BinaryTensor: a tensor of +1 / -1 that stores one bit per element in int32 words.

A wrapper subclass: its shape, dtype and strides are those of the logical tensor, so it can be an
``nn.Parameter`` that ``loss.backward()`` gives a dense gradient; its memory is ``.words``. What cannot be
done on words falls back to the unpacked values where a user expects a new tensor (printing, comparison,
arithmetic); an in-place write that would lose information raises, and so does whatever asks for the address
of dense values (DLPack, ``apply_``, safetensors): there are none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from .. import backends
from .layout import Layout
from .memory import Memory

# What torch's operators do to a BinaryTensor other than unpack it: filled by torch_ops, rows, collectives.
HANDLERS: dict[Any, Callable[..., Any]] = {}


def wrapper(cls: Any, is_traced: bool, **attributes: Any) -> Any:
    """A tensor without memory of its own: whoever asks for the address of its values gets an error.

    Never an inference tensor, so that a model moved inside inference_mode can be used and trained on.
    """
    normal = torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()
    with normal:
        result = torch.Tensor._make_wrapper_subclass(cls, storage_size=0, **attributes)
    if not is_traced:
        torch._C._set_throw_on_mutable_data_ptr(result)
    return result


class BinaryTensor(Tensor):
    """A tensor of +1 / -1 in packed words. Make one with :func:`pack`.

    Args:
        words: int32, contiguous, shape ``layout.words_shape``; tail bits must be 0. Or a BinaryTensor, whose
            words are shared, as ``nn.Parameter(x)`` shares those of ``x``.
        layout: logical shape, packed axis and dtype; not with a BinaryTensor.

    Raises:
        ValueError: words of another dtype or of a count that does not fit the logical shape.
    """

    __slots__ = ("_words", "bit_layout", "memory")  # not in __dict__, which accelerate hands to constructors

    memory: Memory
    bit_layout: Layout
    _words: Tensor  # those of the memory, as an attribute: compilers need one that is the same each time

    @staticmethod
    def __new__(
        cls,
        words: Tensor,
        layout: Layout | None = None,
        requires_grad: bool = False,
        *,
        _is_param: bool = False,
    ) -> BinaryTensor:
        if isinstance(words, BinaryTensor):
            if layout is not None:
                raise ValueError("a BinaryTensor has a layout of its own")
            result = words.sharing(requires_grad)
        elif layout is None:
            raise TypeError("words alone do not say how they are packed: a layout is needed, or use pack()")
        else:
            _check_words(words, layout)
            result = BinaryTensor._wrap(cls, Memory(words), layout, requires_grad)
        if _is_param:
            result._is_param = True
        return result

    @staticmethod
    def _wrap(cls: Any, memory: Memory, layout: Layout, requires_grad: bool = False) -> Any:
        result = wrapper(
            cls,
            memory.is_traced,
            size=layout.shape,
            strides=layout.strides,
            dtype=layout.dtype,
            device=memory.words.device,
            requires_grad=requires_grad,
        )
        result.memory, result._words, result.bit_layout = memory, memory.words, layout
        return result

    def sharing(self, requires_grad: bool = False) -> BinaryTensor:
        """A BinaryTensor of the same words."""
        return BinaryTensor._wrap(BinaryTensor, self.memory, self.bit_layout, requires_grad)

    @property
    def words(self) -> Tensor:
        """An alias of the packed words, int32, contiguous. Tail bits must stay 0 where they are written."""
        return self.memory.lend()

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
        return self.memory.words.nbytes

    def blocked_words(self, groups: int = 1) -> Tensor | None:
        """Words re-laid for the CPU kernels, kept until these change; None where there is no use for them."""
        return self.memory.blocked(groups)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        layout = self.bit_layout
        values = "..." if self.device.type == "meta" or self.memory.is_traced else str(self.unpack().detach())
        return (
            f"{type(self).__name__}({values.removeprefix('tensor(').removesuffix(')')}, "
            f"shape={layout.shape}, packed_dim={layout.dim}, dtype={layout.dtype}, device={self.device}"
            f"{', requires_grad=True' if self.requires_grad else ''})"
        )

    # ------------------------------------------------- what torch asks of a subclass

    def __tensor_flatten__(self) -> tuple[list[str], Layout]:
        return ["_words"], self.bit_layout

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], layout: Layout, size: Any, stride: Any
    ) -> BinaryTensor:
        return BinaryTensor(inner["_words"], layout)

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
        result: tuple[Tensor, tuple[Tensor, ...]] | None = HANDLERS["all_gather"](
            self, outputs[0], param_dtype, out
        )
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        layout = self.bit_layout
        is_param = isinstance(self, torch.nn.Parameter)
        words = self.words
        owns_storage = words.is_meta or words.untyped_storage().nbytes() == words.nbytes
        args = (
            words if owns_storage else words.clone(),  # a block of rows does not drag its padding
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
        copy = BinaryTensor(self.memory.words.clone(), self.bit_layout, self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copy._is_param = True
        if self.grad is not None:
            copy.grad = self.grad.clone()
        memo[id(self)] = copy
        return copy

    # ------------------------------------------------- raw access: to the words, or not at all

    @property
    def data(self) -> BinaryTensor:
        """An alias that autograd does not know of, as torch's. Assigning replaces bits, dtype and device.

        Raises:
            ValueError: a value of another shape, or one that is not a BinaryTensor and not +1 / -1.
        """
        return _DATA.__get__(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(f"data must be a tensor, got {type(value).__name__}")
        layout = self.bit_layout
        if type(self) is not BinaryTensor or tuple(value.shape) != layout.shape:
            raise ValueError(
                f"the data of a {type(self).__name__} of shape {layout.shape} cannot become a tensor of "
                f"shape {tuple(value.shape)}"
            )
        if not isinstance(value, BinaryTensor) or value.bit_layout.dim != layout.dim:
            dense = value.unpack() if isinstance(value, BinaryTensor) else value
            check_plus_minus_one(dense, "the new data of a BinaryTensor")
            value = pack(dense, layout.dim)
        _DATA.__set__(self, value.sharing())
        self.memory, self._words, self.bit_layout = value.memory, value._words, value.bit_layout

    def share_memory_(self) -> BinaryTensor:
        """Move the words to shared memory, for other processes to read and write."""
        self.words.share_memory_()
        return self

    def is_shared(self) -> bool:
        return self.words.is_shared()

    def numpy(self, *, force: bool = False) -> Any:
        """The values as a new NumPy array, read-only: what is written there could not reach the bits."""
        if self.requires_grad and not force:
            raise RuntimeError("numpy() of a tensor that requires grad: use detach().numpy()")
        array = self.unpack().detach().numpy(force=force)
        array.flags.writeable = False
        return array

    def __array__(self, dtype: Any = None) -> Any:
        array = self.numpy(force=True)
        return array if dtype is None else array.astype(dtype, copy=False)

    def tolist(self) -> Any:
        return self.unpack().detach().tolist()

    def _no_dense_memory(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(
            "a BinaryTensor of bop2nd_fast has no dense memory to hand out: take unpack() for its values or "
            ".words for its bits. torch.save, torch.load and bop2nd_fast.checkpoint keep it packed"
        )

    data_ptr = _no_dense_memory
    storage = _no_dense_memory
    apply_ = _no_dense_memory
    map_ = _no_dense_memory
    map2_ = _no_dense_memory
    __dlpack__ = _no_dense_memory
    __dlpack_device__ = _no_dense_memory

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
        if func.namespace == "c10d":
            _refuse_collective(func)
        if torch.is_inference_mode_enabled():  # torch decomposes what is made of others only in autograd
            result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return call_on_values(func, args, kwargs)

    def __setitem__(self, index: Any, value: Any) -> None:
        dense = self.unpack().detach()
        dense[index] = value
        self.detach().copy_(dense)  # raises unless the values are +-1


_DATA: Any = Tensor.data  # torch's own


def _check_words(words: Tensor, layout: Layout) -> None:
    if words.dtype != torch.int32:
        raise ValueError(f"words must be int32, got {words.dtype}")
    if tuple(words.shape) != layout.words_shape:
        raise ValueError(
            f"words of shape {tuple(words.shape)} do not fit logical shape {layout.shape} packed along "
            f"axis {layout.dim}: that takes {layout.words_shape}"
        )


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
    x = x.detach()
    if type(x) is Tensor:
        in_memory = x.permute(sorted(range(x.dim()), key=x.stride, reverse=True))
        if backends.all_signs(in_memory):
            return
    bad = x.abs() != 1
    if bool(bad.any()):
        raise ValueError(f"{what}: {int(bad.sum())} of {x.numel()} values are neither +1 nor -1")


# ------------------------------------------------------------------------------------- dispatch


class UnpackedView(Tensor):
    """What a view operation on a BinaryTensor returns: its values, unpacked, to read only.

    The bits have no floats to alias, so a write into such a view would be lost; it raises instead.
    """

    dense: Tensor

    @staticmethod
    def __new__(cls, dense: Tensor) -> UnpackedView:
        return wrapper(
            cls,
            type(dense) is not Tensor,
            size=dense.shape,
            strides=dense.stride(),
            dtype=dense.dtype,
            device=dense.device,
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
        if func.namespace == "c10d":
            _refuse_collective(func)
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
    return func(**pytree.tree_map_only(BinaryTensor, lambda t: t.memory.words, named))


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


def _refuse_collective(func: Any) -> NoReturn:
    """c10d's schemas do not say what they write: what is not known to move values would be lost silently."""
    raise RuntimeError(
        f"{func} cannot take a BinaryTensor: a sum or mean of signs is no sign, and its memory is not dense. "
        "broadcast, all_gather, gather, scatter and all_to_all move its values; for others use unpack(), or "
        ".words for its bits"
    )
