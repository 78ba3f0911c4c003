"""Names for the steps, layers and constants of a packed model: taken from the user's modules, never twice."""

from __future__ import annotations

import re
from typing import Any

from torch import fx, nn


class Names:
    """Gives every name once, whatever was asked for before."""

    def __init__(self, leaves: set[str]) -> None:
        """``leaves``: paths of modules without children, which stand for what they compute."""
        self._leaves = leaves
        self._taken = set(dir(nn.ModuleDict()))  # no key of a torch.nn.ModuleDict

    def new(self, wanted: str) -> str:
        """``wanted`` as an identifier, with a number if it is taken."""
        name = re.sub(r"\W", "_", wanted)
        name = f"_{name}" if not name or name[0].isdigit() else name
        number, free = 1, name
        while free in self._taken:
            free, number = f"{name}_{number}", number + 1
        self._taken.add(free)
        return free

    def of(self, node: fx.Node) -> str:
        """A new name for a node: its module's, or its operator's."""
        path = module_path(node)
        if path in self._leaves and path:
            return self.new(path)
        target: Any = node.target
        name = getattr(target, "_opname", None) or getattr(target, "__name__", str(target))
        return self.new(f"{path}_{name}" if path else str(name))

    def of_product(self, node: fx.Node) -> str:
        """A new name for a product: that of the module around it, which may hold a quantizer too."""
        path = module_path(node)
        return self.new(path) if path else self.of(node)

    def of_constant(self, node: fx.Node) -> str:
        """A new name for a parameter, a buffer or what was computed from them."""
        path = str(node.meta.get("path", "")).replace(".parametrizations.weight.original0", ".weight")
        return self.new(path) if path else self.of(node)


def module_path(node: fx.Node) -> str:
    """The path of the innermost module whose forward made a node."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    return "" if path.startswith("_empty_nn_module_stack") else re.sub(r"@\d+", "", path)
