"""Timer statistics on a clock of our own, goals as formulas, tables between markers, the committed tables."""

from __future__ import annotations

import json

import pytest

from benchmarks import report, results, roofline
from benchmarks.goals import geometric_mean
from benchmarks.registry import BASELINE, BOUND, OURS, VARIANT, all_goals
from benchmarks.suites import conv, step
from benchmarks.tables import byte_count, duration, significant
from benchmarks.timing import Plan, Quantiles, Series, cpu_sampler, measure, quantile, takes_part
from bop2nd_fast.stamp import stamp

# ----------------------------------------------------------------------------------------- timer


class Machine:
    """A clock that work moves; the whole machine becomes slower by ``drift`` per second of work."""

    def __init__(self, drift: float = 0.0) -> None:
        self.now, self.drift, self.calls = 0.0, drift, []

    def work(self, name: str, seconds: float):
        def run() -> None:
            self.calls.append(name)
            self.now += seconds * (1 + self.drift * self.now)

        return cpu_sampler(run, clock=lambda: self.now)


def test_quantiles_interpolate():
    assert quantile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert quantile([5.0], 0.9) == 5.0
    got = Quantiles.of(list(range(11)))
    assert (got.median, got.p10, got.p90, got.n) == (5, 1, 9, 11)
    with pytest.raises(ValueError, match="no samples"):
        Quantiles.of([])


def test_contenders_take_turns_and_repeat_short_work():
    machine = Machine()
    plan = Plan(rounds=3, min_sample_s=0.01, max_contender_s=10, min_samples=2)
    work = {
        "fast": machine.work("fast", 0.001),
        "mid": machine.work("mid", 0.1),
        "slow": machine.work("slow", 0.2),
    }
    series = measure(work, plan)
    assert [series[n].repeats for n in work] == [10, 1, 1]
    assert series["fast"].seconds().median == pytest.approx(0.001)
    assert series["slow"].seconds().n == 3
    calibration, turns = machine.calls[:5], machine.calls[5:]
    assert calibration == ["fast"] * 3 + ["mid", "slow"]
    fast = ["fast"] * 11  # one call to settle, ten timed
    assert turns == [*fast, "mid", "slow", "mid", "slow", *fast, "slow", *fast, "mid"]


def test_drift_cancels_in_paired_ratios():
    machine = Machine(drift=2.0)
    plan = Plan(rounds=15, min_sample_s=0.001, max_contender_s=100, min_samples=3)
    series = measure({"ours": machine.work("ours", 0.002), "theirs": machine.work("theirs", 0.006)}, plan)
    first, last = series["ours"].by_round[0], series["ours"].by_round[14]
    assert last > 1.2 * first  # the machine did drift
    assert series["theirs"].ratio_to(series["ours"]).median == pytest.approx(3.0, rel=0.02)


def test_slow_contenders_sit_out_rounds_but_meet_the_others():
    machine = Machine()
    plan = Plan(rounds=20, min_sample_s=0.001, max_contender_s=5, min_samples=3)
    series = measure({"ours": machine.work("ours", 0.1), "slow": machine.work("slow", 4.0)}, plan)
    assert len(series["ours"].by_round) == 20 and len(series["slow"].by_round) == 3
    assert series["slow"].ratio_to(series["ours"]).n == 3
    for share in range(1, 21):
        turns = [r for r in range(20) if takes_part(r, share, 20)]
        assert len(turns) == share and turns[-1] == 19
    with pytest.raises(ValueError, match="no samples"):
        Series(1, {0: 1.0}).ratio_to(Series(1, {1: 1.0}))


def test_numbers_read_well():
    assert [duration(s) for s in (1.5, 0.0268, 1.234e-5, 5e-9)] == ["1.5 s", "26.8 ms", "12.3 µs", "5 ns"]
    assert [significant(x) for x in (0, 12345.6, 0.0276, 99.96)] == ["0", "12300", "0.0276", "100"]
    assert [byte_count(n) for n in (12, 2048, 3 << 20)] == ["12 B", "2 KiB", "3 MiB"]


# ------------------------------------------------------------------------------ goals and tables


@pytest.fixture(scope="module")
def mark():
    return stamp()


def entry(name, role, ratio=None, rate=None, **more):
    if ratio is None:
        return {
            "name": name,
            "role": role,
            "threads": 1,
            "gate": "unavailable",
            "gate_detail": "not here",
        } | more
    numbers = {"median": 0.01 * ratio, "p10": 0.009 * ratio, "p90": 0.011 * ratio, "samples": 5}
    return {
        "name": name,
        "role": role,
        "threads": 1,
        "gate": "passed",
        "gate_detail": "equal",
        "bytes": 100,
        "operations": 100,
        "seconds": numbers,
        "ratio": {"median": ratio, "p10": ratio, "p90": ratio, "samples": 5},
        "rate": rate or 10 / ratio,
    } | more


