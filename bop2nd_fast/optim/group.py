"""HyperGroup: a param group whose hyperparameters can change at any time without a recompile or a copy.

``optimizer.param_groups[i]`` looks like torch's plain dict: ``group["gamma"] = 1e-5`` works, a scheduler may
write to it, a 0-dim tensor may stand where a float does. Behind it every hyperparameter also lives in a
0-dim fp64 tensor (a *knob*) on the parameters' device, and an assignment writes that tensor in place. The
step reads only the knobs: compiled code and CUDA graphs see new values as data, never as constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Range:
    """What a hyperparameter may be: a rate in [0, 1], or a level >= 0."""

    is_rate: bool

    def __str__(self) -> str:
        return "in [0, 1]" if self.is_rate else ">= 0"

    def check(self, name: str, value: Any) -> None:
        """Raise ``ValueError`` or ``TypeError`` unless ``value`` fits. Tensors on accelerators are only
        checked for their form: reading them would synchronise."""
        if isinstance(value, Tensor):
            if value.dim() != 0 or not value.is_floating_point():
                raise TypeError(f"{name} must be a number or a 0-dim floating tensor, got {_describe(value)}")
            if value.device.type != "cpu" or torch.compiler.is_compiling():
                return
        elif isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a number or a 0-dim floating tensor, got {type(value).__name__}")
        number = float(value)
        fits = 0 <= number <= 1 if self.is_rate else number >= 0
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
        check_option: called with (name, value, all items as they would be); raises if that is not allowed,
            returns the value as the group keeps it.
        on_option: called with (group, name) after another item, or a hyperparameter's tensor, changed.
        required: names of the items that cannot be removed, besides ``params``.
        source: a plain dict that stands for this group in somebody else's hands: see :meth:`follow`.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        ranges: Mapping[str, Range],
        check_option: Callable[[str, Any, Mapping[str, Any]], Any],
        on_option: Callable[[HyperGroup, str], None] | None = None,
        required: Iterable[str] = (),
        source: dict[str, Any] | None = None,
    ) -> None:
        self.ranges, self._check_option, self._on_option = ranges, check_option, on_option
        self._buffers: dict[str, Tensor] = {}
        self._required = {"params", *required}
        self._source, self._seen = source, dict(source or {})
        super().__init__({name: self._checked(name, value, values) for name, value in values.items()})

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

    def belongs_to(self, on_option: Callable[[HyperGroup, str], None]) -> bool:
        """Whether this is a group of the optimizer that gave ``on_option``."""
        return self._on_option == on_option

    def follow(self) -> None:
        """Take over what was written to the plain dict that this group was made from."""
        if self._source is None:
            return
        for name, value in self._source.items():
            if name not in self._seen or self._seen[name] is not value:
                self[name] = value
                self._seen[name] = value

    def load(self, saved: Mapping[str, Any]) -> None:
        """Take over the items of a saved group, except its parameters. A tensor hyperparameter keeps its
        identity (whoever holds it still drives the group) and takes the saved value."""
        on_option, self._on_option = self._on_option, None  # the caller acts once, on all of it
        together = {**self, **saved}
        for name, value in saved.items():
            if name in ("params", "param_names"):
                continue
            if name in self.ranges and isinstance(self[name], Tensor):
                self[name].fill_(value)
            else:
                value = value.detach().clone() if isinstance(value, Tensor) else value
                self._set(name, self._checked(name, value, together))
        self._on_option = on_option

    def check_all(self, values: Mapping[str, Any]) -> None:
        """Raise if ``values`` could not be assigned together; changes nothing."""
        together = {**self, **values}
        for name, value in values.items():
            self._checked(name, value, together)

    # ------------------------------------------------------------------ what dict would do around __setitem__

    def __setitem__(self, name: str, value: Any) -> None:
        self._set(name, self._checked(name, value, {**self, name: value}))

    def _set(self, name: str, value: Any) -> None:
        was_tensor = isinstance(self.get(name), Tensor)
        super().__setitem__(name, value)
        if name not in self.ranges:
            if self._on_option is not None:
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
        together = {**self, **values}
        values = {name: self._checked(name, value, together) for name, value in values.items()}
        for name, value in values.items():
            self._set(name, value)

    def __ior__(self, other: Any) -> HyperGroup:  # type: ignore[override, misc]
        self.update(other)
        return self

    def __missing__(self, name: str) -> Any:
        raise self._no_learning_rate() if name == "lr" else KeyError(name)

    def _no_learning_rate(self) -> KeyError:
        return KeyError(
            f"this optimizer of binary weights has no 'lr', but {', '.join(self.ranges)}. "
            "Give schedulers one of them: bf.optim.schedule(optimizer, 'gamma', StepLR, step_size=100)"
        )

    def __delitem__(self, name: str) -> None:
        self._refuse_removal(name)
        super().__delitem__(name)

    def pop(self, name: str, *default: Any) -> Any:
        self._refuse_removal(name)
        return super().pop(name, *default)

    def popitem(self) -> tuple[str, Any]:
        raise TypeError("a param group's items cannot be popped in turn: the step needs them")

    def clear(self) -> None:
        raise TypeError("a param group cannot be cleared: the step needs its items")

    def _refuse_removal(self, name: str) -> None:
        if name in self._required:
            raise KeyError(f"{name} cannot be removed from a param group: the step needs it")

    def __reduce__(self) -> Any:
        return dict, (dict(self),)  # pickles and copies are plain dicts; the optimizer wraps them again

    def _checked(self, name: str, value: Any, together: Mapping[str, Any]) -> Any:
        """``value`` as the group keeps it: floats for numbers of any kind, so that files hold plain types."""
        if name in self.ranges:
            self.ranges[name].check(name, value)
            self._check_option(name, value, together)
            return value if isinstance(value, Tensor) else float(value)
        if name == "lr":
            raise self._no_learning_rate()
        if name == "params":
            return value if isinstance(value, list) else [value] if isinstance(value, Tensor) else list(value)
        return self._check_option(name, value, together)
