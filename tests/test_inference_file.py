"""The packed file: what goes in comes out in another process, and a damaged one is refused."""

from __future__ import annotations

import copy
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

import bop2nd_fast as bf
from bop2nd_fast.inference import FORMAT_VERSION, PackedFileError, PackedModel, convert, load, tensor_file
from bop2nd_fast.inference.graph import InputSpec, Ref, Step
from bop2nd_fast.inference.layers import Constant
from bop2nd_fast.nn import BinaryConv2d, BinaryLinear
from tests.inference_models import assert_identical, images, wild_batch_norms


class Mixed(nn.Module):
    """Every kind of layer and argument a file has to hold."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=(1, 0), bias=True), nn.BatchNorm2d(8), nn.PReLU()
        )
        self.a = BinaryConv2d(8, 40, 3, padding=1, padding_value=1)
        self.pool, self.norm = nn.MaxPool2d(2), nn.BatchNorm2d(40)
        self.b = BinaryConv2d(40, 8, 3, padding=1, padding_value=-1, groups=4, bias=True)
        self.shift = nn.Parameter(torch.randn(8, 1, 1))
        self.shortcut = nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), nn.Conv2d(8, 8, 1, bias=False))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d((2, 1)), nn.Flatten(), BinaryLinear(16, 33, bias=True))
        self.dense = BinaryLinear(33, 9, bias=True, input_quantizer=None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.b(self.norm(self.pool(self.a(x)))) * 0.25 + self.shift
        y = torch.cat([y, self.shortcut(x)], dim=1)[:, 4:12, ...].clamp(min=-2)
        return self.dense(self.head(y)).softmax(-1)


@pytest.fixture(scope="module")
def packed() -> PackedModel:
    model = bf.models.BinaryNet(width=4, image_size=8, in_channels=1, first_padding=1)
    return convert(wild_batch_norms(model), images((2, 1, 8, 8)))


@pytest.fixture
def path(packed: PackedModel, tmp_path: Path) -> Path:
    """A file that the test may write to."""
    file = tmp_path / "model.safetensors"
    packed.save(file)
    return file


# ------------------------------------------------------------------------------------------- round trips


@pytest.fixture(scope="module", params=["binarynet", "bi-real-net", "mixed"])
def converted(request: pytest.FixtureRequest) -> tuple[nn.Module, PackedModel, tuple[int, ...]]:
    """A network, packed, and the shape of its images."""
    if request.param == "binarynet":
        size = {"image_size": 8, "in_channels": 1, "first_padding": 1, "padding_value": 1}
        model, shape = bf.models.BinaryNet(width=11, **size), (1, 8, 8)
    elif request.param == "bi-real-net":
        model, shape = bf.models.BiRealNet18(5, width=8), (3, 32, 32)
    else:
        model, shape = Mixed(), (3, 12, 14)
    wild_batch_norms(model)
    return model, convert(model, images((2, *shape))), shape


def test_save_and_load(converted: tuple, cpu_backend: str, tmp_path: Path) -> None:
    model, packed, shape = converted
    packed.save(tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors")
    assert_identical(loaded, model, images((3, *shape)))
    assert repr(loaded) == repr(packed) and loaded.report() == packed.report()
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_in_a_new_process(tmp_path: Path) -> None:
    """A process that knows neither the class of the network nor anything but this package."""
    model, x = Mixed(), images((3, 3, 12, 14))
    convert(wild_batch_norms(model), x).save(tmp_path / "model.safetensors")
    safetensors.torch.save_file(
        {"x": x, "y": model.eval()(x).detach().contiguous()}, tmp_path / "data.safetensors"
    )
    program = """if True:
        import sys, warnings
        warnings.simplefilter("ignore", RuntimeWarning)
        import bop2nd_fast as bf
        from safetensors.torch import load_file
        import torch
        data = load_file(sys.argv[2])
        result = bf.inference.load(sys.argv[1])(data["x"])
        assert result.shape == (3, 9) and torch.equal(result, data["y"])
        print("identical")
    """
    files = [str(tmp_path / name) for name in ("model.safetensors", "data.safetensors")]
    root = str(Path(bf.__file__).parent.parent)
    run = subprocess.run(
        [sys.executable, "-c", program, *files], capture_output=True, text=True, cwd=root, check=False
    )
    assert (run.returncode, run.stdout) == (0, "identical\n"), run.stderr


def test_what_is_in_the_file(path: Path, packed: PackedModel) -> None:
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        words, threshold = file.get_tensor("layers.conv2.weight"), file.get_tensor("layers.conv2.threshold")
    assert words.dtype == torch.int32 and words.shape == (4, 3, 3, 1) and threshold.dtype == torch.int32
    assert metadata["version"] == str(FORMAT_VERSION) and metadata["format"] == "bop2nd_fast.packed_model"
    layout = json.loads(metadata["graph"])["layers"]["conv2"]["layouts"]["weight"]
    assert layout == {"version": 1, "shape": [4, 4, 3, 3], "dim": 1, "length": 4, "dtype": "float32"}
    assert not [name for name in path.parent.iterdir() if name != path], "no temporary file is left"


def test_batch_norm_statistics_of_folded_layers_are_not_in_the_file(path: Path) -> None:
    with safetensors.safe_open(path, framework="pt") as file:
        real = {key for key in file.keys() if file.get_tensor(key).is_floating_point()}  # noqa: SIM118
    assert {key.split(".")[1].partition("_")[0] for key in real} == {"conv1", "norm9"}


# ------------------------------------------------------------------------------ what is converted is saved


class Own(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.erf(x) if x.dim() == 2 else x.erf()


def test_what_is_converted_is_saved(tmp_path: Path) -> None:
    """Modules of one's own, hooks, functions and methods are operators by then."""
    hooked = nn.Linear(4, 4)
    hooked.register_forward_hook(lambda module, args, out: out + 1)
    model = nn.Sequential(BinaryLinear(4, 4), Own(), hooked).eval()
    convert(model, images((2, 4))).save(tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(images((3, 4))), model(images((3, 4))))


