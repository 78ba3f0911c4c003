"""Which GPU kernel would run on which chip and why, asked without a GPU."""

from __future__ import annotations

import pytest

from bop2nd_fast import backends, cuda_library, gpu_dispatch
from bop2nd_fast.kernels import tuning

if backends.why_not("cpu"):
    pytest.skip("the plans are part of the C++ extension", allow_module_level=True)
SQUARE = ((8192, 8192), (8192, 8192))


def explain(op: str, *shapes: tuple[int, ...], chip: str | None = None, **geometry: int) -> dict[str, str]:
    """The lines of the explanation by backend; the first one as "chosen"."""
    first, *rest = backends.explain(op, *shapes, device="cuda", chip=chip, **geometry).split("\n  ")
    return {"chosen": first, **dict(line.split(": ", 1) for line in rest)}


@pytest.mark.parametrize(
    ("chip", "instruction"),
    [
        ("A100", "XOR.POPC"),
        ("RTX 4090", "XOR.POPC"),
        ("H200", "AND.POPC"),
        ("B200", "int8"),
        ("sm_120", "int8"),
    ],
)
def test_the_instruction_follows_the_chip(chip: str, instruction: str) -> None:
    told = explain("binary_linear", *SQUARE, chip=chip)
    assert instruction in told["cuda"] and "128x128" in told["cuda"]
    assert "int8 in registers" in told["triton"] and "tile 128 x 128" in told["triton"]
    found = gpu_dispatch.chip_named(chip)
    assert f"({found.name}: sm_{found.arch}, {found.n_multiprocessors} multiprocessors)" in told["chosen"]


def test_the_kernel_follows_the_shape() -> None:
    skinny = explain("binary_linear_packed", (1, 4096), (4096, 4096), chip="H100")
    assert "popcount kernel" in skinny["cuda"] and "row loop" in skinny["triton"]
    few = explain("binary_linear", (9, 8192), (64, 8192), chip="H100")
    assert "k split in 4" in few["cuda"] and "popcount loop" in few["triton"]
    narrow = explain("binary_conv2d", (256, 64, 56, 56), (64, 64, 3, 3), chip="H100", padding=1)
    assert "256x64 tiles" in narrow["cuda"] and "tile 128 x 64, 2 words" in narrow["triton"]
    wide = explain("binary_conv2d", (256, 256, 14, 14), (256, 256, 3, 3), chip="H100", padding=1)
    assert "128x128 tiles" in wide["cuda"]


def test_geometry_counts() -> None:
    """Strides, padding and groups change the number of tiles, so the split of k and the tile."""
    image, weight = (64, 256, 14, 14), (256, 256, 3, 3)
    dense = explain("binary_conv2d", image, weight, chip="A100", padding=1)
    strided = explain("binary_conv2d", image, weight, chip="A100", padding=1, stride=2)
    assert dense["cuda"] != strided["cuda"] and "64x64" in strided["cuda"]
    grouped = gpu_dispatch.product(
        "binary_conv2d", (image, (256, 64, 3, 3)), {"padding": (1, 0), "stride": 2}
    )
    shape = grouped.shape()
    assert (shape.batch, shape.height, shape.width) == (64, 14, 14)
    assert (shape.channels, shape.out_channels, shape.groups) == (256, 256, 4)
    assert [*shape.kernel, *shape.stride, *shape.padding, *shape.dilation] == [3, 3, 2, 2, 1, 0, 1, 1]
    with pytest.raises(ValueError, match=r"must be 0 to 2\*\*31 - 1"):
        explain("binary_linear", (2**40, 64), (64, 64), chip="A100")
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
        told = explain("binary_linear", (rows, 4096), (4096, 4096), chip="H100")
        assert ("popcount kernel" in told["cuda"]) == popcounts
    narrow = by_what["64-column tiles (256x64, 64x64) up to this many outputs of a group"].value
    for n, small in ((narrow, True), (narrow + 1, False)):
        told = explain("binary_linear", (99_999, 4096), (n, 4096), chip="H100")
        assert ("256x64 tiles" in told["cuda"]) == small
    for limit in backends.gpu_table():
        assert limit.reason and set(limit.ops) <= set(backends._references), limit


def test_every_kernel_on_a_gpu_has_one_preferred_backend() -> None:
    entries = [op for limit in gpu_dispatch.PREFERRED for op in limit.ops]
    assert sorted(entries) == sorted(cuda_library.OPS)
    assert all(limit.value in ("triton", "cuda") for limit in gpu_dispatch.PREFERRED)


def test_the_preference_decides_what_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends._cuda, "missing", None)
    told = explain("binary_linear", *SQUARE, chip="H100")["chosen"]
    assert "triton, preferred: " in told and "(not measured)" in told
    cuda_first = gpu_dispatch.Limit(
        "both", ("binary_linear",), "every chip", "backend", "cuda", "3x", "a run"
    )
    monkeypatch.setattr(gpu_dispatch, "PREFERRED", (cuda_first,))
    told = explain("binary_linear", *SQUARE, chip="H100")["chosen"]
    assert "cuda, preferred: 3x (measured: a run)" in told
    assert not backends._triton_goes_first("binary_linear") and backends._triton_goes_first("bop_step_")


def test_what_is_not_known_is_said() -> None:
    told = explain("binary_linear", *SQUARE, chip="H100")
    assert "not measured" in told["cuda"] and "not measured" in told["triton"]
    backward = explain("binary_linear_backward", chip="H100")
    assert "cuBLAS, cuDNN" in backward["cuda"]
    assert "triton, signs are decoded" in backward["chosen"] and "(not measured)" in backward["chosen"]
    assert "of its own" in backward["triton"]
    backward = explain("binary_conv2d_backward", chip="H100")
    assert "torch, cuDNN" in backward["chosen"] and "library is preferred" in backward["triton"]
    assert "the operands' shapes" in explain("binary_linear", chip="H100")["cuda"]
    with pytest.raises(ValueError, match=r"no chip 'H900'.*A100.*sm_90"):
        explain("binary_linear", *SQUARE, chip="H900")
    with pytest.raises(ValueError, match="NCHW and OIHW"):
        explain("binary_conv2d", *SQUARE, chip="H100")
