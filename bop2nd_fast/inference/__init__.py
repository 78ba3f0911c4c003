"""Packed inference: bits between layers, batch norm folded into thresholds, one file without code in it."""

from typing import TYPE_CHECKING, Any

from .examples import ConversionError
from .packed_file import FORMAT_VERSION, PackedFileError
from .packed_model import LayerReport, PackedModel, load

if TYPE_CHECKING:
    from .conversion import convert

__all__ = [
    "FORMAT_VERSION",
    "ConversionError",
    "LayerReport",
    "PackedFileError",
    "PackedModel",
    "convert",
    "load",
]


def __getattr__(name: str) -> Any:
    """The converter is imported when it is first asked for: SymPy comes with it, which takes as long as all
    the rest of this package, and who loads packed files does not need it."""
    if name != "convert":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .conversion import convert

    globals()[name] = convert
    return convert


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
