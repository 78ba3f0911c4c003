"""Packed inference: bits between layers, batch norm folded into thresholds, one file without code in it."""

from .convert import ConversionError, convert
from .packed_file import FORMAT_VERSION, PackedFileError, load
from .packed_model import LayerReport, PackedModel

__all__ = [
    "FORMAT_VERSION",
    "ConversionError",
    "LayerReport",
    "PackedFileError",
    "PackedModel",
    "convert",
    "load",
]
