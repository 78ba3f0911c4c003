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


class Package:
    """Its modules by their names in it (``__init__``: the package itself), and whom they import."""

    def __init__(self, name: str, *folders: tuple[Path, str]) -> None:
        self.name, self.modules = name, dict[str, Path]()
        for folder, prefix in folders:
            for path in sorted(folder.rglob("*.py")):
                if folder.name == PACKAGE and "kernels" in path.relative_to(folder).parts:
                    continue  # the link
                module = prefix + ".".join(path.relative_to(folder).with_suffix("").parts)
                self.modules[module.removesuffix(".__init__")] = path
        self.arrows = {module: self._arrows(module) for module in self.modules}

    def _arrows(self, module: str) -> set[str]:
        found = self._imported(module, ast.parse(self.modules[module].read_text()).body)
        names = {f.removeprefix(f"{self.name}.") if f != self.name else "__init__" for f in found}
        return (names & self.modules.keys()) - {module}

    def _imported(self, module: str, body: Iterable[ast.stmt]) -> Iterator[str]:
        """What these statements import of the package, at once or when called, but not for types."""
        for node in body:
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                continue
            if isinstance(node, ast.Import):
                yield from (a.name for a in node.names if a.name.split(".")[0] == self.name)
            elif isinstance(node, ast.ImportFrom):
                yield from self._from(module, node)
            for part in ("body", "orelse", "finalbody", "handlers"):
                yield from self._imported(module, getattr(node, part, []))

    def _from(self, module: str, node: ast.ImportFrom) -> Iterator[str]:
        base = node.module or ""
        if node.level:
            is_package = self.modules[module].name == "__init__.py"
            here = [] if module == "__init__" else module.split(".")
            here = here[: len(here) - node.level + is_package * (module != "__init__")]
            base = ".".join([self.name, *here, *([node.module] if node.module else [])])
        if base.split(".")[0] == self.name:
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner.removeprefix(f"{self.name}.") in self.modules else base


OURS = Package(PACKAGE, (ROOT / PACKAGE, ""), (ROOT / "kernels", "kernels."))
MODULES, GRAPH = OURS.modules, OURS.arrows
BENCHMARKS = Package("benchmarks", (ROOT / "benchmarks", ""))


def floor(name: str) -> int:
    top = name.split(".")[0]
    for number, floor_names in enumerate(FLOORS):
        if any(top == n or (n.endswith("*") and top.startswith(n[:-1])) for n in floor_names):
            return number
    raise AssertionError(f"{name} is on no floor: say in FLOORS where it belongs")


def below(name: str, arrows: dict[str, set[str]]) -> set[str]:
    """Whom a module imports, directly or by way of others."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        waiting += arrows[(name := waiting.pop())] - seen
        seen |= arrows[name]
    return seen


def circles(arrows: dict[str, set[str]]) -> set[frozenset[str]]:
    """Modules that import each other, directly or by way of others."""
    reached = {name: below(name, arrows) for name in arrows}
    found = {frozenset({name} | {m for m in reached[name] if name in reached[m]}) for name in arrows}
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
    assert len(BENCHMARKS.arrows) > 10 and sum(map(len, BENCHMARKS.arrows.values())) > 20
    assert not circles(GRAPH) and not circles(BENCHMARKS.arrows)
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == {frozenset("bc")}


# From users down: converting, running, reading and writing files, what a file holds.
INFERENCE = (
    {"conversion", "chains", "tails", "fold", "trace", "write", "check"},
    {"packed_model", "engine", "program", "memory"},
    {"packed_file", "packed_writer"},
    {"packed_graph", "graph_json", "kinds", "graph", "operators"},
)


@pytest.mark.parametrize("i", range(1, len(INFERENCE)))
def test_files_know_no_model_and_models_no_converter(i: int) -> None:
    above = {f"inference.{name}" for names in INFERENCE[:i] for name in names}
    own = {f"inference.{name}" for name in INFERENCE[i]}
    assert own | above <= MODULES.keys() and above & below("inference.conversion", GRAPH)
    for name in own:
        assert not above & below(name, GRAPH), name


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
