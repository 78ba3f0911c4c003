"""What the user's code asked about sizes of inputs, as steps that a packed model checks on every call."""

from __future__ import annotations

from typing import Any

import sympy

from .graph import Ref, Step
from .names import Names
from .trace import Traced

_RELATIONS: dict[Any, str] = {
    sympy.Eq: "eq", sympy.Ne: "ne", sympy.StrictLessThan: "lt", sympy.LessThan: "le",
    sympy.StrictGreaterThan: "gt", sympy.GreaterThan: "ge",
}  # fmt: skip
_FUNCTIONS = {"FloorDiv": "floordiv", "CleanDiv": "floordiv", "Mod": "mod", "PythonMod": "mod", "Max": "max"}
_FUNCTIONS["Min"] = "min"


class Conditions:
    """Writes one step for every condition; the axes of those that no step can say are fixed."""

    def __init__(self, traced: Traced, inputs: list[str], names: Names, steps: list[Step]) -> None:
        self.traced, self.names, self.steps = traced, names, steps
        self.places: dict[Any, tuple[str, int]] = {}
        for name, sizes in zip(inputs, traced.sizes, strict=True):
            for axis, size in enumerate(sizes):
                if isinstance(size, sympy.Symbol):
                    self.places.setdefault(size, (name, axis))
        self.known: dict[Any, Any] = {}

    def write(self) -> None:
        for condition in dict.fromkeys(self.traced.conditions):
            self._condition(condition)

    def _condition(self, condition: Any) -> None:
        if isinstance(condition, sympy.And):
            for part in condition.args:
                self._condition(part)
            return
        if condition == sympy.true:
            return
        relation = _RELATIONS.get(type(condition))
        if relation is None or not all(map(self._sayable, condition.args)):
            fix(self.traced, condition.free_symbols)
            return
        left, right = (self._value(side) for side in condition.args)
        self.steps.append(Step(self.names.new("condition"), "operator", f"require.{relation}", (left, right)))

    def _sayable(self, value: Any) -> bool:
        if isinstance(value, sympy.Symbol):
            return value in self.places
        if isinstance(value, sympy.Integer):
            return True
        if isinstance(value, sympy.Pow):
            return value.exp.is_Integer and 0 < value.exp < 4 and self._sayable(value.base)
        known = isinstance(value, (sympy.Add, sympy.Mul)) or type(value).__name__ in _FUNCTIONS
        return known and all(map(self._sayable, value.args))

    def _value(self, value: Any) -> Any:
        if isinstance(value, sympy.Integer):
            return int(value)
        if value in self.known:
            return self.known[value]
        if isinstance(value, sympy.Symbol):
            name, axis = self.places[value]
            step = Step(self.names.new("size"), "operator", "aten.sym_size.int", (Ref(name), axis))
            self.steps.append(step)
            self.known[value] = Ref(step.name)
            return self.known[value]
        if isinstance(value, sympy.Pow):
            operands, function = [self._value(value.base)] * int(value.exp), "mul"
        else:
            operands = [self._value(a) for a in value.args]
            named = {sympy.Add: "add", sympy.Mul: "mul"}
            function = next((n for t, n in named.items() if isinstance(value, t)), "")
            function = function or _FUNCTIONS[type(value).__name__]
        total = operands[0]
        for operand in operands[1:]:
            step = Step(self.names.new("size"), "operator", f"int.{function}", (total, operand))
            self.steps.append(step)
            total = Ref(step.name)
        self.known[value] = total
        return total


def fix(traced: Traced, symbols: set[Any]) -> None:
    """Axes of these sizes are taken as the example has them."""
    for sizes in traced.sizes:
        sizes[:] = [None if s in symbols else s for s in sizes]
