"""Parts of packed models that C++ runs as one operator: the bits of the single steps, and who keeps these."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import multiprocessing
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import bop2nd_fast as bf
from bop2nd_fast.inference import PackedModel, engine, load
from bop2nd_fast.inference.graph import InputSpec, Ref, Step
from bop2nd_fast.inference.layers import Pack, PackedConv2d
from tests import packed_models
from tests.inference_models import CALLS, assert_same_bits, images

pytestmark = pytest.mark.skipif(bf.backends.active() == "reference", reason="needs the C++ extension")


class Watch(TorchDispatchMode):
    """Sees operators, and lets them through."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def in_parts(packed: PackedModel) -> bool:
    """Whether the last call with these shapes ran in parts, and none of them stayed step by step."""
    made = packed._parts
    return made is not None and bool(made.parts) and all(all(part._strides.values()) for part in made.parts)


def single_steps(packed: PackedModel, *args: Any, **kwargs: Any) -> Any:
    packed.engine = "steps"
    try:
        return packed(*args, **kwargs)
    finally:
        packed.engine = "auto"


def check(packed: PackedModel, *args: Any, **kwargs: Any) -> Any:
    wanted = single_steps(packed, *args, **kwargs)
    for _ in range(CALLS):
        assert_same_bits(packed(*args, **kwargs), wanted)
    return wanted


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def small() -> tuple[PackedModel, Tensor]:
    """Signs, a product, its ReLU: a part of three steps."""
    layers: dict[str, nn.Module] = {
        "pack": Pack(dim=1, length=5, groups=1),
        "conv": PackedConv2d(**packed_models.conv(40, 5, 3, 1, dtype="float32")),
    }
    steps = [
        Step("x", "input"), packed_models.layer("pack", "x"), packed_models.layer("conv", "pack"),
        packed_models.aten("relu", "relu.default", Ref("conv")), packed_models.output(Ref("relu")),
    ]  # fmt: skip
    x = images((2, 5, 6, 7))
    return PackedModel(steps, layers, [InputSpec(x.shape, torch.float32)]), x


# ----------------------------------------------------------------------------------------------- same bits


def test_sizes_threads_and_memory_formats(threads: None) -> None:
    """Networks: all that ``assert_identical`` compares, and tests/test_inference_networks.py."""
    packed = load(packed_models.DATA / "packed_residual.safetensors")
    for batch, n_threads in ((1, 1), (7, 2)):
        torch.set_num_threads(n_threads)
        x = images((batch, 3, 6, 7), batch)
        check(packed, x, scale=1.5)
        check(packed, x.contiguous(memory_format=torch.channels_last), scale=1.5)
    assert in_parts(packed)


@pytest.mark.parametrize("isa", bf.backends.INSTRUCTION_SETS)
@pytest.mark.parametrize("name", ["words", "residual", "signed"])
def test_golden_files(name: str, isa: str) -> None:
    if (reason := bf.backends.why_not(isa)) is not None:
        pytest.skip(reason)
    _, args, kwargs = packed_models.calls()[name]
    with bf.backends.use(isa):
        packed = load(packed_models.DATA / f"packed_{name}.safetensors")
        check(packed, *args, **kwargs)
    assert in_parts(packed)


