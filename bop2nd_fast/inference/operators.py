"""The list of operators a packed model may run beside its layers: what converts, saves and loads.

All are functional and deterministic: nothing is written in place, nothing is random, nothing is read from
outside, and the shape of a result never depends on values. Names are those of ``torch.export``
(``aten.add.Tensor``); ``int.*`` and ``float.*`` compute sizes on Python numbers, bounded to int64 and to
finite values. A file that names the operators of ``BITS`` only is of profile ``bits``
(``docs/packed_file.md`` defines them without torch), any other operator makes it profile ``torch``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .graph import Ref, refers
from .operand_checks import GUARDS

# By what a result takes (see ``memory.py``): one element for each of the shape that operands broadcast to;
ELEMENTWISE = """
__and__.Scalar __and__.Tensor __lshift__.Scalar __lshift__.Tensor __or__.Scalar __or__.Tensor
__rshift__.Scalar __rshift__.Tensor __xor__.Scalar __xor__.Tensor _prelu_kernel abs absolute acos acosh
add.Scalar add.Tensor addcdiv addcmul angle asin asinh atan atan2 atanh binary_cross_entropy
binary_cross_entropy_with_logits bitwise_and.Scalar bitwise_and.Tensor bitwise_left_shift.Tensor
bitwise_left_shift.Tensor_Scalar bitwise_not bitwise_or.Scalar bitwise_or.Tensor bitwise_right_shift.Tensor
bitwise_right_shift.Tensor_Scalar bitwise_xor.Scalar bitwise_xor.Tensor ceil celu clamp clamp.Tensor
clamp_max clamp_max.Tensor clamp_min clamp_min.Tensor clip clip.Tensor copysign.Scalar copysign.Tensor cos
cosh deg2rad digamma div.Scalar div.Scalar_mode div.Tensor div.Tensor_mode divide.Scalar divide.Tensor
divide.Tensor_mode elu eq.Scalar eq.Tensor erf erfc erfinv exp exp2 expm1 fix float_power.Scalar
float_power.Tensor_Scalar float_power.Tensor_Tensor floor floor_divide floor_divide.Scalar fmax fmin
fmod.Scalar fmod.Tensor frac ge.Scalar ge.Tensor gelu glu greater.Scalar greater.Tensor greater_equal.Scalar
greater_equal.Tensor gt.Scalar gt.Tensor hardshrink hardsigmoid hardswish hardtanh heaviside
hinge_embedding_loss huber_loss hypot i0 isclose isfinite isinf isnan isneginf isposinf isreal kl_div
l1_loss ldexp.Tensor le.Scalar le.Tensor leaky_relu lerp.Scalar lerp.Tensor less.Scalar less.Tensor
less_equal.Scalar less_equal.Tensor lgamma log log10 log1p log2 log_sigmoid logaddexp logaddexp2 logical_and
logical_not logical_or logical_xor logit lt.Scalar lt.Tensor margin_ranking_loss masked_fill.Scalar
masked_fill.Tensor max.other maximum min.other minimum mish mse_loss mul.Scalar mul.Tensor multiply.Scalar
multiply.Tensor nan_to_num ne.Scalar ne.Tensor neg negative nextafter not_equal.Scalar not_equal.Tensor
poisson_nll_loss positive pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor prelu rad2deg reciprocal relu relu6
remainder.Scalar remainder.Scalar_Tensor remainder.Tensor round round.decimals rsqrt rsub.Scalar rsub.Tensor
selu sgn sigmoid sign signbit silu sin sinc sinh smooth_l1_loss soft_margin_loss softplus softshrink sqrt
square sub.Scalar sub.Tensor subtract.Scalar subtract.Tensor tan tanh threshold true_divide.Scalar
true_divide.Tensor trunc where where.Scalar where.ScalarOther where.ScalarSelf where.self xlogy.Scalar_Other
xlogy.Scalar_Self xlogy.Tensor
"""
# nothing, the operand's memory is seen in another way;
VIEWS = """
adjoint alias atleast_1d atleast_1d.Sequence atleast_2d atleast_2d.Sequence atleast_3d atleast_3d.Sequence
broadcast_tensors broadcast_to chunk detach diagonal dsplit.array dsplit.int expand expand_as hsplit.array
hsplit.int lift lift_fresh mH mT matrix_H meshgrid meshgrid.indexing moveaxis.int moveaxis.intlist
movedim.int movedim.intlist narrow numpy_T permute select.int slice.Tensor split.Tensor split.sizes
split_with_sizes squeeze squeeze.dim squeeze.dims swapaxes swapdims t tensor_split.indices
tensor_split.sections transpose.int unbind.int unflatten.int unfold unsafe_chunk unsafe_split.Tensor
unsafe_split_with_sizes unsqueeze view view.dtype view_as vsplit.array vsplit.int
"""
# no more elements than all operands have;
KEPT = """
_native_batch_norm_legit.no_stats
_batch_norm_no_update _log_softmax _native_batch_norm_legit_no_training _safe_softmax _softmax _to_copy
_unsafe_view alias_copy all all.dim all.dims alpha_dropout amax amin aminmax any any.dim any.dims argmax
argmin argsort argsort.stable batch_norm bucketize.Scalar bucketize.Tensor cat channel_shuffle clone
column_stack concat concatenate contiguous copy count_nonzero count_nonzero.dim_IntList cross_entropy_loss
cummax cummin cumprod cumsum detach_copy diagonal_copy diagonal_scatter diff dropout dstack
feature_alpha_dropout feature_dropout fill.Scalar fill.Tensor flatten.using_ints flip fliplr flipud
frobenius_norm.dim full_like gather group_norm hstack index_add index_copy index_fill.int_Scalar
index_fill.int_Tensor index_put instance_norm isin.Scalar_Tensor isin.Tensor_Scalar isin.Tensor_Tensor
kthvalue layer_norm lift_fresh_copy linalg_matrix_norm linalg_norm linalg_vector_norm log_softmax.int
logcumsumexp logsumexp max max.dim mean mean.dim median median.dim min min.dim mode msort nanmean nanmedian
nanmedian.dim nansum narrow_copy native_batch_norm native_channel_shuffle native_dropout native_group_norm
native_layer_norm nll_loss nll_loss2d nll_loss_nd norm.Scalar norm.ScalarOpt_dim norm.ScalarOpt_dim_dtype
norm.ScalarOpt_dtype ones_like permute_copy pixel_shuffle pixel_unshuffle prod prod.dim_int ravel renorm
reshape reshape_as resolve_conj resolve_neg rms_norm roll rot90 row_stack rrelu scatter.reduce scatter.src
scatter.value scatter.value_reduce scatter_add scatter_reduce.two searchsorted.Scalar searchsorted.Tensor
select_copy.int select_scatter slice_copy.Tensor slice_scatter softmax.int sort sort.stable
split_copy.Tensor split_with_sizes_copy squeeze_copy squeeze_copy.dim squeeze_copy.dims stack std
std.correction std.dim std_mean std_mean.correction std_mean.dim sum sum.dim_IntList sum_to_size t_copy take
to.dtype to.other topk trace transpose_copy.int trapezoid.dx tril triu type_as unbind_copy.int
unsqueeze_copy var var.correction var.dim var_mean var_mean.correction var_mean.dim view_copy vstack
zeros_like
"""
# pools with a padding of at most half their window;
POOLS = """
avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool1d_with_indices max_pool2d max_pool2d_with_indices
max_pool3d max_pool3d_with_indices
"""
# anything.
_OTHERS = """
_adaptive_avg_pool2d _adaptive_avg_pool3d _cdist_forward _convolution _native_multi_head_attention
_scaled_dot_product_attention_math _transformer_encoder_layer_fwd _trilinear _upsample_bicubic2d_aa
_upsample_bilinear2d_aa _upsample_nearest_exact1d _upsample_nearest_exact1d.vec _upsample_nearest_exact2d
_upsample_nearest_exact2d.vec _upsample_nearest_exact3d _upsample_nearest_exact3d.vec _weight_norm
_weight_norm_interface adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
adaptive_max_pool2d adaptive_max_pool3d addbmm addmm addmv addr affine_grid_generator arange arange.start
arange.start_step baddbmm bilinear block_diag bmm cdist chain_matmul col2im constant_pad_nd conv1d
conv1d.padding conv2d conv2d.padding conv3d conv3d.padding conv_transpose1d conv_transpose2d.input
conv_transpose3d.input convolution corrcoef cosine_embedding_loss cosine_similarity cov cross diag
diag_embed dist dot einsum embedding embedding_bag embedding_bag.padding_idx expand_copy eye eye.m full ger
grid_sampler grid_sampler_2d grid_sampler_3d gru.input gru_cell im2col index.Tensor index_select inner kron
linalg_cross linalg_multi_dot linear linspace lstm.input lstm_cell masked_scatter matmul matrix_power
max_unpool2d max_unpool3d mm mv new_full new_ones new_zeros ones outer pad pairwise_distance pdist quantile
quantile.scalar reflection_pad1d reflection_pad2d reflection_pad3d repeat repeat_interleave.self_int
replication_pad1d replication_pad2d replication_pad3d rnn_relu.input rnn_relu_cell rnn_tanh.input
rnn_tanh_cell scalar_tensor scaled_dot_product_attention take_along_dim tensordot tile trapezoid.x
tril_indices triplet_margin_loss triu_indices unfold_copy upsample_bicubic2d upsample_bicubic2d.vec
upsample_bilinear2d upsample_bilinear2d.vec upsample_linear1d upsample_linear1d.vec upsample_nearest1d
upsample_nearest1d.vec upsample_nearest2d upsample_nearest2d.vec upsample_nearest3d upsample_nearest3d.vec
upsample_trilinear3d upsample_trilinear3d.vec vdot zeros
"""
# Profile ``bits``: real-valued operators that the specification of the file defines.
_BITS = """
adaptive_avg_pool2d add.Tensor avg_pool2d batch_norm cat clamp contiguous conv2d div.Tensor expand expand_as
flatten.using_ints hardtanh leaky_relu linear log_softmax.int mean.dim mul.Tensor neg permute prelu relu
reshape softmax.int sub.Tensor view
"""


def full_names(*lists: str) -> frozenset[str]:
    """Names as ``torch.export`` writes them."""
    names = " ".join(lists).split()
    return frozenset(f"aten.{name}" if "." in name else f"aten.{name}.default" for name in names)


BITS = full_names(_BITS)
_ATEN = full_names(ELEMENTWISE, VIEWS, KEPT, POOLS, _OTHERS)

# ------------------------------------------------------------------------------------------- numbers


def _int64(value: Any) -> int:
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise OverflowError(f"{value!r} is no 64-bit integer")
    return value


def _finite(value: Any) -> float:
    if type(value) is not float or not math.isfinite(value):
        raise OverflowError(f"{value!r} is no finite number")
    return value


def _of_ints(function: Callable[..., Any], *values: Any) -> int:
    return _int64(function(*map(_int64, values)))


def _of_floats(function: Callable[..., Any], *values: Any) -> float:
    return _finite(float(function(*(_finite(float(v)) for v in values))))


def _whole(function: Callable[[float], int], value: Any) -> int:
    return _int64(function(_finite(float(value))))


def _require(holds: Callable[[Any, Any], bool], sign: str, left: Any, right: Any) -> bool:
    """What the trained model's code asked about sizes, and was answered with yes in the conversion."""
    if not holds(_int64(left), _int64(right)):
        raise ValueError(
            "an input has a size for which the model takes another way than in the conversion: "
            f"{left} {sign} {right} does not hold"
        )
    return True


