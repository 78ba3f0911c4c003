"""Fixtures shared by all tests: forcing one backend and proving that it ran."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

import tests.triton_device  # noqa: F401  first: it chooses Triton's interpreter where there is no GPU
from bop2nd_fast import backends

# Workers that share the machine share its cores: threads that outnumber them wait for each other.
torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))

CPU_BACKENDS = ("reference", *backends.INSTRUCTION_SETS)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``cpu_backend`` runs a test on every backend that serves CPU tensors; impossible ones are skipped."""
    if "cpu_backend" in metafunc.fixturenames:
        metafunc.parametrize("cpu_backend", CPU_BACKENDS, indirect=True)


@pytest.fixture
def cpu_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Force one backend for the test, and fail the test if no operator ran on it."""
    name: str = request.param
    if (reason := backends.why_not(name)) is not None:
        pytest.skip(f"{name}: {reason}")
    with backends.use(name):
        before = backends.calls()
        yield name
        after = backends.calls()
    served = {backend for backend in after if after[backend] > before[backend]}
    assert name in served, f"{name} was forced, but {served or 'nothing'} ran"
    others = served - {name}
    assert not others, f"{name} was forced, but {others} ran too"


@pytest.fixture(scope="session", autouse=True)
def _compiled_code(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Inductor's code is made anew by every run of the tests: its cache does not see that an operator's fake
    changed, and then compiled code asserts the strides of before."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")  # that of all processes of this run


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20260)