def record(mark, suite, case, contenders, **more):
    return {
        "schema": results.SCHEMA,
        "suite": suite,
        "op": suite,
        "case": case,
        "shapes": {},
        "networks": [],
        "tags": [],
        "unit": "GB/s",
        "threads": 1,
        "quick": False,
        "contenders": contenders,
        "stamp": mark,
    } | more


@pytest.fixture
def machine(tmp_path, mark):
    """A results directory with one machine whose figures are known."""
    rows = [
        record(
            mark,
            "step",
            "64 M weights in one tensor",
            [
                entry(step.PACKED, OURS, 1.0),
                entry(step.BF16, VARIANT, 0.5),
                entry(step.CAREFUL, BASELINE, 20.0),
                entry(step.ADAM, BASELINE, 1.1),
                entry(step.COMPILED, BASELINE),
                entry(roofline.STREAM, BOUND, 0.97),
                entry(roofline.COPY, BOUND, 0.9),
            ],
        ),
        *(
            record(
                mark,
                "conv",
                f"3x3 {i}",
                [
                    entry(conv.PACKED, OURS, 1.0),
                    entry(conv.BOTH_THREADS, VARIANT, 0.5),
                    entry(conv.FP32[0], BASELINE, fp32),
                    entry(conv.FP32[1], BASELINE, 50.0),
                    entry(conv.LARQ, BASELINE),
                    entry(roofline.REGISTER, BOUND, 0.4, rate=20.0),
                ],
                tags=[conv.GOAL],
                unit="GMAC/s",
            )
            for i, fp32 in enumerate((10.0, 40.0))
        ),
    ]
    folder = tmp_path / "results" / "test-machine"
    for suite in ("step", "conv"):
        order = [r["case"] for r in rows if r["suite"] == suite]
        for r in rows:
            if r["suite"] == suite:
                results.put(folder, r, order)
    return folder


def verdicts(folder):
    records = results.read_all(folder)
    return {g.name: (g.value(records), g.verdict(records)) for g in all_goals()}


def test_goals_are_computed_from_the_results(machine):
    got = verdicts(machine)
    start = "step, 64 M weights in one tensor: "
    assert got[start + "against careful eager"] == (pytest.approx(20), "met")
    assert got[start + "against torch.optim.Adam(fused=True)"] == (pytest.approx(1.1), "missed")
    assert got[start + "against careful eager under torch.compile"] == (None, "open")
    assert got[start + "share of the read/write loop's bandwidth"] == (pytest.approx(97), "met")
    assert got[start + "bf16 moments and gradients against fp32"] == (pytest.approx(2), "met")
    stages = "3x3 convolution, 4 stages, batch 1"
    assert got[stages + ", 1 thread: against fp32"] == (
        pytest.approx(20),
        "met",
    )  # best of two, mean of 10 and 40
    assert got[stages + ": 2 threads against 1"] == (pytest.approx(2), "met")
    assert got[stages + ", 1 thread: against Larq Compute Engine 0.16"] == (None, "open")
    assert got["linear 1024x1024, batch 1: against fp32"] == (None, "open")
    assert geometric_mean([1.0, None]) is None and geometric_mean([]) is None
    assert len({g.name for g in all_goals()}) == len(all_goals())


def documents(tmp_path, text):
    path = tmp_path / "README.md"
    path.write_text(text)
    return path


MARKED = """# Title

<!-- benchmark:summary -->
old
<!-- /benchmark -->

Text stays.

<!-- benchmark:machines -->
<!-- /benchmark -->
"""


def test_tables_are_put_between_markers_and_checked(tmp_path, machine):
    path, own = documents(tmp_path, MARKED), machine / "README.md"
    stale = "does not match the results: run python -m benchmarks.report"
    assert report.differences([path], machine.parent) == [
        f"{tmp_path.name}/README.md {stale}",
        f"test-machine/README.md {stale}",
    ]
    assert report.write_documents([path], machine.parent) == [path, own]
    text = path.read_text()
    assert text.startswith("# Title\n\n<!-- benchmark:summary -->\n| work |") and "Text stays." in text
    assert "| 10 ms | 1.1x Adam, fused, 20x careful eager |" in text and "old" not in text
    assert "[test-machine](results/test-machine/README.md)" in text
    assert report.differences([path], machine.parent) == []
    assert report.write_documents([path], machine.parent) == []

    path.write_text(text.replace("20x careful", "21x careful"))  # a typed number is noticed
    assert report.differences([path], machine.parent) == [f"{tmp_path.name}/README.md {stale}"]


