"""Packed files with a right checksum and altered content: refused, or run to a result or an error of Python.

Never a crash, never memory without bound, never another exception than those below.
"""

from __future__ import annotations

import itertools
import json
import random
import resource
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bop2nd_fast.inference import PackedFileError, PackedModel, load, operators, tensor_file
from bop2nd_fast.inference.graph import InputSpec, Ref, Step
from bop2nd_fast.inference.kinds import LAYERS
from bop2nd_fast.inference.layers import Pack, PackedConv2d, PackedLinear, RealConv2d, Regroup
from bop2nd_fast.inference.pooling import MaxPool, PoolBits
from tests import packed_models

# What running a model may raise: an operator's or a layer's word about operands that do not fit.
ERRORS = (
    ValueError,
    TypeError,
    RuntimeError,
    IndexError,
    OverflowError,
    ZeroDivisionError,
    NotImplementedError,
)
MEMORY = 3 * 2**30  # bytes that the whole process may grow to, torch included
INTERESTING = [
    0, 1, 2, 3, 5, 31, 32, 33, 64, -1, -2, 127, 2**15, 2**20, 2**30, 2**31 - 1, 2**31, -(2**31), 2**32, 2**48,
    2**62, 2**63 - 1, -(2**63), 0.5, -1.5, 1e-30, 1e30, 1.9, True, False, None, "", "float32", "int64",
    "channels_last", "both", "signs", "values", "\x1b[2J", "a" * 300, [], {}, [1, 1], [0, 0], [2, 2], [-1, 2],
    [2**31, 1], [2**40, 2**40], {"float": "nan"}, {"float": "-inf"}, {"dtype": "float64"}, {"dtype": "bool"},
    {"tuple": []}, {"dict": []}, {"ref": "x"}, {"ref": "image"}, {"memory_format": "channels_last"}, [[1]],
]  # fmt: skip


def small_models() -> list[PackedModel]:
    """A few layers each, with free sizes, so that many changes leave a model that runs."""
    pm = packed_models
    tail = {"scale": pm.values(8, seed=1), "shift": pm.values(8, seed=2), "dtype": "float32"}
    chains: list[tuple[dict[str, Any], tuple[int, ...]]] = [
        (
            {
                "pack": Pack(dim=1, length=5, groups=1),
                "conv": PackedConv2d(**pm.conv(40, 5, 3, 1, dtype="float32"), threshold=pm.thresholds(40, 2)),
                "pool": PoolBits(torch.tensor([0x5A5A, 0x0F], dtype=torch.int32), **pm.POOL),
                "regroup": Regroup(length=40, groups=2),
                "last": PackedConv2d(**pm.conv(6, 20, 3, 3, dtype="float32", groups=2, padding_value=-1)),
            },
            (2, 5, 7, 6),
        ),
        (
            {
                "stem": RealConv2d(**pm.conv(8, 3, 3, 10), bias=pm.values(8, seed=13)),
                "max": MaxPool(**pm.POOL),
                "pack": Pack(dim=1, length=8, groups=2),
                "conv": PackedConv2d(
                    **pm.conv(8, 4, 3, 14, groups=2, padding_value=1), **tail, emits="values"
                ),
            },
            (2, 3, 6, 7),
        ),
        (
            {
                "pack": Pack(dim=-1, length=70, groups=1),
                "dense": PackedLinear(
                    pm.bits(40, 70, seed=1), threshold=pm.thresholds(40, 2), dtype="float32"
                ),
                "last": PackedLinear(pm.bits(8, 40, seed=3), **tail, emits="values"),
            },
            (3, 70),
        ),
    ]
    models = []
    for layers, shape in chains:
        names = ["x", *layers]
        steps = [Step("x", "input"), *(pm.layer(b, a) for a, b in itertools.pairwise(names))]
        steps.append(pm.aten("sum", "add.Tensor", Ref(names[-1]), 1.5))
        steps.append(pm.output(Ref("sum")))
        models.append(PackedModel(steps, layers, [InputSpec(shape, torch.float32)]))
    return models


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    found = [path]
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        found += places(value, (*path, key))
    return found


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def change_graph(rng: random.Random, graph: Any) -> None:
    """One change at a random place, most of them small enough that a reader gets far."""
    possible = [p for p in places(graph) if p]
    if not possible:
        return
    path = rng.choice(possible)
    parent, key = at(graph, path[:-1]), path[-1]
    value, other = parent[key], rng.choice(places(graph))
    choice = rng.random()
    if isinstance(value, str) and choice < 0.5:
        names = [str(at(graph, p)) for p in places(graph) if p and p[-1] == "name"]
        parent[key] = rng.choice(sorted(operators.NAMES) if path[-1] == "operator" else [*names, *LAYERS])
    elif type(value) in (int, float) and choice < 0.4:
        parent[key] = value + rng.choice((-1, 1, 2, 31, 32, 1000, 2**31, -value, value, 0.5))
    elif choice < 0.6:
        parent[key] = rng.choice(INTERESTING)
    elif choice < 0.75:
        parent[key] = json.loads(json.dumps(at(graph, other)))
    elif choice < 0.85:
        del parent[key]
    elif isinstance(parent, list):
        parent.insert(rng.randrange(len(parent) + 1), json.loads(json.dumps(value)))
    else:
        parent[rng.choice(("more", "ref", *map(str, parent)))] = parent.pop(key)