SPECIAL = torch.tensor(
    [0.0, -0.0, 1.5, -2.5, float("inf"), -float("inf"), float("nan"), 1e-40, -1e-40, 3e38, -1.0]
)
X, Y = Ref("x"), Ref("y")
ARITHMETIC = ("add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor")
OPERATORS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(ARITHMETIC, (X, Y)),
    **{f"{name} of a number": (X, 0.1) for name in ARITHMETIC},
    "neg.default": (X,),
    "relu.default": (X,),
    "leaky_relu.default": (X, 0.3),
    "prelu.default": (X, Ref("slope")),
    "hardtanh.default": (X, -1, 0.0),
    "clamp.default": (X, None, -0.0),
    "cat.default": ([X, Y], 1),
    "flatten.using_ints": (X, 1, 2),
    "view.default": (X, [11, -1]),
    "reshape.default": (X, [22, -1]),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_on_special_numbers(name: str) -> None:
    """Every pair of them, in images that lie in both ways, in slices and as one channel or pixel."""
    target, args = name.split(" ")[0], OPERATORS[name]
    steps = [
        Step("a", "input"), Step("b", "input"),
        packed_models.aten("x", "neg.default", Ref("a")), packed_models.aten("y", "neg.default", Ref("b")),
        packed_models.aten("z", target, *args), packed_models.output((Ref("z"), Ref("x"))),
    ]  # fmt: skip
    a, b = (t.reshape(1, 11, 11, 1) for t in torch.meshgrid(SPECIAL, SPECIAL, indexing="ij"))
    inputs = [InputSpec((1, 11, 22, 2), torch.float32, (True,) * 4)] * 2
    packed = PackedModel(steps, {}, inputs, {"slope": SPECIAL})
    a, b = (t.expand(1, 11, 11, 4).reshape(1, 11, 22, 2).contiguous() for t in (a, b))
    last = torch.channels_last
    for x, y in (
        (a, b), (a.contiguous(memory_format=last), b.contiguous(memory_format=last)),
        (a, b.contiguous(memory_format=last)), (a[..., :1], b[..., 1:]), (a[:, :, ::2], b[:, :, 1::2]),
        (a[:, :, :1, :1].expand(1, 11, 11, 2), b[:, :, :11]), (a[:0], b[:0]),
    ):  # fmt: skip
        if "slope" not in str(args) or x.shape[1] == 11:
            check(packed, x, y)
    assert packed._parts is not None and packed._parts.parts


def test_an_output_that_is_another_one_seen_in_another_way() -> None:
    steps = [
        Step("x", "input"), packed_models.aten("a", "neg.default", Ref("x")),
        packed_models.aten("b", "flatten.using_ints", Ref("a"), 1),
        packed_models.output([Ref("a"), Ref("b"), Ref("a")]),
    ]  # fmt: skip
    packed = PackedModel(steps, {}, [InputSpec((2, 3, 4), torch.float32)])
    check(packed, images((2, 3, 4)))
    assert in_parts(packed)


def test_names_of_any_text() -> None:
    odd = ["x" * 2000, 'a "quoted" name\n', "\u00e4\u00f6"]
    steps = [
        Step(odd[0], "input"), packed_models.aten(odd[1], "neg.default", Ref(odd[0])),
        packed_models.aten(odd[2], "add.Tensor", Ref(odd[1]), Ref("c" * 500)),
        packed_models.output(Ref(odd[2])),
    ]  # fmt: skip
    packed = PackedModel(steps, {}, [InputSpec((3,), torch.float32)], {"c" * 500: torch.ones(3)})
    check(packed, images((3,)))
    assert in_parts(packed)


def test_a_value_that_has_the_name_of_a_part() -> None:
    names = ["part.0", "part.1", "part.0."]
    steps = [
        Step(names[0], "input"), packed_models.aten(names[1], "neg.default", Ref(names[0])),
        packed_models.aten(names[2], "relu.default", Ref(names[1])),
        packed_models.aten("s", "softmax.int", Ref(names[2]), -1),
        packed_models.aten("n", "neg.default", Ref("s")),
        packed_models.aten("r", "add.Tensor", Ref("n"), Ref(names[1])), packed_models.output(Ref("r")),
    ]  # fmt: skip
    packed = PackedModel(steps, {}, [InputSpec((3, 4), torch.float32)])
    check(packed, images((3, 4)))
    assert packed._parts is not None and len(packed._parts.parts) == 2
    assert not {part.name for part in packed._parts.parts} & {step.name for step in steps}
    assert packed.explain().startswith("4 of 5 steps in 2 parts")