def _getitem(values: Any, index: int) -> Any:
    """One of the results of an operator that has several."""
    return values[_int64(index)]


_INTS: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "floordiv": operator.floordiv,
    "mod": operator.mod, "neg": operator.neg, "min": min, "max": max, "abs": abs,
}  # fmt: skip
_FLOATS: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "truediv": operator.truediv,
    "neg": operator.neg, "min": min, "max": max, "abs": abs, "sqrt": math.sqrt, "pow": math.pow,
    "log": math.log, "exp": math.exp, "of": float,
}  # fmt: skip
_WHOLE: dict[str, Callable[[float], int]] = {
    "floor": math.floor, "ceil": math.ceil, "round": round, "trunc": math.trunc,
}  # fmt: skip
_RELATIONS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "eq": (operator.eq, "=="), "ne": (operator.ne, "!="), "lt": (operator.lt, "<"), "le": (operator.le, "<="),
    "gt": (operator.gt, ">"), "ge": (operator.ge, ">="),
}  # fmt: skip
NUMBERS: dict[str, Callable[..., Any]] = {
    "getitem": _getitem,
    **{f"int.{name}": partial(_of_ints, function) for name, function in _INTS.items()},
    **{f"float.{name}": partial(_of_floats, function) for name, function in _FLOATS.items()},
    **{f"int.{name}": partial(_whole, function) for name, function in _WHOLE.items()},
    **{f"require.{name}": partial(_require, *relation) for name, relation in _RELATIONS.items()},
}

