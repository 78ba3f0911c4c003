"""The Triton step against the specification, bit for bit, in the interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bop2nd_fast import reference
from tests.triton_device import DEVICE, runnable

if reason := runnable():
    pytest.skip(reason, allow_module_level=True)
from bop2nd_fast.kernels import bop_step, step_tables, tuning

HYPER = (0.3, 0.2, 0.1, 0.05)  # all different, and at these sizes about half of the candidates flip
Group = list[list[Tensor]]


def make_group(
    kinds: list[tuple[torch.dtype, tuple[int, ...]]],
    grad: torch.dtype,
    moment: torch.dtype,
    with_v: bool = True,
) -> Group:
    """Weights, gradients and moments; a weight dtype of int32 stands for packed words."""
    generator = torch.Generator().manual_seed(7)
    group: Group = [[], [], [], []] if with_v else [[], [], []]
    for dtype, shape in kinds:
        signs = torch.where(torch.rand(shape, generator=generator) < 0.5, -1.0, 1.0)
        m = 0.1 * torch.randn(shape, generator=generator)
        m[torch.rand(shape, generator=generator) < 0.02] = float("nan")
        tensors = [
            reference.pack_bits(signs) if dtype == torch.int32 else signs.to(dtype),
            torch.randn(shape, generator=generator).to(grad),
            m.to(moment),
            torch.rand(shape, generator=generator).to(moment),
        ]
        for column, tensor in zip(group, tensors, strict=False):
            column.append(tensor.to(DEVICE))
    return group


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shape, dtype and bits; NaNs count as equal whatever their payload."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a, b) if a.dtype == torch.int32 else torch.equal(a.nan_to_num(9e9), b.nan_to_num(9e9))


def step_both(group: Group, **options: object) -> tuple[Group, Tensor]:
    """Step a copy with the reference and a copy with Triton; assert equal bits; return Triton's."""
    hyper = torch.tensor(HYPER, device=DEVICE)
    results = []
    for step in (reference.bop_step_, bop_step.bop_step_):
        copy = [[tensor.clone() for tensor in column] for column in group]
        counts = torch.full((len(group[0]), 2), -77, device=DEVICE)  # poisoned
        columns = copy if len(copy) == 4 else [*copy, []]
        step(*columns, hyper, counts, **options)
        results.append((copy, counts))
    (expected, expected_counts), (actual, counts) = results
    assert torch.equal(counts, expected_counts)
    for a_column, e_column in zip(actual, expected, strict=True):
        for a, e in zip(a_column, e_column, strict=True):
            assert same_bits(a, e)
    return actual, counts


LENGTHS = (1, 31, 32, 33, 63, 64, 65, 511, 512, 513, 2055)


@pytest.mark.parametrize("weight", [torch.int32, torch.float32, torch.bfloat16])
def test_one_row_of_every_length(weight: torch.dtype) -> None:
    group = make_group([(weight, (n,)) for n in LENGTHS], torch.float32, torch.float32)
    _, counts = step_both(group)
    assert counts[-1, 1] > 100


@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("moment", [torch.float32, torch.bfloat16])
def test_dtypes_rows_and_mixed_groups(grad: torch.dtype, moment: torch.dtype) -> None:
    kinds = [
        (torch.int32, (5, 33)),
        (torch.float32, (7, 11)),
        (torch.int32, (70, 64)),
        (torch.float16, (3, 3, 40)),
        (torch.int32, (2, 0)),
        (torch.int32, (4, 3, 3, 3)),
    ]
    seed = torch.tensor([2**40 + 12345, 17], device=DEVICE)
    group = make_group(kinds, grad, moment)
    changed, counts = step_both(group, seed=seed)
    assert counts[4].tolist() == [0, 0] and counts[2, 1] > 0
    assert not same_bits(changed[2][0], group[2][0])


def test_bop_without_second_moment() -> None:
    step_both(
        make_group(
            [(torch.int32, (9, 96)), (torch.float32, (65,))], torch.float32, torch.float32, with_v=False
        )
    )