def test_inputs_of_other_memory() -> None:
    packed, x = small()
    wanted = check(packed, x)
    shifted = torch.frombuffer(bytearray(b"\0" + x.numpy().tobytes()), dtype=torch.float32, offset=1).reshape(
        x.shape
    )
    assert_same_bits(packed(shifted), wanted)  # not on 4 bytes
    packed.inputs = (InputSpec((2, 5, 6, 7), torch.float32, (True,) * 4),)
    check(packed, x[:0])
    wide = torch.zeros(2, 5, 6, 14)
    wide[..., ::2] = x
    assert torch.equal(check(packed, wide[..., ::2]), wanted)
    assert torch.equal(packed(nn.Parameter(x)), wanted) and torch.equal(packed(x.requires_grad_()), wanted)
    assert not packed(x).requires_grad and not packed(x).is_inference()
    with torch.inference_mode():
        assert_same_bits(packed(x), wanted)


# --------------------------------------------------------------------------- who keeps the single steps


def test_who_looks_at_single_steps_gets_them() -> None:
    packed, x = small()
    wanted = check(packed, x)
    calls: list[str] = []
    conv = packed.layers["conv"]
    handle = conv.register_forward_hook(lambda *_: calls.append("hook"))
    assert "hooks" in packed.explain() and torch.equal(packed(x), wanted) and calls == ["hook"]
    handle.remove()
    conv.forward = lambda words: calls.append("own") or PackedConv2d.forward(conv, words)  # type: ignore[method-assign]
    assert torch.equal(packed(x), wanted) and calls == ["hook", "own"]
    del conv.forward
    with Watch():
        assert "hooks" in packed.explain() and torch.equal(packed(x), wanted)
    with bf.backends.use("reference"):
        assert "'reference' is forced" in packed.explain() and torch.equal(packed(x), wanted)
    with torch.autocast("cpu"):
        assert "autocast" in packed.explain() and torch.equal(packed(x), wanted)
    assert torch.equal(torch.vmap(packed)(x[None])[0], wanted)
    packed.engine = "steps"
    assert packed.explain() == "step by step: PackedModel.engine is 'steps'"
    with pytest.raises(ValueError, match="'auto' or 'steps', not 'fast'"):
        packed.engine = "fast"
    assert packed.engine == "steps" and copy.deepcopy(packed).engine == "steps"
    packed.engine = "auto"
    assert packed.explain().startswith("3 of 3 steps in 1 parts") and "pack, conv, relu" in packed.explain()
    assert "run_packed" in bf.backends.explain("run_packed")


def test_profile_torch_stays() -> None:
    _, args, kwargs = packed_models.calls()["torch"]
    packed = load(packed_models.DATA / "packed_torch.safetensors")
    check(packed, *args, **kwargs)
    assert packed.explain().startswith("step by step: the model is of profile 'torch'")


class Doubled(PackedConv2d):
    def forward(self, words: Tensor, residual: Tensor | None = None) -> Any:
        return 2 * super().forward(words, residual)


def test_layers_of_ones_own() -> None:
    packed, x = small()
    packed.layers["conv"] = Doubled(**packed_models.conv(40, 5, 3, 1, dtype="float32"))
    assert torch.equal(packed(x), 2 * small()[0](x)) and torch.equal(packed(x), packed(x))
    assert not in_parts(packed)


# ------------------------------------------------------------------------------------------ nothing is stale


