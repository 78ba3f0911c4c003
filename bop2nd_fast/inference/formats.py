"""Memory formats inside a packed model: layers write images channels-last, whatever the model's own are.

Torch's faster kernels on CPUs read channels-last, so such an image stays as it is through everything that
rounds each element by itself (and through all else where rounding is free). Only what rounds by place, and
whoever reads the packed model's outputs, gets the image in the format that it has in the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from .chains import IMAGES, is_elementwise, max_pool
from .fold import Form
from .graph import Ref, Step
from .names import Names
from .trace import Traced

_aten = torch.ops.aten
_CONTIGUOUS = "aten.contiguous.default"
_COPIES = ("pixel", "series")  # forms that a channels-last value can be copied to


class Formats:
    """The values that lie channels-last where the model's are contiguous, and their copies.

    Args:
        written: the reference of a node's value.
        steps: where steps of copies are written.
    """

    def __init__(
        self, traced: Traced, exact: bool, written: Callable[[Any], Any], names: Names, steps: list[Step]
    ) -> None:
        self._traced, self._exact, self._written = traced, exact, written
        self._names, self._steps = names, steps
        self._last: set[fx.Node] = set()
        self._copies: dict[tuple[fx.Node, bool], Ref] = {}

    def note(self, node: fx.Node) -> None:
        """An image was written channels-last."""
        if self._form(node) == "pixel":
            self._last.add(node)

    def _form(self, node: Any) -> Form | None:
        info = self._traced.info.get(node)
        return None if info is None else info.form

    def as_model(self, node: Any) -> Any:
        """The reference of a value in the memory format of the model."""
        return self._copy(node, False) if node in self._last and self._form(node) else self._written(node)

    def last(self, node: Any) -> Any:
        """The reference of an image with channels-last strides."""
        lies = node in self._last or self._form(node) != "pixel"
        return self._written(node) if lies else self._copy(node, True)

    def any_will_do(self, node: fx.Node) -> bool:
        """Whether a node changes the format only, for readers to whom it is all one."""
        signs = all(user.args[0] is node and user.target in IMAGES for user in node.users)
        return node.target is _aten.contiguous.default and self._form(node) is not None and signs

    def reader(self, node: fx.Node) -> Callable[[Any], Any]:
        """How an operator's arguments are referred to; notes what becomes of its result."""
        if not any(a in self._last for a in node.all_input_nodes):
            return self._written
        if not self._exact:  # whatever its strides are: several values (None), or one to be copied at the end
            if node not in self._traced.info or self._form(node) in _COPIES:
                self._last.add(node)
            return self._written
        images = [a for a in node.all_input_nodes if self._is_whole(a, node)]
        if not (self._is_free(node) and any(a in self._last for a in images)):
            return self.as_model
        self.note(node)
        return lambda a: self.last(a) if a in images else self._written(a)

    def _is_whole(self, value: fx.Node, node: fx.Node) -> bool:
        """Whether a value is an image and no small operand that is spread over one."""
        if self._form(value) != "pixel" or self._form(node) != "pixel":
            return False
        resizes = node.target in (_aten.cat.default, _aten.max_pool2d.default)
        return resizes or self._traced.info[value].shape == self._traced.info[node].shape

    def _is_free(self, node: fx.Node) -> bool:
        """Whether an operator has the same bits in both formats."""
        norm = node.target is _aten.batch_norm.default and node.args[5] is False
        return norm or is_elementwise(node) or node.target is _aten.cat.default or max_pool(node) is not None

    def _copy(self, node: fx.Node, last: bool) -> Ref:
        if (node, last) not in self._copies:
            reference = self._written(node)
            name = self._names.new(f"{reference.name}_{'last' if last else 'image'}")
            layout = torch.channels_last if last else torch.contiguous_format
            self._steps.append(Step(name, "operator", _CONTIGUOUS, (reference,), {"memory_format": layout}))
            self._copies[node, last] = Ref(name)
        return self._copies[node, last]