def test_a_failed_save_changes_nothing(tmp_path: Path) -> None:
    packed = convert(nn.Sequential(BinaryLinear(4, 4)), images((2, 4)))
    layer: Any = packed.layers["_0"]
    layer.config["padding_bits"] = object()
    target = tmp_path / "model.safetensors"
    target.write_bytes(b"what was there before")
    with pytest.raises(ValueError, match="_0"):
        packed.save(target)
    assert target.read_bytes() == b"what was there before" and len(list(tmp_path.iterdir())) == 1


# ------------------------------------------------------------------------------------------- damaged files


def rewritten(path: Path, change: Any, seal: bool) -> None:
    """Apply ``change(metadata, graph, tensors)`` to a file; ``seal`` makes its checksum right again."""
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    graph = json.loads(metadata["graph"])
    change(metadata, graph, tensors)
    metadata["graph"] = json.dumps(graph, separators=(",", ":"))
    if seal:
        metadata["sha256"] = tensor_file.checksum(metadata, tensors)
    path.write_bytes(safetensors.torch.save(tensors, metadata))


def refused(path: Path, message: str) -> None:
    """Loading raises, and neither the file nor a model loaded before it changes."""
    before = path.read_bytes()
    with pytest.raises(PackedFileError, match=message):
        load(path)
    assert path.read_bytes() == before


def test_every_truncation_is_refused(path: Path) -> None:
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path, "damaged")
    path.write_bytes(whole + b"\0")
    refused(path, "damaged or not a packed model")
    path.write_bytes(whole)
    load(path)


def test_every_altered_byte_is_refused(path: Path) -> None:
    """One bit anywhere: in the sizes, the graph, the checksum, the padding, the words."""
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [*range(0, header, 61), *range(header, len(whole), 97), header - 1, header, len(whole) - 1]
    for place in places:
        altered = bytearray(whole)
        altered[place] ^= 4
        path.write_bytes(altered)
        with pytest.raises(PackedFileError):
            load(path)


def test_altered_words_say_so(path: Path) -> None:
    def flip(metadata: dict[str, str], graph: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors["layers.conv3.weight"][0, 1, 1, 0] ^= 1

    rewritten(path, flip, seal=False)
    refused(path, "was altered after it was written: its checksum does not match")


def test_other_versions_are_refused(path: Path) -> None:
    for version, message in (
        (
            str(FORMAT_VERSION + 1),
            f"has format version {FORMAT_VERSION + 1}; this bop2nd_fast reads {FORMAT_VERSION}",
        ),
        ("0", "has format version 0, which does not exist"),
        ("one", "'one' is not a format version"),
    ):
        rewritten(path, lambda metadata, *_, v=version: metadata.update(version=v), seal=True)
        refused(path, message)


def test_other_files_are_refused(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"weight": torch.ones(3)}, other)
    refused(other, "a safetensors file, but not a packed model of bop2nd_fast")
    torch.save({"weight": torch.ones(3)}, other)
    refused(other, "damaged or not a packed model")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing.safetensors")
    with pytest.raises(OSError):
        load(tmp_path)


