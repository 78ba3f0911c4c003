"""Who imports whom, read from the source: no circles, and no arrow upwards between the package's layers."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def modules(package: str) -> dict[str, Path]:
    """Every module of a package by its dotted name; a package's ``__init__`` has the package's name."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path) -> Iterator[tuple[str, ...]]:
    """What every import statement of a module may mean, most specific name first; inside functions too."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name,) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
            start = ".".join(filter(None, (base if node.level else "", node.module)))
            yield from ((f"{start}.{alias.name}", start) for alias in node.names)


def graph(package: str) -> dict[str, set[str]]:
    """Module -> the modules of the same package it imports."""
    known = modules(package)
    arrows = {}
    for name, path in known.items():
        found = (next((m for m in meant if m in known), None) for meant in imports(name, path))
        arrows[name] = {m for m in found if m is not None and m != name}
    return arrows


def circle(arrows: dict[str, set[str]]) -> list[str] | None:
    """The names along one circle, or None."""
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> list[str] | None:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return None
        for other in sorted(arrows[name]):
            if (found := walk(other, [*way, name])) is not None:
                return found
        done.add(name)
        return None

    return next((found for name in arrows if (found := walk(name, [])) is not None), None)


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) is None
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b"}, "b": {"a"}}) == ["a", "b", "a"]


@pytest.mark.parametrize("package", ["benchmarks"])
def test_no_module_imports_itself_by_a_detour(package):
    arrows = graph(package)
    assert len(arrows) > 10 and sum(map(len, arrows.values())) > 20
    found = circle(arrows)
    assert found is None, " -> ".join(found or [])
