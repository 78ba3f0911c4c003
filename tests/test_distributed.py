"""DDP and FSDP2 with packed parameters: 2 and 4 processes on gloo."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bop2nd_fast import BinaryTensor, pack
from bop2nd_fast.binary_tensor.rows import FlatSigns, RowBlock
from bop2nd_fast.optim.distributed import checksum

from . import distributed_workers as workers
from .distributed_processes import run

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 4])
def test_ddp(world_size):
    model = workers.network(seed=0)
    for result in run(workers.ddp, world_size):
        assert "0.weight" in result["before"]
        assert result["is_bucket_view"]
        assert result["flips"] > 1000
        assert result["n_checked"] == 7 + 3 * 3 + 4 * 3  # parameters, Bop2ndOrder's and Adam's state
        assert "4.weight" in result["one_bit"] and "1 of 7" in result["one_bit"]
        assert result["bf16"] > 100
        by_ddp, by_us = result["start_bytes"]
        words = sum(p.nbytes for p in model.parameters())
        dense = sum(p.numel() * 4 for p in model.parameters())
        buffers = sum(b.nbytes for b in model.buffers())
        assert by_us == words + buffers
        assert by_ddp >= dense + buffers  # and a little for comparing shapes


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 4])
def test_fsdp_shards_rows_and_gathers_words(world_size):
    run(workers.fsdp_layout, world_size)


@pytest.mark.distributed
def test_fsdp_trains_and_resumes_on_another_world_size(tmp_path):
    """2 processes -> 4 -> 2, each from the other's checkpoint, against one process without interruption.

    Bit for bit: the gradients are small integers, so that no order of summation rounds.
    """
    alone = workers.integer_network()
    optimizer = workers.integer_optimizer(alone)
    stages = [(2, range(5)), (4, range(5, 10)), (2, range(10, 15))]
    previous = None
    for i, (world_size, steps) in enumerate(stages):
        assert workers.integer_steps(alone, optimizer, steps, 0, 1) > 100
        expected = workers.gathered(alone, optimizer)
        save = str(tmp_path / f"after_{steps.stop}") if i < 2 else None
        for result in run(workers.fsdp_train, world_size, previous, save, steps):
            assert result.keys() == expected.keys()
            for name, value in expected.items():
                assert torch.equal(result[name], value), (steps, name)
        previous = save


@pytest.mark.distributed
def test_fsdp_resumes_an_ordinary_network(tmp_path):
    """Batch norm, Adam: rounding gradients, so the same world size; every rank's block bit for bit."""
    flips = run(workers.fsdp_real, 2, str(tmp_path))
    assert min(flips) > 100


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 3])
def test_collectives_move_signs_and_refuse_sums(world_size):
    run(workers.collectives, world_size)


@pytest.mark.distributed
def test_a_weight_becomes_a_distributed_tensor():
    run(workers.distributed_tensors, 2)


@pytest.mark.distributed
@pytest.mark.parametrize("from_rank0", [False, True])
def test_a_packed_state_dict_of_the_whole_model_goes_into_blocks(from_rank0):
    run(workers.full_state_dict, 2, from_rank0)


@pytest.mark.distributed
def test_the_training_loop_agrees_and_resumes_in_the_middle_of_an_epoch(tmp_path):
    results = run(workers.training_loop, 2, str(tmp_path / "run"))
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(*result["bits"], strict=True))
        assert result["history"][0] == result["history"][1] == results[0]["history"][0]
        assert result["losses"][1] == pytest.approx(result["losses"][0], rel=1e-12)
    assert len((tmp_path / "run" / "history.jsonl").read_text().splitlines()) == 2


