"""The wheel of ``bop2nd_runtime`` where torch cannot be imported, and the program ``bop2nd-run``."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import bop2nd_fast as bf
from bop2nd_fast import data
from bop2nd_fast.inference.graph import InputSpec, Ref, Step
from bop2nd_fast.inference.layers import Pack, PackedConv2d
from bop2nd_fast.inference.packed_model import PackedModel
from bop2nd_fast.inference.signed_layers import SignedConv2d
from tests import packed_models
from tests.native_builds import ARM_TOOLS, ROOT, build, run
from tests.test_packed_file_golden import compare, expected, golden

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]
WHEEL = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
# The golden files that the runtime reads. All their outputs are tensors or sizes.
GOLDEN = ["words", "residual", "signed"]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all processes that run these tests
    with open(folder / "wheel.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not list(folder.glob("wheel/*.whl")):
            library = build("bop2nd_runtime_static") / "libbop2nd_runtime.a"
            config = f"cmake.define.BOP2ND_RUNTIME_LIBRARY={library}"
            run(*WHEEL, "-C", config, "--wheel-dir", folder / "wheel", ROOT / "runtime")
    (made,) = folder.glob("wheel/*.whl")
    return made


@pytest.fixture(scope="session")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, NumPy and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    zipfile.ZipFile(wheel).extractall(site)
    link(site, "numpy", np.__file__)
    return folder / "bin" / "python"


def link(site: Path, name: str, file: str | None) -> None:
    assert file is not None
    package = Path(file).parent
    for folder in (package, package.with_name(f"{name}.libs")):  # libraries that its wheel brings along
        if folder.exists():
            (site / folder.name).symlink_to(folder)


def in_environment(python: Path, program: str, *arguments: object) -> str:
    return run(python, "-I", "-c", program, *arguments)


Saved = tuple[Path, Path, np.ndarray]


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A packed network for digits, a file with the test images, and torch's logits of them."""
    return saved(tmp_path_factory.mktemp("digits"), data.get("digits").test_images)


