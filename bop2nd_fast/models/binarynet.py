"""BinaryNet (Courbariaux et al., arXiv 1602.02830) as in the Bop papers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

from torch import nn

from ..nn import LayerNorm2d, MaxPool2d
from .layers import layers_of
from .network import ImageNetwork


class BinaryNet(ImageNetwork):
    """Six 3x3 binary convolutions and three binary dense layers, a normalisation after each.

    Widths ``w, w, 2w, 2w, 4w, 4w``, max-pool 2 after the 2nd, 4th and 6th convolution, dense ``8w, 8w,
    classes`` (w = 128 in the papers). Every layer is binary, including the first (real-valued input, no
    padding) and the last; the others pad with ``padding_value``.

    Args:
        width: channels of the first convolution.
        image_size: height and width of the input, at least 10 (8 with ``first_padding``).
        in_channels: channels of the input.
        num_classes: outputs.
        padding_value: what padded taps count as: 0, +1 or -1.
        first_padding: zero padding of the first convolution; the papers use 0.
        input_quantizer: quantizer of every layer but the first.
        norm: ``"batch"`` (batch norm with a shift and no scale) or ``"layer"`` (over the channels of every
            pixel, with both): the paper's comparison.
        weights: ``"binary"``, or ``"latent"`` for real-valued weights whose signs multiply (``nn.latent``).

    Shapes: ``[N, in_channels, image_size, image_size] -> [N, num_classes]``.

    Raises:
        ValueError: an image too small for three poolings, an unknown norm or kind of weights.
    """

    def __init__(
        self,
        width: int = 128,
        image_size: int = 32,
        in_channels: int = 3,
        num_classes: int = 10,
        padding_value: int = 0,
        first_padding: int = 0,
        input_quantizer: str = "ste_sign",
        norm: str = "batch",
        weights: str = "binary",
    ) -> None:
        convolution, dense = layers_of(weights)
        if norm not in _NORMS:
            raise ValueError(f"norm must be {' or '.join(map(repr, _NORMS))}, got {norm!r}")
        of_images, of_rows = _NORMS[norm]
        side = (image_size - 2 + 2 * first_padding) // 8
        if side < 1:
            raise ValueError(f"image_size {image_size} is too small: three poolings leave nothing")
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        channels = in_channels
        for i, out in enumerate((width, width, 2 * width, 2 * width, 4 * width, 4 * width), start=1):
            layers[f"conv{i}"] = convolution(
                channels,
                out,
                3,
                padding=first_padding if i == 1 else 1,
                padding_value=0 if i == 1 else padding_value,
                input_quantizer=None if i == 1 else input_quantizer,
            )
            if i % 2 == 0:
                layers[f"pool{i}"] = MaxPool2d(2)
            layers[f"norm{i}"] = of_images(out)
            channels = out
        layers["flatten"] = nn.Flatten()
        features = channels * side * side
        for i, out in enumerate((8 * width, 8 * width, num_classes), start=7):
            layers[f"dense{i}"] = dense(features, out, input_quantizer=input_quantizer)
            layers[f"norm{i}"] = of_rows(out)
            features = out
        super().__init__(layers)


def _without_scale(kind: type[nn.BatchNorm1d | nn.BatchNorm2d], channels: int) -> nn.Module:
    """Batch norm with a shift and no scale: the scale stays 1 and is not trained."""
    norm = kind(channels)
    norm.weight.requires_grad_(False)
    return norm


_NORMS: dict[str, tuple[Callable[[int], nn.Module], Callable[[int], nn.Module]]] = {
    "batch": (partial(_without_scale, nn.BatchNorm2d), partial(_without_scale, nn.BatchNorm1d)),
    "layer": (LayerNorm2d, partial(nn.LayerNorm, eps=1e-3)),
}
