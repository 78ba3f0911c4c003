from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bop2nd_fast import data

TRAIN_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST_FILES = ("test_batch.bin",)
RECORD_BYTES = 1 + 3 * 32 * 32


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------- digits


def test_digits_are_split_in_proportion_and_disjoint():
    split = data.digits()
    assert len(split.train_images) + len(split.test_images) == 1797
    assert split.train_images.shape[1:] == (1, 8, 8) == split.test_images.shape[1:]
    assert split.train_images.min() == -1 and split.train_images.max() == 1
    assert (split.in_channels, split.image_size, len(split.classes)) == (1, 8, 10)
    train = torch.bincount(split.train_labels, minlength=10)
    test = torch.bincount(split.test_labels, minlength=10)
    assert torch.equal(test, ((train + test) * 0.25).round().long())
    # scikit-learn's 1797 images are all different, so equal rows would mean a leak.
    together = torch.cat([split.train_images, split.test_images]).flatten(1)
    assert len(torch.unique(together, dim=0)) == 1797


def test_digits_split_follows_the_seed():
    assert torch.equal(data.digits(seed=3).test_images, data.digits(seed=3).test_images)
    assert not torch.equal(data.digits(seed=3).test_images, data.digits(seed=4).test_images)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_digits_refuse_a_share_outside_the_unit_interval(share):
    with pytest.raises(ValueError, match="between 0 and 1"):
        data.digits(test_share=share)


# ---------------------------------------------------------------------------------------------- cifar10


def write_cifar(folder, n_records: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(TRAIN_FILES + TEST_FILES):
        records = np.zeros((n_records, RECORD_BYTES), np.uint8)
        records[:, 0] = number
        records[:, 1] = 255  # red, row 0, column 0
        records[:, 1 + 1024 + 32] = 51  # green, row 1, column 0
        records[:, 1 + 2048 + 1] = 102  # blue, row 0, column 1
        records.tofile(folder / name)


def test_cifar10_reads_labels_planes_and_scale(tmp_path):
    write_cifar(tmp_path)
    split = data.cifar10(tmp_path)
    assert split.train_images.shape == (10, 3, 32, 32) and split.test_images.shape == (2, 3, 32, 32)
    assert split.train_labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4] and split.test_labels.tolist() == [
        5,
        5,
    ]
    image = split.train_images[0]
    assert image[0, 0, 0] == 1.0
    torch.testing.assert_close(image[1, 1, 0], torch.tensor(51 / 127.5 - 1))
    torch.testing.assert_close(image[2, 0, 1], torch.tensor(102 / 127.5 - 1))
    assert (image == -1).sum() == 3 * 1024 - 3


def test_cifar10_finds_the_folder_inside_its_parent(tmp_path):
    write_cifar(tmp_path / "cifar-10-batches-bin")
    assert len(data.cifar10(str(tmp_path)).train_labels) == 10


def test_cifar10_names_every_missing_file(tmp_path):
    write_cifar(tmp_path)
    (tmp_path / "data_batch_3.bin").unlink()
    (tmp_path / "test_batch.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks data_batch_3\.bin, test_batch\.bin"):
        data.cifar10(tmp_path)


@pytest.mark.parametrize("n_bytes", [0, 1, RECORD_BYTES - 1, RECORD_BYTES + 1])
def test_cifar10_refuses_a_truncated_file(tmp_path, n_bytes):
    write_cifar(tmp_path)
    (tmp_path / "data_batch_2.bin").write_bytes(bytes(n_bytes))
    with pytest.raises(ValueError, match=rf"data_batch_2\.bin has {n_bytes} bytes"):
        data.cifar10(tmp_path)


def test_cifar10_refuses_an_unknown_label(tmp_path):
    write_cifar(tmp_path)
    (tmp_path / "test_batch.bin").write_bytes(bytes([10]) + bytes(RECORD_BYTES - 1))
    with pytest.raises(ValueError, match=r"labels 10 to 10; labels are 0 to 9"):
        data.cifar10(tmp_path)


# ---------------------------------------------------------------------------------------------- batches


def numbered(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(n, dtype=torch.float32).view(n, 1, 1, 1).expand(n, 3, 4, 4), torch.arange(n)


def test_batches_hold_each_example_once_with_its_label():
    images, labels = numbered(10)
    batches = data.Batches(images, labels, 3, generator())
    seen = []
    for image, label in batches:
        assert image.shape == (3, 3, 4, 4) and torch.equal(image[:, 0, 0, 0].long(), label)
        seen += label.tolist()
    assert len(batches) == 3 and len(seen) == 9 == len(set(seen))


def test_batches_reshuffle_and_resume_from_the_generator_state():
    images, labels = numbered(64)
    source = generator(5)
    batches = data.Batches(images, labels, 64, source)
    (first,) = [label.tolist() for _, label in batches]
    state = source.get_state()
    (second,) = [label.tolist() for _, label in batches]
    assert first != second
    source.set_state(state)
    (again,) = [label.tolist() for _, label in batches]
    assert again == second


@pytest.mark.parametrize("size", [0, -1, 11])
def test_batches_refuse_an_impossible_size(size):
    with pytest.raises(ValueError, match="allowed is 1 to 10"):
        data.Batches(*numbered(10), size, generator())


def test_batches_refuse_different_lengths():
    images, labels = numbered(10)
    with pytest.raises(ValueError, match="10 images but 9 labels"):
        data.Batches(images, labels[:9], 2, generator())


def test_augmentation_crops_a_padded_image_and_mirrors_half():
    n, size, pad = 400, 6, 4
    images = torch.rand(n, 3, size, size, generator=generator(1)) + 1  # zeros can only be padding
    out = data.augment_crop_flip(images, generator(2), pad=pad)
    assert out.shape == images.shape
    padded = F.pad(images, (pad,) * 4)
    found = set()
    for i in range(n):
        matches = [
            (top, left, mirrored)
            for top in range(2 * pad + 1)
            for left in range(2 * pad + 1)
            for mirrored in (False, True)
            if torch.equal(
                out[i],
                (lambda crop, mirrored=mirrored: crop.flip(-1) if mirrored else crop)(
                    padded[i, :, top : top + size, left : left + size]
                ),
            )
        ]
        assert len(matches) == 1
        found.add(matches[0])
    assert {top for top, _, _ in found} == set(range(9)) == {left for _, left, _ in found}
    assert 0.4 < sum(mirrored for *_, mirrored in found) / len(found) < 0.6


def test_augmentation_repeats_with_the_seed():
    images = torch.rand(8, 3, 32, 32)
    first = data.augment_crop_flip(images, generator(7))
    assert torch.equal(first, data.augment_crop_flip(images, generator(7)))
    assert not torch.equal(first, data.augment_crop_flip(images, generator(8)))
