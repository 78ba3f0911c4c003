"""An old commit against this tree: who goes first, the interval of a median, and the run as a whole."""

from __future__ import annotations

import json

import pytest

from benchmarks import compare, run
from bop2nd_fast.stamp import ROOT


def test_the_interval_of_a_median_is_the_tables():
    # n, and the 1-based ranks that textbooks give for 95 %
    for n, low, high in ((6, 1, 6), (9, 2, 8), (15, 4, 12), (21, 6, 16)):
        values = [float(v) for v in range(1, n + 1)]
        assert compare.median_interval(values) == ((n + 1) / 2, low, high)


def test_the_two_trees_take_turns_at_going_first():
    calls = []

    def sampler(name, seconds):
        def sample(n):
            calls.append(name)
            return n * seconds

        return sample

    old, new, ratios = compare.compare_samples(sampler("old", 0.5), sampler("new", 1.0), rounds=6)
    assert (old, new) == ([0.5] * 6, [1.0] * 6)
    assert ratios == [2.0] * 6
    assert calls[4:] == ["new", "old", "old", "new"] * 3


def test_an_unknown_commit_is_refused(capsys):
    assert run.main(["--compare", "no-such-commit"]) == 2
    assert "no-such-commit" in capsys.readouterr().err
    assert run.main(["--compare", "HEAD", "--rounds", "5"]) == 2
    assert "at least 6 rounds" in capsys.readouterr().err


@pytest.mark.slow
def test_this_tree_against_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "tree_of", lambda base, python: ROOT)
    out = tmp_path / "ratios.jsonl"
    asked = ["--compare", "HEAD", "--suite", "linear", "--quick", "--rounds", "6", "--out", str(out)]
    assert run.main(asked) == 0
    assert run.main(asked) == 2 and "there already" in capsys.readouterr().err
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["contender"] for row in rows} >= {"bop2nd", "bf.nn.BinaryLinear"}
    assert all(row["low"] <= row["median"] <= row["high"] for row in rows)


class _Tree:
    """A worker whose contenders take so long; those that failed their gate it names."""

    def __init__(self, seconds: float, *failed: str) -> None:
        self.seconds, self.failed = seconds, list(failed)

    def ask(self, **request):
        if "suite" in request:
            return {"contenders": ["bop2nd"], "failed": self.failed}
        return {"seconds": self.seconds * request["n"]}

    def close(self) -> None:
        pass


def test_a_gate_fails_the_comparison_and_no_time_does(monkeypatch, capsys):
    monkeypatch.setattr(compare, "tree_of", lambda base, python: ROOT)
    asked = ["--compare", "HEAD", "--suite", "pack", "--quick", "--op", "unpack_bits", "--rounds", "6"]
    for failed, status in (((), 0), (("bop2nd, bits in: differs",), 1)):
        trees = iter((_Tree(1.0), _Tree(9.0, *failed)))  # nine times as slow
        monkeypatch.setattr(compare, "worker_of", lambda *_, trees=trees: next(trees))
        assert run.main(asked) == status
        told = capsys.readouterr().out
        assert "9.000" in told and ("bits in: differs" in told) == bool(failed)


def test_a_worker_that_dies_is_said(tmp_path):
    with pytest.raises(RuntimeError, match="ended"):
        compare.worker_of(tmp_path)  # a folder without the registry
