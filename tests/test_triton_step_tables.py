"""The tables of the step as a GPU would see them: captures, replays, streams and pinned memory, by a fake."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.fake_cuda import DEVICE, RUBBISH, FakeCuda, Stream, on_cpu, on_cuda
from tests.triton_device import runnable

if reason := runnable():
    pytest.skip(reason, allow_module_level=True)
from bop2nd_fast import reference
from bop2nd_fast.kernels import step_tables

Params = list[tuple[Tensor, ...]]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    fake = FakeCuda(monkeypatch)
    for name in ("_plans", "_chunk_tables"):
        monkeypatch.setattr(step_tables, name, type(getattr(step_tables, name))())
    monkeypatch.setattr(step_tables, "_arena", step_tables._Arena())
    monkeypatch.setattr(step_tables, "_captured", [])
    yield fake


def params(*shapes: tuple[int, int]) -> Params:
    """Packed weight, gradient and both moments of each shape."""
    made = []
    for shape in shapes:
        words = reference.pack_bits(torch.randn(shape))
        made.append(tuple(map(on_cuda, (words, torch.randn(shape), torch.randn(shape), torch.rand(shape)))))
    return made


def scalars(n: int, **changes: Any) -> tuple[Tensor | None, ...]:
    given = {
        "hyper": on_cuda(torch.zeros(4)),
        "counts": on_cuda(torch.zeros(n, 2, dtype=torch.int64)),
        "inv_scale": None,
        "found_inf": None,
        "seed": None,
    }
    return tuple({**given, **changes}.values())


def plan(tensors: Params) -> list[step_tables.Launch]:
    return step_tables.plan(list(map(list, zip(*tensors, strict=True))), scalars(len(tensors)), DEVICE)


def new_gradients(tensors: Params) -> Params:
    return [(w, on_cuda(on_cpu(g).clone()), *moments) for w, g, *moments in tensors]


def is_filled(launches: list[step_tables.Launch], tensors: Params) -> bool:
    """Whether both tables hold on the device what this step needs."""
    (launch,) = launches
    addresses = [[t.data_ptr() for t in group] for group in tensors]
    chunks = on_cpu(launch.chunks)
    in_order = bool((chunks[:, 1] < chunks[:, 2]).all()) and set(chunks[:, 0].tolist()) == set(
        range(len(tensors))
    )
    return on_cpu(launch.table)[:, :4].tolist() == addresses and in_order


def test_what_a_capture_makes_is_not_served_before_its_replay(cuda: FakeCuda) -> None:
    tensors = params((4, 64), (3, 33))
    plan(tensors)
    with cuda.capture() as first:
        inside = new_gradients(tensors)
        captured = plan(inside)
    assert not is_filled(captured, inside)
    eager = plan(inside)  # the same addresses, before the graph was ever replayed
    cuda.stream.synchronize()
    assert is_filled(eager, inside)
    with cuda.capture() as second:  # a second graph, whose pool hands out the same addresses
        again = plan(inside)
    second.replay()
    assert is_filled(again, inside) and len(second.copies) > 0
    first.replay()
    assert is_filled(captured, inside)


def test_a_captured_step_reads_tables_of_its_own_at_every_replay(cuda: FakeCuda) -> None:
    tensors = params((4, 64))
    plan(tensors)
    with cuda.capture() as graph:
        launches = plan(tensors)  # addresses that an eager step has made a table of
    graph.replay()
    assert is_filled(launches, tensors)
    on_cpu(launches[0].table).fill_(RUBBISH)
    graph.replay()
    assert is_filled(launches, tensors)


def test_any_number_of_captures_after_one_eager_step(cuda: FakeCuda) -> None:
    tensors = params((4, 64), (8, 32))
    for _ in range(3):  # stable addresses: one table
        plan(tensors)
    graphs = []
    for _ in range(5):
        with cuda.capture() as graph:
            inside = new_gradients(tensors)
            graphs.append((graph, plan(inside), inside))
    for graph, launches, inside in graphs:
        graph.replay()
        assert is_filled(launches, inside)


def test_every_parameter_may_be_a_step_of_its_own(cuda: FakeCuda) -> None:
    tensors = params(*[(4, 64)] * 20)
    for group in tensors:
        plan([group])
    with cuda.capture() as graph:
        inside = [[new] for new in new_gradients(tensors)]
        launches = [plan(group) for group in inside]
    graph.replay()
    assert all(is_filled(some, group) for some, group in zip(launches, inside, strict=True))


def test_chunks_first_seen_in_a_capture_keep_their_source(cuda: FakeCuda) -> None:
    """A gradient off 16 bytes changes what is linear, so the chunk table is made in the capture."""
    tensors = params((4, 64))
    plan(tensors)
    with cuda.capture() as graph:
        gradient = on_cuda(torch.zeros(4 * 64 + 1)[1:].view(4, 64))
        inside = [(tensors[0][0], gradient, *tensors[0][2:])]
        launches = plan(inside)
    for _ in range(2):
        graph.replay()
        assert is_filled(launches, inside)
    assert on_cpu(launches[0].chunks)[:, 3].tolist() == [0]
    assert on_cpu(plan(tensors)[0].chunks)[:, 3].tolist() == [1]


def test_a_large_model_is_captured_with_chunks_of_its_own(cuda: FakeCuda) -> None:
    """The arena grows with what was stepped: its chunk table alone is larger than the arena's first size."""
    many = [[(2**25, 0), (64, 64)]] * 8
    for shapes in many:
        step_tables._chunks_for(tuple(shapes), DEVICE, False)
    plan(params((4, 64)))
    with cuda.capture() as graph:
        launches = step_tables._chunks_for(((2**25, 64), (64, 0)), DEVICE, True)
    graph.replay()
    assert on_cpu(launches)[0].tolist() == [0, 0, 64, 1]