@pytest.mark.parametrize("packed", [True, False])
def test_a_row_of_more_than_2_31_weights(packed: bool) -> None:
    """Its end, by a table whose addresses lie far before the few weights that exist."""
    length, n = 2**33 + 8, 72  # the last two words and the quarter of a word
    first = length - n
    words_per_row = -(-length // 32)
    kind = torch.int32 if packed else torch.float32
    columns = make_group([(kind, (n,))], torch.float32, torch.float32)
    expected = [[column[0].clone()] for column in columns]
    hyper, counts = torch.tensor(HYPER, device=DEVICE), torch.zeros(1, 2, dtype=torch.int64, device=DEVICE)
    reference.bop_step_(*expected, hyper, counts)
    before = [first // 32 if packed else first, first, first, first]
    addresses = [t[0].data_ptr() - 4 * skipped for t, skipped in zip(columns, before, strict=True)]
    table = torch.tensor([[*addresses, length, words_per_row, 0, 0]], device=DEVICE)
    chunks = torch.tensor([[0, first // 32, words_per_row, 0]], dtype=torch.int32, device=DEVICE)
    wanted = counts.clone()
    counts.zero_()
    bop_step.bop_step_kernel[(1,)](
        chunks, table, hyper, counts, None, None, None,
        WEIGHT=bop_step._TRITON_DTYPE[kind], GRAD=bop_step._TRITON_DTYPE[torch.float32],
        MOMENT=bop_step._TRITON_DTYPE[torch.float32], HAS_V=True, MAXIMIZE=False, BLOCK_WORDS=16,
    )  # fmt: skip
    assert torch.equal(counts, wanted) and wanted[0, 1] > 0
    assert all(same_bits(a[0], e[0]) for a, e in zip(columns, expected, strict=True))


@pytest.mark.parametrize("maximize", [False, True])
def test_unscaling_and_maximize(maximize: bool) -> None:
    group = make_group([(torch.int32, (3, 64)), (torch.int32, (3, 33))], torch.float32, torch.float32)
    step_both(group, inv_scale=torch.tensor(0.37, device=DEVICE), maximize=maximize)


@pytest.mark.parametrize("found", [1.0, float("inf"), float("nan")])
def test_found_inf_changes_nothing(found: float) -> None:
    group = make_group([(torch.int32, (3, 64)), (torch.float32, (100,))], torch.float32, torch.float32)
    stepped, counts = step_both(group, found_inf=torch.tensor(found, device=DEVICE))
    assert counts.tolist() == [[0, 0], [0, 0]]
    assert all(
        same_bits(a, b) for x, y in zip(stepped, group, strict=True) for a, b in zip(x, y, strict=True)
    )
    _, counts = step_both(group, found_inf=torch.tensor(0.0, device=DEVICE))
    assert counts[:, 0].min() > 0


def test_addresses_off_16_bytes_and_neighbours_untouched() -> None:
    group = make_group([(torch.int32, (4, 64)), (torch.float32, (131,))], torch.float32, torch.float32)
    stores = [
        [torch.full((t.numel() + 2,), 42, dtype=t.dtype, device=DEVICE) for t in column] for column in group
    ]
    moved = [
        [store[1:-1].copy_(t.flatten()).view_as(t) for store, t in zip(stores_, column, strict=True)]
        for stores_, column in zip(stores, group, strict=True)
    ]
    expected, _ = step_both(group)
    bop_step.bop_step_(
        *moved, torch.tensor(HYPER, device=DEVICE), torch.empty(2, 2, dtype=torch.int64, device=DEVICE)
    )
    for column, e_column, s_column in zip(moved, expected, stores, strict=True):
        for tensor, e, store in zip(column, e_column, s_column, strict=True):
            assert same_bits(tensor, e)
            assert store[0] == 42 and store[-1] == 42


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy under the interpreter
def test_denormals_infinities_and_zero_signs() -> None:
    special = [
        0.0,
        -0.0,
        1e-40,
        -1e-40,
        3e-39,
        float("inf"),
        -float("inf"),
        float("nan"),
        3e38,
        -3e38,
        1e-20,
        2e-23,
    ]
    values = torch.tensor(special, device=DEVICE)
    grad, m, v = (t.flatten() for t in torch.meshgrid(values, values, values.abs(), indexing="ij"))
    words = reference.pack_bits(torch.arange(grad.numel(), device=DEVICE) % 3 - 1.0)
    step_both([[words], [grad], [m.clone()], [v.clone()]])


def test_rounding_is_unbiased_and_uses_every_input() -> None:
    size = 4096
    seeds = [(1, 1), (1, 2), (2, 1), (1 + 2**32, 1)]
    results = []
    for seed in seeds:
        weight = torch.zeros(size // 32, dtype=torch.int32, device=DEVICE)
        m = torch.zeros(size, dtype=torch.bfloat16, device=DEVICE)
        grad = torch.full((size,), 1.0 + 2.0**-10, device=DEVICE)  # gamma = 1: m becomes the gradient
        bop_step.bop_step_(
            [weight], [grad], [m], [], torch.tensor([1.0, 0.0, 0.0, 9.0], device=DEVICE),
            torch.empty(1, 2, dtype=torch.int64, device=DEVICE), seed=torch.tensor(seed, device=DEVICE),
        )  # fmt: skip
        results.append(m)
        assert set(m.tolist()) == {1.0, 1.0 + 2.0**-7}
        # 1/8 of the way between two bf16 values: binomial, five standard deviations are 0.026.
        assert abs((m > 1).float().mean().item() - 0.125) < 0.026
    assert len({tuple(m.tolist()) for m in results}) == len(seeds)


def test_tables_are_kept_while_addresses_stay_and_the_cache_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(step_tables, "_MAX_PLANS", 5)
    step_tables._plans.clear()
    step_tables._chunk_tables.clear()
    group = make_group([(torch.int32, (8, 64))], torch.float32, torch.float32)
    counts = torch.empty(1, 2, dtype=torch.int64, device=DEVICE)
    hyper = torch.tensor(HYPER, device=DEVICE)
    bop_step.bop_step_(*group, hyper, counts)
    (plan,) = step_tables._plans.values()
    bop_step.bop_step_(*group, hyper, counts)
    assert list(step_tables._plans.values()) == [plan]
    keep = []
    for i in range(step_tables._MAX_PLANS + 3):  # new gradient addresses: a new table, the same chunks
        keep.append(group[1][0].clone())
        bop_step.bop_step_(group[0], [keep[-1]], *group[2:], hyper, counts)
        assert len(step_tables._chunk_tables) == 1, i
    assert len(step_tables._plans) == step_tables._MAX_PLANS
    assert plan not in step_tables._plans.values()


def test_same_addresses_with_another_shape_make_another_plan() -> None:
    group = make_group([(torch.int32, (4, 48))], torch.float32, torch.float32)
    step_both(group)
    words = group[0][0].flatten()[:6].clone()
    flat = [[words], *([column[0].flatten()] for column in group[1:])]
    step_both(flat)
    columns = [[column[0].clone()] for column in group]
    hyper, counts = torch.tensor(HYPER, device=DEVICE), torch.empty(1, 2, dtype=torch.int64, device=DEVICE)
    bop_step.bop_step_(*columns, hyper, counts)
    reshaped = [[columns[0][0].flatten()[:6]], *([column[0].view(192)] for column in columns[1:])]
    expected = [[column[0].clone()] for column in reshaped]
    reference.bop_step_(*expected, hyper, counts)
    bop_step.bop_step_(*reshaped, hyper, counts)
    assert all(same_bits(a[0], e[0]) for a, e in zip(reshaped, expected, strict=True))


def test_wrong_arguments_raise_and_change_nothing() -> None:
    hyper, counts = torch.tensor(HYPER, device=DEVICE), torch.zeros(1, 2, dtype=torch.int64, device=DEVICE)
    low = make_group([(torch.int32, (2, 64))], torch.float32, torch.bfloat16)
    before = low[0][0].clone()
    with pytest.raises(ValueError, match="need `seed`"):
        bop_step.bop_step_(*low, hyper, counts)
    group = make_group([(torch.int32, (2, 64))], torch.float64, torch.float32)
    with pytest.raises(ValueError, match="float64"):
        bop_step.bop_step_(*group, hyper, counts)
    short = make_group([(torch.int32, (2, 64))], torch.float32, torch.float32)
    short[0][0] = short[0][0][:1]
    with pytest.raises(ValueError, match="2 words do not hold 128 weights"):
        bop_step.bop_step_(*short, hyper, counts)
    assert torch.equal(low[0][0], before)


def test_half_a_million_words_use_larger_chunks() -> None:
    assert tuning.step_chunk_words(2**19) > tuning.step_chunk_words(2**19 - 1)
    chunks = step_tables._chunk_rows(3, 131, 130, 64)
    assert chunks.tolist() == [[3, 0, 64, 1], [3, 64, 128, 1], [3, 128, 130, 1], [3, 130, 131, 0]]


@pytest.mark.cuda
@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")
def test_a_captured_step_replays_like_eager_steps() -> None:
    kinds = [(torch.int32, (64, 64)), (torch.float32, (100,))]
    hyper, seed = torch.tensor(HYPER, device=DEVICE), torch.tensor([3, 1], device=DEVICE)
    counts = torch.empty(2, 2, dtype=torch.int64, device=DEVICE)
    eager = make_group(kinds, torch.float32, torch.bfloat16)
    captured = [[tensor.clone() for tensor in column] for column in eager]
    start = [[tensor.clone() for tensor in column] for column in eager]
    bop_step.bop_step_(*captured, hyper, counts, seed=seed)  # warm up: compiles, takes pinned memory
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grads = [grad + 0 for grad in captured[1]]  # new addresses inside the graph
        bop_step.bop_step_(captured[0], grads, *captured[2:], hyper, counts, seed=seed)
    for column, first in zip(captured, start, strict=True):
        for tensor, value in zip(column, first, strict=True):
            tensor.copy_(value)
    for _ in range(3):
        seed[1] += 1
        reference.bop_step_(*eager, hyper, torch.empty_like(counts), seed=seed)
        graph.replay()
        for a_column, e_column in zip(captured, eager, strict=True):
            assert all(same_bits(a, e) for a, e in zip(a_column, e_column, strict=True))


@pytest.mark.cuda
@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")
def test_graphs_of_one_pool_replay_in_any_order() -> None:
    """The pool hands the second capture the first one's gradient addresses again."""
    kinds = [(torch.int32, (64, 64)), (torch.float32, (100,))]
    hyper, counts = torch.tensor(HYPER, device=DEVICE), torch.empty(2, 2, dtype=torch.int64, device=DEVICE)
    eager = make_group(kinds, torch.float32, torch.float32)
    captured = [[tensor.clone() for tensor in column] for column in eager]
    start = [[tensor.clone() for tensor in column] for column in eager]
    bop_step.bop_step_(*captured, hyper, counts)  # warm up
    graphs, pool = [], None
    for _ in range(3):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            grads = [grad + 0 for grad in captured[1]]
            bop_step.bop_step_(captured[0], grads, *captured[2:], hyper, counts)
            del grads
        pool = graph.pool()
        graphs.append(graph)
    for column, first in zip(captured, start, strict=True):
        for tensor, value in zip(column, first, strict=True):
            tensor.copy_(value)
    for graph in reversed(graphs):
        reference.bop_step_(*eager, hyper, torch.empty_like(counts))
        graph.replay()
        for a_column, e_column in zip(captured, eager, strict=True):
            assert all(same_bits(a, e) for a, e in zip(a_column, e_column, strict=True))