NAMES = frozenset({*_ATEN, *NUMBERS, "aten.sym_size.int"})

# ------------------------------------------------------------------------------------------- one operator


class Operator(NamedTuple):
    """An operator of the list: what to call, and the schema its arguments are checked against."""

    name: str
    call: Callable[..., Any]
    schema: Any  # torch.FunctionSchema, or None for numbers
    profile: str  # "bits" or "torch"


@cache
def find(name: str) -> Operator:
    """The operator of that name.

    Raises:
        ValueError: the list has none of that name, or this torch has not.
    """
    if name not in NAMES:
        raise ValueError(f"{name!r} is not an operator that a packed model can run")
    if name in NUMBERS:
        return Operator(name, NUMBERS[name], None, "bits")
    if name == "aten.sym_size.int":
        return Operator(name, Tensor.size, torch.ops.aten.sym_size.int._schema, "bits")
    _, packet, overload = name.split(".")
    try:
        found = getattr(getattr(torch.ops.aten, packet), overload)
    except AttributeError:
        raise ValueError(f"this torch ({torch.__version__}) has no operator {name!r}") from None
    return Operator(name, found, found._schema, "bits" if name in BITS else "torch")


# Arguments that turn an operator into one that draws random numbers or writes statistics.
_MUST_BE: dict[str, dict[str, Any]] = {
    "dropout": {"train": False},
    "alpha_dropout": {"train": False},
    "feature_dropout": {"train": False},
    "feature_alpha_dropout": {"train": False},
    "native_dropout": {"train": False},
    "rrelu": {"training": False},
    "scaled_dot_product_attention": {"dropout_p": 0.0},
    "_scaled_dot_product_attention_math": {"dropout_p": 0.0},
    "lstm": {"train": False},
    "gru": {"train": False},
    "rnn_tanh": {"train": False},
    "rnn_relu": {"train": False},
    "batch_norm": {"training": False},
    "native_batch_norm": {"training": False},
    "embedding": {"sparse": False},
    "embedding_bag": {"sparse": False},
}
_NOT_IN_GRAPHS = ("device", "layout", "pin_memory", "generator")
# Sizes that torch divides by, or multiplies without looking: their least value, by the argument's name.
_LEAST = {
    "kernel_size": 1, "stride": 1, "dilation": 1, "groups": 1, "upscale_factor": 1, "downscale_factor": 1,
    "num_groups": 1, "group": 1, "chunks": 1, "sections": 1, "padding": 0, "output_padding": 0, "repeats": 0,
    "split_size": 0, "split_sizes": 0, "num_layers": 1,
}  # fmt: skip
_LARGEST = 2**31 - 1
_MOST = {"chunks": 2**16, "sections": 2**16, "num_layers": 2**10}  # results, or rounds


