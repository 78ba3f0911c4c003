from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from bop2nd_fast import data
from bop2nd_fast.data import batches

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


def numbered(n: int, n_test: int = 7) -> data.Dataset:
    """Every image holds its label."""

    def images(count: int) -> torch.Tensor:
        return torch.arange(count, dtype=torch.float32).view(count, 1, 1, 1).expand(count, 3, 4, 4)

    names = tuple(map(str, range(n)))
    return data.Dataset("numbered", names, images(n), torch.arange(n), images(n_test), torch.arange(n_test))


def labels_of(loader: data.Loader, epoch: int, first: int = 0) -> list[list[int]]:
    return [labels.tolist() for _, labels in loader.train(epoch, first)]


def test_batches_hold_each_example_once_with_its_label():
    loader = data.loader(numbered(10), 3, seed=0)
    seen = []
    for image, label in loader.train(1):
        assert image.shape == (3, 3, 4, 4) and torch.equal(image[:, 0, 0, 0].long(), label)
        seen += label.tolist()
    assert loader.steps_per_epoch == 3 and len(seen) == 9 == len(set(seen))


def test_batches_follow_seed_and_epoch_and_can_be_entered_anywhere():
    loader = data.loader(numbered(64), 8, seed=5)
    first, second = labels_of(loader, 1), labels_of(loader, 2)
    assert first != second and labels_of(loader, 2) == second
    assert labels_of(loader, 2, first=3) == second[3:]
    assert labels_of(data.loader(numbered(64), 8, seed=6), 1) != first


def test_augmented_batches_can_be_entered_anywhere_too():
    images = torch.rand(12, 3, 8, 8, generator=generator(3))
    dataset = dataclasses.replace(numbered(12), train_images=images)
    loader = data.loader(dataset, 4, seed=1, augmentation="crop_flip")
    whole = [x for x, _ in loader.train(2)]
    assert torch.equal(torch.stack(whole[1:]), torch.stack([x for x, _ in loader.train(2, first=1)]))
    assert not torch.equal(whole[0], images[next(iter(loader.train(2)))[1]])


def test_flips_alone_mirror_about_half_of_the_images():
    images = torch.rand(400, 3, 4, 4, generator=generator(3))
    out = batches.crop_flip(images, batches.draw_crop_flip(400, generator(4), crop=False))
    same, mirrored = ((out == x).flatten(1).all(1) for x in (images, images.flip(-1)))
    assert bool((same ^ mirrored).all()) and 150 < int(mirrored.sum()) < 250
    dataset = dataclasses.replace(numbered(400), train_images=images)
    batch, labels = next(data.loader(dataset, 8, seed=1, augmentation="flip").train(1))
    again = next(data.loader(dataset, 8, seed=1, augmentation="none").train(1))
    assert torch.equal(labels, again[1]) and not torch.equal(batch, again[0])
    assert torch.equal(batch.sort(3).values, again[0].sort(3).values)


def test_processes_share_every_batch():
    whole = labels_of(data.loader(numbered(16), 4, seed=2), 1)
    parts = [labels_of(data.loader(numbered(16), 4, seed=2, share=(r, 2)), 1) for r in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*parts, strict=True)] == [sorted(batch) for batch in whole]
    tests = [data.loader(numbered(16), 4, seed=2, share=(r, 2)).test() for r in (0, 1)]
    assert sorted(i for test in tests for _, labels in test for i in labels.tolist()) == list(range(7))
    with pytest.raises(ValueError, match="multiple of the 3 processes"):
        data.loader(numbered(16), 4, seed=2, share=(0, 3))


@pytest.mark.parametrize("size", [0, -1, 11])
def test_batches_refuse_an_impossible_size(size):
    with pytest.raises(ValueError, match="allowed is 1 to 10"):
        data.loader(numbered(10), size, seed=0)


def test_augmentation_crops_a_padded_image_and_mirrors_half():
    n, size, pad = 400, 6, batches.PAD
    images = torch.rand(n, 3, size, size, generator=generator(1)) + 1  # zeros can only be padding
    out = batches.crop_flip(images, batches.draw_crop_flip(n, generator(2)))
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


# ---------------------------------------------------------------------------------------------- images

RAMP = np.linspace(0, 255, 64).round().astype(np.uint8).reshape(8, 8)
EXPECTED = torch.from_numpy(RAMP.astype(np.float32) / 127.5 - 1)
STROKE = np.zeros((8, 8, 2), np.uint8)  # black where it is opaque
STROKE[2:6, 3:5, 1] = 255