def torchrun(processes: int, *command: object) -> str:
    """What the processes print."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [str(word) for word in (*words, *command)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.distributed
def test_bop2nd_train_under_torchrun(tmp_path):
    options = ["--epochs", 2, "--width", 4, "--batch-size", 128, "--out", tmp_path / "run"]
    text = torchrun(2, "-m", "bop2nd_fast", "train", "digits", *options)
    assert re.findall(r"^epoch   (\d)  loss", text, re.MULTILINE) == ["1", "2"]  # one process speaks
    assert sorted(os.listdir(tmp_path / "run")) == [
        "checkpoint.pt", "checkpoint.pt.previous", "history.jsonl", "training.png"
    ]  # fmt: skip


@pytest.mark.distributed
def test_the_example_of_shards_goes_on_with_another_number_of_processes(tmp_path):
    def epochs(processes: int, until: int) -> list[str]:
        options = ["--epochs", until, "--width", 4, "--batch-size", 256, "--checkpoints", tmp_path / "run"]
        text = torchrun(processes, ROOT / "examples" / "train_sharded.py", *options)
        return re.findall(r"epoch (\d+): loss [\d.]+, test accuracy [\d.]+%", text)

    assert epochs(2, 1) == ["1"]
    assert epochs(1, 2) == ["2"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "step_0000000001",
        "step_0000000002",
    ]


# ------------------------------------------------------------------ what they build on, in one process


def signs(*shape: int) -> BinaryTensor:
    return pack(torch.randn(*shape), dim=1)


@pytest.mark.parametrize("shape", [(7, 33), (6, 40, 3, 2)])
def test_rows_share_words(shape):
    weight = signs(*shape)
    dense = weight.unpack()
    for part, expected in zip(
        [weight[2:5], *weight.split(4), *weight.chunk(3), *weight.split([1, 0, shape[0] - 1])],
        [dense[2:5], *dense.split(4), *dense.chunk(3), *dense.split([1, 0, shape[0] - 1])],
        strict=True,
    ):
        assert type(part) is BinaryTensor and part.shape == expected.shape
        assert part.stride() == torch.empty_like(expected, memory_format=torch.preserve_format).stride()
        assert torch.equal(part.unpack(), expected)
    weight[2:5].copy_(-dense[2:5])
    assert torch.equal(weight.unpack()[2:5], -dense[2:5]) and torch.equal(weight.unpack()[5:], dense[5:])
    assert torch.equal(weight[:, 1:3] + 0, weight.unpack()[:, 1:3])  # not rows: values
    with pytest.raises(RuntimeError, match="split"):
        weight.split([1, 2])


def test_rows_of_a_weight_packed_along_rows_are_values():
    weight = pack(torch.randn(40, 3), dim=0)
    assert torch.equal(weight[3:9] + 0, weight.unpack()[3:9])


@pytest.mark.parametrize("shape", [(7, 33), (6, 40, 3, 2)])
def test_flat_alias_unpacks_when_read(shape):
    weight = signs(*shape)
    flat = weight.view(-1)
    assert type(flat) is FlatSigns and flat.shape == (weight.numel(),)
    assert torch.equal(flat + 0, weight.unpack().reshape(-1))
    weight.copy_(-weight.unpack())
    assert torch.equal(torch.cat([flat, flat])[: flat.numel()], weight.unpack().reshape(-1))
    with pytest.raises(RuntimeError, match="holds only signs"):
        flat.add_(1)


def test_a_block_of_rows_reads_zeros_until_signs_are_copied_in():
    weight = signs(5, 40)
    block = weight.new_zeros(8, 40)
    assert type(block) is RowBlock and torch.equal(block + 0, torch.zeros(8, 40))
    rows = block.narrow(0, 0, 5)
    assert torch.equal(rows * 2, torch.zeros(5, 40)) and torch.equal(rows.clone(), torch.zeros(5, 40))
    with pytest.raises(RuntimeError, match="still zeros"):
        torch.ops.bop2nd.binary_linear(torch.randn(2, 40), rows, True)
    with pytest.raises(RuntimeError, match="still holds zeros"):
        rows.__reduce_ex__(2)
    with pytest.raises(RuntimeError, match="holds only signs"):
        block.add_(1)
    rows.copy_(weight)
    assert torch.equal(rows.unpack(), weight.unpack()) and torch.equal(rows.words, weight.words)
    assert torch.equal(block + 0, torch.cat([weight.unpack(), torch.zeros(3, 40)]))
    assert type(weight.new_zeros(3)) is torch.Tensor


def test_checksum_depends_on_every_bit_place_and_shape():
    words = torch.randint(-(2**31), 2**31 - 1, (3, 50), dtype=torch.int32)
    reference = checksum(words)
    for i in range(0, 150, 7):
        for bit in (0, 13, 31):
            changed = words.clone()
            changed.view(-1)[i] ^= (1 << bit) if bit < 31 else -(2**31)
            assert checksum(changed) != reference
    assert checksum(words.flip(1)) != reference
    assert checksum(words.view(50, 3)) != reference
    weight = signs(9, 70)
    assert checksum(weight) == checksum(weight.clone())
    floats = torch.tensor([0.0, 1.0])
    assert checksum(floats) != checksum(torch.tensor([-0.0, 1.0]))
