"""Checkpoints: killed at every call of a write, killed at random moments, damaged files."""

from __future__ import annotations

import copy
import os
import random
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard

import bop2nd_fast as bf
from bop2nd_fast import checkpoint, checkpoint_file

from .distributed_processes import pipe, start
from .distributed_processes import run as run_processes

N_STEPS = 120


def training(path: str | Path) -> tuple[checkpoint.Run, nn.Module, tuple[Any, ...], torch.Generator]:
    generator = torch.Generator().manual_seed(5)
    torch.manual_seed(11)
    model = nn.Sequential(
        bf.nn.BinaryLinear(40, 33, input_quantizer=None),
        nn.BatchNorm1d(33),
        nn.Dropout(0.1),
        bf.nn.BinaryLinear(33, 4),
    )
    binary, real = bf.optim.split_parameters(model)
    opts = (
        bf.optim.Bop2ndOrder(binary, gamma=1e-2, sigma=1e-2, threshold=0.05, bias_correction="adam"),
        torch.optim.Adam(real, lr=1e-2),
    )
    run = checkpoint.Run(path, model=model, binary=opts[0], real=opts[1], batches=generator)
    return run, model, opts, generator


def train(path: str, n_steps: int, progress: Any = None, every: int = 1) -> None:
    """Train to ``n_steps`` with a checkpoint after every step, or after every ``every``-th."""
    torch.set_num_threads(1)
    run, model, opts, generator = training(path)
    for step in range(run.resume(), n_steps):
        images = torch.randn(16, 40, generator=generator)
        labels = torch.randint(0, 4, (16,), generator=generator)
        F.cross_entropy(model(images), labels).backward()
        for optimizer in opts:
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % every == 0:
            run.save(step + 1)
        if progress is not None:
            progress.send(step + 1)


def assert_same(a: Any, b: Any, where: str = "") -> None:
    assert type(a) is type(b), where
    if isinstance(a, bf.BinaryTensor):
        assert torch.equal(a.words, b.words), where
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


@pytest.mark.distributed
def test_killed_20_times_at_random_moments(tmp_path):
    """SIGKILL between, before and within writes; the end is that of a run that nobody disturbed."""
    path, moments = tmp_path / "run.pt", random.Random(2)
    reached = []
    for _ in range(20):
        ours, theirs = pipe()
        process = start(train, str(path), N_STEPS, theirs)
        theirs.close()
        for _ in range(moments.randint(1, 2)):
            assert ours.poll(60), "the training process makes no progress"
            reached.append(ours.recv())
        time.sleep(moments.uniform(0, 0.03))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        step = checkpoint.load_latest(path)["step"]
        assert reached[-1] <= step < N_STEPS, "a finished checkpoint was lost"
    train(str(path), N_STEPS)
    train(str(tmp_path / "undisturbed.pt"), N_STEPS, every=N_STEPS)
    assert_same(checkpoint.load(path), checkpoint.load(tmp_path / "undisturbed.pt"))
    assert checkpoint.load(path)["step"] == N_STEPS
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "undisturbed.pt") == [
        "run.pt",
        "run.pt.previous",
    ]


CALLS = ["link", "replace", "fsync"]  # of module os: everything by which a write becomes visible or durable