def check(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operator:
    """The operator, after a look at its arguments: their number, names, types and sizes.

    References stand for tensors and numbers, which are judged when they are there.

    Raises:
        ValueError: not in the list, or arguments that its schema does not take.
    """
    found = find(name)
    if found.schema is None:
        if kwargs or not args:
            raise ValueError(f"{name} takes numbers by position")
        return found
    given = bind(found, args, kwargs)
    fixed = _MUST_BE.get(name.split(".")[1], {})
    for argument in found.schema.arguments:
        if argument.name not in given:
            if not argument.has_default_value():
                raise ValueError(f"{name} misses its argument {argument.name!r}")
            continue
        value = given[argument.name]
        if argument.name in _NOT_IN_GRAPHS and value is not None:
            raise ValueError(f"{name}: results are where the model is, a graph names no {argument.name}")
        if not _fits(str(argument.real_type), value):
            raise ValueError(f"{name} takes {argument.name} of type {argument.real_type}, not {value!r}")
        check_size(name, argument.name, value)
    for key, value in fixed.items():
        default = next(a.default_value for a in found.schema.arguments if a.name == key)
        if given.get(key, default) != value:
            raise ValueError(f"{name} with {key} other than {value!r} is not functional and deterministic")
    if (
        name == "aten.instance_norm.default"
        and given["use_input_stats"]
        and given["running_mean"] is not None
    ):
        raise ValueError(f"{name} that updates statistics is not functional")
    return found


def bind(found: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by the names of the schema.

    Raises:
        ValueError: too many, twice, or of unknown names.
    """
    positional = [a.name for a in found.schema.arguments if not a.kwarg_only]
    known = {a.name for a in found.schema.arguments}
    given = dict(zip(positional, args, strict=False))
    if len(args) > len(positional) or not kwargs.keys() <= known - given.keys():
        raise ValueError(f"{found.name} takes ({', '.join(known)}), got {len(args)} and {sorted(kwargs)}")
    return given | kwargs


def explicit(found: Operator, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments in the schema's order; those of profile ``bits`` with their defaults written out."""
    named = [a for a in found.schema.arguments if a.name not in _NOT_IN_GRAPHS]
    defaults = {a.name: a.default_value for a in named if a.has_default_value()}
    if isinstance(defaults.get("memory_format"), int):  # as schemas hold it
        defaults["memory_format"] = torch.contiguous_format
    chosen = defaults | given if found.profile == "bits" else given
    return {a.name: chosen[a.name] for a in named if a.name in chosen}


def unbind(found: Operator, given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments by name as a call: by position as far as the schema has them in order."""
    args = []
    left = dict(given)
    for argument in found.schema.arguments:
        if argument.kwarg_only or argument.name not in left:
            break
        args.append(left.pop(argument.name))
    return tuple(args), left


def check_size(name: str, argument: str, value: Any) -> None:
    """Raise ``ValueError`` for a size that torch would divide by, or that leaves 31 bits."""
    least = _LEAST.get(argument)
    if least is None:
        return
    for size in value if isinstance(value, (list, tuple)) else [value]:
        most = _MOST.get(argument, _LARGEST)
        if type(size) is int and not least <= size <= most:
            raise ValueError(f"{name}: {argument} must be {least} to {most}, got {size}")


def makes_from_nothing(found: Operator) -> bool:
    """Whether the operator takes no tensor, so that it has to be told the device."""
    arguments = [] if found.schema is None else found.schema.arguments
    return any(a.name == "device" for a in arguments) and not any("Tensor" in str(a.type) for a in arguments)


def has_sizes(found: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a size that has to be looked at is known at the call only."""
    if found.schema is None:
        return False
    return any(name in _LEAST and refers(value) for name, value in bind(found, args, kwargs).items())


def check_call(found: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """What can be judged at the call only: sizes that steps computed, operands of guarded operators.

    Raises:
        ValueError
    """
    given = bind(found, args, kwargs)
    for argument, value in given.items():
        check_size(found.name, argument, value)
    if found.name in GUARDS:
        GUARDS[found.name](given)


_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (float, int),
    "bool": (bool,),
    "str": (str,),
    "number": (int, float, bool),
    "ScalarType": (torch.dtype,),
    "MemoryFormat": (torch.memory_format,),
    "Tensor": (int, float, bool),  # a number is a tensor without axes
}
_TAKES_REFERENCES = ("int", "float", "number", "Tensor")


def _fits(wanted: str, value: Any) -> bool:
    """Whether an argument is of a schema's type; a reference may stand for tensors, numbers and lists."""
    if wanted.startswith("Optional["):
        return value is None or _fits(wanted[9:-1], value)
    if wanted.startswith("List["):
        inner = wanted[5:-1]
        if isinstance(value, (list, tuple)):
            return all(_fits(inner, v) for v in value)
        return isinstance(value, Ref) or _fits(inner, value)  # a number stands for as many as it needs
    if isinstance(value, Ref):
        return wanted in _TAKES_REFERENCES
    if wanted not in _TYPES:
        return False
    if isinstance(value, bool):
        return wanted in ("bool", "number", "Tensor")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return False
    return isinstance(value, _TYPES[wanted])
