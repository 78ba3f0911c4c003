"""HyperGroup: a param group whose hyperparameters can change at any time without a recompile or a copy.

``optimizer.param_groups[i]`` looks like torch's plain dict: ``group["gamma"] = 1e-5`` works, a scheduler may
write to it, a 0-dim tensor may stand where a float does. Behind it every hyperparameter also lives in a
0-dim fp64 tensor (a *knob*) on the parameters' device, and an assignment writes that tensor in place. The
step reads only the knobs: compiled code and CUDA graphs see new values as data, never as constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Range:
    """What a hyperparameter may be: a rate in (0, 1], or a level >= 0."""

    is_rate: bool

    def __str__(self) -> str:
        return "in (0, 1]" if self.is_rate else ">= 0"

    def check(self, name: str, value: Any) -> None:
        """Raise ``ValueError`` or ``TypeError`` unless ``value`` fits. Tensors on accelerators are only
        checked for their form: reading them would synchronise."""
        if isinstance(value, Tensor):
            if value.dim() != 0 or not value.is_floating_point():
                raise TypeError(f"{name} must be a number or a 0-dim floating tensor, got {_describe(value)}")
            if value.device.type != "cpu" or torch.compiler.is_compiling():
                return
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number or a 0-dim floating tensor, got {type(value).__name__}")
        number = float(value)
        fits = 0 < number <= 1 if self.is_rate else number >= 0
        if not fits or not math.isfinite(number):
            raise ValueError(f"{name} must be {self}, got {number}")


RATE = Range(is_rate=True)
LEVEL = Range(is_rate=False)


def _describe(value: Tensor) -> str:
    return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"


class HyperGroup(dict[str, Any]):
    """One param group. Assigning a value out of range raises and changes nothing.

    Args:
        values: the group's items, ``params`` among them.
        ranges: name -> :class:`Range` of the hyperparameters that have a knob.
        check_option: called with (name, value, all items as they would be); raises if that is not allowed.
        on_option: called with (group, name) after another item, or a hyperparameter's tensor, changed.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        ranges: Mapping[str, Range],
        check_option: Callable[[str, Any, Mapping[str, Any]], None],
        on_option: Callable[[HyperGroup, str], None] | None = None,
    ) -> None:
        self.ranges, self._check_option, self._on_option = ranges, check_option, on_option
        self._buffers: dict[str, Tensor] = {}
        for name, value in values.items():
            self._check(name, value, values)
        super().__init__({name: self._plain(name, value) for name, value in values.items()})

    def knob(self, name: str, device: torch.device) -> Tensor:
        """The 0-dim tensor that holds hyperparameter ``name`` on ``device``: the user's own if given."""
        value = self[name]
        if isinstance(value, Tensor):
            return value
        buffer = self._buffers.get(name)
        if buffer is None or buffer.device != device:
            buffer = torch.full((), value, dtype=torch.float64, device=device)
            self._buffers[name] = buffer
        return buffer

    def load(self, saved: Mapping[str, Any]) -> None:
        """Take over the items of a saved group, except its parameters. A tensor hyperparameter keeps its
        identity (whoever holds it still drives the group) and takes the saved value."""
        on_option, self._on_option = self._on_option, None  # the caller acts once, on all of it
        for name, value in saved.items():
            if name in ("params", "param_names"):
                continue
            if name in self.ranges and isinstance(self[name], Tensor):
                self[name].fill_(value)
            else:
                self._set(name, value.detach().clone() if isinstance(value, Tensor) else value)
        self._on_option = on_option

    def check_all(self, values: Mapping[str, Any]) -> None:
        """Raise if ``values`` could not be assigned together; changes nothing."""
        together = {**self, **values}
        for name, value in values.items():
            self._check(name, value, together)

    # ------------------------------------------------------------------ what dict would do around __setitem__

    def __setitem__(self, name: str, value: Any) -> None:
        self._check(name, value, {**self, name: value})
        self._set(name, value)

    def _set(self, name: str, value: Any) -> None:
        was_tensor = isinstance(self.get(name), Tensor)
        super().__setitem__(name, self._plain(name, value))
        if name not in self.ranges:
            if self._on_option is not None and name != "params":
                self._on_option(self, name)
        elif isinstance(value, Tensor) or was_tensor:
            self._buffers.pop(name, None)
            if self._on_option is not None:
                self._on_option(self, name)  # another tensor is the knob now
        elif name in self._buffers:
            self._buffers[name].fill_(value)

    def setdefault(self, name: str, default: Any = None) -> Any:
        if name not in self:
            self[name] = default
        return self[name]

    def update(self, *args: Any, **kwargs: Any) -> None:
        values = dict(*args, **kwargs)
        self.check_all(values)
        for name, value in values.items():
            self._set(name, value)

    def __ior__(self, other: Any) -> HyperGroup:  # type: ignore[override, misc]
        self.update(other)
        return self

    def __reduce__(self) -> Any:
        return dict, (dict(self),)  # pickles and copies are plain dicts; the optimizer wraps them again

    def _check(self, name: str, value: Any, together: Mapping[str, Any]) -> None:
        if name in self.ranges:
            self.ranges[name].check(name, value)
        self._check_option(name, value, together)

    def _plain(self, name: str, value: Any) -> Any:
        return float(value) if name in self.ranges and not isinstance(value, Tensor) else value