def test_the_text_of_a_machine_holds_goals_and_every_number(tmp_path, machine):
    path = documents(tmp_path, MARKED)
    report.write_documents([path], machine.parent)
    text = (machine / "README.md").read_text()
    assert text.startswith("# Results: test-machine\n") and "| 20x | met |" in text
    assert "| 1.1x | **missed** |" in text and "unavailable: not here" in text
    for r in results.read_all(machine):
        assert r["case"] in text and all(c["name"] in text for c in r["contenders"])
    assert "No results of suite `pack` yet." in text and "No pictures yet." in text
    (machine / "README.md").write_text(text.replace("| 20x | met |", "| 21x | met |"))
    assert len(report.differences([path], machine.parent)) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no marker at all\n", "has no '<!-- benchmark:NAME -->' marker"),
        ("<!-- benchmark:summary -->\n<!-- /benchmark -->\n<!-- benchmark:machine -->\n", "without its"),
        ("<!-- benchmark:gaols -->\n<!-- /benchmark -->\n", "unknown marker benchmark:gaols"),
    ],
)
def test_documents_without_usable_markers_are_reported(tmp_path, machine, text, message):
    path = documents(tmp_path, text)
    (line,) = report.differences([path], machine.parent)
    assert message in line
    with pytest.raises(report.ReportError):
        report.write_documents([path], machine.parent)
    assert path.read_text() == text and not (machine / "README.md").exists()
    assert "missing.md does not exist" in report.differences([tmp_path / "missing.md"], machine.parent)


def test_every_block_can_be_made(tmp_path, machine, mark):
    path = documents(tmp_path, "")
    rows = [entry("triton", OURS, 1.0, rate=9.321), entry("copy", BOUND, 0.9, rate=10.0)]
    results.put(machine, record(mark, "gpu", "step, 64 M weights", rows), ["step, 64 M weights"])
    untimed = record(mark, "gpu", "step, ResNet-18", rows, untimed=True)  # is no result
    results.put(machine, untimed, ["step, 64 M weights", "step, ResNet-18"])
    found = {name: report.block(name, machine.parent, path) for name in report.BLOCKS}
    assert "20x careful eager" in found["summary"] and "10x fp32" in found["summary"]
    assert "| step, 64 M weights: of copy bandwidth | ≥ 90 % | 93.2 % | met |" in found["gpu-goals"]
    assert "| step, 64 M weights: over torch.compile | ≥ 1.3x | - | open |" in found["gpu-goals"]
    for name in ("CUDA C++, of the tensor cores' peak", "CUDA C++, time over Triton's", "compute-sanitizer"):
        assert any(name in line and line.endswith("| open |") for line in found["gpu-goals"].splitlines())
    assert "| step, ResNet-18: of copy bandwidth | ≥ 70 % | - | open |" in found["gpu-goals"]
    assert "`binary_linear`" in found["gpu-dispatch"]
    assert "Commit" in found["machine"]


def test_the_machine_measured_last_is_the_default(machine, mark):
    assert report.default_machine(machine.parent) == "test-machine"
    other = machine.parent / "a-machine"
    other.mkdir()
    assert report.default_machine(machine.parent) == "test-machine"  # an empty directory does not count
    for date, newest in (("2000-01-01", "test-machine"), ("2999-01-01", "a-machine")):
        line = json.dumps(record({**mark, "date": date}, "step", "64 M weights", []))
        (other / "step.jsonl").write_text(line + "\n")
        assert report.default_machine(machine.parent) == newest
    with pytest.raises(report.ReportError, match=r"run benchmarks\.run first"):
        report.default_machine(other)


def test_pictures_are_drawn(machine):
    pytest.importorskip("matplotlib", reason="pictures need the extra [cli]")
    from benchmarks.pictures import draw_all

    paths = draw_all(results.read_all(machine), machine)
    assert {p.name for p in paths} == {"step.png", "conv.png", "roofline.png"}
    first = {p.name: p.read_bytes() for p in paths}
    assert all(data.startswith(b"\x89PNG") and len(data) > 10_000 for data in first.values())
    again = {p.name: p.read_bytes() for p in draw_all(results.read_all(machine), machine)}
    assert first == again  # the same results give the same files


def test_the_committed_tables_match_the_committed_results():
    if not any(results.RESULTS.glob("*/*.jsonl")):
        pytest.skip(
            "no results are committed yet: run `python -m benchmarks.run`, then `python -m benchmarks.report`"
        )
    assert report.differences(report.DOCUMENTS, results.RESULTS) == []
