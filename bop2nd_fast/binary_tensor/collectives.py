"""BinaryTensors in collectives: their values travel, so that the ranks need not hold the same kind of tensor.

A BinaryTensor on one rank and a dense tensor on another (a full state dict that rank 0 read from a file)
would send words to somebody who waits for floats. So what ``torch.distributed`` moves are values, which are
checked and packed where they arrive. One bit per weight on the wire take: FSDP2,
``optim.broadcast_parameters``, and any collective on ``t.words``. Reductions raise, for a sum of signs is no
sign.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from .tensor import HANDLERS, BinaryTensor

# Operators that move tensors unchanged -> positions of the tensors they write. Not recv_: it would have to
# wait for a sender, who may be waiting for this process.
_MOVES = {
    "broadcast_": 0,
    "allgather_": 0,
    "_allgather_base_": 0,
    "allgather_coalesced_": 0,
    "allgather_into_tensor_coalesced_": 0,
    "gather_": 0,
    "scatter_": 0,
    "alltoall_": 0,
    "alltoall_base_": 0,
    "send": None,
}


def _dense(x: Any) -> Any:
    return x.unpack().contiguous() if isinstance(x, BinaryTensor) else x


def _filled_up(block: Tensor) -> Tensor:
    """``distribute_tensor`` pads the last blocks of rows with zeros, which it takes off after scattering."""
    is_row = block.flatten(1).any(1).tolist() if block.dim() > 1 and block.numel() else []
    while is_row and not is_row[-1]:
        is_row.pop()
        block[len(is_row)] = 1
    return block


def _move_values(func: Any, *args: Any, **kwargs: Any) -> Any:
    """The collective on values; BinaryTensors that it writes take them when it has ended.

    Raises:
        ValueError: what arrived is not +1 / -1.
    """
    sent = pytree.tree_map(_dense, args)
    result = func(*sent, **kwargs)
    position = _MOVES[func._schema.name.removeprefix("c10d::")]
    if position is None:
        return result
    written, arrived = (pytree.tree_leaves(a[position]) for a in (args, sent))
    if any(isinstance(x, BinaryTensor) for x in written):
        work = result[-1] if isinstance(result, (tuple, list)) else result
        torch.distributed.Work.unbox(work).wait()
        for x, values in zip(written, arrived, strict=True):
            if isinstance(x, BinaryTensor):
                x.copy_(_filled_up(values) if func is torch.ops.c10d.scatter_.default else values)
    return result


if torch.distributed.is_available():
    HANDLERS.update({getattr(torch.ops.c10d, name).default: _move_values for name in _MOVES})
