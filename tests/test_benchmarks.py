"""The benchmark suite: every case passes its gate, a wrong contender gets no number, results keep form."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

import bop2nd_fast as bf
from benchmarks import blocks, larq_adapter, memory, results, roofline, run
from benchmarks.registry import (
    BASELINE,
    BOUND,
    OURS,
    SUITES,
    VARIANT,
    Case,
    Contender,
    GateError,
    Prepared,
    Unavailable,
    cases,
)
from benchmarks.timing import QUICK
from bop2nd_fast.stamp import machine_name, stamp


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def mark():
    return stamp()


@pytest.mark.parametrize("case", cases(SUITES, quick=True), ids=lambda c: f"{c.suite}-{c.name}")
def test_every_contender_passes_its_gate(case):
    with torch.no_grad():
        for contender in case.contenders():
            if contender.slow:
                continue
            entrant = run.admit(contender, 1, quick=True)
            assert entrant.gate != "failed", f"{contender.name}: {entrant.detail}"
            if contender.role in (OURS, VARIANT):
                assert entrant.gate == "passed", f"{contender.name}: {entrant.detail}"
            if entrant.prepared is not None:
                assert (entrant.prepared.run is None) != (entrant.prepared.sample is None)


HEAVY = ("inference", "runtime")  # naming their contenders builds networks


@pytest.mark.parametrize("quick", [False, True])
def test_the_registry_is_consistent(quick):
    for case in cases(SUITES, quick=quick):
        contenders = [Contender("x", OURS, lambda: None)] if case.suite in HEAVY else case.contenders()
        names = [c.name for c in contenders]
        assert len(set(names)) == len(names), case.name
        assert [c.role for c in contenders].count(OURS) == 1, case.name
        if not quick and case.suite in ("step", "conv"):
            break  # building the data of every full case would take gigabytes
    assert {c.suite for c in cases(SUITES, quick=quick)} == set(SUITES)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="there are step, conv"):
        cases(["speed"])
    with pytest.raises(ValueError, match="binary_conv2d"):
        cases(["conv"], op="convolve")
    with pytest.raises(ValueError, match="role"):
        Contender("x", "hero", lambda: None)
    with pytest.raises(ValueError, match="at least 1"):
        run.run(["pack"], quick=True, threads=0)


def _case(*contenders: Contender) -> Case:
    return Case("pack", "pack_bits", "made up", {}, "GB/s", lambda: contenders, threads=1)


def _contender(name: str, role: str, check) -> Contender:
    return Contender(name, role, lambda: Prepared(check, lambda: sum(range(100))), bytes=100)


def test_no_number_without_a_passed_gate(mark):
    def wrong() -> str:
        raise GateError("differs")

    def missing() -> Prepared:
        raise Unavailable("not installed")

    def broken() -> str:
        raise RuntimeError("kernel threw\nlong trace")

    case = _case(
        _contender("ours", OURS, lambda: "equal"),
        _contender("wrong", BASELINE, wrong),
        _contender("broken", BASELINE, broken),
        Contender("missing", BASELINE, missing),
    )
    record = run.measure_case(case, QUICK, None, 1, True, mark)
    results.check(record)
    ours, *others = record["contenders"]
    assert ours["gate"] == "passed" and ours["seconds"]["median"] > 0
    assert ours["rate"] == pytest.approx(100 / ours["seconds"]["median"] / 1e9)
    assert ours["ratio"]["median"] == ours["single"]["ratio"] == 1.0 and ours["single"]["samples"] == 3
    assert [e["gate"] for e in others] == ["failed", "failed", "unavailable"]
    assert [e["gate_detail"] for e in others] == ["differs", "RuntimeError: kernel threw", "not installed"]
    assert not any("seconds" in e or "rate" in e or "ratio" in e for e in others)


def test_a_wrong_operator_fails_its_gate(monkeypatch):
    """The gate of the packing case notices a single wrong bit."""
    case = next(c for c in cases(["pack"], quick=True) if c.op == "pack_bits_ste")
    right = bf.reference.pack_bits_ste

    def one_bit_off(x, dim=-1, groups=1):
        signs, mask = right(x, dim, groups)
        signs.view(-1)[-1] ^= 1
        return signs, mask

    monkeypatch.setattr(bf.reference, "pack_bits_ste", one_bit_off)
    entrant = run.admit(case.contenders()[0], 1, quick=True)
    assert entrant.gate == "failed" and "bits differ" in entrant.detail


def test_a_quick_run_writes_records_that_read_back(tmp_path, capsys):
    assert (
        run.main(
            ["--suite", "pack", "--quick", "--op", "unpack_bits", "--out", str(tmp_path), "--threads", "1"]
        )
        == 0
    )
    text = capsys.readouterr().out
    assert "unpack 2x40x5x5" in text and "numbers mean nothing" in text
    (record,) = results.read_all(tmp_path)
    assert record["quick"] and record["threads"] == 1
    assert {e["threads"] for e in record["contenders"]} == {1}


def test_the_command_line_refuses_unknown_operators(capsys):
    assert run.main(["--suite", "pack", "--quick", "--op", "nothing"]) == 2
    assert "no case of operator 'nothing'" in capsys.readouterr().err


# --------------------------------------------------------------------------------------- results


def _record(mark, case="a", **changes):
    entry = {
        "name": "ours",
        "role": OURS,
        "gate": "passed",
        "gate_detail": "equal",
        "threads": 1,
        "seconds": {},
    }
    record = {
        "schema": results.SCHEMA,
        "suite": "pack",
        "op": "pack_bits",
        "case": case,
        "shapes": {},
        "networks": [],
        "tags": [],
        "unit": "GB/s",
        "threads": 1,
        "quick": True,
        "contenders": [entry],
        "stamp": mark,
    }
    return record | changes


def test_a_record_replaces_that_of_its_case_and_keeps_the_order(tmp_path, mark):
    for case in ("b", "a", "gone"):
        results.put(tmp_path, _record(mark, case), ["a", "b", "gone"])
    results.put(tmp_path, _record(mark, "b", op="pack_bits_ste"), ["a", "b"])
    records = results.read(tmp_path / "pack.jsonl")
    assert [(r["case"], r["op"]) for r in records] == [("a", "pack_bits"), ("b", "pack_bits_ste")]
    assert all(json.loads(line) for line in (tmp_path / "pack.jsonl").read_text().splitlines())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threads": "1"}, "threads must be int"),
        ({"schema": 0}, "schema 0"),
        ({"suite": "speed"}, "unknown suite"),
        ({"stamp": {}}, "the stamp lacks processor"),
        ({"contenders": [{"name": "x", "role": OURS}]}, "no gate"),
        (
            {
                "contenders": [
                    {"name": "x", "role": OURS, "gate": "failed", "gate_detail": "y", "seconds": {}}
                ]
            },
            "if and only if the gate passed",
        ),
    ],
)
def test_records_out_of_form_are_refused(tmp_path, mark, changes, message):
    with pytest.raises(ValueError, match=message):
        results.put(tmp_path, _record(mark, **changes), ["a"])
    assert not list(tmp_path.iterdir())


def test_the_stamp_names_machine_software_and_commit(mark):
    assert mark["torch"] == torch.__version__
    assert mark["active_backend"] == bf.backends.active("cpu")
    assert mark["cores"] >= 1 and isinstance(mark["dirty"], bool)
    name = machine_name(
        {"processor": "Intel(R) Xeon(R) Gold 6130 CPU @ 2.10GHz, 4 logical cores", "cores": 4}
    )
    assert name == "intel-xeon-gold-6130-2.10ghz-4-cores"


# ---------------------------------------------------------------------------------------- memory


def test_the_allocator_peak_counts_live_bytes():
    assert memory.allocator_peak(lambda: [torch.zeros(1 << 18) for _ in range(3)]) == 3 << 20
    one_after_the_other = memory.allocator_peak(lambda: [torch.zeros(1 << 18).sum() for _ in range(3)])
    assert 1 << 20 <= one_after_the_other < (1 << 20) + 4096


def test_the_resident_set_is_measured_without_the_past():
    torch.ones(64 << 18).sum()  # 64 MiB, gone before the measurement
    growth = memory.rss_growth(lambda: torch.ones(32 << 18))
    assert 28 << 20 <= growth <= 48 << 20


def test_a_binary_layer_keeps_two_bits_per_activation():
    x = torch.randn(2, 64, 8, 8, requires_grad=True)
    assert memory.saved_for_backward(bf.nn.BinaryConv2d(64, 32, 3, padding=1), x) == x.numel() * 2 // 8
    dense = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU())
    assert memory.saved_for_backward(dense, torch.randn(8, 64)) == 8 * 64 * 4 + 8 * 32 * 4


# ------------------------------------------------------------------------------- peers and limits


def test_a_missing_peer_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(larq_adapter, "_interpreter", "/no/such/python")
    with pytest.raises(Unavailable, match="cannot start /no/such/python"):
        larq_adapter._running()


def test_the_yardsticks_count_what_they_do():
    if bf.backends.active("cpu") not in bf.backends.INSTRUCTION_SETS:
        pytest.skip(f"the C++ extension is not in use: {bf.backends.why_not('cpu')}")
    assert "MAC per iteration" in roofline.register_contender().make().check()
    assert "moves 38400 bytes" in roofline.traffic_contender(6400, 32_000).make().check()


@pytest.mark.parametrize(
    ("grad", "moment", "moved"),
    [
        (torch.float32, torch.float32, 648_000),
        (torch.bfloat16, torch.float32, 584_000),
        (torch.bfloat16, torch.bfloat16, 328_000),
    ],
)
def test_the_loop_of_the_step_leaves_its_arrays_as_they_are(grad, moment, moved):
    if bf.backends.active("cpu") not in bf.backends.INSTRUCTION_SETS:
        pytest.skip(f"the C++ extension is not in use: {bf.backends.why_not('cpu')}")
    weights = (64, 31_936)
    words = [torch.randint(-(2**31), 2**31, (n // 32,)).to(torch.int32) for n in weights]
    state = (words, *([torch.randn(n).to(d) for n in weights] for d in (grad, moment, moment)))
    before = [t.clone() for column in state for t in column]
    sizes = (grad.itemsize, moment.itemsize)
    loop = roofline.stream_contender("loop", lambda: state, weights, sizes).make()
    assert f"moves {moved} bytes" in loop.check()
    assert all(torch.equal(a, t) for a, t in zip(before, (t for c in state for t in c), strict=True))


def test_a_share_of_a_bound_counts_its_fastest_sample(mark):
    """Ours takes 2 seconds; the loop 1 or, disturbed, 4, for half as much; a quarter of ours is padding."""
    times = itertools.cycle((1.0, 1.0, 1.0, 4.0, 4.0, 4.0))
    bound = Contender("loop", BOUND, lambda: Prepared(_equal, sample=lambda n: n * next(times)), bytes=50)
    made = Prepared(_equal, sample=lambda n: 2.0 * n)
    ours = Contender("ours", OURS, lambda: made, bytes=100, bounded_by="loop", needed=75)
    record = run.measure_case(_case(ours, bound), QUICK, None, 1, True, mark)
    assert record["contenders"][0]["bound"] == {"name": "loop", "share": 0.75}
    assert record["contenders"][1]["rate"] == 50 / 1e9
    assert "75% of its bound" in blocks.suite_block([record], "pack")


def _equal() -> str:
    return "equal"


def test_a_contender_that_raises_while_it_is_timed_fails_alone(mark):
    calls = itertools.count()

    def breaks(n: int) -> float:
        if next(calls) > 4:
            raise RuntimeError("CUDA error: launch failed")
        return 0.01 * n

    bad = Contender("bad", BASELINE, lambda: Prepared(_equal, sample=breaks), bytes=1)
    record = run.measure_case(_case(_contender("ours", OURS, _equal), bad), QUICK, None, 1, True, mark)
    ours, failed = record["contenders"]
    assert "seconds" in ours and failed["gate"] == "failed" and "seconds" not in failed
    assert failed["gate_detail"] == "while it was timed: RuntimeError: CUDA error: launch failed"


def test_operands_that_cannot_be_made_are_a_row(mark):
    def contenders():
        yield _contender("ours", OURS, _equal)
        raise RuntimeError("out of memory")

    case = Case("pack", "pack_bits", "made up", {}, "GB/s", contenders)
    record = run.measure_case(case, QUICK, None, 1, True, mark)
    rows = {row["name"]: row["gate"] for row in record["contenders"]}
    assert rows == {"ours": "passed", "the operands": "failed"}
