"""The house's layers: an import goes down or stays on its floor, and no circle closes."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "bop2nd_fast"

# Top to bottom; a trailing * stands for the rest of a name.
FLOORS = (
    ("__main__",),
    ("cli*",),
    ("train*", "plots", "studies", "interchange", "system_report", "stamp", "terminal"),
    ("__init__",),
    ("models", "inference", "network_summary", "optim", "nn", "data", "recipes", "checkpoint*"),
    ("ops", "binary_tensor"),
    ("backends", "reference", "gpu_dispatch", "cuda_library", "triton_library"),
    ("kernels", "atomic_write"),
)


def modules() -> dict[str, Path]:
    """Every module's name without the package's, ``__init__`` for the package itself, and its file."""
    found = {}
    for folder, prefix in ((ROOT / PACKAGE, ""), (ROOT / "kernels", "kernels.")):
        for path in sorted(folder.rglob("*.py")):
            if folder.name == PACKAGE and "kernels" in path.relative_to(folder).parts:
                continue  # the link
            name = prefix + ".".join(path.relative_to(folder).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imported(name: str, body: Iterable[ast.stmt]) -> Iterator[str]:
    """Modules of the package that these statements import, at once or when called, but not for types."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == PACKAGE)
        elif isinstance(node, ast.ImportFrom):
            yield from _from(name, node)
        for part in ("body", "orelse", "finalbody", "handlers"):
            yield from imported(name, getattr(node, part, []))


def _from(name: str, node: ast.ImportFrom) -> Iterator[str]:
    base = node.module or ""
    if node.level:
        is_package = MODULES[name].name == "__init__.py"
        here = [] if name == "__init__" else name.split(".")
        here = here[: len(here) - node.level + is_package * (name != "__init__")]
        base = ".".join([PACKAGE, *here, *([node.module] if node.module else [])])
    if base.split(".")[0] == PACKAGE:
        for alias in node.names:
            inner = f"{base}.{alias.name}"
            yield inner if inner.removeprefix(f"{PACKAGE}.") in MODULES else base


def graph() -> dict[str, set[str]]:
    result = {}
    for name, path in MODULES.items():
        found = imported(name, ast.parse(path.read_text()).body)
        names = {f.removeprefix(f"{PACKAGE}.") if f != PACKAGE else "__init__" for f in found}
        result[name] = (names & MODULES.keys()) - {name}
    return result


GRAPH = graph()


def floor(name: str) -> int:
    top = name.split(".")[0]
    for number, floor_names in enumerate(FLOORS):
        if any(top == n or (n.endswith("*") and top.startswith(n[:-1])) for n in floor_names):
            return number
    raise AssertionError(f"{name} is on no floor: say in FLOORS where it belongs")


def circles() -> set[frozenset[str]]:
    """Modules that import each other, directly or by way of others."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            waiting += GRAPH[(name := waiting.pop())] - seen
            seen |= GRAPH[name]
        return seen

    below = {name: reached(name) for name in GRAPH}
    found = {frozenset({name} | {m for m in below[name] if name in below[m]}) for name in GRAPH}
    return {circle for circle in found if len(circle) > 1}


def test_the_graph_is_seen() -> None:
    assert "backends" in GRAPH["binary_tensor.memory"] and "binary_tensor.layout" in GRAPH["binary_tensor"]
    assert "cli" in GRAPH["__main__"] and "kernels.bits" in GRAPH["kernels.pack_bits"]
    assert {"binary_tensor", "optim"} <= GRAPH["__init__"]


@pytest.mark.parametrize("name", MODULES)
def test_no_arrow_points_upward(name: str) -> None:
    upward = [other for other in GRAPH[name] if floor(other) < floor(name)]
    assert not upward, f"{name} imports what stands above it"


def test_no_circle_closes() -> None:
    assert not circles()


def test_kernels_import_nothing_of_the_package() -> None:
    assert not {
        name: others
        for name, others in GRAPH.items()
        if name.startswith("kernels.") and not all(o.startswith("kernels.") for o in others)
    }


@pytest.mark.parametrize("name", MODULES)
def test_imports_stand_before_what_is_defined(name: str) -> None:
    body = ast.parse(MODULES[name].read_text()).body
    defined = [i for i, n in enumerate(body) if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    after = body[defined[0] :] if defined else []
    late = [n.lineno for n in after if isinstance(n, (ast.Import, ast.ImportFrom))]
    assert not late, f"{MODULES[name].name}, lines {late}"
