"""convert(model, example_input): trace, decide what lies between signs, write the packed graph, compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .check import CALL_ERRORS, allow_sizes, call, check_rounding, same
from .examples import ConversionError, Example, borrowed, signature, unwrapped
from .image_bytes import Normalisation, check_readers
from .packed_model import PackedModel
from .trace import Traced, trace
from .write import Writer


@torch.inference_mode(False)
@torch.no_grad()
def convert(
    model: nn.Module,
    example_input: Any,
    exact: bool = True,
    leaves: Any = (),
    image_bytes: bool | Callable[[Tensor], Tensor] = False,
) -> PackedModel:
    """A packed copy of a model, for inference: the same predictions bit for bit, bits between products.

    The model is copied and the copy put in eval mode, so a model in training mode may be given; it is not
    changed. What it computes on the example is seen operator by operator (``torch.export``): chains of
    products of signs (with max-pool, batch norm, clipping, flattening between them) are fused into
    XNOR-popcount layers with one threshold per channel; every other operator runs as torch runs it. Data
    parallel, compiled and averaged models are converted as the module they wrap.

    Args:
        model: its ``forward`` must do the same operations for every input of a kind: no branch on values.
        example_input: a tensor, a sequence of positional arguments, or a dict of keyword arguments, of the
            shapes, dtypes and device to be predicted on. Batch and image size may differ later where the
            model leaves them free; numbers, strings and None stay what they are here.
        exact: False lets a layer whose real values are needed (in residual networks: every layer) compute
            batch norm, residual addition and the next signs in its own kernel, and real convolutions take in
            batch norm and run on channels-last images. That is faster, and rounds differently: a value near
            0 may take the other sign. Every such layer is compared on the example with the operators it
            stands for, see ``check.py`` for the bounds.

        image_bytes: the packed model takes uint8 images ``[N, C, H, W]`` (in any memory format: as a camera
            holds them, channels last), and the example is such; the model's own input is
            ``image / 127.5 - 1``, or what this function makes of the bytes. The first layer then sums
            integers, its normalisation, batch norm and all up to the next signs become thresholds. What
            rounding in fp32 would have done to the sums of the first layer is left out; all else is exact.
            ``image_bytes.py`` says what can be folded.

    Raises:
        TypeError: an example of another kind.
        ConversionError: the model cannot be traced or uses an operator that a packed model cannot run; or
            (a defect of this package) the packed model's result differs on the example.
    """
    if leaves:
        raise ConversionError(
            "there are no leaves any more: convert() sees through every module, leave them out"
        )
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            raise ConversionError(
                "convert() was called under autocast: call it outside; forward may use autocast"
            )
    meant = unwrapped(model)
    given = example = Example.of(example_input, meant.forward)
    bytes = None
    if image_bytes is not False:
        if not exact:
            raise ConversionError("image_bytes needs exact=True")
        bytes = Normalisation.of(image_bytes, example.tensors())
        example = example.with_tensors([bytes.images(t) for t in example.tensors()])
    with borrowed(meant) as fresh:
        expected = call(fresh(), example)
        traced = _traced(fresh, example, expected, exact)
        allow_sizes(traced, fresh(), example, exact)
    traced.observe(example.clone().tensors())
    writer = Writer(traced, exact, bytes)
    writer.write()
    if bytes is not None:
        check_readers(writer.steps, writer.layers)
    names = signature(meant.forward, example, writer.inputs)
    inputs = writer.specs(given.tensors())
    packed = PackedModel(writer.steps, writer.layers, inputs, constants=writer.constants, signature=names)
    copied = given.clone()
    result = packed(*copied.args, **copied.kwargs)
    if bytes is not None and not same(result, expected):
        raise ConversionError(
            "image_bytes: the packed model differs from the trained one on the example: a sum of its first "
            "layer lies so near to a threshold that fp32 rounds it to the other side"
        )
    if exact and not same(result, expected):
        raise ConversionError(
            "the packed model differs from the trained one on the example; please report this"
        )
    if not exact:
        check_rounding(traced, writer, packed, example.clone().tensors(), result)
    return packed.prepare()


def _traced(fresh: Callable[[], nn.Module], example: Example, expected: Any, exact: bool) -> Traced:
    """The model's graph, which gives the model's result on the example.

    Traced with at least two of everything along axis 0, for a batch of one would be taken as fixed; with
    every axis free, then axis 0 alone (what a model does with sizes may be beyond torch), at last none.
    """
    attempts = [(_widened(example), None), (_widened(example), 1), (example, 0)]
    for tried, n_free in attempts:
        last = tried is example and n_free == 0
        try:
            traced = trace(fresh(), tried, n_free)
            result = traced.run(example.clone().tensors())
        except CALL_ERRORS:
            if last:
                raise
            continue
        if same(result, expected, exact):
            return traced
    raise ConversionError(
        "the operators that the model was seen to call do not give its result again: does it "
        "use random numbers, or a state that it changes in every call?"
    )


def _widened(example: Example) -> Example:
    tensors = example.tensors()
    wide = [t.repeat(2, *[1] * (t.dim() - 1)) if t.dim() and t.shape[0] == 1 else t for t in tensors]
    changed = any(a is not b for a, b in zip(tensors, wide, strict=True))
    return example.with_tensors(wide) if changed else example