def killed_in_call(path: str, n: int) -> None:
    """Write a checkpoint, but end before (even n) or after (odd n) the n//2-th of ``CALLS``."""
    left = [n // 2]

    def wrapped(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0 and n % 2 == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **kwargs)
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for name in CALLS:
        setattr(os, name, wrapped(getattr(os, name)))
    checkpoint.save(path, {"value": torch.full((1000,), 2.0)})


@pytest.mark.distributed
def test_killed_at_every_call_of_a_write(tmp_path):
    kills = 0
    for n in range(100):
        path = tmp_path / f"{n}.pt"
        checkpoint.save(path, {"value": torch.full((1000,), 0.0)})
        checkpoint.save(path, {"value": torch.full((1000,), 1.0)})
        process = start(killed_in_call, str(path), n)
        process.join(60)
        value = checkpoint.load(path)["value"]
        assert value.unique().numel() == 1 and value[0] in (1.0, 2.0)
        assert checkpoint.load(f"{path}.previous")["value"][0] in (0.0, 1.0)
        if process.exitcode == 0:
            assert value[0] == 2
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        checkpoint.save(path, {"value": torch.full((1000,), 3.0)})  # and the next write works
        assert checkpoint.load(path)["value"][0] == 3
        assert {p.name for p in tmp_path.iterdir() if p.name.lstrip(".").startswith(f"{n}.pt")} == {
            f"{n}.pt",
            f"{n}.pt.previous",
        }
    assert kills == 10  # link, replace, fsync of the file, replace, fsync of the directory; before and after


def sharded(rank: int, world_size: int, directory: str, step: int, dies: bool) -> int:
    """Resume, save checkpoint ``step``; if it ``dies``, everything is written but the name."""
    torch.manual_seed(step)
    model = fully_shard(bf.nn.BinaryLinear(40, 6))
    optimizer = bf.optim.Bop2ndOrder(model.parameters())
    resumed = checkpoint.resume_sharded(directory, model, optimizer)
    if dies:
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    checkpoint.save_sharded(directory, step, model, optimizer)
    return resumed


@pytest.mark.distributed
def test_sharded_checkpoint_appears_when_it_is_complete(tmp_path):
    assert run_processes(sharded, 2, str(tmp_path), 1, False) == [0, 0]
    with pytest.raises(AssertionError, match="rank"):
        run_processes(sharded, 2, str(tmp_path), 2, True)
    assert [path.name for path in checkpoint.sharded_checkpoints(tmp_path)] == ["step_0000000001"]
    assert run_processes(sharded, 2, str(tmp_path), 2, False) == [1, 1]
    assert run_processes(sharded, 2, str(tmp_path), 3, False) == [2, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_0000000002", "step_0000000003"]


def resumed_loudly(rank: int, world_size: int, directory: str) -> tuple[int, list[str], str]:
    """The step resumed at, the warnings, the error."""
    model = fully_shard(bf.nn.BinaryLinear(40, 6))
    optimizer = bf.optim.Bop2ndOrder(model.parameters())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            step, error = checkpoint.resume_sharded(directory, model, optimizer), ""
        except checkpoint.CheckpointError as caught:
            step, error = -1, str(caught)
    return step, [str(w.message) for w in seen if w.category is RuntimeWarning], error


@pytest.mark.distributed
def test_a_damaged_sharded_checkpoint_is_passed_over_loudly(tmp_path):
    for step in (1, 2):
        run_processes(sharded, 2, str(tmp_path), step, False)
    newest, oldest = reversed(checkpoint.sharded_checkpoints(tmp_path))
    block = next(newest.glob("*.distcp"))
    damaged = bytearray(block.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    block.write_bytes(damaged)
    for step, seen, error in run_processes(resumed_loudly, 2, str(tmp_path)):
        assert (step, error) == (1, "")
        assert any(f"the checksum of {block.name} does not fit" in w and "going on from" in w for w in seen)
    (oldest / ".metadata").unlink()
    for step, _, error in run_processes(resumed_loudly, 1, str(tmp_path)):
        assert step == -1 and ".metadata" in error and block.name in error


def test_damaged_file_falls_back_to_the_previous_one_loudly(tmp_path):
    path = tmp_path / "run.pt"
    assert checkpoint.load_latest(path) is None
    checkpoint.save(path, {"step": 1})
    checkpoint.save(path, {"step": 2})
    assert checkpoint.load_latest(path) == {"step": 2}
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(checkpoint.CheckpointError, match="damaged"):
        checkpoint.load(path)
    with pytest.warns(RuntimeWarning, match="going on from"):
        assert checkpoint.load_latest(path) == {"step": 1}
    Path(f"{path}.previous").unlink()
    with pytest.raises(checkpoint.CheckpointError, match="damaged"):
        checkpoint.load_latest(path)


def content_of(*paths: Path) -> list[bytes]:
    return [path.read_bytes() for path in paths]


def test_a_changed_bit_of_any_byte_is_noticed(tmp_path):
    path, moments = tmp_path / "run.pt", random.Random(3)
    checkpoint.save(path, {"w": bf.pack(torch.randn(3, 40)), "n": 1})
    whole = path.read_bytes()
    for i in range(len(whole)):
        damaged = bytearray(whole)
        damaged[i] ^= 1 << moments.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(checkpoint.CheckpointError, match="damaged"):
            checkpoint.load(path)
    for other in (b"", whole[:-1], whole + b"\0", whole + whole, whole[1:], b"\0" * len(whole)):
        path.write_bytes(other)
        with pytest.raises(checkpoint.CheckpointError, match="damaged"):
            checkpoint.load(path)
    path.write_bytes(whole)
    assert checkpoint.load(path)["n"] == torch.load(path, weights_only=True)["n"] == 1


def test_what_is_no_checkpoint_is_a_checkpoint_error(tmp_path):
    path = tmp_path / "run.pt"
    torch.save({"n": 1}, path)
    with pytest.raises(checkpoint.CheckpointError, match="checksum"):
        checkpoint.load(path)
    with pytest.raises(checkpoint.CheckpointError, match="no regular file"):
        checkpoint.load(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(checkpoint.CheckpointError, match="no regular file"):
        checkpoint.load(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "none.pt")


def test_a_lost_file_falls_back_loudly_too(tmp_path):
    path = tmp_path / "run.pt"
    for step in (1, 2):
        checkpoint.save(path, {"step": step})
    path.unlink()
    with pytest.warns(RuntimeWarning, match="there is no file .* going on from"):
        assert checkpoint.load_latest(path) == {"step": 1}


class NotToBeRead:
    pass


@pytest.mark.parametrize("value", [lambda: None, NotToBeRead(), np.float32(3), open])
def test_what_could_not_be_read_back_is_refused_when_it_is_saved(tmp_path, value):
    path = tmp_path / "run.pt"
    previous = Path(f"{path}.previous")
    for step in (1, 2):
        checkpoint.save(path, {"step": step})
    before = content_of(path, previous)
    with pytest.raises(checkpoint.CheckpointError, match="cannot be written and read back"):
        checkpoint.save(path, {"step": value})
    assert content_of(path, previous) == before
    assert not list(tmp_path.glob(".*"))


def test_a_save_that_fails_at_any_call_leaves_two_good_checkpoints(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    previous = Path(f"{path}.previous")
    failures = 0
    for n in range(100):
        for step in (1, 2):
            checkpoint.save(path, {"step": step})
        left = [n]

        def wrapped(original: Any, left: list[int] = left) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    raise OSError(28, "No space left on device")
                return original(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in ("replace", "fsync"):
                patch.setattr(os, name, wrapped(getattr(os, name)))
            try:
                checkpoint.save(path, {"step": 3})
            except OSError:
                failures += 1
        assert checkpoint.load(path)["step"] in (2, 3)
        assert checkpoint.load(previous)["step"] < checkpoint.load(path)["step"]
        if left[0] >= 0:
            break
    assert failures == 4


def test_a_damaged_file_never_takes_the_place_of_its_predecessor(tmp_path):
    path = tmp_path / "run.pt"
    path.write_bytes(b"not ours")
    checkpoint.save(path, {"step": 1})
    assert Path(f"{path}.previous").read_bytes() == b"not ours"  # better than to lose it
    checkpoint.save(path, {"step": 2})
    checkpoint.save(path, {"step": 3})
    path.write_bytes(path.read_bytes()[:-20] + bytes(20))
    with pytest.warns(RuntimeWarning, match="going on from"):
        assert checkpoint.load_latest(path) == {"step": 2}
    checkpoint.save(path, {"step": 4})
    assert checkpoint.load(path) == {"step": 4} and checkpoint.load(f"{path}.previous") == {"step": 2}


def test_the_previous_one_is_kept_where_links_are_refused(tmp_path, monkeypatch):
    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "run.pt"
    for step in (1, 2, 3):
        checkpoint.save(path, {"step": step})
    assert checkpoint.load(f"{path}.previous") == {"step": 2}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.pt", "run.pt.previous"]


def test_a_linked_checkpoint_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    path = tmp_path / "run.pt"
    path.symlink_to(tmp_path / "disk" / "real.pt")
    for step in (1, 2):
        checkpoint.save(path, {"step": step})
    assert path.is_symlink()
    (tmp_path / "disk" / "real.pt").unlink()
    with pytest.warns(RuntimeWarning, match=r"real\.pt\.previous"):
        assert checkpoint.load_latest(path) == {"step": 1}


BAD: dict[str, Any] = {
    "model": lambda state: state["members"]["model"].popitem(),
    "model's shape": lambda state: state["members"]["model"].update({"1.weight": torch.zeros(2)}),
    "binary": lambda state: state["members"]["binary"]["state"][0].pop("exp_avg_sq"),
    "real": lambda state: state["members"]["real"]["param_groups"].clear(),
    "batches": lambda state: state["members"].update(batches=torch.zeros(5)),
    "another kind": lambda state: state["members"].update(real=7),
    "random": lambda state: state.update(random={"cpu": torch.zeros(7), "cuda": []}),
    "no random": lambda state: state.update(random=None),
}


@pytest.mark.parametrize("part", BAD)
def test_a_run_is_resumed_whole_or_not_at_all(tmp_path, part):
    path = str(tmp_path / "run.pt")
    train(path, 3)
    state = checkpoint.load(path)
    BAD[part](state)
    checkpoint.save(path, state)
    run, model, opts, generator = training(path)
    F.cross_entropy(model(torch.randn(16, 40)), torch.randint(0, 4, (16,))).backward()
    for optimizer in opts:
        optimizer.step()

    def everything() -> Any:
        states = [model.state_dict(), *(o.state_dict() for o in opts), generator.get_state()]
        return copy.deepcopy([*states, torch.get_rng_state()])

    before = everything()
    with pytest.raises(checkpoint.CheckpointError, match="does not fit"):
        run.resume()
    assert_same(before, everything())


def test_an_interrupted_save_leaves_two_checkpoints_and_is_an_interrupt(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    for step in (1, 2):
        checkpoint.save(path, {"step": step})
    before = content_of(path, Path(f"{path}.previous"))
    original = checkpoint_file._Hashed.write
    for n in range(3, 40, 6):
        calls = [0]

        def write(self: Any, data: Any, calls: list[int] = calls, n: int = n) -> int:
            calls[0] += 1
            if calls[0] == n:
                raise KeyboardInterrupt
            return original(self, data)

        monkeypatch.setattr(checkpoint_file._Hashed, "write", write)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(path, {"step": 3, "x": [torch.randn(10) for _ in range(5)]})
        assert content_of(path, Path(f"{path}.previous")) == before
        assert not list(tmp_path.glob(".*"))


class Interrupted:
    """A member whose loading somebody interrupts with Ctrl-C, the first time."""

    loads = 0

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        self.loads += 1
        if self.loads == 1:
            raise KeyboardInterrupt


def test_an_interrupted_resume_changes_nothing(tmp_path):
    model = bf.nn.BinaryLinear(40, 3)
    checkpoint.Run(tmp_path / "run.pt", model=model, other=Interrupted()).save(1)
    other = bf.nn.BinaryLinear(40, 3)
    before = other.weight.words.clone()
    assert not torch.equal(before, model.weight.words)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.Run(tmp_path / "run.pt", model=other, other=Interrupted()).resume()
    assert torch.equal(other.weight.words, before)


def test_a_run_refuses_what_is_not_its_own(tmp_path):
    run, model, _, _ = training(tmp_path / "run.pt")
    run.save(3)
    before = model[0].weight.words.clone()
    other = checkpoint.Run(tmp_path / "run.pt", model=model)
    with pytest.raises(checkpoint.CheckpointError, match="this run has"):
        other.resume()
    checkpoint.save(tmp_path / "run.pt", {"something": 1})
    with pytest.raises(checkpoint.CheckpointError, match="not written by"):
        run.resume()
    assert torch.equal(model[0].weight.words, before)
    with pytest.raises(TypeError, match="no state_dict"):
        checkpoint.Run(tmp_path / "x.pt", model=3)
