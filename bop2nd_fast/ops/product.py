"""What the products of signs share: geometry from checked operands, what they emit, tiles of a backward pass.

Every implementation refuses the same operands: the kernels in C++ by ``csrc/register_product.h``, all that is
Python (references, fakes, the functions that users call) by the checks below. The limits of sizes are those
of :mod:`bop2nd_fast.kernels.geometry`. Symbolic sizes are not judged: the call that runs is.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ..binary_tensor import BinaryTensor
from ..kernels.geometry import Arguments, Geometry, Pair, checked_geometry, pair, words_for
from ..kernels.outputs import check_outputs

# The backward pass unpacks activations in tiles: of 8 MiB of fp32, which a CPU's caches hold; of 256 MiB on
# GPUs, where a tile costs ten launches and a library wants large problems.
TILE_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}
REALS = (torch.float32, torch.bfloat16, torch.float16)


def check_real(tensor: Tensor, what: str) -> None:
    """Raises TypeError unless the tensor's dtype is float32, bfloat16 or float16."""
    if tensor.dtype not in REALS:
        raise TypeError(f"{what} must be float32, bfloat16 or float16, got {tensor.dtype}")


def check_words(words: Tensor, what: str, beside: Tensor | None = None) -> None:
    """Raises TypeError unless the tensor is int32, ValueError unless it is on the device of ``beside``."""
    if words.dtype != torch.int32:
        raise TypeError(f"{what} must be int32 words, got {words.dtype}")
    if beside is not None and words.device != beside.device:
        raise ValueError(f"{what} is on {words.device}, the first operand on {beside.device}")


def check_shape(tensor: Tensor, shape: Sequence[int], what: str) -> None:
    """Raises ValueError unless the tensor has this shape; symbolic sizes pass."""
    if _plain(*shape, *tensor.shape) and tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{what} must be {list(shape)}, got {list(tensor.shape)}")


def check_extent(tensor: Tensor, what: str) -> None:
    """Raises ValueError from 2**54 elements on, where a size of 0 counts as 1: what follows stays bounded.

    Also for negative sizes: ``expand`` makes such tensors of empty ones (torch 2.13).
    """
    if _plain(*tensor.shape) and min(tensor.shape, default=0) < 0:
        raise ValueError(f"{what} has a negative size: {list(tensor.shape)}")
    if _plain(*tensor.shape) and math.prod(max(1, size) for size in tensor.shape) >= 2**54:
        raise ValueError(
            f"{what} {list(tensor.shape)} is beyond 2**54 elements, where a size of 0 counts as 1"
        )


def _plain(*sizes: Any) -> bool:
    return all(type(size) is int for size in sizes)


def geometry_of(
    batch: int,
    image: Sequence[int],
    channels: int,
    outputs: int,
    kernel: Sequence[int],
    arguments: Arguments = Arguments(),  # noqa: B008  a tuple
) -> Geometry:
    """The geometry of a product, within its limits; of a linear layer with image and kernel (1, 1).

    Raises:
        ValueError: a limit is not kept; with the numbers.
    """
    for name, values in zip(("stride", "padding", "dilation"), arguments[:3], strict=True):
        if len(values) != 2:
            raise ValueError(f"{name} must be two numbers, got {list(values)}")
    plain = _plain(batch, channels, outputs, *image, *kernel)
    if torch.compiler.is_compiling():  # which warns of caches
        traced = Geometry.of(_pair(image), _pair(kernel), channels, outputs, arguments)
        return traced.check(batch) if plain else traced
    if plain:
        return checked_geometry(batch, _pair(image), _pair(kernel), channels, outputs, arguments)
    return Geometry.of(_pair(image), _pair(kernel), channels, outputs, arguments)


def _pair(values: Sequence[int]) -> Pair:
    return values[0], values[1]


def linear_geometry(shape: Sequence[int], features: int, weight: Tensor) -> Geometry:
    """Of rows ``[...]`` of so many features by weight words ``[outputs, words]``.

    Raises:
        TypeError, ValueError: other words, or a limit is not kept.
    """
    check_words(weight, "weight")
    rows = 1
    for size in shape:
        rows *= size
    if weight.dim() != 2 or (_plain(features) and (features < 0 or weight.shape[1] != words_for(features))):
        raise ValueError(f"weight words {list(weight.shape)} do not fit {features} input features")
    return geometry_of(rows, (1, 1), features, weight.shape[0], (1, 1))


def conv_geometry(
    batch: int, image: Sequence[int], channels: int, weight: Tensor, arguments: Arguments
) -> Geometry:
    """Of images by weight words ``[outputs, rows, columns, words of a group]``.

    Raises:
        TypeError, ValueError: other words, or a limit is not kept.
    """
    check_words(weight, "weight")
    if weight.dim() != 4:
        raise ValueError(f"weight must be [O, kH, kW, words], got {list(weight.shape)}")
    outputs, rows, columns, words = weight.shape
    geometry = geometry_of(batch, image, channels, outputs, (rows, columns), arguments)
    if _plain(words, geometry.words) and words != geometry.words:
        raise ValueError(
            f"weight words {list(weight.shape)} do not fit {channels} input channels in "
            f"{geometry.groups} groups"
        )
    return geometry