def change_tensor(rng: random.Random, tensors: dict[str, Tensor]) -> None:
    name = rng.choice(sorted(tensors))
    tensor, choice = tensors[name].clone(), rng.random()
    if choice < 0.5 and tensor.numel():
        flat = tensor.view(-1).view(torch.uint8)
        for _ in range(rng.choice((1, 4, 64))):
            flat[rng.randrange(flat.numel())] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        if tensor.dtype == torch.bool:
            flat &= 1
    elif choice < 0.6:
        tensor = tensor.to(rng.choice(list(tensor_file.DTYPES.values())))
    elif choice < 0.7:
        tensor = tensor.reshape(-1)
    elif choice < 0.8:
        tensor = tensor.unsqueeze(rng.randrange(tensor.dim() + 1))
    elif choice < 0.9 and tensor.dim():
        dim = rng.randrange(tensor.dim())
        tensor = tensor.narrow(dim, 0, rng.randrange(tensor.shape[dim] + 1))
    else:
        tensor = torch.cat([tensor.reshape(-1), tensor.reshape(-1)])
    tensors[name] = tensor.contiguous()


def change_gently(rng: random.Random, graph: Any, tensors: dict[str, Tensor]) -> None:
    """A number of a layer or an operator a little larger or smaller, or other bits that mean something."""
    inside = [p for p in places(graph) if "attributes" in p or "arguments" in p]
    numbers = [p for p in inside if type(at(graph, p)) is int and p[-1] not in ("length", "groups")]
    if numbers and rng.random() < 0.6:
        path = rng.choice(numbers)
        at(graph, path[:-1])[path[-1]] += rng.choice((-2, -1, 1, 2, 3))
        return
    name = rng.choice(sorted(tensors))
    tensor = tensors[name].clone()
    if tensor.dim() > 1:
        tensor = tensor.roll(rng.randrange(1, 5), 0)  # rows of words stay rows of words
    elif tensor.dtype == torch.int32:
        tensor += rng.choice((-(2**31), -1000, -1, 1, 1000, 2**30))
    elif tensor.numel():
        tensor[rng.randrange(tensor.numel())] = rng.choice(
            (0.0, -0.0, 1e30, -1e-30, float("nan"), float("inf"))
        )
    tensors[name] = tensor