def saved(folder, picture: Image.Image, suffix: str = "png", **options):
    path = folder / f"picture.{suffix}"
    picture.save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "pgm", "tga"])
def test_grey_of_8_bits_is_one_channel(tmp_path, suffix):
    image = data.read_images(saved(tmp_path, Image.fromarray(RAMP), suffix))
    assert image.dtype == torch.float32 and image.shape == (1, 1, 8, 8) and torch.equal(image[0, 0], EXPECTED)


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_grey_of_16_bits_has_the_same_white(tmp_path, suffix):
    image = data.read_images(saved(tmp_path, Image.fromarray(RAMP.astype(np.uint16) * 257), suffix))
    assert image.dtype == torch.float32 and image.min() == -1 and image.max() == 1
    torch.testing.assert_close(image[0, 0], EXPECTED, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA", "CMYK"])
def test_colours_are_three_channels_in_every_mode(tmp_path, mode):
    picture = Image.fromarray(RAMP)
    picture = picture.convert("P") if mode == "P" else picture.convert("RGB").convert(mode)
    image = data.read_images(saved(tmp_path, picture, "tiff" if mode == "CMYK" else "png"))
    assert torch.equal(image, EXPECTED.expand(1, 3, 8, 8))


def test_black_and_white_is_minus_one_and_one(tmp_path):
    image = data.read_images(saved(tmp_path, Image.fromarray(RAMP >= 128)))
    assert torch.equal(image[0, 0], torch.from_numpy(np.where(RAMP >= 128, 1, -1).astype(np.float32)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_cameras_is_followed(tmp_path, orientation):
    pixels = np.array([[0, 80, 160], [200, 220, 255]], np.uint8)
    turned = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.T,
        6: pixels[::-1].T,
        7: pixels[::-1, ::-1].T,
        8: pixels[:, ::-1].T,
    }[orientation]
    picture = Image.fromarray(pixels)
    exif = picture.getexif()
    exif[0x0112] = orientation
    image = data.read_images(saved(tmp_path, picture, exif=exif))
    assert torch.equal(image[0, 0], torch.from_numpy(turned / np.float32(127.5) - 1))


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_alpha_is_laid_on_white_or_on_what_is_asked_for(tmp_path, mode):
    path = saved(tmp_path, Image.fromarray(STROKE).convert(mode))
    on_white, on_black = data.read_images(path), data.read_images(path, "black")
    stroke = torch.from_numpy(STROKE[..., 1] == 255)
    assert torch.equal(on_white[0, 0], torch.where(stroke, -1.0, 1.0))
    assert torch.equal(on_white, data.read_images(path, "white")) and bool((on_black == -1).all())


def test_half_transparent_is_half_way(tmp_path):
    grey = np.full((1, 2, 2), 0, np.uint8)
    grey[0, :, 1] = 51, 255
    path = saved(tmp_path, Image.fromarray(grey))
    torch.testing.assert_close(data.read_images(path)[0, 0, 0], torch.tensor([0.6, -1.0]))


@pytest.mark.parametrize(
    ("pixels", "mode", "transparent"),
    [(RAMP, "L", 0), (RAMP, "P", 0), (RAMP, "RGB", (0, 0, 0)), (RAMP.astype(np.uint16) * 257, "I;16", 0)],
    ids=["L", "P", "RGB", "I;16"],
)
def test_a_colour_that_means_transparent_is_followed(tmp_path, pixels, mode, transparent):
    picture = Image.fromarray(pixels)
    path = saved(tmp_path, picture if mode == "I;16" else picture.convert(mode), transparency=transparent)
    corner = [float(data.read_images(path, background)[0, 0, 0, 0]) for background in (None, "black")]
    assert corner == [1, -1] and float(data.read_images(path)[0, 0, 7, 7]) == 1


def test_transparent_pictures_that_vanish_on_white_are_refused(tmp_path):
    white = STROKE.copy()
    white[..., 0] = 255
    path = saved(tmp_path, Image.fromarray(white))
    with pytest.raises(ValueError, match=r"picture\.png is transparent.*black or white"):
        data.read_images(path)
    stroke = torch.from_numpy(STROKE[..., 1] == 255)
    assert torch.equal(data.read_images(path, "black")[0, 0], torch.where(stroke, 1.0, -1.0))
    with pytest.raises(ValueError, match="background is 'green', allowed are black, white"):
        data.read_images(path, "green")


@pytest.mark.parametrize("mode", ["I", "F", "LAB"])
def test_modes_without_a_known_range_are_refused(tmp_path, mode):
    picture = Image.fromarray(RAMP)
    picture = picture.convert("RGB").convert(mode) if mode == "LAB" else picture.convert(mode)
    with pytest.raises(ValueError, match=rf"picture\.tiff has pixels of Pillow's mode '{mode}'; allowed are"):
        data.read_images(saved(tmp_path, picture, "tiff"))


@pytest.mark.parametrize("suffix", ["gif", "png", "tiff"])
def test_several_frames_are_refused(tmp_path, suffix):
    other = Image.fromarray(255 - RAMP)
    path = saved(tmp_path, Image.fromarray(RAMP), suffix, save_all=True, append_images=[other])
    with pytest.raises(ValueError, match=rf"picture\.{suffix} has 2 frames; allowed is one"):
        data.read_images(path)


@pytest.mark.parametrize("side", [8500, 10_000, 20_000])
def test_huge_pictures_are_refused_before_they_are_decoded(tmp_path, side, recwarn):
    path = saved(tmp_path, Image.new("1", (side, side)))
    with pytest.raises(ValueError, match=r"picture\.png (has 8500x8500 pixels|is too large)"):
        data.read_images(path)
    assert not recwarn.list


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "tiff", "webp"])
def test_truncated_pictures_are_refused_by_name(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = saved(tmp_path, Image.fromarray(noise), suffix)
    whole = path.read_bytes()
    for n_bytes in (0, 1, 10, len(whole) // 2):
        path.write_bytes(whole[:n_bytes])
        refused = pytest.raises(ValueError, match=rf"picture\.{suffix} is (empty|damaged|not a picture)")
        with refused, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own words
            data.read_images(path)


def test_altered_pictures_raise_nothing_but_value_errors(tmp_path):
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for suffix in ("png", "jpg", "gif", "bmp", "tiff", "webp", "tga", "pcx"):
        path = saved(tmp_path, Image.fromarray(noise), suffix)
        whole = path.read_bytes()
        for _ in range(100):
            altered = bytearray(whole[: generator.integers(1, len(whole) + 1)])
            altered[generator.integers(len(altered))] = generator.integers(256)
            path.write_bytes(altered)
            with contextlib.suppress(ValueError), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert data.read_images(path).shape[1] in (1, 3)


def test_only_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for name, kind in (("none.png", FileNotFoundError), ("", IsADirectoryError), ("pipe.png", ValueError)):
        with pytest.raises(kind, match=str(tmp_path / name)):
            data.read_images(tmp_path / name)


@pytest.mark.parametrize("dtype", [">f4", "<f2", "<f8", "g", "u1"])
def test_arrays_of_every_byte_order_and_width(tmp_path, dtype):
    values = RAMP if dtype == "u1" else (RAMP / 127.5 - 1).astype(dtype)
    np.save(tmp_path / "a.npy", np.asfortranarray(values))
    (tmp_path / "a.npy").rename(tmp_path / "a.NPY")
    image = data.read_images(tmp_path / "a.NPY")
    assert image.dtype == torch.float32 and image.shape == (1, 1, 8, 8)
    torch.testing.assert_close(image[0, 0], EXPECTED, rtol=0, atol=1e-3 if dtype == "<f2" else 1e-6)


def test_arrays_that_lie_about_their_size_are_refused(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, RAMP)
    for wrong in (b"(999999999999, 8)", b"(9, 8)", b"(-8, 8)", b"(8, "):
        whole = path.read_bytes().replace(b"(8, 8)", wrong)
        (tmp_path / "b.npy").write_bytes(whole)
        with pytest.raises(ValueError, match=r"b\.npy is not a \.npy file of numbers, or it is damaged"):
            data.read_images(tmp_path / "b.npy")


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((0, 8, 8), np.uint8), "holds no pixels"),
        (np.zeros((8, 8, 3), np.uint8), r"allowed are \[H, W\]"),
        (np.full((8, 8), 1e300), "outside"),
        (np.zeros((8, 8), np.uint16), "uint16"),
        (np.zeros((8, 8), "U3"), "<U3"),
        (np.array([[None]]), "not a .npy file of numbers"),
    ],
)
def test_arrays_that_are_no_pictures_are_refused(tmp_path, array, words):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=rf"a\.npy .*{words}"):
        data.read_images(tmp_path / "a.npy")
