"""Every kind of layer that a packed file may hold."""

from __future__ import annotations

from .layers import Constant, FlattenBits, Pack, PackedConv2d, PackedLinear, RealConv2d, RealLinear, Regroup
from .packed_layer import PackedLayer
from .pooling import MaxPool, PoolBits
from .signed_layers import QuantizeRows, SignedConv2d, SignedLinear

LAYERS: dict[str, type[PackedLayer]] = {
    cls.kind: cls
    for cls in (
        PackedConv2d,
        PackedLinear,
        RealConv2d,
        RealLinear,
        SignedConv2d,
        SignedLinear,
        QuantizeRows,
        Pack,
        Regroup,
        FlattenBits,
        PoolBits,
        MaxPool,
        Constant,
    )
}