def _words_of_another_count(metadata: Any, graph: Any, tensors: dict[str, Tensor]) -> None:
    tensors["layers.conv3.weight"] = tensors["layers.conv3.weight"].repeat(1, 1, 1, 2)


def _another_logical_shape(metadata: Any, graph: Any, tensors: Any) -> None:
    graph["layers"]["conv3"]["layouts"]["weight"].update(shape=[8, 40, 3, 3], length=40)


def _length_against_shape(metadata: Any, graph: Any, tensors: Any) -> None:
    graph["layers"]["conv3"]["layouts"]["weight"]["length"] = 5


def _newer_layout(metadata: Any, graph: Any, tensors: Any) -> None:
    graph["layers"]["conv3"]["layouts"]["weight"]["version"] = 2


def _words_of_another_type(metadata: Any, graph: Any, tensors: dict[str, Tensor]) -> None:
    tensors["layers.conv3.weight"] = tensors["layers.conv3.weight"].to(torch.int64)


def _too_few_thresholds(metadata: Any, graph: Any, tensors: dict[str, Tensor]) -> None:
    tensors["layers.conv3.threshold"] = tensors["layers.conv3.threshold"][:-1].clone()


def _missing_tensor(metadata: Any, graph: Any, tensors: dict[str, Tensor]) -> None:
    del tensors["layers.conv3.weight"]


def _missing_statistics(metadata: Any, graph: Any, tensors: dict[str, Tensor]) -> None:
    del tensors["constants.norm9_running_var"]


def _unknown_layer(metadata: Any, graph: Any, tensors: Any) -> None:
    graph["layers"]["conv3"]["kind"] = "quantum_conv2d"


def _unknown_module(metadata: Any, graph: Any, tensors: Any) -> None:
    graph["layers"]["conv3"] = {"kind": "torch", "class": "Linear", "attributes": {}, "tensors": []}


def _forbidden_method(metadata: Any, graph: Any, tensors: Any) -> None:
    graph["steps"][-2] = {"name": "m", "kind": "method", "target": "numpy", "arguments": [], "keywords": {}}


def _forbidden_function(metadata: Any, graph: Any, tensors: Any) -> None:
    graph["steps"][-2] = {"name": "f", "kind": "operator", "operator": "os.system", "arguments": {}}


def _forward_reference(metadata: Any, graph: Any, tensors: Any) -> None:
    graph["steps"][1]["arguments"]["input"] = {"ref": "dense9"}


def _no_output(metadata: Any, graph: Any, tensors: Any) -> None:
    del graph["steps"][-1]


def _layout_version_of_another_type(metadata: Any, graph: Any, tensors: Any) -> None:
    graph["layers"]["conv3"]["layouts"]["weight"]["version"] = 1.9


def _tail_bits(metadata: Any, graph: Any, tensors: dict[str, Tensor]) -> None:
    tensors["layers.conv3.weight"][..., -1] |= -(2**31)


def _negative_padding(metadata: Any, graph: Any, tensors: Any) -> None:
    graph["layers"]["conv2_pool"]["attributes"]["padding"] = [-1, 0]


