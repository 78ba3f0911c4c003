"""The graph of a packed model: the list of operators, how it runs, how it is called."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bop2nd_fast.binary_tensor import pack
from bop2nd_fast.inference import PackedModel, operators
from bop2nd_fast.inference.graph import InputSpec, Parameter, Ref, Signature, Step
from bop2nd_fast.inference.layers import Constant, Pack, PackedLinear, RealLinear


def aten(name: str, target: str, *args: Any, **kwargs: Any) -> Step:
    return Step(name, "operator", f"aten.{target}", args, kwargs)


def output(tree: Any) -> Step:
    return Step("output", "output", "", (tree,))


X = InputSpec((2, 3), torch.float32)


# ------------------------------------------------------------------------------------------- the list


@pytest.mark.parametrize("name", sorted(operators.NAMES))
def test_operators_are_functional_and_deterministic(name: str) -> None:
    found = operators.find(name)
    if found.schema is None:
        return
    assert not found.schema.is_mutable
    tags = getattr(found.call, "tags", [])
    if torch.Tag.nondeterministic_seeded in tags:
        assert operators._MUST_BE[name.split(".")[1]], "it draws random numbers unless an argument forbids it"
    assert torch.Tag.data_dependent_output not in tags


def test_what_the_list_does_not_have_is_refused() -> None:
    for name in (
        "aten.add_.Tensor",
        "aten.rand.default",
        "aten.nonzero.default",
        "os.system",
        "aten.add",
        "",
    ):
        with pytest.raises(ValueError, match="not an operator that a packed model can run"):
            operators.find(name)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (aten("y", "add.Tensor", Ref("x")), "misses its argument 'other'"),
        (aten("y", "add.Tensor", Ref("x"), "1"), "takes other of type Tensor, not '1'"),
        (aten("y", "relu.default", Ref("x"), 1), "got 2"),
        (aten("y", "relu.default", Ref("x"), out=1), r"got 1 and \['out'\]"),
        (aten("y", "dropout.default", Ref("x"), 0.5, True), "with train other than False"),
        (
            aten("y", "conv2d.default", Ref("x"), Ref("x"), None, [0, 0]),
            "stride must be 1 to 2147483647, got 0",
        ),
        (aten("y", "view.default", Ref("x"), [2**63]), "takes size"),
        (aten("y", "softmax.int", Ref("x"), True), "takes dim of type int, not True"),
        (aten("y", "relu.default", Ref("z")), "reads 'z', which no earlier step makes"),
        (aten("x", "relu.default", Ref("x")), "two values have the name 'x'"),
        (aten("y", "zeros.default", [2], device=torch.device("cpu")), "a graph names no device"),
        (Step("y", "layer", "missing", (Ref("x"),)), "calls layer 'missing'"),
        (Step("y", "python", "eval", ("1",)), "unknown kind"),  # type: ignore[arg-type]
    ],
)
def test_wrong_steps_are_refused(step: Step, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackedModel([Step("x", "input"), step, output(Ref("x"))], {}, [X])


def test_graphs_without_one_last_output_are_refused() -> None:
    with pytest.raises(ValueError, match="no output"):
        PackedModel([Step("x", "input")], {}, [X])
    with pytest.raises(ValueError, match="after the output"):
        PackedModel([Step("x", "input"), output(Ref("x")), aten("y", "relu.default", Ref("x"))], {}, [X])


# ------------------------------------------------------------------------------------------- running


def test_numbers_nested_arguments_constants_and_results() -> None:
    steps = [
        Step("x", "input"),
        aten("n", "sym_size.int", Ref("x"), 0),
        Step("twice", "operator", "int.mul", (Ref("n"), 2)),
        aten("both", "cat.default", [Ref("x"), Ref("c")]),
        aten("flat", "view.default", Ref("both"), [Ref("twice"), -1]),
        aten("parts", "split.Tensor", Ref("flat"), 1),
        Step("first", "operator", "getitem", (Ref("parts"), 0)),
        aten("range", "arange.default", Ref("twice")),
        aten("sum", "sum.dim_IntList", Ref("flat"), [1], True, dtype=torch.float64),
        output({"first": Ref("first"), "rest": (Ref("range"), [Ref("sum"), None, Ref("n"), 1.5])}),
    ]
    c = torch.arange(6.0).view(2, 3)
    model, x = PackedModel(steps, {}, [X], {"c": c}), torch.ones(2, 3)
    result = model(x)
    assert torch.equal(result["first"], torch.ones(1, 3))
    numbers, (total, none, n, number) = result["rest"]
    assert numbers.tolist() == [0, 1, 2, 3] and (none, n, number) == (None, 2, 1.5)
    assert total.dtype == torch.float64 and total.flatten().tolist() == [3, 3, 3, 12]
    assert model.nbytes == 24 and model.report()[0].layer == "c"
    assert "both   = cat([x, c])" in repr(model)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_run_by_themselves(how: Any) -> None:
    steps = [Step("x", "input"), Step("c", "layer", "c"), aten("y", "add.Tensor", Ref("x"), Ref("c"))]
    model = PackedModel([*steps, output(Ref("y"))], {"c": Constant(torch.ones(3))}, [X])
    other = how(model)
    other.layers["c"] = Constant(torch.full((3,), 5.0))
    x = torch.zeros(2, 3)
    assert model(x)[0, 0] == 1 and other(x)[0, 0] == 5, "a layer put in another's place is used at once"
    other.load_state_dict({"layers.c.value": torch.full((3,), 7.0)})
    assert model(x)[0, 0] == 1 and other(x)[0, 0] == 7


def _packed(seed: int) -> PackedModel:
    weight = pack(torch.randn(16, 40, generator=torch.Generator().manual_seed(seed)), 1)
    first = RealLinear(pack(torch.randn(40, 3, generator=torch.Generator().manual_seed(seed)), 1))
    layers = {"first": first, "pack": Pack(dim=-1, length=40, groups=1)}
    layers |= {"dense": PackedLinear(weight, dtype="float32")}
    names = ["x", *layers]
    steps = [Step(b, "layer", b, (Ref(a),)) for a, b in itertools.pairwise(names)]
    return PackedModel([Step("x", "input"), *steps, output(Ref("dense"))], layers, [X])


def _torch_saved(model: PackedModel) -> PackedModel:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", [lambda m: m, copy.deepcopy, _torch_saved, lambda m: m.to("cpu")])
def test_weights_written_later_are_used_at_once(how: Any) -> None:
    """A call, a write, a call: nothing that was kept beside the words is stale."""
    model, other, x = _packed(1), _packed(2), torch.randn(2, 3)
    model(x)
    model = how(model).prepare()
    before = model(x)
    assert torch.equal(before, _packed(1)(x)) and not torch.equal(before, other(x))
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(x), other(x))
    model.load_state_dict(_packed(1).state_dict(), assign=True)
    assert torch.equal(model(x), before)
    model.layers["dense"] = other.layers["dense"]
    model.layers["first"] = other.layers["first"]
    assert torch.equal(model(x), other(x))


def test_names_of_layers_are_no_attributes() -> None:
    names = ["update", "keys", "training", "_modules", "forward", "items", "a b", "\u00e9"]
    steps = [Step("x", "input"), *(Step(f"s_{n}", "layer", n) for n in names)]
    result = output([Ref(f"s_{n}") for n in names])
    layers = {n: Constant(torch.full((1,), float(i))) for i, n in enumerate(names)}
    model = PackedModel([*steps, result], layers, [X])
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [v.item() for v in one(torch.zeros(2, 3))] == list(range(len(names)))
        one.load_state_dict({f"layers.{n}.value": torch.full((1,), 9.0) for n in names})
        assert [v.item() for v in one(torch.zeros(2, 3))] == [9] * len(names)
    for name in ("", "a.b", 1):
        with pytest.raises(ValueError, match="cannot have the name"):
            model.layers[name] = layers["keys"]  # type: ignore[index]


@pytest.mark.parametrize("cast", ["half", "double", "bfloat16", torch.float64, torch.float16])
def test_another_dtype_is_refused_at_once(cast: Any) -> None:
    steps = [Step("x", "input"), aten("y", "add.Tensor", Ref("x"), Ref("c")), output(Ref("y"))]
    model = PackedModel(steps, {}, [X], {"c": torch.ones(3)})
    with pytest.raises(TypeError, match="computes in the dtypes it was converted in"):
        model.to(cast) if isinstance(cast, torch.dtype) else getattr(model, cast)()
    assert model.float().to("cpu").to(torch.float32)(torch.zeros(2, 3)).sum() == 6
    assert model.to("meta").constants["c"].is_meta


def test_sizes_known_at_the_call_are_judged() -> None:
    steps = [
        Step("x", "input"),
        aten("n", "sym_size.int", Ref("x"), 2),
        Step("zero", "operator", "int.sub", (Ref("n"), 4)),
        aten("y", "avg_pool2d.default", Ref("x"), [2, 2], [Ref("zero"), 1]),
        output(Ref("y")),
    ]
    model = PackedModel(steps, {}, [InputSpec((1, 3, 5, 5), torch.float32)])
    assert model(torch.ones(1, 3, 5, 5)).shape == (1, 3, 4, 4)
    with pytest.raises(ValueError, match="stride must be 1 to 2147483647, got 0"):
        model(torch.ones(1, 3, 4, 4))


def test_operands_that_torch_does_not_look_at_are_refused() -> None:
    """With these, torch reads beyond its tensors."""
    lstm = nn.LSTM(3, 4)
    given = dict(zip(("w", "v", "b", "c"), (p.detach() for p in lstm.parameters()), strict=True))
    state = {"h": torch.zeros(1, 2, 4)}
    params = [Ref(name) for name in given]
    spec = InputSpec((5, 2, 3), torch.float32)

    def recurrent(n_layers: int, params: list[Ref]) -> PackedModel:
        step = aten(
            "y",
            "lstm.input",
            Ref("x"),
            [Ref("h"), Ref("h")],
            params,
            True,
            n_layers,
            0.0,
            False,
            False,
            False,
        )
        getitem = Step("z", "operator", "getitem", (Ref("y"), 0))
        return PackedModel([Step("x", "input"), step, getitem, output(Ref("z"))], {}, [spec], given | state)

    x = torch.randn(5, 2, 3)
    assert torch.equal(recurrent(1, params)(x), lstm(x)[0])
    for model in (recurrent(2, params), recurrent(1, params[:3]), recurrent(1, [params[1], *params[1:]])):
        with pytest.raises(ValueError, match="recurrent network"):
            model(x)
    norm = aten("y", "_weight_norm.default", Ref("x"), Ref("g"))
    model = PackedModel([Step("x", "input"), norm, output(Ref("y"))], {}, [X], {"g": torch.ones(5, 1)})
    with pytest.raises(ValueError, match="weight norm"):
        model(torch.ones(2, 3))


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("int.mul", (2**40, 2**40)), ("int.floordiv", (1, 0)), ("int.add", (1.5, 1)), ("int.add", ([1], [2])),
        ("float.truediv", (1, 0)), ("float.pow", (1e200, 2)), ("int.ceil", (float("inf"),)),
        ("float.sqrt", (-1.0,)),
    ],
)  # fmt: skip
def test_numbers_stay_numbers(name: str, args: Any) -> None:
    model = PackedModel([Step("y", "operator", name, args), output(Ref("y"))], {}, [])
    with pytest.raises((OverflowError, ZeroDivisionError, ValueError, TypeError)):
        model()


# ------------------------------------------------------------------------------------------- calls


def called(signature: Signature, names: list[str]) -> PackedModel:
    inputs = [Step(name, "input") for name in names]
    result = output(tuple(Ref(name) for name in names))
    return PackedModel([*inputs, result], {}, [X] * len(names), signature=signature)


def test_calls_as_the_trained_model_was_called() -> None:
    a, b = torch.zeros(2, 3), torch.ones(2, 3)
    parameters = (
        Parameter("x", "positional"), Parameter("mask", "any", None), Parameter("more", "args"),
        Parameter("pair", "keyword"), Parameter("scale", "keyword", 2.0), Parameter("named", "kwargs"),
    )  # fmt: skip
    call = {
        "x": Ref("x"), "mask": None, "more": (), "pair": {"one": Ref("one"), "list": [Ref("two"), 3]},
        "scale": 2.0, "named": {"bias": Ref("bias")},
    }  # fmt: skip
    model = called(Signature(parameters, call), ["bias", "x", "one", "two"])
    pair = {"one": b, "list": [a, 3]}
    bias, x, one, two = model(a, pair=pair, bias=b)
    assert bias is b and x is a and one is b and two is a
    assert model(a, None, pair=pair, bias=b, scale=2.0)[1] is a
    for args, kwargs, kind, message in (
        ((a,), {"pair": pair}, TypeError, "named must be a dict with the keys"),
        (
            (),
            {"pair": pair, "bias": b},
            TypeError,
            r"takes \(x, mask=None, \*more, pair, scale=2.0, \*\*named\)",
        ),
        (
            (a,),
            {"pair": {"one": b, "list": (a, 3)}, "bias": b},
            TypeError,
            r"pair\['list'\] must be a list of 2",
        ),
        ((a,), {"pair": {"one": b, "list": [a, 4]}, "bias": b}, ValueError, r"\[1\] was 3 in the conversion"),
        ((a, b), {"pair": pair, "bias": b}, ValueError, "mask was None in the conversion.*got a tensor"),
        ((a,), {"pair": pair, "bias": b, "scale": 3.0}, ValueError, "scale was 2.0"),
        ((a,), {"pair": pair, "bias": None}, TypeError, "input bias must be a tensor"),
    ):
        with pytest.raises(kind, match=message):
            model(*args, **kwargs)


def test_keywords_and_positions_give_the_same() -> None:
    signature = Signature((Parameter("x"), Parameter("y")), {"x": Ref("x"), "y": Ref("y")})
    model, a, b = called(signature, ["y", "x"]), torch.zeros(2, 3), torch.ones(2, 3)
    for result in (model(a, b), model(y=b, x=a), model(a, y=b)):
        assert result[0] is b and result[1] is a


def test_signatures_that_do_not_fit_the_graph_are_refused() -> None:
    for parameters, call in (
        ((Parameter("x"),), {"x": None}),
        ((Parameter("x"),), {"y": Ref("x")}),
        ((Parameter("x"),), {"x": (Ref("x"), Ref("x"))}),
        ((Parameter("x", "any", None), Parameter("y")), {"x": Ref("x"), "y": 1}),
    ):
        with pytest.raises(ValueError):
            called(Signature(parameters, call), ["x"])


def test_free_and_fixed_axes() -> None:
    spec = InputSpec((2, 3, 8), torch.float32, (True, False, True))
    model = PackedModel([Step("x", "input"), output(Ref("x"))], {}, [spec])
    assert model(torch.ones(5, 3, 9)).shape == (5, 3, 9)
    for shape in ((5, 4, 9), (5, 3), (5, 3, 9, 1)):
        with pytest.raises(ValueError, match=r"input 0 must be \[N, 3, U\], got shape"):
            model(torch.ones(shape))


def test_a_module_as_layer_runs_with_its_hooks() -> None:
    layer = nn.Linear(3, 2)
    model = PackedModel(
        [Step("x", "input"), Step("y", "layer", "y", (Ref("x"),)), output(Ref("y"))], {"y": layer}, [X]
    )
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda module, args, result: seen.append(result))
    model(torch.ones(2, 3))
    assert len(seen) == 1
