"""The geometry of a binary convolution: one description, its sizes, and the limits that kernels rely on.

Plain integers, no torch and no Triton: operators, fakes, layers, launchers, files and benchmarks all build a
:class:`Geometry`, and whoever is about to compute or to believe a file calls :meth:`Geometry.check`.

The limits, the same as in ``csrc/core/conv_shape.h``. They are checked in unbounded integers (in C++ with
overflow checks), so that no product of sizes can wrap afterwards:

1. Stride, dilation, kernel and groups are at least 1, padding, channels and outputs at least 0; all of them,
   the image and the padded image (size + 2 padding, along each axis) are below 2**31. Groups of nothing (more
   groups than channels or outputs) are refused.
2. The kernel with its dilation fits into the padded image: the output has at least one row and one column.
3. The words of the padded input, all images, and those of the weight are below 2**31: offsets in either are
   int32.
4. The products that make one output (taps * channels of a group) are below 2**24: fp32 holds every dot.
5. Elements of the output (their bytes below 2**63) and the products of the whole are below 2**60.

In 3 and 5 a size of 0 counts as 1: loops run over sizes whose product is nothing.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

Pair = tuple[int, int]

PADDING_VALUES = (0, 1, -1)
INT32_LIMIT = 2**31
DOT_LIMIT = 2**24
COUNT_LIMIT = 2**60


def words_for(length: int) -> int:
    """Words that hold ``length`` bits."""
    return -(-length // 32)


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Output length of a convolution along one axis; below 1 where the kernel does not fit."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def pair(value: int | tuple[int, int] | list[int], name: str, minimum: int) -> Pair:
    """An integer or two as a pair; raises ValueError outside ``minimum`` .. 2**31 - 1."""
    both = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(both) != 2 or any(isinstance(v, (bool, float, str)) or v is None for v in both):
        raise ValueError(f"{name} must be one or two integers >= {minimum}, got {value!r}")
    first, second = operator.index(both[0]), operator.index(both[1])
    if min(first, second) < minimum:
        raise ValueError(f"{name} must be one or two integers >= {minimum}, got {value!r}")
    if max(first, second) >= INT32_LIMIT:
        raise ValueError(f"{name} must be below 2**31, got {value!r}")
    return first, second


class Arguments(NamedTuple):
    """How a kernel is laid over an image: what the operators take after their tensors, in their order."""

    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    padding_value: int = 0  # what a padded tap counts as: 0 (left out), +1 or -1

    @classmethod
    def taken(cls, given: Sequence[Any], padded: bool = True) -> tuple[Arguments, list[Any]]:
        """These, out of an operator's operands from ``stride`` on, and the operands behind them.

        Not ``padded``: the operator takes no padding value, it leaves padded taps out.
        """
        stride, padding, dilation, groups, *behind = given
        value = behind.pop(0) if padded else 0
        return cls(tuple(stride), tuple(padding), tuple(dilation), groups, value), behind


SCHEMA = "int[2] stride, int[2] padding, int[2] dilation, int groups, int padding_value"  # of Arguments


class Geometry(NamedTuple):
    """A convolution of a batch of any size. Pairs are (rows, columns); sizes are those of one group.

    The first fields are those of :class:`Arguments`. Make it with :meth:`of`.
    """

    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    padding_value: int
    image: Pair
    kernel: Pair
    out: Pair
    channels: int
    words: int  # that hold the channels
    outputs: int
    taps: int
    image_words: int  # of one pixel, all groups
    all_outputs: int

    @classmethod
    def of(
        cls,
        image: Pair,
        kernel: Pair,
        channels: int,
        outputs: int,
        arguments: Arguments = Arguments(),  # noqa: B008  a tuple
    ) -> Geometry:
        """From the sizes of the whole tensors: ``channels`` and ``outputs`` of all groups.

        Sizes may be symbols: nothing is asked of them but that the groups divide them.

        Raises:
            ValueError: the arguments break limit 1, or the groups do not divide.
        """
        stride, padding, dilation, groups, padding_value = arguments
        strides, paddings = pair(stride, "stride", 1), pair(padding, "padding", 0)
        dilations = pair(dilation, "dilation", 1)
        if not 1 <= groups < INT32_LIMIT:
            raise ValueError(f"groups is {groups}, allowed is 1 to 2**31 - 1")
        if groups > 1 and (channels % groups != 0 or outputs % groups != 0):
            raise ValueError(f"groups={groups} does not divide {channels} channels and {outputs} outputs")
        if padding_value not in PADDING_VALUES:
            raise ValueError(f"padding_value must be 0, 1 or -1, got {padding_value!r}")
        sizes = zip(image, kernel, strides, paddings, dilations, strict=True)
        height, width = (output_size(*axis) for axis in sizes)
        per_group = channels // groups
        return cls(
            strides, paddings, dilations, groups, padding_value,
            (image[0], image[1]), (kernel[0], kernel[1]), (height, width),
            per_group, words_for(per_group), outputs // groups,
            kernel[0] * kernel[1], groups * words_for(per_group), outputs,
        )  # fmt: skip

    @property
    def arguments(self) -> Arguments:
        return Arguments._make(self[: len(Arguments._fields)])

    @property
    def all_channels(self) -> int:
        return self.groups * self.channels

    def pixels(self, batch: int) -> int:
        """Output pixels of ``batch`` images."""
        return batch * self.out[0] * self.out[1]

    def check(self, batch: int = 1) -> Geometry:
        """This geometry, if it and a batch of this size keep the limits above.

        Raises:
            ValueError: which one is not kept, with its numbers.
        """
        self._check_sizes(batch)
        padded = [size + 2 * p for size, p in zip(self.image, self.padding, strict=True)]
        for name, size in zip(("height", "width"), padded, strict=True):
            if size >= INT32_LIMIT:
                raise ValueError(f"the padded image's {name} is {size}, allowed is less than 2**31")
        if min(self.out) < 1:
            raise ValueError(
                f"an image {self.image} with padding {self.padding} is smaller than the kernel {self.kernel} "
                f"with dilation {self.dilation}"
            )
        if self.groups > max(1, self.all_channels, self.all_outputs):
            raise ValueError(
                f"{self.groups} groups of {self.all_channels} channels and {self.all_outputs} outputs"
            )
        products = self.taps * self.channels
        if products >= DOT_LIMIT:
            raise ValueError(f"{products} products of one output, allowed are less than 2**24 ({self})")
        outputs, words = max(1, self.all_outputs), max(1, self.words)
        for what, count in (
            ("words of the padded input", max(1, batch) * padded[0] * padded[1] * self.groups * words),
            ("words of weight", outputs * self.taps * words),
        ):
            if count >= INT32_LIMIT:
                raise ValueError(f"{count} {what}, allowed are less than 2**31 ({self})")
        count = max(1, batch) * self.out[0] * self.out[1] * outputs * max(1, products)
        if count >= COUNT_LIMIT:
            raise ValueError(f"{count} products, allowed are less than 2**60 ({self})")
        return self

    def _check_sizes(self, batch: int) -> None:
        for name, minimum in (("kernel", 1), ("image", 0)):
            pair(getattr(self, name), name, minimum)
        for name, value in (("channels", self.all_channels), ("outputs", self.all_outputs), ("batch", batch)):
            if not 0 <= value < INT32_LIMIT:
                raise ValueError(f"{name} is {value}, allowed is 0 to 2**31 - 1")


@functools.lru_cache(maxsize=4096)
def checked_geometry(
    batch: int,
    image: Pair,
    kernel: Pair,
    channels: int,
    outputs: int,
    arguments: Arguments,
) -> Geometry:
    """:meth:`Geometry.of`, checked for a batch: the way of a call, which repeats. Raises as they do."""
    return Geometry.of(image, kernel, channels, outputs, arguments).check(batch)