def altered(rng: random.Random, data: tuple[dict[str, str], dict[str, Tensor]]) -> bytes:
    metadata, tensors = dict(data[0]), dict(data[1])
    graph = json.loads(metadata["graph"])
    gently = rng.random() < 0.6
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        if gently:
            change_gently(rng, graph, tensors)
        elif rng.random() < 0.2:
            change_tensor(rng, tensors)
        else:
            change_graph(rng, graph)
    metadata["graph"] = json.dumps(graph)
    if rng.random() < 0.3:
        metadata["profile"] = "torch"
    metadata["sha256"] = tensor_file.checksum(metadata, tensors)
    return tensor_file.write(metadata, tensors)


def example(model: PackedModel, rng: random.Random) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments that the signature asks for, of the described shapes (of moderate size)."""

    def fill(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {key: fill(v) for key, v in tree.items()}
        if isinstance(tree, (list, tuple)):
            return type(tree)(map(fill, tree))
        if type(tree).__name__ != "Ref":
            return tree
        spec = specs[tree.name]
        shape = [
            rng.choice((min(n, 64), min(n, 64), 0, 1, 9)) if free else n
            for n, free in zip(spec.shape, spec.free or (), strict=True)
        ]
        if torch.Size(shape).numel() > 2**22:
            raise ValueError("a large input")
        seed = rng.randrange(100)
        return (packed_models.values(*shape, seed=seed) * 2).to(spec.dtype)

    names = [step.name for step in model.steps if step.kind == "input"]
    specs = dict(zip(names, model.inputs, strict=True))
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for parameter in model.signature.parameters:
        value = fill(model.signature.call[parameter.name])
        if parameter.kind == "args":
            args += value
        elif parameter.kind == "kwargs":
            kwargs |= value
        elif parameter.kind == "keyword":
            kwargs[parameter.name] = value
        else:
            args.append(value)
    return tuple(args), kwargs


def try_file(file: Path, rng: random.Random) -> str:
    """What became of a file: ``refused``, ``error`` or ``result``."""
    try:
        model = load(file)
    except PackedFileError as error:
        assert str(error).isprintable() and file.name in str(error)
        return "refused"
    assert repr(model).replace("\n", "").isprintable()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        args, kwargs = example(model, rng)
        copies = json.dumps([str(a) for a in packed_models.leaves(args)])
        model(*args, **kwargs)
    except ERRORS:
        return "error"
    assert copies == json.dumps([str(a) for a in packed_models.leaves(args)]), (
        "the caller's tensors were changed"
    )
    for key, value in model.state_dict().items():
        same = getattr(value, "words", value).view(-1).view(torch.uint8)
        assert torch.equal(same, getattr(before[key], "words", before[key]).view(-1).view(torch.uint8))
    model.save(file)
    load(file)
    return "result"


def fuzz(seeds: range, folder: Path, seconds_each: float) -> dict[str, int]:
    torch.set_num_threads(1)
    whole = [packed_models.DATA / f"packed_{name}.safetensors" for name in packed_models.calls()]
    for i, model in enumerate(small_models()):
        whole.append(folder / f"small{i}")
        model.save(whole[-1])
    files = [tensor_file.read(file) for file in whole]
    seen = {"refused": 0, "error": 0, "result": 0}
    for seed in seeds:
        rng = random.Random(seed)
        file = folder / "altered.safetensors"
        file.write_bytes(altered(rng, files[seed % len(files)]))
        start = time.process_time()
        try:
            seen[try_file(file, rng)] += 1
        except BaseException:
            print(f"seed {seed}", file=sys.stderr)
            raise
        assert time.process_time() - start < seconds_each, seed
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        assert used < MEMORY, (seed, used)
    return seen


def test_altered_files(tmp_path: Path) -> None:
    seen = fuzz(range(300), tmp_path, 20)
    assert all(n > 10 for n in seen.values()), f"some of each are needed to mean anything: {seen}"


@pytest.mark.fuzz
@pytest.mark.timeout(7200)
def test_many_altered_files(tmp_path: Path) -> None:
    """10,000 files; also under the address sanitizer (``make sanitize-python``)."""
    print(fuzz(range(1000, 11_000), tmp_path, 120))
