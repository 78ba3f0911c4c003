from __future__ import annotations

import ast
import itertools
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import tomllib
import torch

import bop2nd_fast
from bop2nd_fast import backends

ROOT = Path(__file__).resolve().parent.parent
KERNELS = sorted(path.name for path in (ROOT / "kernels").glob("*.py"))

WITHOUT_EXTENSION = """
import sys, warnings
sys.modules["bop2nd_fast._C"] = None  # as if it had not been built
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import bop2nd_fast as bf
    import bop2nd_fast.backends, bop2nd_fast.nn
import torch
about = [str(w.message) for w in caught if "bop2nd_fast" in str(w.message)]
assert len(about) == 1, about
assert "C++ extension is not there" in about[0], about
layer = bf.nn.BinaryLinear(40, 3)
output = layer(torch.linspace(-1, 1, 80).view(2, 40).requires_grad_())
output.sum().backward()
assert output.shape == (2, 3) and layer.weight.grad is not None
assert bf.backends.active("cpu") == "reference" and bf.backends.calls()["reference"] > 0
"""

IMPORT_IS_QUIET = """
import os, sys
before = dict(os.environ)
import bop2nd_fast, torch
assert dict(os.environ) == before, "importing wrote to the environment"
assert not torch.cuda.is_initialized(), "importing started CUDA"
for name in ("sklearn", "matplotlib", "typer", "rich", "sympy", "triton"):
    assert name not in sys.modules, f"importing bop2nd_fast imports {name}"
"""

INSTALLED = """
import pathlib, sys
import bop2nd_fast as bf, torch
assert pathlib.Path(bf.__file__).is_relative_to(sys.prefix), bf.__file__
model = bf.models.BinaryNet(width=4, image_size=10)
x = torch.randn(2, 3, 10, 10)
model(x).sum().backward()
packed = bf.inference.convert(model.eval(), x)
assert torch.equal(packed(x), model(x))
assert bf.backends.active("cpu") in bf.backends.INSTRUCTION_SETS
"""

WITHOUT_CLI_EXTRA = """
import sys
sys.modules["{missing}"] = None
sys.argv = ["bop2nd", "info"]
from bop2nd_fast.__main__ import main
sys.exit(main())
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_kernels_is_reached_through_the_link_only():
    # Without __init__.py and with the link, wheels, editable installs and checkouts all see
    # bop2nd_fast.kernels, and no top-level package `kernels` (a name that is taken) is ever installed.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    link = ROOT / "bop2nd_fast" / "kernels"
    assert link.is_symlink() and str(link.readlink()) == "../kernels"


@pytest.mark.parametrize("folder", ["kernels", "csrc"])
def test_the_lowest_layers_import_nothing_of_the_package(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            upward = [name for name in names if name.startswith("bop2nd_fast") and ".kernels" not in name]
            assert not upward, f"{path} imports {upward}"


def test_the_package_works_without_its_extension_and_says_so_once():
    finished = run(WITHOUT_EXTENSION)
    assert finished.returncode == 0, finished.stderr


def test_importing_has_no_side_effects():
    finished = run(IMPORT_IS_QUIET)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_the_command_line_says_which_extra_is_missing(missing):
    finished = run(WITHOUT_CLI_EXTRA.format(missing=missing))
    assert finished.returncode == 2
    assert f"needs the package '{missing}'" in finished.stderr and "bop2nd-fast[cli]" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_every_requirement_is_pinned_exactly_and_covers_the_extras():
    lines = (ROOT / "requirements" / "dev.txt").read_text().splitlines()
    pins = [line.partition("#")[0].strip() for line in lines]
    pins = [pin for pin in pins if pin]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", pin) for pin in pins), pins
    pinned = {normal(pin.partition("==")[0]) for pin in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    missing = {normal(re.split(r"[<>=!~ \[]", name)[0]) for name in wanted} - pinned
    assert not missing


def normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def test_the_documentation_tells_which_backend_has_which_operator():
    text = (ROOT / "docs" / "internals.md").read_text()
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| (.*) \|$", text, re.MULTILINE)
    told = {
        op: [cell.strip() for cell in cells.split("|")]
        for ops, cells in rows
        for op in re.findall(r"\w+", ops)
    }
    assert told.keys() == backends._references.keys()
    for op, (reference, cpu, triton, cuda) in told.items():
        assert reference == "yes"
        assert (cpu == "yes") == torch._C._dispatch_has_kernel_for_dispatch_key(f"bop2nd::{op}", "CPU"), op
        assert (cuda == "yes") == (op in backends.CUDA_OPS), op
        assert (triton == "yes") == (op in backends._TRITON_LAUNCHERS), op


@pytest.mark.slow
def test_a_wheel_holds_the_kernels_inside_the_package_only(tmp_path):
    # The extension is built again here, without optimization: a third of the time, and nothing runs it. From
    # a source distribution, which must hold all that this takes.
    tree = tmp_path / "tree"
    left_out = shutil.ignore_patterns(".git", ".venv", "build", "out", "*.so")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=left_out)
    packed = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path)]
    subprocess.run(packed, cwd=tree, capture_output=True, check=True)
    (source,) = tmp_path.glob("*.tar.gz")
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
    compiler.chmod(0o755)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
    built = subprocess.run(
        [*command, "--wheel-dir", str(tmp_path), str(source)],
        env={**os.environ, "CXX": str(compiler)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"bop2nd_fast-{bop2nd_fast.__version__}-")
    names = zipfile.ZipFile(wheel).namelist()
    assert KERNELS and {f"bop2nd_fast/kernels/{name}" for name in KERNELS} <= set(names)
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"bop2nd_fast"}
    assert [name for name in names if re.fullmatch(r"bop2nd_fast/_C.*\.so", name)]
    assert "bop2nd_fast/py.typed" in names
    for package in ("data", "inference", "models", "nn", "ops", "optim"):
        assert f"bop2nd_fast/{package}/__init__.py" in names
    # In an environment of its own, with the packages that the wheel needs and no checkout.
    venv.create(tmp_path / "environment", symlinks=True)
    site = next((tmp_path / "environment").glob("lib/python*/site-packages"))
    zipfile.ZipFile(wheel).extractall(site)
    (site / "others.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    command = [str(tmp_path / "environment/bin/python"), "-I", "-c", INSTALLED]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