def _padding_that_wraps(metadata: Any, graph: Any, tensors: Any) -> None:
    graph["layers"]["conv3"]["attributes"].update(padding=[(6148914691236517206 - 2) // 2, 1])


def _more_padding_than_window(metadata: Any, graph: Any, tensors: Any) -> None:
    graph["layers"]["conv2_pool"]["attributes"]["padding"] = [2**30, 0]


def _stride_of_zero(metadata: Any, graph: Any, tensors: Any) -> None:
    graph["layers"]["conv3"]["attributes"]["stride"] = [0, 1]


def _attribute_of_another_type(metadata: Any, graph: Any, tensors: Any) -> None:
    graph["layers"]["conv3"]["attributes"]["groups"] = True


def _missing_attribute(metadata: Any, graph: Any, tensors: Any) -> None:
    del graph["layers"]["conv3"]["attributes"]["groups"]


def _tensor_of_nobody(metadata: Any, graph: Any, tensors: dict[str, Tensor]) -> None:
    tensors["layers.conv3.more"] = torch.zeros(2)


def _tensor_twice(metadata: Any, graph: Any, tensors: Any) -> None:
    graph["layers"]["conv3"]["tensors"].append("weight")


def _unknown_field(metadata: Any, graph: Any, tensors: Any) -> None:
    graph["code"] = "import os"


def _escape_sequence(metadata: Any, graph: Any, tensors: Any) -> None:
    graph["steps"][1]["name"] = "\x1b[2J"


def _name_twice(metadata: Any, graph: Any, tensors: Any) -> None:
    graph["steps"][2]["name"] = graph["steps"][1]["name"]


def _another_profile(metadata: Any, graph: Any, tensors: Any) -> None:
    metadata["profile"] = "torch"


def _nested_argument(metadata: Any, graph: Any, tensors: Any) -> None:
    tree: Any = 1
    for _ in range(200):
        tree = [tree]
    graph["steps"][-1]["value"] = tree


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_words_of_another_count, r"words of shape \[8, 3, 3, 2\] do not fit logical shape \[8, 4, 3, 3\]"),
        (_another_logical_shape, r"words of shape \[8, 3, 3, 1\] do not fit logical shape \[8, 40, 3, 3\]"),
        (_length_against_shape, "length 5 contradicts shape"),
        (_newer_layout, "layout version 2 is not known"),
        (_layout_version_of_another_type, "layout version 1.9 is not known"),
        (_words_of_another_type, "words must be int32, got torch.int64"),
        (_tail_bits, "bits behind the last of 4 are set"),
        (_too_few_thresholds, r"threshold must be int32 \[8\], got int32 \[7\]"),
        (_missing_tensor, "weight is missing"),
        (_tensor_twice, "weight is missing, or named twice"),
        (_tensor_of_nobody, "'layers.conv3.more' belongs to no layer"),
        (_missing_statistics, "running_var"),
        (_unknown_layer, "layer 'conv3' is of unknown kind 'quantum_conv2d'"),
        (_unknown_module, "layer 'conv3' is of unknown kind 'torch'"),
        (_unknown_field, "the graph has the fields"),
        (_forbidden_method, "is of unknown kind 'method'"),
        (_forbidden_function, "os.system"),
        (_forward_reference, r"reads 'dense9', which no earlier step makes"),
        (_name_twice, "two values have the name"),
        (_no_output, "the graph has no output"),
        (_negative_padding, r"padding must be two integers from 0 to \d+, got \[-1, 0\]"),
        (_padding_that_wraps, "padding must be two integers"),
        (_more_padding_than_window, "at most half the window"),
        (_stride_of_zero, "stride must be two integers from 1"),
        (_attribute_of_another_type, "groups must be an integer from 1 to .*, got True"),
        (_missing_attribute, "has attributes"),
        (_escape_sequence, r"a step's name must be printable text .*, got '\\x1b\[2J'"),
        (_nested_argument, "nested more than 64 deep"),
    ],
)
def test_files_that_contradict_themselves_are_refused(path: Path, change: Any, message: str) -> None:
    """Whole files with a right checksum that do not describe a model of this format."""
    rewritten(path, change, seal=True)
    refused(path, f"the graph does not describe a model: (?s:.*){message}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.uint8, torch.int64, torch.bool])
def test_only_real_inputs_and_bytes_are_of_profile_bits(dtype: torch.dtype) -> None:
    size = Step("n", "operator", "aten.sym_size.int", (Ref("x"), 0))
    steps = [Step("x", "input"), size, Step("output", "output", "", (Ref("n"),))]
    profile = PackedModel(steps, {}, [InputSpec((2,), dtype)]).profile
    other = dtype in (torch.int64, torch.bool)
    assert profile.name == ("torch" if other else "bits") and len(profile.because) == other


def test_a_file_of_another_profile_than_it_says_is_refused(path: Path) -> None:
    rewritten(path, _another_profile, seal=True)
    refused(path, "it says profile 'torch', but is 'bits'")


def replaced_text(path: Path, old: str, new: str) -> None:
    """Change the graph's JSON as text, with a right checksum."""
    metadata, tensors = tensor_file.read(path)
    assert old in metadata["graph"]
    metadata["graph"] = metadata["graph"].replace(old, new, 1)
    metadata["sha256"] = tensor_file.checksum(metadata, tensors)
    path.write_bytes(tensor_file.write(metadata, tensors))


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ("9" * 30, "an integer beyond 64 bits"),
        ("9" * 5000, "an integer beyond 64 bits"),
        ("NaN", "no finite one"),
        ("1e999", "no finite one"),
        ('4,"groups":4', "the key 'groups' stands twice"),
        ("[" * 100_000, "damaged or not a packed model"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ("\\", "damaged or not a packed model"),
    ],
    ids=["big", "huge", "nan", "infinite", "twice", "open", "deep", "escape"],
)
def test_json_that_is_no_graph_is_refused(path: Path, new: str, message: str) -> None:
    replaced_text(path, '"groups":1', f'"groups":{new}')
    refused(path, message)