def test_a_capture_before_any_step_says_what_to_do(cuda: FakeCuda) -> None:
    with cuda.capture(), pytest.raises(RuntimeError, match="step once outside the CUDA graph"):
        plan(params((4, 64)))


def test_no_number_of_parameters_makes_every_step_copy(cuda: FakeCuda) -> None:
    tensors = params(*[(2, 32)] * 150)
    for group in tensors:
        plan([group])
    cuda.stream.synchronize()
    for group in tensors:
        plan([group])
    assert cuda.stream.pending == []


def test_a_chunk_table_is_filled_before_another_stream_reads_it(cuda: FakeCuda) -> None:
    """Two models of one architecture on two streams share the table of chunks, and nothing orders them."""
    plan(params((4, 64)))
    with cuda.on_stream(Stream(2)) as second:
        other = params((4, 64))
        launches = plan(other)
        for copy in second.pending:
            copy.run()
        assert is_filled(launches, other)
    assert [stream.cuda_stream for _, stream in cuda.recorded] == [2]


def test_address_tables_belong_to_their_stream(cuda: FakeCuda) -> None:
    tensors = params((4, 64))
    first = plan(tensors)
    with cuda.on_stream(Stream(2)):
        assert plan(tensors) is not first
    assert plan(tensors) is first


def test_threads_share_the_tables(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_tables, "_MAX_PLANS", 2)
    tensors = params(*[(2, 32)] * 4)
    failed: list[BaseException] = []

    def run() -> None:
        try:
            for i in range(300):
                plan([tensors[i % 4]])
        except BaseException as error:  # noqa: BLE001
            failed.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == [] and len(step_tables._plans) == 2


def _bad(what: str) -> tuple[Params, dict[str, Any]]:
    """Tensors or scalars that the kernel would misread."""
    words, grad, m, v = (on_cpu(t) for t in params((4, 64))[0])
    changes: dict[str, Any] = {}
    if what == "a moment on the CPU":
        return [(on_cuda(words), on_cuda(grad), on_cuda(m), v)], changes
    if what == "a strided gradient":
        grad = torch.randn(64, 4).T
    if what == "a short moment":
        m = m[:2].clone()
    if what == "a short second moment":
        v = v[:2].clone()
    if what == "a dense weight of another size":
        words = torch.ones(4, 32)
    if what == "a scalar gradient":
        words, grad, m, v = words[0, :1].clone(), *(torch.tensor(1.0) for _ in range(3))
    if what == "hyper on the CPU":
        changes["hyper"] = torch.zeros(4)
    if what == "hyper in double":
        changes["hyper"] = on_cuda(torch.zeros(4, dtype=torch.float64))
    if what == "counts of another size":
        changes["counts"] = on_cuda(torch.zeros(2, 2, dtype=torch.int64))
    if what == "a seed of one":
        changes["seed"] = on_cuda(torch.zeros(1, dtype=torch.int64))
    return [tuple(map(on_cuda, (words, grad, m, v)))], changes


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("a moment on the CPU", "exp_avg_sq is on cpu, the first weight is on cuda:0"),
        ("a strided gradient", "not contiguous"),
        ("a short moment", "exp_avg has 128 elements, grad has 256"),
        ("a short second moment", "exp_avg_sq has 128 elements"),
        ("a dense weight of another size", "weight has 128 elements, grad has 256"),
        ("a scalar gradient", "at least one axis"),
        ("hyper on the CPU", "hyper must be 4 x torch.float32 on cuda:0"),
        ("hyper in double", "hyper must be 4 x torch.float32"),
        ("counts of another size", "counts must be 2 x torch.int64"),
        ("a seed of one", "seed must be 2 x torch.int64"),
    ],
)
def test_what_the_kernel_would_misread_is_refused(cuda: FakeCuda, what: str, message: str) -> None:
    tensors, changes = _bad(what)
    for _ in range(2):  # also after a good call with the same addresses
        with pytest.raises(ValueError, match=message):
            step_tables.plan([[t] for t in tensors[0]], scalars(1, **changes), DEVICE)


def test_a_view_with_the_address_and_shape_of_a_good_tensor_is_still_checked(cuda: FakeCuda) -> None:
    words, grad, m, v = params((32, 32))[0]
    plan([(words, grad, m, v)])
    with pytest.raises(ValueError, match="not contiguous"):
        plan([(words, grad.T, m, v)])
