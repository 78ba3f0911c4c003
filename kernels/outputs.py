"""What a product is asked to emit: the operands of its epilogue, named once, and which belong together.

No Triton: schemas, fakes, references, layers of packed models and launchers all take the names and the check
from here. ``reference.epilogue`` says what the operands mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .operands import FLOATS

DOT_BOUND = 2**24  # fp32 holds whole numbers up to here


class Outputs(NamedTuple):
    """What a product stores, and what that is made of; kernels take the tuple, with None for what is absent.

    ``reals``: values in their dtype, or int32 for the dots themselves; ``signs``: their sign words. Empty
    tensors: not asked for. ``low``, ``high``: integers; ``relu``: 1 or None, either way known to the
    compiler. From ``scale`` on fp32 ``[outputs]``, in the order of ``BOP2ND_PER_OUTPUT``
    (csrc/core/epilogue.h).
    """

    reals: Any
    signs: Any
    threshold: Any = None  # int32 [outputs]
    residual: Any = None  # like the values
    low: Any = None
    high: Any = None
    relu: Any = None
    scale: Any = None
    shift: Any = None
    slope: Any = None
    post_shift: Any = None
    sign_shift: Any = None

    def asked(self) -> Outputs:
        """This tuple with None in the place of empty results."""
        reals, signs, *others = self
        return Outputs(reals if reals.numel() else None, signs if signs.numel() else None, *others)


PER_OUTPUT = Outputs._fields[Outputs._fields.index("scale") :]

# As the operators' schemas end: values, sign words or both in one pass.
SCHEMA = (
    "bool values=True, bool signs=False, Tensor? threshold=None, Tensor? residual=None, int? low=None, "
    f"int? high=None, bool relu=False, {', '.join(f'Tensor? {name}=None' for name in PER_OUTPUT)}, "
    "ScalarType dtype=float, Tensor? blocked=None"
)
NAMES = tuple(part.split()[-1].split("=")[0] for part in SCHEMA.split(", "))


def check_outputs(
    beside: Tensor,
    shape: Sequence[int],
    *,
    values: bool = True,
    signs: bool = False,
    threshold: Tensor | None = None,
    residual: Tensor | None = None,
    low: int | None = None,
    high: int | None = None,
    relu: bool = False,
    dtype: torch.dtype = torch.float32,
    blocked: Tensor | None = None,
    **per_output: Tensor | None,
) -> None:
    """What is asked of a product whose values are ``shape``, its first operand ``beside``.

    Symbolic sizes pass; ``blocked`` is the CPU's and not looked at.

    Raises:
        TypeError, ValueError: nothing asked for, what belongs to signs without them, two activations, bounds
            out of order or beyond 2**24, unknown operands, or operands of another shape, dtype or device.
    """
    if unknown := per_output.keys() - set(PER_OUTPUT):
        raise TypeError(f"there is no operand {', '.join(sorted(unknown))}")
    if dtype not in FLOATS:
        raise TypeError(f"dtype is {dtype}, allowed are {FLOATS}")
    if not (values or signs) or (threshold is not None and not signs):
        raise ValueError(f"values={values}, signs={signs}: one is needed, and thresholds belong to signs")
    least, most = -DOT_BOUND if low is None else low, DOT_BOUND if high is None else high
    if not -DOT_BOUND <= least <= most <= DOT_BOUND:
        raise ValueError(f"low {least} and high {most} must be in this order and within 2**24")
    if relu and per_output.get("slope") is not None:
        raise ValueError("relu and slope: one activation")
    if per_output.get("sign_shift") is not None and (not signs or threshold is not None):
        raise ValueError("sign_shift belongs to signs without thresholds")
    _check("threshold", threshold, shape[-1:], torch.int32, beside)
    _check("residual", residual, shape, dtype, beside)
    for name, operand in per_output.items():
        _check(name, operand, shape[-1:], torch.float32, beside)


def _check(
    name: str, operand: Tensor | None, shape: Sequence[int], kind: torch.dtype, beside: Tensor
) -> None:
    if operand is None:
        return
    plain = all(type(size) is int for size in (*shape, *operand.shape))
    if operand.dtype != kind or (plain and tuple(operand.shape) != tuple(shape)):
        raise ValueError(f"{name} must be {kind} {list(shape)}, got {operand.dtype} {list(operand.shape)}")
    if operand.device != beside.device:
        raise ValueError(f"{name} is on {operand.device}, the first operand on {beside.device}")
