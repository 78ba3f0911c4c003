"""Operands that torch does not look at: with wrong ones it reads beyond a tensor, or takes any memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def _weight_norm(given: dict[str, Any]) -> None:
    """``g`` has one element for each slice of ``v``."""
    v, g, dim = given["v"], given["g"], given.get("dim", 0)
    fits = v.dim() > 0 and -v.dim() <= dim < v.dim() and 0 < g.numel() == v.shape[dim] and v.numel() > 0
    if not fits or v.dtype != g.dtype or not v.is_floating_point():
        raise ValueError(f"a weight norm of v {list(v.shape)} along axis {dim} has no g {list(g.shape)}")


def _recurrent(gates: int) -> Callable[[dict[str, Any]], None]:
    """Sequences [T, N, I] (or [N, T, I]), states [layers * directions, N, H], and for each of them weights
    [gates * H, I], [gates * H, H] and two biases [gates * H].
    """

    def check(given: dict[str, Any]) -> None:
        states = given["hx"] if isinstance(given["hx"], (list, tuple)) else [given["hx"]]
        n_states = 2 if gates == 4 else 1
        sequence, params = given["input"], given["params"]
        directions = 2 if given["bidirectional"] else 1
        each = 4 if given["has_biases"] else 2
        tensors = [sequence, *states, *params]
        if len(states) != n_states or len(params) != given["num_layers"] * directions * each:
            raise ValueError(
                f"{len(states)} states and {len(params)} weights do not make such a recurrent network"
            )
        if (
            not all(isinstance(t, Tensor) and t.dtype == sequence.dtype for t in tensors)
            or sequence.dim() != 3
        ):
            raise ValueError("a recurrent network takes a sequence of 3 axes, and all operands of one dtype")
        batch, hidden = sequence.shape[0 if given["batch_first"] else 1], states[0].shape[-1]
        state = (given["num_layers"] * directions, batch, hidden)
        wanted: list[tuple[int, ...]] = [state] * n_states
        for layer in range(given["num_layers"]):
            n_inputs = sequence.shape[2] if layer == 0 else directions * hidden
            rows = gates * hidden
            wanted += [(rows, n_inputs), (rows, hidden), (rows,), (rows,)][:each] * directions
        _compare([*states, *params], wanted)

    return check


def _cell(gates: int) -> Callable[[dict[str, Any]], None]:
    """One step of a recurrent network: rows [N, I], states [N, H]."""

    def check(given: dict[str, Any]) -> None:
        states = given["hx"] if isinstance(given["hx"], (list, tuple)) else [given["hx"]]
        rows, weights = given["input"], [given["w_ih"], given["w_hh"]]
        biases = [given[k] for k in ("b_ih", "b_hh") if given.get(k) is not None]
        tensors = [rows, *states, *weights, *biases]
        if len(states) != (2 if gates == 4 else 1) or rows.dim() != 2 or states[0].dim() != 2:
            raise ValueError("a recurrent cell takes rows and states of 2 axes")
        if any(t.dtype != rows.dtype for t in tensors):
            raise ValueError("a recurrent cell takes operands of one dtype")
        hidden = states[0].shape[1]
        wanted = [(rows.shape[0], hidden)] * len(states)
        wanted += [(gates * hidden, rows.shape[1]), (gates * hidden, hidden)]
        _compare(tensors[1:], [*wanted, *[(gates * hidden,)] * len(biases)])

    return check


def _compare(tensors: list[Tensor], shapes: list[tuple[int, ...]]) -> None:
    for tensor, shape in zip(tensors, shapes, strict=True):
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"a tensor of a recurrent network has shape {list(tensor.shape)}, not {list(shape)}"
            )


GUARDS: dict[str, Callable[[dict[str, Any]], None]] = {
    "aten._weight_norm.default": _weight_norm,
    "aten._weight_norm_interface.default": _weight_norm,
    **{f"aten.{name}.input": _recurrent(gates) for name, gates in _GATES.items()},
    **{f"aten.{name}_cell.default": _cell(gates) for name, gates in _GATES.items()},
}
