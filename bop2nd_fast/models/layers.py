"""Which layers a network is built from, by what holds its weights."""

from __future__ import annotations

from ..nn import BinaryConv2d, BinaryLinear, LatentConv2d, LatentLinear

_LAYERS: dict[str, tuple[type[BinaryConv2d], type[BinaryLinear]]] = {
    "binary": (BinaryConv2d, BinaryLinear),
    "latent": (LatentConv2d, LatentLinear),
}


def layers_of(weights: str) -> tuple[type[BinaryConv2d], type[BinaryLinear]]:
    """Convolution and dense layer of a kind of weights: ``"binary"`` or ``"latent"``.

    Raises:
        ValueError: another kind.
    """
    if weights not in _LAYERS:
        raise ValueError(f"weights must be {' or '.join(map(repr, _LAYERS))}, got {weights!r}")
    return _LAYERS[weights]
