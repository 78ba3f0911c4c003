"""Every way to write a weight, with a product before and after: nothing re-laid before may be used."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bop2nd_fast as bf
from bop2nd_fast import BinaryTensor
from bop2nd_fast.inference.graph import InputSpec, Ref, Step
from bop2nd_fast.inference.layers import Pack, PackedConv2d, PackedLinear, RealLinear
from bop2nd_fast.inference.packed_model import PackedModel
from bop2nd_fast.inference.signed_layers import SignedLinear
from bop2nd_fast.nn import BinaryConv2d, BinaryLinear

from .distributed_processes import pipe, start

CONV = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1, "padding_value": 0}


class InParts(nn.Module):
    """A packed model that C++ runs as one operator; its layer stands for it where weights are written."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.conv = PackedConv2d(bf.pack(values, 1), dtype="float32", **CONV)
        steps = [
            Step("x", "input"), Step("pack", "layer", "pack", (Ref("x"),)),
            Step("conv", "layer", "conv", (Ref("pack"),)), Step("output", "output", "", (Ref("conv"),)),
        ]  # fmt: skip
        layers = {"pack": Pack(dim=1, length=70, groups=1), "conv": self.conv}
        spec = InputSpec((2, 70, 4, 5), torch.float32)
        self.__dict__["model"] = PackedModel(steps, layers, [spec])  # no second way to the layer

    @property
    def weight(self) -> Any:
        return self.conv.weight

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.conv.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.conv.load_state_dict(*args, **kwargs)

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


