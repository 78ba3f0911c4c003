"""Data sets in the layouts that people have on their disks; damaged and hostile files."""

from __future__ import annotations

import gzip
import pickle
import pickletools

import numpy as np
import pytest
import torch

from bop2nd_fast import data
from bop2nd_fast.data import plain_pickle

PIXELS = 3 * 32 * 32


def pixels(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, PIXELS), dtype=np.uint8)


def python_2(tree) -> bytes:
    """A pickle as Python 2 wrote it: protocol 2, text as bytes strings."""
    return pickle.dumps(tree, protocol=2)


def write_cifar10_python(folder, n=3):
    folder.mkdir(parents=True)
    for i, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        content = {b"data": pixels(n, i), b"labels": [i] * n, b"batch_label": b"x", b"filenames": [b"a"] * n}
        (folder / name).write_bytes(python_2(content))


# ------------------------------------------------------------------------------------------------ CIFAR


def test_cifar10_is_the_same_in_both_layouts(tmp_path):
    write_cifar10_python(tmp_path / "cifar-10-batches-py")
    binary = tmp_path / "binary"
    binary.mkdir()
    for i, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        labels = np.full((3, 1), i, np.uint8)
        np.concatenate([labels, pixels(3, i)], 1).tofile(binary / f"{name}.bin")
    one, other = data.get("cifar10", tmp_path), data.get("cifar10", binary)
    assert one.classes == other.classes and one.classes[9] == "truck"
    for part in ("train_images", "train_labels", "test_images", "test_labels"):
        assert torch.equal(getattr(one, part), getattr(other, part)), part
    assert one.train_labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
    torch.testing.assert_close(
        one.train_images[0, 0, 0, 0], torch.tensor(pixels(3, 0)[0, 0] / 127.5 - 1).float()
    )


@pytest.mark.parametrize("layout", ["binary", "python"])
def test_cifar100_has_its_fine_labels_and_their_names(tmp_path, layout):
    names = [f"class{i}" for i in range(100)]
    folder = tmp_path / f"cifar-100-{layout}"
    folder.mkdir()
    for name, n in (("train", 5), ("test", 2)):
        fine = list(range(95, 95 + n))
        if layout == "binary":
            labels = np.array([[7, f] for f in fine], np.uint8)  # coarse, fine
            np.concatenate([labels, pixels(n)], 1).tofile(folder / f"{name}.bin")
        else:
            content = {b"data": pixels(n), b"fine_labels": fine, b"coarse_labels": [7] * n}
            (folder / name).write_bytes(python_2(content))
    if layout == "binary":
        (folder / "fine_label_names.txt").write_text("\n".join(names) + "\n")
    else:
        (folder / "meta").write_bytes(python_2({b"fine_label_names": [n.encode() for n in names]}))
    split = data.cifar100(tmp_path)
    assert split.classes == tuple(names)
    assert split.train_labels.tolist() == [95, 96, 97, 98, 99] and len(split.test_images) == 2
    torch.testing.assert_close(split.test_images.flatten(1), torch.tensor(pixels(2)).float() / 127.5 - 1)


