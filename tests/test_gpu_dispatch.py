"""Which GPU kernel would run on which chip and why, asked without a GPU."""

from __future__ import annotations

import pytest
import torch

from bop2nd_fast import backends, cuda_library, gpu_dispatch
from bop2nd_fast.kernels import tuning

if backends.why_not("cpu"):
    pytest.skip("the plans are part of the C++ extension", allow_module_level=True)
SQUARE = ((8192, 8192), (8192, 8192))
SKINNY, SMALL, TALL, LARGE = (8, 32), (64, 64), (256, 64), (128, 128)  # tiles of csrc/cuda


def plans(
    op: str, *shapes: tuple[int, ...], chip: str, **geometry: int
) -> tuple[gpu_dispatch.CudaPlan, tuning.MatmulTile]:
    """What CUDA C++ and what Triton would run; ``explain`` tells of both, in their own words."""
    work, found = gpu_dispatch.product(op, shapes, geometry), gpu_dispatch.chip_named(chip)
    assert work is not None and found is not None and backends._extension.symbols is not None
    cuda = gpu_dispatch.cuda_plan(work, found, backends._extension.symbols)
    triton = gpu_dispatch.triton_tile(op, work, found)
    told = backends.explain(op, *shapes, device="cuda", chip=chip, **geometry)
    assert cuda.text in told and gpu_dispatch.triton_kernel(op, work, found) in told and str(found) in told
    return cuda, triton


@pytest.mark.parametrize(
    ("chip", "math"),
    [
        ("A100", "XOR.POPC"),
        ("RTX 4090", "XOR.POPC"),
        ("H200", "AND.POPC"),
        ("B200", "int8"),
        ("sm_120", "int8"),
    ],
)
def test_the_instruction_follows_the_chip(chip: str, math: str) -> None:
    cuda, triton = plans("binary_linear", *SQUARE, chip=chip)
    assert (cuda.math, cuda.tile, cuda.n_slices) == (math, LARGE, 1)
    assert (triton.loop, triton.block_m, triton.block_n) == ("decode", 128, 128)


def test_the_kernel_follows_the_shape() -> None:
    cuda, triton = plans("binary_linear_packed", (1, 4096), (4096, 4096), chip="H100")
    assert cuda.tile == SKINNY and triton.loop == "rows"
    cuda, triton = plans("binary_linear", (9, 8192), (64, 8192), chip="H100")
    assert (cuda.tile, cuda.n_slices) == (SMALL, 4) and triton.loop == "popcount"
    cuda, triton = plans("binary_conv2d", (256, 64, 56, 56), (64, 64, 3, 3), chip="H100", padding=1)
    assert cuda.tile == TALL and (triton.block_m, triton.block_n, triton.block_words) == (128, 64, 2)
    cuda, _ = plans("binary_conv2d", (256, 256, 14, 14), (256, 256, 3, 3), chip="H100", padding=1)
    assert cuda.tile == LARGE


def test_products_of_real_and_8_bit_inputs_have_triton_kernels() -> None:
    found = gpu_dispatch.chip_named("H100")
    for rows, loop in ((tuning.SIGNED_ROWS_LIMIT, "rows"), (tuning.SIGNED_ROWS_LIMIT + 1, "decode")):
        shapes = (rows, 4096), (4096, 4096)
        work = gpu_dispatch.product("signed_linear", shapes, {})
        assert gpu_dispatch.triton_tile("signed_linear", work, found).loop == loop
        told = backends.explain("signed_linear", *shapes, device="cuda", chip="H100")
        chosen, triton, cuda = told.split("\n")
        assert ": triton, " in chosen and gpu_dispatch.triton_kernel("signed_linear", work, found) in triton
        assert "Triton" in cuda
    shapes, kinds = ((64, 3, 32, 32), (128, 3, 3, 3)), (torch.float32, torch.float16, torch.uint8)
    lines = [
        backends.explain("signed_conv2d", *shapes, device="cuda", chip="A100", padding=1, dtype=kind)
        for kind in kinds
    ]
    assert all(kind in text for kind, text in zip(("bf16", "fp16", "int8"), lines, strict=True))
    assert len(backends.explain("quantize_rows", (4, 5), device="cuda", chip="A100").split("\n")) == 3


def test_geometry_counts() -> None:
    """Strides, padding and groups change the number of tiles, so the split of k and the tile."""
    image, weight = (64, 256, 14, 14), (256, 256, 3, 3)
    dense, _ = plans("binary_conv2d", image, weight, chip="A100", padding=1)
    strided, _ = plans("binary_conv2d", image, weight, chip="A100", padding=1, stride=2)
    assert dense.tile == LARGE and strided.tile == SMALL
    grouped = gpu_dispatch.product(
        "binary_conv2d", (image, (256, 64, 3, 3)), {"padding": (1, 0), "stride": 2}
    )
    shape = grouped.shape()
    assert (shape.batch, shape.height, shape.width) == (64, 14, 14)
    assert (shape.channels, shape.out_channels, shape.groups) == (256, 256, 4)
    assert [*shape.kernel, *shape.stride, *shape.padding, *shape.dilation] == [3, 3, 2, 2, 1, 0, 1, 1]
    with pytest.raises(ValueError, match=r"must be 0 to 2\*\*31 - 1"):
        plans("binary_linear", (2**40, 64), (64, 64), chip="A100")
    assert (grouped.rows, grouped.outputs, grouped.group_words) == (64 * 7 * 6, 64, 2)