# name -> (a layer of these weights, an input for it)
LAYERS: dict[str, tuple[Callable[[Tensor], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda w: _layer(BinaryLinear(70, 40), w), lambda: torch.randn(3, 70)),
    "conv": (lambda w: _layer(BinaryConv2d(70, 40, 3, padding=1), w), lambda: torch.randn(2, 70, 4, 5)),
    "packed linear": (
        lambda w: PackedLinear(bf.pack(w, 1), dtype="float32", padding_bits=0),
        lambda: torch.ops.bop2nd.pack_bits(torch.randn(3, 70)),
    ),
    "packed conv": (
        lambda w: PackedConv2d(bf.pack(w, 1), dtype="float32", **CONV),
        lambda: torch.ops.bop2nd.pack_bits(torch.randn(2, 70, 4, 5), 1),
    ),
    "packed model, conv": (InParts, lambda: torch.randn(2, 70, 4, 5)),
    "real linear": (lambda w: RealLinear(bf.pack(w, 1)), lambda: torch.randn(3, 70)),
    "signed linear": (
        lambda w: SignedLinear(bf.pack(w, 1), dtype="float32", input="real"),
        lambda: torch.randn(3, 70),
    ),
    "signed linear of 8 bits": (
        lambda w: _layer(BinaryLinear(70, 40, input_quantizer="int8"), w),
        lambda: torch.randn(40, 70),
    ),
}


def _layer(layer: Any, values: Tensor) -> Any:
    layer.weight = nn.Parameter(bf.pack(values, 1))
    return layer


def random_signs(name: str) -> Tensor:
    shape = (40, 70, 3, 3) if "conv" in name else (40, 70)
    return torch.where(torch.randn(shape) < 0, -1.0, 1.0)


def words_of(values: Tensor) -> Tensor:
    return torch.ops.bop2nd.pack_bits(values, 1)


def rows(weight: BinaryTensor, new: Tensor) -> None:
    upper, lower = weight.detach().split(20)
    upper.copy_(new[:20])
    lower.copy_(bf.pack(new, 1)[20:])


def through_autograd_list(weight: BinaryTensor, new: Tensor) -> None:
    torch._foreach_copy_([weight.detach(), torch.zeros(3)], [new, torch.ones(3)])


def in_inference_mode(weight: BinaryTensor, new: Tensor) -> None:
    with torch.inference_mode():
        weight.copy_(new)


def by_numpy(weight: BinaryTensor, new: Tensor) -> None:
    weight.words.numpy()[...] = words_of(new).numpy()


def by_address(weight: BinaryTensor, new: Tensor) -> None:
    words, source = weight.words, words_of(new)
    ctypes.memmove(words.data_ptr(), source.data_ptr(), source.nbytes)


def one_by_one(weight: BinaryTensor, new: Tensor) -> None:
    for i in range(40):
        weight.detach()[i] = new[i]


def swapped(weight: BinaryTensor, new: Tensor) -> None:
    other = bf.pack(new, 1)
    if isinstance(weight, nn.Parameter):
        other = nn.Parameter(other)
    torch.utils.swap_tensors(weight, other)


def by_a_vector(weight: BinaryTensor, new: Tensor) -> None:
    nn.utils.vector_to_parameters(new.reshape(-1), [weight])


def by_the_operator(weight: BinaryTensor, new: Tensor) -> None:
    """A step whose flips are where old and new differ."""
    words = weight.words
    old = torch.ops.bop2nd.unpack_bits(words, 70)
    new = new.movedim(1, -1).contiguous()
    grad = torch.where(old == new, 0.0, old)
    m = torch.where(old == new, -old, torch.zeros_like(old))
    hyper = torch.tensor([1.0, 1.0, 0.0, 0.0])
    torch.ops.bop2nd.bop_step_([words], [grad], [m], [], hyper, torch.zeros(1, 2, dtype=torch.int64))


def by_an_optimizer(weight: BinaryTensor, new: Tensor) -> None:
    weight.requires_grad_()
    optimizer = bf.optim.Bop([weight], gamma=1.0, threshold=0.5)
    weight.grad = torch.empty_strided(weight.shape, weight.stride()).copy_(-new)
    weight.grad[weight.unpack().detach() == new] = 0.0
    optimizer.step()
    weight.grad = None
    weight.requires_grad_(False)


WRITES: dict[str, Callable[[Any, Tensor], object]] = {
    "copy_ of values": lambda w, new: w.detach().copy_(new),
    "copy_ of signs": lambda w, new: w.detach().copy_(bf.pack(new, 1)),
    "copy_ of other packing": lambda w, new: w.detach().copy_(bf.pack(new, 0)),
    "detach twice": lambda w, new: w.detach().detach().copy_(new),
    "view": lambda w, new: w.detach().view(w.shape).copy_(new),
    "data.copy_": lambda w, new: w.data.copy_(new),
    "data = values": lambda w, new: setattr(w, "data", new.clone()),
    "data = signs": lambda w, new: setattr(w, "data", bf.pack(new, 1)),
    "setitem": lambda w, new: w.detach().__setitem__(..., new),
    "setitem of rows": one_by_one,
    "rows": rows,
    "_foreach_copy_": through_autograd_list,
    "inference mode": in_inference_mode,
    "words": lambda w, new: w.words.copy_(words_of(new)),
    "words[...]": lambda w, new: w.words.__setitem__(..., words_of(new)),
    "words.data": lambda w, new: w.words.data.copy_(words_of(new)),
    "words.set_": lambda w, new: (
        torch.empty(0, dtype=torch.int32)
        .set_(w.words.untyped_storage(), 0, w.words.shape)
        .copy_(words_of(new))
    ),
    "numpy": by_numpy,
    "dlpack": lambda w, new: torch.from_dlpack(w.words).copy_(words_of(new)),
    "numpy's dlpack": lambda w, new: np.copyto(np.asarray(w.words), words_of(new).numpy()),
    "address": by_address,
    "swap_tensors": swapped,
    "vector_to_parameters": by_a_vector,
    "operator": by_the_operator,
    "optimizer": by_an_optimizer,
}


def check(layer: Any, make: Callable[[Tensor], nn.Module], x: Tensor, new: Tensor) -> None:
    assert torch.equal(layer.weight.unpack(), new)
    assert torch.equal(layer(x), make(new)(x))


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("way", WRITES)
def test_products_after_a_write(cpu_backend: str, name: str, way: str) -> None:
    make, make_input = LAYERS[name]
    layer: Any = make(random_signs(name))
    x = make_input()
    for _ in range(3):
        layer(x)
        layer(x)
        new = random_signs(name)
        WRITES[way](layer.weight, new)
        check(layer, make, x, new)


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("hold", ["detach", "words", "words.data", "numpy", "dlpack", "rows", "storage"])
def test_writes_through_what_was_taken_before(name: str, hold: str) -> None:
    """Aliases of any kind, taken before the first product and written after it."""
    make, make_input = LAYERS[name]
    layer: Any = make(random_signs(name))
    weight, x = layer.weight, make_input()
    alias: Any = {
        "detach": lambda: weight.detach(),
        "words": lambda: weight.words,
        "words.data": lambda: weight.words.data,
        "numpy": lambda: weight.words.numpy(),
        "dlpack": lambda: torch.from_dlpack(weight.words),
        "rows": lambda: weight.detach()[:],
        "storage": lambda: weight.words.untyped_storage(),
    }[hold]()
    for _ in range(2):
        layer(x)
        new = random_signs(name)
        if hold in ("detach", "rows"):
            alias.copy_(new)
        elif hold == "numpy":
            alias[...] = words_of(new).numpy()
        elif hold == "storage":
            alias.copy_(words_of(new).untyped_storage())
        else:
            alias.copy_(words_of(new))
        check(layer, make, x, new)


@torch.no_grad()
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_load_state_dict(name: str, assign: bool, swap: bool) -> None:
    make, make_input = LAYERS[name]
    layer, x = make(random_signs(name)), make_input()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        for packed in (True, False) if not assign else (True,):
            layer(x)
            new = random_signs(name)
            layer.load_state_dict({"weight": bf.pack(new, 1) if packed else new}, assign=assign)
            check(layer, make, x, new)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@torch.no_grad()
def test_weight_averaging_copies_first_and_refuses_means() -> None:
    layer, x = BinaryLinear(70, 40), torch.randn(3, 70)
    average = torch.optim.swa_utils.AveragedModel(layer)
    average(x)
    layer.weight.copy_(random_signs("linear"))
    average.update_parameters(layer)
    assert torch.equal(average(x), layer(x))
    layer.weight.copy_(-layer.weight.unpack())
    with pytest.raises((RuntimeError, ValueError), match="BinaryTensor"):
        average.update_parameters(layer)


@torch.no_grad()
def test_words_given_by_somebody_who_keeps_them() -> None:
    words = words_of(random_signs("linear"))
    layer, x = BinaryLinear(70, 40), torch.randn(3, 70)
    layer.weight = nn.Parameter(BinaryTensor(words, layer.weight.bit_layout), requires_grad=False)
    layer(x)
    new = random_signs("linear")
    words.copy_(words_of(new))
    check(layer, LAYERS["linear"][0], x, new)


@torch.no_grad()
def test_words_in_the_memory_of_numpy() -> None:
    array = words_of(random_signs("linear")).numpy().copy()
    layer, x = BinaryLinear(70, 40), torch.randn(3, 70)
    weight = BinaryTensor(torch.from_numpy(array), layer.weight.bit_layout)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    del weight
    layer(x)
    new = random_signs("linear")
    array[...] = words_of(new).numpy()
    check(layer, LAYERS["linear"][0], x, new)


def write_signs(weight: BinaryTensor, new: Tensor, done: Any) -> None:
    weight.detach().copy_(new)
    done.send(None)


@torch.no_grad()
@pytest.mark.parametrize("first", ["share_memory", "pickled"])
def test_another_process_writes(first: str) -> None:
    layer, x = BinaryLinear(70, 40), torch.randn(3, 70)
    layer(x)
    if first == "share_memory":
        layer.share_memory()
        assert layer.weight.is_shared()
        layer(x)
    for _ in range(2):
        new = random_signs("linear")
        receiving, sending = pipe()
        # handing a weight to another process moves its words to shared memory, as it moves any tensor's
        process = start(write_signs, layer.weight.detach(), new, sending)
        layer(x)
        assert receiving.poll(60)
        process.join(30)
        check(layer, LAYERS["linear"][0], x, new)


def test_a_product_beside_a_step_keeps_nothing() -> None:
    torch.manual_seed(1)
    layer, x = BinaryLinear(1024, 1024), torch.randn(1, 1024)
    optimizer = bf.optim.Bop2ndOrder([layer.weight], gamma=0.5, sigma=0.5, threshold=1e-3)
    for _ in range(10):
        stop: list[int] = []

        def read(stop: list[int] = stop) -> None:
            with torch.no_grad():
                while not stop:
                    layer(x)

        reader = threading.Thread(target=read)
        reader.start()
        for _ in range(3):
            layer.weight.grad = torch.randn(1024, 1024)
            optimizer.step()
        stop.append(1)
        reader.join()
        with torch.no_grad():
            assert torch.equal(layer(x), torch.where(x < 0, -1.0, 1.0) @ layer.weight.unpack().T)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_products_after_a_compiled_step(backend: str) -> None:
    layer, x = BinaryLinear(70, 40), torch.randn(3, 70)
    optimizer = bf.optim.Bop(layer.parameters(), gamma=1.0, threshold=0.0)
    step = torch.compile(optimizer.step, backend=backend)
    for _ in range(3):
        with torch.no_grad():
            layer(x)
            before = layer.weight.unpack()
        layer.weight.grad = torch.randn(40, 70)
        step()
        with torch.no_grad():
            assert not torch.equal(before, layer.weight.unpack())
            check(layer, LAYERS["linear"][0], x, layer.weight.unpack())


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_what_is_kept_stays_kept(name: str) -> None:
    """The other direction: reading, saving and copying a weight cost no second re-laying of it for ever."""
    make, make_input = LAYERS[name]
    layer: Any = make(random_signs(name))
    x = make_input()
    layer(x)
    layer(x)
    memory = layer.weight.memory
    if bf.backends.active() == "reference" and name != "real linear":
        pytest.skip("the reference has no use for re-laid weights")
    kept = memory._kept
    assert kept is not None
    state = layer.state_dict()
    layer.weight.unpack(), layer.weight.clone(), layer.weight.detach(), repr(layer.weight)
    layer(x)
    assert memory._kept is kept, "aliases of ours share the gate"
    layer.weight.words.sum()
    layer(x)
    assert memory._kept is not None and memory._kept is not kept, "an alias that is gone costs one re-laying"
    held = layer.weight.words
    layer(x)
    layer(x)
    assert memory._kept is None or memory._kept[0] != kept[0]
    del held, state
    layer(x)
    assert memory._kept is not None
