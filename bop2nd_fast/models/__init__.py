"""Networks of the Bop papers, and by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from .binarynet import BinaryNet
from .birealnet import BiRealNet18, ReActNet18
from .xnornet import XNORNet

_NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "binarynet": BinaryNet,
    "birealnet18": BiRealNet18,
    "reactnet18": ReActNet18,
    "xnornet": XNORNet,
}
NAMES = tuple(_NETWORKS)


def get(name: str, *, num_classes: int, in_channels: int, image_size: int, **options: Any) -> nn.Module:
    """The network of that name for images ``[N, in_channels, image_size, image_size]``.

    Args:
        name: one of ``NAMES``.
        options: what else its class takes (``width``, ``padding_value``, ...).

    Raises:
        ValueError: an unknown network or option (the message lists what there is), or an impossible value.
    """
    if name not in _NETWORKS:
        raise ValueError(f"there is no network {name!r}; there are {', '.join(NAMES)}")
    build = _NETWORKS[name]
    given = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    parameters = inspect.signature(build).parameters
    allowed = [option for option in parameters if option not in given]
    if unknown := sorted({*options} - {*allowed}):
        raise ValueError(f"{name} has no option {', '.join(unknown)}; there are {', '.join(allowed)}")
    for option, value in options.items():
        if isinstance(parameters[option].default, bool) and not isinstance(value, bool):
            raise ValueError(f"{option} is a switch, true or false, got {value!r}")  # any text would be true
    if "image_size" not in parameters:
        del given["image_size"]
    if name == "binarynet" and image_size < 10:
        options = {"first_padding": 1, **options}  # three poolings would leave nothing
    return build(**given, **options)


__all__ = ["NAMES", "BiRealNet18", "BinaryNet", "ReActNet18", "XNORNet", "get"]