def test_limits_are_the_ones_that_decide() -> None:
    by_what = {limit.what: limit for limit in backends.gpu_table() if limit.backend != "both"}
    rows = by_what["row loop up to this many rows"].value
    assert (
        tuning.linear_tile("sm90", rows, 64).loop == "rows" != tuning.linear_tile("sm90", rows + 1, 64).loop
    )
    below = by_what["popcount loop below this many rows"].value
    assert tuning.linear_tile("sm90", below - 1, 64).loop == "popcount"
    assert tuning.linear_tile("sm90", below, 64).loop == "decode"
    outputs = by_what["popcount loop below this many outputs (of a group)"].value
    for tile in (lambda n: tuning.linear_tile("sm90", 64, n), lambda n: tuning.conv_tile("sm90", n, 4)):
        assert (tile(outputs - 1).loop, tile(outputs).loop) == ("popcount", "decode")
    skinny = by_what["popcount kernel up to this many rows"].value
    for rows, popcounts in ((skinny, True), (skinny + 1, False)):
        cuda, _ = plans("binary_linear", (rows, 4096), (4096, 4096), chip="H100")
        assert (cuda.tile == SKINNY) == popcounts
    narrow = by_what["64-column tiles (256x64, 64x64) up to this many outputs of a group"].value
    for n, small in ((narrow, True), (narrow + 1, False)):
        cuda, _ = plans("binary_linear", (99_999, 4096), (n, 4096), chip="H100")
        assert cuda.tile == (TALL if small else LARGE)
    for limit in backends.gpu_table():
        assert limit.reason and set(limit.ops) <= set(backends._references), limit


def test_every_kernel_on_a_gpu_has_one_preferred_backend() -> None:
    entries = [op for limit in gpu_dispatch.PREFERRED for op in limit.ops]
    assert sorted(entries) == sorted(cuda_library.OPS)
    assert all(limit.value in ("triton", "cuda") for limit in gpu_dispatch.PREFERRED)


def test_the_preference_decides_what_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends._cuda, "missing", None)
    chosen, why = backends._chosen("binary_linear", "cuda")
    entry = gpu_dispatch.preferred("binary_linear")
    assert entry is not None and entry.measured is None
    assert chosen == entry.value == "triton" and entry.reason in why and gpu_dispatch.timed(None) in why
    cuda_first = gpu_dispatch.Limit(
        "both", ("binary_linear",), "every chip", "backend", "cuda", "3x", "a run"
    )
    monkeypatch.setattr(gpu_dispatch, "PREFERRED", (cuda_first,))
    chosen, why = backends._chosen("binary_linear", "cuda")
    assert chosen == "cuda" and "3x" in why and "a run" in why
    assert not backends._triton_goes_first("binary_linear") and backends._triton_goes_first("bop_step_")
    assert f"{chosen}, {why}" in backends.explain("binary_linear", *SQUARE, device="cuda", chip="H100")


def test_what_was_not_measured_is_said() -> None:
    _, tile = plans("binary_linear", *SQUARE, chip="H100")
    limits = [limit for limit in backends.gpu_table() if limit.backend == "cuda"]
    assert tile.measured is None and all(limit.measured is None for limit in limits)
    told = backends.explain("binary_linear", *SQUARE, device="cuda", chip="H100")
    triton, cuda = told.split("\n")[1:]
    assert (
        gpu_dispatch.timed(None) in triton and str(len(limits)) in cuda and gpu_dispatch.timed(None) in cuda
    )
    assert gpu_dispatch.timed("a run") not in told


@pytest.mark.parametrize(("op", "runs"), [("binary_linear", "triton"), ("binary_conv2d", "torch")])
def test_a_backward_pass_is_served_as_its_table_says(op: str, runs: str) -> None:
    choice = tuning.BACKWARD[f"{op}_backward"]
    assert choice.runs == runs
    assert backends._chosen(f"{op}_backward", "cuda")[0] == runs
    told = backends.explain(f"{op}_backward", device="cuda", chip="H100")
    assert f": {runs}, {choice.why}" in told and len(told.split("\n")) == 3  # and a line for each backend


def test_unknown_chips_and_other_shapes_are_refused() -> None:
    without = backends.explain("binary_linear", device="cuda", chip="H100").split("\n")
    assert gpu_dispatch.product("binary_linear", (), {}) is None and len(without) == 3  # told all the same
    with pytest.raises(ValueError, match=r"H900.*A100.*sm_90"):
        backends.explain("binary_linear", *SQUARE, device="cuda", chip="H900")
    with pytest.raises(ValueError, match=r"NCHW.*OIHW"):
        backends.explain("binary_conv2d", *SQUARE, device="cuda", chip="H100")