def test_other_tensors_written_replaced_or_cast() -> None:
    """Weights: tests/test_weight_writes.py."""
    packed = load(packed_models.DATA / "packed_residual.safetensors")
    _, (x,), kwargs = packed_models.calls()["residual"]
    check(packed, x, **kwargs)
    last: Any = packed.layers["last"]
    last.scale.mul_(2)
    first = check(packed, x, **kwargs)
    last.scale = last.scale * 3
    second = check(packed, x, **kwargs)
    last.shift = None  # and back again
    third = check(packed, x, **kwargs)
    last.shift = torch.linspace(-1, 1, 16)[::2]  # not as C++ takes it
    assert "alias" in packed.explain()
    fourth = check(packed, x, **kwargs)
    last.shift = last.shift.contiguous()
    assert_same_bits(check(packed, x, **kwargs), fourth)
    packed.constants._buffers["slope"].data = torch.full((8,), 0.7)
    fifth = check(packed, x, **kwargs)
    joined = [r["joined"] for r in (first, second, third, fourth, fifth)]
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(joined))


def test_a_layer_in_anothers_place() -> None:
    packed, x = small()
    first = check(packed, x)
    packed.layers["conv"] = PackedConv2d(**packed_models.conv(40, 5, 3, 9, dtype="float32"))
    assert not torch.equal(check(packed, x), first) and in_parts(packed)


def test_an_alias_that_lives_keeps_single_steps_and_one_that_is_gone_does_not() -> None:
    packed, x = small()
    check(packed, x)
    alias = packed.layers["conv"].weight.words
    alias ^= 1
    assert "alias" in packed.explain() and packed._parts is not None
    changed = check(packed, x)
    assert packed._parts.run is packed._parts.program
    alias ^= 1
    assert not torch.equal(check(packed, x), changed)
    del alias
    check(packed, x)
    assert in_parts(packed)


def test_models_that_share_layers_do_not_disturb_each_other(tmp_path: Path) -> None:
    packed, x = small()
    other = copy.copy(packed)
    for model in (packed, other):
        check(model, x)
    parts = [model._parts for model in (packed, other)]
    check(packed, x), check(other, x)
    packed.save(tmp_path / "saved")  # which reads the words
    check(packed, x), check(other, x)
    assert [model._parts for model in (packed, other)] == parts
    packed.layers["conv"].weight.copy_(-packed.layers["conv"].weight.unpack())
    assert_same_bits(check(packed, x), check(other, x))


def test_copies_and_pickles_are_independent() -> None:
    packed, x = small()
    before = check(packed, x)
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    copies = [copy.deepcopy(packed), torch.load(file, weights_only=False)]
    packed.layers["conv"].weight.copy_(-packed.layers["conv"].weight.unpack())
    assert not torch.equal(check(packed, x), before)
    for other in copies:
        assert_same_bits(check(other, x), before)


# ------------------------------------------------------------------------------ threads, processes, memory


def test_threads_on_one_model() -> None:
    packed, _ = small()
    packed.inputs = (InputSpec((2, 5, 6, 7), torch.float32, (True,) * 4),)
    batches = [images((n, 5, 6, 7 + n), n) for n in (1, 2, 3, 5)]
    wanted = [single_steps(packed, x) for x in batches]
    wrong: list[int] = []

    def work(i: int) -> None:
        for k in range(20):
            j = (i + k) % len(batches)
            if not torch.equal(packed(batches[j]), wanted[j]):
                wrong.append(j)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong and in_parts(packed)


def _in_child(packed: PackedModel, x: Tensor, sending: Any) -> None:
    torch.set_num_threads(1)
    sending.send(packed(x).numpy().tobytes())


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_forked_child(threads: None) -> None:
    torch.set_num_threads(1)
    packed, x = small()
    wanted = check(packed, x)
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    child = context.Process(target=_in_child, args=(packed, x, sending))
    child.start()
    assert receiving.poll(60) and receiving.recv() == wanted.numpy().tobytes()
    child.join(30)
    assert child.exitcode == 0


def test_weights_are_laid_once_and_parts_end_with_their_model() -> None:
    packed, x = small()
    check(packed, x)
    assert packed._parts is not None
    (part,) = packed._parts.parts
    weight = packed.layers["conv"].weight
    assert any(laid is weight.blocked_words(1) for laid in part._laid)
    number, held, gone = part._number, part._held, weakref.ref(part)
    del part, packed
    gc.collect()
    assert gone() is None
    with pytest.raises(ValueError, match="there is no part"):
        torch.ops.bop2nd.run_packed(number, held, [x], [1])