def header_of(path: Path, change: Any) -> None:
    """Change the safetensors header itself."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


@pytest.mark.parametrize(
    "entry",
    [
        {"data_offsets": [0, 4]}, {"data_offsets": [-4, 0]}, {"data_offsets": [4, 0]},
        {"data_offsets": [0.0, 8]}, {"data_offsets": [2**62, 2**62 + 8]}, {"data_offsets": None},
        {"shape": [2**62, 2**62]}, {"shape": [-1, -288]}, {"shape": [True, 288]},
        {"shape": [1] * 17}, {"shape": "288"}, {"dtype": "F8_E5M2"},
        {"dtype": "object"}, {"dtype": None}, {"dtype": "I64"}, {"more": 1},
    ],
    ids=str,
)  # fmt: skip
def test_tensors_that_do_not_fit_the_file_are_refused(path: Path, entry: dict[str, Any]) -> None:
    header_of(path, lambda header: header["layers.conv3.weight"].update(entry))
    with pytest.raises(PackedFileError, match=r"model\.safetensors: .*tensor 'layers\.conv3\.weight'"):
        load(path)


def test_holes_and_overlaps_are_refused(path: Path) -> None:
    def overlap(header: dict[str, Any]) -> None:
        header["layers.conv3.weight"]["data_offsets"] = header["layers.conv4.weight"]["data_offsets"]
        header["layers.conv3.weight"]["shape"] = header["layers.conv4.weight"]["shape"]

    header_of(path, overlap)
    refused(path, "starts at byte")


@pytest.mark.parametrize("length", [2**24 + 1, 2**40, 2**64 - 1])
def test_headers_beyond_the_file_or_the_limit_are_refused(path: Path, length: int) -> None:
    path.write_bytes(length.to_bytes(8, "little") + bytes(2**24 + 2 if length < 2**25 else 100))
    refused(path, "packed model")


def test_special_files_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for special in (tmp_path / "fifo", Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(PackedFileError, match="not a regular file"):
            load(special)


def test_messages_move_no_cursor(tmp_path: Path) -> None:
    file = tmp_path / "\x1b[31mred.safetensors"
    file.write_bytes(b"nothing")
    with pytest.raises(PackedFileError) as caught:
        load(file)
    assert str(caught.value).isprintable() and "red.safetensors: damaged" in str(caught.value)


def test_loading_is_linear_in_the_number_of_tensors(tmp_path: Path) -> None:
    """Time per tensor with 8 times as many: about the same (a square would make it 8 times as much)."""

    def seconds(n: int) -> float:
        steps = [Step("x", "input"), Step("output", "output", "", (Ref("x"),))]
        constants = {f"c{i}": torch.zeros(1) for i in range(n)}
        layers = {f"z{i}": Constant(torch.zeros(1)) for i in range(n)}
        PackedModel(steps, layers, [InputSpec((1,), torch.float32)], constants).save(tmp_path / "many")
        times = []
        gc.collect()
        gc.disable()  # a large process would collect its garbage in here
        try:
            for _ in range(3):
                start = time.process_time()
                load(tmp_path / "many")
                times.append(time.process_time() - start)
        finally:
            gc.enable()
        return min(times)

    seconds(100)
    assert seconds(4000) < 24 * seconds(500)


def test_a_refused_file_changes_nothing(path: Path, packed: PackedModel) -> None:
    loaded = load(path)
    x = images((2, 1, 8, 8))
    before, state = loaded(x), copy.deepcopy(loaded.state_dict())
    rewritten(path, _newer_layout, seal=True)
    refused(path, "layout version 2")
    assert torch.equal(loaded(x), before) and torch.equal(packed(x), before), (
        "nothing is read from the file later"
    )
    assert loaded.state_dict().keys() == state.keys()
