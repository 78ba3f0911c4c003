"""Golden packed files: written again to the same bytes, read and run from the specification alone."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from bop2nd_fast.inference import load, operators
from bop2nd_fast.inference.kinds import LAYERS
from tests import packed_models, packed_reader

NAMES = ["words", "residual", "signed", "torch"]


def golden(name: str) -> Path:
    return packed_models.DATA / f"packed_{name}.safetensors"


def expected(name: str) -> list[np.ndarray]:
    with np.load(packed_models.DATA / f"packed_{name}.npz") as file:
        return [file[str(i)] for i in range(len(file.files))]


def compare(name: str, got: list[np.ndarray]) -> None:
    """Words and what is computed from them alone to the bit, sums of real values to rounding."""
    wanted = expected(name)
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        if name == "words" or not np.issubdtype(b.dtype, np.floating):
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_golden_files_are_written_byte_for_byte(name: str, tmp_path: Path) -> None:
    model, _, _ = packed_models.calls()[name]
    model.save(tmp_path / "new")
    assert (tmp_path / "new").read_bytes() == golden(name).read_bytes()
    load(golden(name)).save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == golden(name).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_golden_outputs(cpu_backend: str, name: str) -> None:
    _, args, kwargs = packed_models.calls()[name]
    model = load(golden(name))
    compare(name, packed_models.leaves(model(*args, **kwargs)))
    assert model.profile.name == ("torch" if name == "torch" else "bits")


@pytest.mark.parametrize("name", NAMES)
def test_the_specification_is_enough_to_read(name: str) -> None:
    metadata, graph, tensors = packed_reader.read(golden(name).read_bytes())
    assert metadata["profile"] == ("torch" if name == "torch" else "bits")
    assert graph["steps"][-1]["kind"] == "output" and tensors


@pytest.mark.parametrize("name", ["words", "residual", "signed"])
def test_the_specification_is_enough_to_run(name: str) -> None:
    _, (x,), _ = packed_models.calls()[name]
    _, graph, tensors = packed_reader.read(golden(name).read_bytes())
    compare(name, packed_models.leaves(_arrays(packed_reader.run(graph, tensors, {"x": x.numpy()}))))


def _arrays(tree: object) -> object:
    import torch

    if isinstance(tree, dict):
        return {k: _arrays(v) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_arrays(v) for v in tree]
    return torch.from_numpy(np.ascontiguousarray(tree)) if isinstance(tree, np.ndarray) else tree


def test_golden_files_hold_every_kind_and_operator() -> None:
    kinds, names = set(), set()
    for name in NAMES:
        _, graph, _ = packed_reader.read(golden(name).read_bytes())
        kinds |= {layer["kind"] for layer in graph["layers"].values()}
        names |= {step["operator"] for step in graph["steps"] if step["kind"] == "operator"}
    assert kinds == set(LAYERS)
    assert set(operators.BITS) <= names


def test_kinds_and_operators_are_in_the_specification() -> None:
    text = (Path(__file__).parent.parent / "docs" / "packed_file.md").read_text()
    for kind, cls in LAYERS.items():
        assert f"`{kind}`" in text, kind
        for word in (*cls.attributes, *cls.tensors):
            assert f"`{word}`" in text, (kind, word)
    for name in operators.BITS:
        assert f"`{name}`" in text, name
    for name in operators.NUMBERS:
        assert name.rpartition(".")[2] in text, name


def test_the_oracle_reads_without_torch() -> None:
    assert "torch" not in vars(sys.modules["tests.packed_reader"])