def test_a_call_allocates_its_outputs_alone() -> None:
    """Results between steps lie in memory that a part keeps, and outputs are not copied."""
    packed, x = small()
    wanted = check(packed, x)
    assert packed._parts is not None
    (part,) = packed._parts.parts
    with torch.profiler.profile(profile_memory=True) as profile:
        part(x)
    taken = [e.self_cpu_memory_usage for e in profile.events() if e.self_cpu_memory_usage > 0]
    assert taken == [wanted.nbytes]


def test_what_run_packed_refuses() -> None:
    packed, x = small()
    out = check(packed, x)
    assert packed._parts is not None
    (part,) = packed._parts.parts
    number, held, run = part._number, part._held, torch.ops.bop2nd.run_packed
    strides = list(out.stride())
    assert_same_bits(run(number, held, [x], strides)[0], out)
    for inputs, wrong, what in (
        ([x], [1, 1, 1, 1], "gaps"), ([x], [*strides[:3], 3], "gaps"), ([x], strides[:3], "other strides"),
        ([x], [*strides, 1], "other strides"), ([x.double()], strides, "float32"),
        ([], strides, "at least one input"),
        ([x, x], strides, "1 inputs"), ([x[0]], strides, "takes images"), ([x[:, :3]], strides, "length"),
        ([x.to(torch.int32)], strides, "is int32, not float32"),
    ):  # fmt: skip
        with pytest.raises((ValueError, RuntimeError), match=what):
            run(number, held, inputs, wrong)
    with pytest.raises(ValueError, match="there is no part -1"):
        run(-1, held, [x], strides)
    assert np.array_equal(run(number, held, [x], strides)[0].numpy(), out.numpy())


def test_run_packed_gives_nothing_for_tensors_that_lie_elsewhere() -> None:
    packed = load(packed_models.DATA / "packed_residual.safetensors")
    _, (x,), kwargs = packed_models.calls()["residual"]
    check(packed, x, **kwargs)
    assert packed._parts is not None and packed._parts.parts
    run, strides = torch.ops.bop2nd.run_packed, next(iter(packed._parts.parts[0]._strides.values()))
    part = packed._parts.parts[0]
    inputs = [torch.zeros(key[0], dtype=torch.float32) for key in next(iter(part._strides))]
    held = part._held
    assert len(run(part._number, held, inputs, strides)) > 0
    for i, t in enumerate(held):
        for other in (t.clone(), t.double(), t[:0], t.as_strided(t.shape, [0] * t.dim())):
            assert run(part._number, [*held[:i], other, *held[i + 1 :]], inputs, strides) == []
    assert run(part._number, held[1:], inputs, strides) == []


# --------------------------------------------------------------------------------------------- batch norms


