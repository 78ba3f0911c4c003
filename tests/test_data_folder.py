"""ImageNet-style folders: what is read, in which order, whatever the number of workers; damaged ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bop2nd_fast.data import ImageFolder, read_images

Image = pytest.importorskip("PIL.Image")


def write(root, n_train=4, n_val=2, classes=("circle", "square", "triangle"), size=(20, 26)):
    generator = np.random.default_rng(0)
    for split, n in (("train", n_train), ("val", n_val)):
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels if i else pixels[..., 0]).save(
                    folder / f"{i}.png"
                )  # the first is grey
    (root / "train" / classes[0] / ".DS_Store").write_bytes(b"x")
    return root


def batches(folder, **settings):
    return list(folder.train_batches(**({"batch_size": 5, "seed": 3, "epoch": 1} | settings)))


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) and torch.equal(s, t) for (x, s), (y, t) in zip(a, b, strict=True)
    )


def test_pictures_come_with_the_labels_of_their_folders(tmp_path):
    folder = ImageFolder(write(tmp_path), image_size=16)
    assert folder.classes == ("circle", "square", "triangle")
    assert len(folder.train_pictures) == 12 and len(folder.test_pictures) == 6
    ((images, labels),) = folder.test_batches(10)
    assert images.shape == (6, 3, 16, 16) and images.dtype == torch.float32
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert images.min() >= -1 and images.max() <= 1
    assert torch.equal(images[0, 0], images[0, 2])  # grey: three equal channels
    assert not torch.equal(images[1, 0], images[1, 2])


def test_a_test_picture_is_the_centre_of_the_resized_one(tmp_path):
    write(tmp_path, size=(32, 32))  # 256 / 224 of 28: not resized
    folder = ImageFolder(tmp_path, image_size=28)
    ((images, _),) = folder.test_batches(6)
    path = folder.test_pictures[1][0]
    assert torch.equal(images[1], read_images(path)[0, :, 2:30, 2:30])


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_are_the_same_whatever_the_number_of_workers(tmp_path, workers):
    folder = ImageFolder(write(tmp_path), image_size=8)
    alone = batches(folder)
    assert [len(labels) for _, labels in alone] == [5, 5]
    assert same(alone, batches(folder, workers=workers))
    assert same(alone[1:], batches(folder, first=1, workers=workers))


def test_order_and_crops_follow_the_seed_and_the_epoch(tmp_path):
    folder = ImageFolder(write(tmp_path), image_size=8)
    assert same(batches(folder), batches(folder))
    assert not same(batches(folder), batches(folder, seed=4))
    assert not same(batches(folder), batches(folder, epoch=2))
    # seeds and epochs are not added: (3, 1) and (1, 3) differ
    assert not same(batches(folder, seed=3, epoch=1), batches(folder, seed=1, epoch=3))


def test_training_crops_cover_the_picture_and_half_are_mirrored(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        ramp = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))
        Image.fromarray(ramp).save(tmp_path / split / "a" / "ramp.png")
    folder = ImageFolder(tmp_path, image_size=16)
    seen = torch.cat([next(folder.train_batches(1, seed=0, epoch=e))[0] for e in range(200)])
    rising = (seen[:, 0, 8, -1] > seen[:, 0, 8, 0]).float().mean()
    assert 0.4 < rising < 0.6
    assert seen.amin() < -0.95 and seen.amax() > 0.95
    widths = (seen[:, 0, 8, -1] - seen[:, 0, 8, 0]).abs()
    assert widths.min() < 0.8 and widths.max() > 1.6


def test_a_narrow_picture_still_has_a_crop(tmp_path):
    for size in ((1, 300), (300, 1), (1, 1)):
        root = tmp_path / f"{size}"
        for split in ("train", "val"):
            (root / split / "a").mkdir(parents=True)
            Image.fromarray(np.zeros(size, np.uint8)).save(root / split / "a" / "x.png")
        folder = ImageFolder(root, image_size=8)
        assert next(folder.train_batches(1, 0, 0))[0].shape == (1, 3, 8, 8)
        assert next(folder.test_batches(1))[0].shape == (1, 3, 8, 8)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_picture_is_named(tmp_path, workers):
    folder = ImageFolder(write(tmp_path), image_size=8)
    bad = folder.train_pictures[7][0]
    bad.write_bytes(bad.read_bytes()[:40])
    with pytest.raises(ValueError, match=bad.name) as caught:
        batches(folder, batch_size=12, workers=workers)
    assert str(bad) in str(caught.value) and "Traceback" not in str(caught.value)


def test_folders_of_another_form_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="lacks the folder train"):
        ImageFolder(tmp_path / "nowhere")
    root = write(tmp_path / "a")
    (root / "val" / "hexagon").mkdir()
    with pytest.raises(ValueError, match="hexagon in val, but not in train"):
        ImageFolder(root)
    (root / "train" / "hexagon").mkdir()
    with pytest.raises(ValueError, match="hexagon holds no pictures"):
        ImageFolder(root)
    only = write(tmp_path / "b")
    (only / "val").rename(only / "test")
    with pytest.raises(FileNotFoundError, match="lacks the folder val"):
        ImageFolder(only)
    with pytest.raises(ValueError, match="image_size is 0"):
        ImageFolder(write(tmp_path / "c"), image_size=0)
    with pytest.raises(ValueError, match="allowed is 1 to 12"):
        batches(ImageFolder(write(tmp_path / "d")), batch_size=13)