def test_a_folder_without_the_set_says_what_it_wants(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"cifar-100-binary \(train\.bin, test\.bin\) or cifar-100-python"
    ):
        data.get("cifar100", tmp_path)
    (tmp_path / "train.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"lacks test\.bin"):
        data.get("cifar100", tmp_path)


@pytest.mark.parametrize(
    "content, said",
    [
        ({b"labels": [0, 1]}, "no 'data'"),
        ({b"data": pixels(2)}, "no 'labels'"),
        ({b"data": pixels(2), b"labels": [0]}, "2 whole numbers"),
        ({b"data": pixels(2), b"labels": [0, 10]}, "labels 0 to 10"),
        ({b"data": pixels(2), b"labels": [0, -1]}, "labels -1 to 0"),
        ({b"data": pixels(2).astype(np.float32), b"labels": [0, 1]}, "uint8"),
        ({b"data": pixels(2)[:, :100], b"labels": [0, 1]}, "uint8"),
        ([1, 2], "no 'data'"),
    ],
)
def test_a_python_batch_of_another_form_is_refused(tmp_path, content, said):
    write_cifar10_python(tmp_path / "p")
    (tmp_path / "p" / "data_batch_2").write_bytes(python_2(content))
    with pytest.raises(ValueError, match=said) as caught:
        data.cifar10(tmp_path / "p")
    assert "data_batch_2" in str(caught.value)


# ------------------------------------------------------------------------------------------------ pickles


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data_comes_through_every_protocol(tmp_path, protocol):
    tree = {
        "a": [1, 2.5, None, True, "text", b"bytes", (1, [2])],
        "u1": pixels(2)[:, :7],
        "i8": np.arange(6).reshape(2, 3),
        "big": np.arange(3, dtype=">i4"),
        "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "empty": np.zeros((0, 4), np.float32),
    }
    path = tmp_path / "x"
    path.write_bytes(pickle.dumps(tree, protocol=protocol))
    try:
        read = plain_pickle.load(path)
    except plain_pickle.PlainPickleError as error:
        # NumPy writes arrays of protocol 5 through another function, those of 0 and 1 through copyreg
        assert protocol in (0, 1, 5), error
        return
    read = {k.decode() if isinstance(k, bytes) else k: v for k, v in read.items()}
    assert read["a"] == tree["a"]
    for key, value in tree.items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(read[key], value)
            assert read[key].dtype == value.dtype.newbyteorder("=")


class Runs:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def test_nothing_that_a_pickle_names_is_run(tmp_path):
    import os

    marker = tmp_path / "ran"
    path = tmp_path / "x"
    hostile = [
        Runs(os.system, f"touch {marker}"),
        Runs(eval, f"open({str(marker)!r}, 'w')"),
        Runs(np.load, str(path)),
        np.array([Runs(os.system, f"touch {marker}")], dtype=object),
        np.zeros(2, dtype=[("a", "i4")]),
        np.float64(3),
        torch.zeros(2),
        {1, 2},
        Runs,
    ]
    for thing in hostile:
        for protocol in (2, 4, 5):
            path.write_bytes(pickle.dumps({"data": thing}, protocol=protocol))
            with pytest.raises(plain_pickle.PlainPickleError, match="x is not a pickle of plain data"):
                plain_pickle.load(path)
    assert not marker.exists()


def test_what_is_let_through_cannot_be_given_state(tmp_path):
    # _codecs.encode by name, then BUILD with a dict: would set attributes of whatever the name stands for
    for name in (b"c_codecs\nencode\n", b"cnumpy\ndtype\n", b"cnumpy\nndarray\n"):
        path = tmp_path / "x"
        path.write_bytes(name + b"}(Vx\nI1\nub.")
        pickletools.dis(path.read_bytes(), out=open("/dev/null", "w"))  # noqa: SIM115  a well-formed pickle
        with pytest.raises(plain_pickle.PlainPickleError):
            plain_pickle.load(path)


def test_damaged_pickles_raise_one_type_of_error(tmp_path):
    good = python_2({b"data": pixels(1)[:, :64], b"labels": [3, 4], b"more": [b"a", 1.5]})
    path = tmp_path / "x"
    generator = np.random.default_rng(5)
    refused = 0
    for _ in range(600):
        bad = bytearray(good)
        for _ in range(generator.integers(1, 4)):
            bad[generator.integers(len(bad))] = generator.integers(256)
        path.write_bytes(bad[: generator.integers(1, len(bad) + 1)])
        try:
            plain_pickle.load(path)
        except plain_pickle.PlainPickleError:
            refused += 1
    assert refused > 300


# ------------------------------------------------------------------------------------------------ MNIST


def idx(array, rank_byte=None):
    head = bytes((0, 0, 8, array.ndim if rank_byte is None else rank_byte))
    return head + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def write_mnist(folder, zipped=(), n=(5, 2)):
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(1)
    written = {}
    for part, count in zip(("train", "t10k"), n, strict=True):
        written[f"{part}-images-idx3-ubyte"] = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        written[f"{part}-labels-idx1-ubyte"] = (np.arange(count) % 10).astype(np.uint8)
    for i, (name, array) in enumerate(written.items()):
        content = idx(array)
        if i in zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return written


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
@pytest.mark.parametrize("zipped", [(), (0, 1, 2, 3), (1, 2)])
def test_mnist_reads_idx_files_zipped_or_not(tmp_path, name, zipped):
    written = write_mnist(
        tmp_path / {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}[name] / "raw", zipped
    )
    split = data.get(name, tmp_path)
    assert split.train_images.shape == (5, 1, 28, 28) and split.test_labels.tolist() == [0, 1]
    expected = torch.tensor(written["train-images-idx3-ubyte"]).float() / 127.5 - 1
    torch.testing.assert_close(split.train_images[:, 0], expected)
    assert (split.in_channels, split.image_size, len(split.classes)) == (1, 28, 10)


def damaged():
    good = idx(np.zeros((2, 28, 28), np.uint8))
    yield "no idx file", idx(np.zeros((2, 28, 28), np.uint8), rank_byte=2)
    yield "no idx file", b"\x00\x00\x0d\x03" + good[4:]
    yield "no idx file", b"short"
    yield "only 1567", good[:-1]
    yield "has more", good + b"x"
    yield "no set of pictures", good[:4] + b"\xff" * 12 + good[16:]
    yield "images, .* labels", idx(np.zeros((3, 28, 28), np.uint8))


@pytest.mark.parametrize("said, content", list(damaged()))
@pytest.mark.parametrize("zipped", [False, True])
def test_damaged_idx_files_are_named(tmp_path, said, content, zipped):
    write_mnist(tmp_path, n=(2, 2))
    name = "train-images-idx3-ubyte"
    (tmp_path / name).unlink()
    path = tmp_path / (f"{name}.gz" if zipped else name)
    path.write_bytes(gzip.compress(content) if zipped else content)
    with pytest.raises(ValueError, match=said) as caught:
        data.mnist(tmp_path)
    assert name in str(caught.value)
    if zipped:
        path.write_bytes(gzip.compress(idx(np.zeros((2, 28, 28), np.uint8)))[:-20])
        with pytest.raises(ValueError, match="damaged"):
            data.mnist(tmp_path)


def test_missing_idx_files_are_all_named(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte").unlink()
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="lacks train-labels-idx1-ubyte, t10k-images-idx3-ubyte"):
        data.mnist(tmp_path)


# ------------------------------------------------------------------------------------------------ by name


def test_sets_are_found_by_name(tmp_path):
    assert data.get("digits").name == "digits"
    with pytest.raises(ValueError, match=r"'svhn'; there are digits, cifar10, cifar100, mnist"):
        data.get("svhn")
    with pytest.raises(ValueError, match="needs --data-dir"):
        data.get("mnist")
    with pytest.raises(ValueError, match="no folder"):
        data.get("digits", tmp_path)