class Normed(nn.Module):
    """Batch norms of products' sums: of images, of rows, of rows with an axis more."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = bf.nn.BinaryConv2d(19, 37, 3, padding=1)
        self.norm = nn.BatchNorm2d(37)
        self.dense = bf.nn.BinaryLinear(37, 70)
        self.rows = nn.BatchNorm1d(70, affine=False, eps=1e-3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(self.conv(x))
        return x, self.rows(self.dense(x.mean((2, 3))))


def normed() -> tuple[Normed, Tensor]:
    torch.manual_seed(3)
    model = Normed()
    for module in (model.norm, model.rows):
        assert module.running_mean is not None and module.running_var is not None
        module.running_mean.normal_()
        module.running_var.uniform_(0.01, 4)
    nn.init.normal_(model.norm.weight)
    nn.init.normal_(model.norm.bias)
    return model.eval(), torch.randn(3, 19, 6, 5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_batch_norms_of_products_are_rounded_as_torch_does(memory_format: torch.memory_format) -> None:
    model, x = normed()
    x = x.contiguous(memory_format=memory_format)
    packed = bf.inference.convert(model, x)
    assert engine.torch_fuses_norms() is not None  # on x86 and ARM builds of torch
    assert "conv, norm\n" in packed.explain() and "dense, rows" in packed.explain()
    for sizes in ((3, 6, 5), (1, 6, 5), (64, 6, 5), (0, 6, 5)):
        images = torch.randn(sizes[0], 19, *sizes[1:]).contiguous(memory_format=memory_format)
        check(packed, images)
        with torch.inference_mode():
            assert all(map(torch.equal, packed(images), model(images)))
    assert in_parts(packed)


def test_statistics_of_batch_norms_may_change_between_calls() -> None:
    model, x = normed()
    packed = bf.inference.convert(model, x)
    results = [check(packed, x)]
    for name in ("norm_weight", "norm_bias", "norm_running_mean", "norm_running_var"):
        packed.constants[name].mul_(2)
        results.append(check(packed, x))
    assert all(not torch.equal(a[0], b[0]) for a, b in itertools.pairwise(results))
    assert in_parts(packed)


def test_what_torch_does_is_tried_in_fp32_whatever_the_default_is() -> None:
    try:
        torch.set_default_dtype(torch.float64)
        assert engine.torch_fuses_norms.__wrapped__() == engine.torch_fuses_norms() is not None
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_torch_for_other_processors_rounds_otherwise(capability: str) -> None:
    """What torch does is tried, not presumed."""
    code = """
import torch, bop2nd_fast as bf
from tests import test_inference_engine as t
model, x = t.normed()
packed = bf.inference.convert(model, x)
t.check(packed, x)
assert t.in_parts(packed) and "dense, rows" in packed.explain()
print(t.engine.torch_fuses_norms(), torch.backends.cpu.get_cpu_capability())
"""
    env = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    fused, runs_on = done.stdout.split()
    if runs_on in ("DEFAULT", "AVX2", "AVX512"):
        assert fused == str(runs_on != "DEFAULT")


# ------------------------------------------------------------------------------ a call that was judged before


def test_what_is_judged_once_is_judged_again_after_a_change() -> None:
    packed, x = small()
    wanted = check(packed, x)
    assert packed._parts is not None and packed._parts.takes(packed, (x,))
    assert not packed._parts.takes(packed, (x.double(),)) and not packed._parts.takes(packed, (x[:1],))
    assert not packed._parts.takes(packed, ()) and not packed._parts.takes(packed, (x, x))
    for wrong in (x.double(), x[:, :4], x[0], None, [x], x.to("meta")):
        with pytest.raises((TypeError, ValueError)):
            packed(wrong)
    with pytest.raises(TypeError):
        packed(x, x)
    with pytest.raises(TypeError):
        packed(input_0=x)
    assert torch.equal(packed(x), wanted)
    packed.inputs = (InputSpec((2, 5, 6, 8), torch.float32, (False,) * 4),)
    with pytest.raises(ValueError, match=r"\[2, 5, 6, 8\]"):
        packed(x)


def test_a_memory_limit_set_later_holds() -> None:
    packed, x = small()
    packed.memory_limit = 2**20
    check(packed, x)
    packed.memory_limit = 0
    packed.inputs = (InputSpec((2, 5, 6, 7), torch.float32, (True,) * 4),)
    check(packed, x)  # 4096 bytes for every byte of the inputs stay allowed


@pytest.mark.parametrize("enabled", [False, True])
def test_calls_leave_the_gradient_mode_as_it_was(enabled: bool) -> None:
    packed, x = small()
    x.requires_grad_()
    with torch.set_grad_enabled(enabled):
        for _ in range(CALLS):
            out = packed(x)
            assert torch.is_grad_enabled() == enabled
            assert not out.requires_grad and out.grad_fn is None and not out.is_inference()
    with torch.inference_mode():
        assert packed(x).is_inference()