def check_saved(
    grad: Tensor, shape: Sequence[int], signs: Tensor, mask: Tensor, saved: Sequence[int]
) -> None:
    """What a backward pass is given: the output's gradient, sign words and mask words (or none) of the input.

    Raises:
        TypeError, ValueError: other dtypes, devices or shapes.
    """
    check_real(grad, "grad_output")
    check_words(signs, "signs", grad)
    check_words(mask, "mask", grad)
    check_shape(grad, shape, "grad_output")
    check_shape(signs, saved, "signs")
    if tuple(mask.shape) != (0,):
        check_shape(mask, saved, "mask (or empty)")


def empty_outputs(
    like: Tensor,
    shape: tuple[int, ...],
    *,
    values: bool = True,
    signs: bool = False,
    dtype: torch.dtype = torch.float32,
    **operands: Any,
) -> tuple[Tensor, Tensor]:
    """Memory for the values ``[..., O]`` and their sign words; what is not asked for is empty.

    Raises:
        TypeError, ValueError: as :func:`~bop2nd_fast.kernels.outputs.check_outputs`.
    """
    check_outputs(like, shape, values=values, signs=signs, dtype=dtype, **operands)
    words = (*shape[:-1], words_for(shape[-1]))
    return (
        like.new_empty(shape if values else (0,), dtype=dtype),
        like.new_empty(words if signs else (0,), dtype=torch.int32),
    )


def image_like(input: Tensor, values: Tensor) -> Tensor:
    """Values ``[N, Ho, Wo, O]`` as ``[N, O, Ho, Wo]`` in the memory format of the image ``input``."""
    return values.permute(0, 3, 1, 2).contiguous(memory_format=suggest_memory_format(input))


def row_tiles(n_rows: int, elements_per_row: int, device: torch.device) -> Iterator[slice]:
    """Slices of rows whose unpacked values fill at most one tile of ``device``, of nearly one size."""
    tile = TILE_ELEMENTS.get(device.type, TILE_ELEMENTS["cpu"])
    n_tiles = -(-n_rows // max(1, tile // max(1, elements_per_row)))
    step = max(1, -(-n_rows // max(1, n_tiles)))  # even tiles: torch's convolutions plan once for each shape
    return (slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step))


def records_gradient(input: Tensor, weight: BinaryTensor) -> bool:
    """Whether the operator must see the BinaryTensor itself; else its words will do, at half the overhead."""
    wanted = torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)
    return wanted or torch.compiler.is_compiling()


def check_operands(
    input: Tensor,
    weight: BinaryTensor,
    n_axes: int,
    dtypes: Collection[torch.dtype] = REALS,
    allowed: str = "float32, bfloat16 or float16",
) -> None:
    """Raise unless ``weight`` is packed along axis 1 and ``input`` of one of ``dtypes`` on its device."""
    if not isinstance(weight, BinaryTensor):
        raise TypeError(f"weight must be a BinaryTensor (see bop2nd_fast.pack), got {type(weight).__name__}")
    if weight.dim() != n_axes or weight.bit_layout.dim != 1:
        raise ValueError(
            f"weight of shape {tuple(weight.shape)} packed along axis {weight.bit_layout.dim}: this operator "
            f"needs {n_axes} axes packed along axis 1"
        )
    if input.dtype not in dtypes:
        raise TypeError(f"input must be {allowed}, got {input.dtype}: use x.float()")
    if input.device != weight.device:
        raise ValueError(f"input is on {input.device}, weight on {weight.device}")


def check_features(input: Tensor, weight: BinaryTensor) -> None:
    """Raise ValueError unless the rows of ``input`` are as long as those of ``weight``."""
    if input.dim() < 1 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"input {tuple(input.shape)} does not end in the {weight.shape[1]} features of the weight"
        )


def image_arguments(
    input: Tensor,
    weight: BinaryTensor,
    stride: int | Pair,
    padding: int | Pair,
    dilation: int | Pair,
    groups: int,
) -> tuple[Pair, Pair, Pair, int]:
    """A convolution's geometry, both axes written out; the limits of sizes every backend looks at.

    Raises:
        ValueError: other numbers than these can be, or channels that do not fit the weight.
    """
    strides = stride if _is_pair(stride) else pair(stride, "stride", 1)
    paddings = padding if _is_pair(padding) else pair(padding, "padding", 0)
    dilations = dilation if _is_pair(dilation) else pair(dilation, "dilation", 1)
    if input.dim() != 4:
        raise ValueError(f"input must be [N, C, H, W], got shape {tuple(input.shape)}")
    outputs, per_group = weight.shape[:2]
    if groups < 1 or outputs % groups or input.shape[1] != groups * per_group:
        raise ValueError(
            f"input has {input.shape[1]} channels; a weight {tuple(weight.shape)} with groups={groups} "
            f"takes {groups * per_group} (and groups must divide its {outputs} outputs)"
        )
    return strides, paddings, dilations, groups


def _is_pair(value: Any) -> TypeGuard[Pair]:
    """As layers pass it: a tenth of the time that ``pair`` takes."""
    return type(value) is tuple and len(value) == 2 and type(value[0]) is int and type(value[1]) is int