@pytest.fixture(scope="session")
def digits_of_bytes(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The same for a network that takes bytes."""
    images = data.get("digits").test_images
    bytes = ((images + 1) * 127.5).round().to(torch.uint8)
    return saved(tmp_path_factory.mktemp("bytes"), bytes, image_bytes=True)


def saved(folder: Path, images: torch.Tensor, **options: bool) -> Saved:
    torch.manual_seed(0)
    model = bf.models.BinaryNet(width=8, image_size=8, in_channels=1, first_padding=1).eval()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    packed = bf.inference.convert(model, images[:1], **options)
    packed.save(folder / "digits.safetensors")
    np.save(folder / "digits.npy", images.numpy())
    with torch.no_grad():
        return folder / "digits.safetensors", folder / "digits.npy", packed(images).numpy()


PREDICT = """
import sys, numpy as np
try:
    import torch
    sys.exit("torch can be imported")
except ModuleNotFoundError:
    pass
import bop2nd_runtime
net = bop2nd_runtime.load(sys.argv[1], threads=int(sys.argv[4]))
results = net(np.load(sys.argv[2]))
assert "torch" not in sys.modules and net.describe()
np.savez(sys.argv[3], *(results if isinstance(results, tuple) else [results]))
"""


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_files_without_torch(python: Path, tmp_path: Path, name: str) -> None:
    np.save(tmp_path / "x.npy", packed_models.calls()[name][1][0].numpy())
    in_environment(python, PREDICT, golden(name), tmp_path / "x.npy", tmp_path / "y.npz", 1)
    compare(name, tensors(np.load(tmp_path / "y.npz")))


def tensors(file: np.lib.npyio.NpzFile) -> list[np.ndarray]:
    """Without the sizes, which the golden outputs leave out."""
    arrays = [file[name] for name in file.files]
    return [a for a in arrays if not (a.ndim == 0 and a.dtype == np.int64)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", ["digits", "digits_of_bytes"])
def test_digits_without_torch(
    python: Path, tmp_path: Path, request: pytest.FixtureRequest, kind: str, threads: int
) -> None:
    model, images, logits = request.getfixturevalue(kind)
    in_environment(python, PREDICT, model, images, tmp_path / "y.npz", threads)
    got = np.load(tmp_path / "y.npz")["arr_0"]
    np.testing.assert_allclose(got, logits, rtol=1e-4, atol=1e-4)
    assert (got.argmax(1) == logits.argmax(1)).mean() > 0.99


ERRORS = """
import json, sys, numpy as np
import bop2nd_runtime as br
model, damaged, of_torch = sys.argv[1:4]
net = br.load(model)
x = np.zeros(net.inputs[0].shape, np.float32)
said = {}
def record(name, call):
    try:
        call()
    except Exception as error:
        said[name] = [type(error).__name__, str(error)]
record("missing", lambda: br.load("no such file"))
record("damaged", lambda: br.load(damaged))
record("bytes", lambda: br.load(b"short"))
record("torch", lambda: br.load(of_torch))
record("threads", lambda: br.load(model, threads=0))
record("small", lambda: br.load(model, max_file_bytes=16))
record("dtype", lambda: net(x.astype(np.float64)))
record("list", lambda: net(x.tolist()))
record("axes", lambda: net(x[0]))
record("shape", lambda: net(np.zeros((1, 5, 3, 3), np.float32)))
record("none", lambda: net())
record("twice", lambda: net(x, **{net.inputs[0].name: x}))
assert np.array_equal(net(x), br.load(open(model, "rb").read())(x))  # still works, also from memory
print(json.dumps(said))
"""


def test_errors_are_exceptions_that_say_what_was_wrong(python: Path, digits: tuple, tmp_path: Path) -> None:
    model = digits[0]
    content = bytearray(model.read_bytes())
    content[-5] ^= 1
    (tmp_path / "damaged").write_bytes(content)
    said = json.loads(in_environment(python, ERRORS, model, tmp_path / "damaged", golden("torch")))
    assert {name: kind for name, (kind, _) in said.items()} == {
        "missing": "FileNotFoundError",
        "damaged": "PackedFileError",
        "bytes": "PackedFileError",
        "torch": "PackedFileError",
        "threads": "ValueError",
        "small": "LimitError",
        "dtype": "TypeError",
        "list": "TypeError",
        "axes": "ValueError",
        "shape": "ValueError",
        "none": "TypeError",
        "twice": "TypeError",
    }
    assert all(len(text) > 10 for _, text in said.values()) and "float32" in said["dtype"][1]


REFUSED = """
import sys
import bop2nd_runtime as br
try:
    br.load(sys.argv[1])
except br.PackedFileError as error:
    print(error)
"""


NOT_FINITE = """
import sys, numpy as np
import bop2nd_runtime as br
net = br.load(sys.argv[1])
x = np.ones((2, 1, 8, 8), np.float32)
wanted = net(x)
x[1, 0, 3, 3] = np.nan
try:
    net(x)
except ValueError as error:
    print(error)
assert np.array_equal(net(np.ones_like(x)), wanted)
"""


def test_rows_of_8_bits_are_finite(python: Path, tmp_path: Path) -> None:
    layer = bf.nn.BinaryConv2d(1, 8, 3, input_quantizer="int8")
    model = nn.Sequential(layer, nn.BatchNorm2d(8), bf.nn.BinaryConv2d(8, 8, 3)).eval()
    bf.inference.convert(model, torch.randn(2, 1, 8, 8)).save(tmp_path / "model.safetensors")
    said = in_environment(python, NOT_FINITE, tmp_path / "model.safetensors")
    assert "1 of 2 rows hold infinite or NaN elements" in said


def test_an_empty_shape_with_huge_axes_is_refused(python: Path, tmp_path: Path) -> None:
    """Its strides would be beyond 64 bits."""
    size = [0, 2**62, 2**62]
    steps = [Step("x", "input"), packed_models.aten("none", "view.default", Ref("x"), size)]
    steps.append(packed_models.aten("n", "sym_size.int", Ref("none"), 0))
    spec = InputSpec((0,), torch.float32)
    model = PackedModel([*steps, packed_models.output((Ref("x"), Ref("n")))], {}, [spec])
    model.save(tmp_path / "model.safetensors")
    assert "the shape is too large" in in_environment(python, REFUSED, tmp_path / "model.safetensors")


def test_a_small_file_cannot_make_loading_expensive(python: Path, tmp_path: Path) -> None:
    """A plan lists the numbers of a sum: one of 2^27 is refused."""
    steps = [
        Step("x", "input"),
        packed_models.aten("wide", "expand.default", Ref("w"), [1, 2**27]),
        packed_models.aten("sum", "linear.default", Ref("x"), Ref("wide")),
    ]
    spec = InputSpec((1, 2**27), torch.float32)
    model = PackedModel([*steps, packed_models.output(Ref("sum"))], {}, [spec], {"w": torch.ones(1, 1)})
    model.save(tmp_path / "model.safetensors")
    assert "more than 2^24 numbers" in in_environment(python, REFUSED, tmp_path / "model.safetensors")


def test_the_documented_program_runs(python: Path, digits: tuple) -> None:
    page = (ROOT / "docs/runtime.md").read_text()
    start = page.index("```python\nimport bop2nd_runtime")
    program = page[start:].partition("\n")[2].partition("```")[0]
    said = run(python, "-I", "-c", program, cwd=digits[0].parent)
    assert "bop2nd_runtime" in program and "packed network" in said


THREADS = """
import sys, threading, numpy as np
import bop2nd_runtime
net = bop2nd_runtime.load(sys.argv[1])
x = np.load(sys.argv[2])
wanted = net(x)
strided = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
assert np.array_equal(net(strided), wanted) and np.array_equal(net(x[::-1])[::-1], wanted)
same, counted, done = [], 0, threading.Event()
def work():
    same.extend(np.array_equal(net(x), wanted) for _ in range(5))
workers = [threading.Thread(target=work) for _ in range(4)]
for worker in workers:
    worker.start()
while any(worker.is_alive() for worker in workers):
    counted += 1
assert len(same) == 20 and all(same), same
assert counted > 100, counted  # this thread went on while they ran
steps = net.profile(x)
assert sum(step.products for step in steps) > 0 and all(step.seconds >= 0 for step in steps)
assert max(step.rate for step in steps) > 0 and all(step.name and step.kind for step in steps)
"""


def test_threads_of_python_share_a_network(python: Path, digits: tuple) -> None:
    in_environment(python, THREADS, *digits[:2])


@pytest.mark.parametrize("kind", ["digits", "digits_of_bytes"])
def test_the_command(python: Path, tmp_path: Path, request: pytest.FixtureRequest, kind: str) -> None:
    model, images, logits = request.getfixturevalue(kind)
    command = [python, "-I", "-m", "bop2nd_runtime", model]
    run(*command, "--npy", images, "-o", tmp_path / "y.npy")
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), logits, rtol=1e-4, atol=1e-4)
    assert f"[0]: class {logits[0].argmax()} (" in run(*command, "--npy", images)
    assert "GMAC/s" in run(*command, "--bench")
    assert len(run(*command).splitlines()) > 2


@pytest.mark.parametrize("kind", ["digits", "digits_of_bytes"])
def test_pictures_need_pillow_and_nothing_else_does(
    python: Path, tmp_path: Path, request: pytest.FixtureRequest, kind: str
) -> None:
    import subprocess

    import PIL
    from PIL import Image

    image = data.get("digits").test_images[0, 0]
    pixels = ((image + 1) * 127.5).round().to(torch.uint8).numpy()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    command = [str(python), "-I", "-m", "bop2nd_runtime", str(request.getfixturevalue(kind)[0])]
    command += ["--images", str(tmp_path / "a.png")]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2 and "bop2nd-runtime[images]" in refused.stderr
    np.save(tmp_path / "a.npy", pixels)
    wanted = run(*command[:5], "--npy", tmp_path / "a.npy").partition(": ")[2]
    # the same environment with Pillow
    site = next(python.parent.parent.glob("lib/python*/site-packages"))
    with_pillow = tmp_path / "site"
    with_pillow.mkdir()
    link(with_pillow, "PIL", PIL.__file__)
    libraries = Path(PIL.__file__).parent.with_name("pillow.libs")
    if libraries.exists():
        (with_pillow / "pillow.libs").symlink_to(libraries)
    assert not (site / "PIL").exists()
    environment = {**os.environ, "PYTHONPATH": str(with_pillow)}
    got = run(*[part for part in command if part != "-I"], env=environment, cwd=tmp_path)
    assert got.partition(": ")[2] == wanted and "class" in wanted


def test_the_wheel_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size <= 1.5 * 2**20


def test_the_library_is_small(tmp_path: Path) -> None:
    """It lacks what only training needs."""
    library = next(build("bop2nd_runtime").glob("libbop2nd_runtime.so.*.*.*"))
    run("strip", "-o", tmp_path / "stripped", library)
    assert (tmp_path / "stripped").stat().st_size <= 10**6


# --------------------------------------------------------------------------- the program without Python


@pytest.mark.skipif(not shutil.which("pkg-config"), reason="needs pkg-config")
def test_pkg_config_names_the_folder_of_the_installation(tmp_path: Path) -> None:
    build("bop2nd_runtime_static")
    run("cmake", "--install", build("bop2nd_runtime"), "--prefix", tmp_path / "here")
    (told,) = tmp_path.glob("here/lib*/**/bop2nd.pc")
    flags = run("pkg-config", "--cflags", "--libs", told).split()
    assert any((Path(f[2:]) / "bop2nd_runtime.h").exists() for f in flags if f.startswith("-I"))
    assert any((Path(f[2:]) / "libbop2nd_runtime.so").exists() for f in flags if f.startswith("-L"))


def programs() -> list:
    skip = pytest.mark.skipif(
        not ARM_TOOLS, reason="needs g++-aarch64-linux-gnu and qemu-user: make arm-test"
    )
    return ["here", pytest.param("arm", marks=skip)]


@pytest.fixture(scope="session", params=programs())
def program(request: pytest.FixtureRequest) -> list[object]:
    """How to start ``bop2nd-run``, made for this machine and for 64-bit ARM, where an emulator runs it."""
    arm = request.param == "arm"
    made = build("bop2nd-run", arm=arm) / "bop2nd-run"
    return ["qemu-aarch64", made] if arm else [made]


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_files_without_python(program: list, tmp_path: Path, name: str) -> None:
    np.save(tmp_path / "x.npy", packed_models.calls()[name][1][0].numpy())
    run(*program, golden(name), "--npy", tmp_path / "x.npy", "-o", tmp_path / "y.npy")
    outputs = sorted(tmp_path.glob("y*.npy"), key=lambda path: (len(path.name), path.name))
    compare(name, [a for a in map(np.load, outputs) if not (a.ndim == 0 and a.dtype == np.int64)])
    assert expected(name)


@pytest.mark.parametrize("kind", ["digits", "digits_of_bytes"])
def test_digits_without_python(
    program: list, tmp_path: Path, request: pytest.FixtureRequest, kind: str
) -> None:
    model, images, logits = request.getfixturevalue(kind)
    run(*program, model, "--npy", images, "-o", tmp_path / "y.npy")
    got = np.load(tmp_path / "y.npy")
    np.testing.assert_allclose(got, logits, rtol=1e-4, atol=1e-4)
    lines = run(*program, model, "--npy", images).splitlines()
    assert [int(line.split()[2]) for line in lines] == got.argmax(1).tolist()
    assert "linear" in run(*program, model).lower()


@pytest.mark.parametrize("tall_first", [False, True])
def test_one_constant_is_the_weight_of_several_products(
    program: list, tmp_path: Path, tall_first: bool
) -> None:
    """Of the same numbers each product has its own order, and as many as its shape takes."""
    x = packed_models.values(3, 4, 2, 2)
    products = [
        [packed_models.aten("conv", "conv2d.default", Ref("x"), Ref("w"), None, [1, 1], [0, 0], [1, 1], 1)],
        [
            packed_models.aten("wide", "view.default", Ref("w"), [8, 16]),
            packed_models.aten("rows", "linear.default", Ref("row"), Ref("wide")),
        ],
        [
            packed_models.aten("tall", "view.default", Ref("w"), [64, 2]),
            packed_models.aten("columns", "linear.default", Ref("x"), Ref("tall")),
        ],
    ]
    steps = [Step("x", "input"), packed_models.aten("row", "flatten.using_ints", Ref("x"), 1)]
    for product in reversed(products) if tall_first else products:
        steps += product
    result = packed_models.output((Ref("conv"), Ref("rows"), Ref("columns")))
    spec = InputSpec(tuple(x.shape), torch.float32)
    model = PackedModel([*steps, result], {}, [spec], {"w": packed_models.values(8, 4, 2, 2, seed=1)})
    model.save(tmp_path / "model.safetensors")
    np.save(tmp_path / "x.npy", x.numpy())
    run(*program, tmp_path / "model.safetensors", "--npy", tmp_path / "x.npy", "-o", tmp_path / "y.npy")
    for i, wanted in enumerate(model(x)):
        np.testing.assert_allclose(np.load(tmp_path / f"y.{i}.npy"), wanted.numpy(), rtol=1e-5, atol=1e-5)


def test_batch_norm_behind_a_convolution(program: list, tmp_path: Path) -> None:
    """Alone or with signs behind it, read by others or not: all numbers here are exact."""
    steps, layers = [Step("x", "input")], {}
    rows = {"w": (2 ** packed_models.values(34, seed=1).round()), "b": packed_models.values(34, seed=2)}
    rows |= {"m": packed_models.values(34, seed=3), "v": 4.0 ** packed_models.values(34, seed=4).round()}

    def norm(name: str, of: str, weight: bool = True) -> Step:
        affine = [Ref("w"), Ref("b")] if weight else [None, None]
        statistics = [Ref("m"), Ref("v"), False, 0.1, 0.0, True]
        return packed_models.aten(name, "batch_norm.default", Ref(of), *affine, *statistics)

    for name in ("signs", "values", "plain", "both", "summed", "words", "groups"):
        given = packed_models.conv(34, 3, 3, len(name), dtype="float32")
        layers[name] = PackedConv2d(**given) if name == "words" else SignedConv2d(**given, input="real")
        steps.append(packed_models.layer(name, "pack" if name == "words" else "x"))
        steps.append(norm(f"{name}_norm", name, weight=name != "plain"))
    layers["pack"] = Pack(dim=1, length=3, groups=1)
    steps.insert(1, packed_models.layer("pack", "x"))
    for name in ("signs", "both", "summed", "words", "groups"):
        layers[f"{name}_pack"] = Pack(dim=1, length=34, groups=2 if name == "groups" else 1)
        steps.append(packed_models.layer(f"{name}_pack", f"{name}_norm"))
    steps.append(packed_models.aten("sum", "add.Tensor", Ref("summed"), Ref("summed")))
    results = ["signs_pack", "values_norm", "plain_norm", "both_pack", "both_norm", "summed_pack", "sum"]
    results += ["words_pack", "groups_pack"]
    steps.append(packed_models.output(tuple(map(Ref, results))))
    model = PackedModel(steps, layers, [InputSpec((2, 3, 5, 6), torch.float32)], rows)
    x = packed_models.values(2, 3, 5, 6, seed=9)
    model.save(tmp_path / "model.safetensors")
    np.save(tmp_path / "x.npy", x.numpy())
    run(*program, tmp_path / "model.safetensors", "--npy", tmp_path / "x.npy", "-o", tmp_path / "y.npy")
    for i, wanted in enumerate(model(x)):
        assert np.array_equal(np.load(tmp_path / f"y.{i}.npy"), wanted.numpy()), results[i]
    told = run(*program, tmp_path / "model.safetensors", "--bench")
    alone = [line.split()[0] for line in told.splitlines() if "batch_norm" in line]
    assert alone == ["summed_norm"]  # of the others the convolutions have become a part
