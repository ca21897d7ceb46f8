"""Data sets: decoding, checksums, the order in which sources are tried, and one clear line for what is wrong."""

import gzip
import hashlib
import shutil
import struct

import numpy as np
import pytest

import jaxbatch as jb
from jaxbatch.data import official
from jaxbatch.data.published import IDX_GZ, IDX_ROLES, FileFacts


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def small_mnist(tmp_path, monkeypatch):
    """A folder with a small data set in MNIST's form, and its facts registered as the published ones."""
    random = np.random.default_rng(0)
    arrays = [
        random.integers(0, 256, (6, 28, 28), dtype=np.uint8),
        np.arange(6, dtype=np.uint8),
        random.integers(0, 256, (3, 28, 28), dtype=np.uint8),
        np.array([7, 8, 9], np.uint8),
    ]
    folder = tmp_path / "data" / "mnist"
    folder.mkdir(parents=True)
    facts, plain_lengths, plain_digests = {}, {}, {}
    for role, array in zip(IDX_ROLES, arrays):
        blob = gzip.compress(idx(array), mtime=0)
        (folder / f"{role}.gz").write_bytes(blob)
        facts[role] = FileFacts(len(blob), hashlib.sha256(blob).hexdigest())
        plain_lengths[role] = len(idx(array))
        plain_digests[role] = hashlib.sha256(idx(array)).hexdigest()
    monkeypatch.setitem(IDX_GZ, "mnist", facts)
    monkeypatch.setattr(official, "PLAIN_IDX_LENGTHS", plain_lengths)
    monkeypatch.setattr(official, "PLAIN_MNIST_DIGESTS", plain_digests)
    return tmp_path / "data", arrays


def test_digits_are_the_originals_enlarged():
    from sklearn import datasets

    digits = jb.load_dataset("digits")
    images = np.concatenate([digits.train_images, digits.test_images])
    small = images[:, 2:26:3, 2:26:3, 0]
    originals = np.rint(datasets.load_digits().images * 255 / 16).astype(np.uint8)
    assert {row.tobytes() for row in small} == {row.tobytes() for row in originals}
    assert images.dtype == np.uint8 and digits.train_labels.dtype == np.int32
    assert images[:, :2].max() == images[:, 26:].max() == 0
    np.testing.assert_array_equal(small.repeat(3, 1).repeat(3, 2), images[:, 2:26, 2:26, 0])


def test_digits_split_is_stratified_and_fixed():
    first, second = jb.load_dataset("digits"), jb.load_dataset("digits")
    np.testing.assert_array_equal(first.test_images, second.test_images)
    train, test = np.bincount(first.train_labels), np.bincount(first.test_labels)
    assert len(first.train_labels) + len(first.test_labels) == 1797
    assert (np.abs(test / (train + test) - 0.2) < 0.005).all()


@pytest.mark.parametrize("form", ["gz", "plain"])
def test_idx_files(cache, small_mnist, form):
    folder, arrays = small_mnist
    if form == "plain":
        for path in list((folder / "mnist").iterdir()):
            path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
            path.unlink()
    dataset = jb.load_dataset("mnist", data_dir=folder)
    np.testing.assert_array_equal(dataset.train_images[..., 0], arrays[0])
    np.testing.assert_array_equal(dataset.test_labels, arrays[3])
    assert dataset.train_images.shape == (6, 28, 28, 1) and dataset.num_classes == 10


def test_files_may_lie_in_the_folder_itself_and_in_the_environment(cache, small_mnist, monkeypatch):
    folder, arrays = small_mnist
    monkeypatch.setenv("JAXBATCH_DATA_DIR", str(folder / "mnist"))
    np.testing.assert_array_equal(jb.load_dataset("mnist").train_labels, arrays[1])


def test_decoded_arrays_are_kept_and_a_changed_file_is_noticed(cache, small_mnist, monkeypatch):
    folder, arrays = small_mnist
    jb.load_dataset("mnist", data_dir=folder)
    with monkeypatch.context() as context:
        context.setattr(official, "read_files", lambda *_: pytest.fail("decoded twice"))
        np.testing.assert_array_equal(jb.load_dataset("mnist", data_dir=folder).test_images[..., 0], arrays[2])
    for kept in (cache / "decoded").iterdir():
        kept.write_bytes(kept.read_bytes()[:100])  # a kill while writing: decoded again
    np.testing.assert_array_equal(jb.load_dataset("mnist", data_dir=folder).test_images[..., 0], arrays[2])
    path = folder / "mnist" / f"{IDX_ROLES[0]}.gz"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="truncated"):
        jb.load_dataset("mnist", data_dir=folder)


def test_read_only_cache_costs_nothing_but_time(cache, small_mnist):
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text("a file where the folder should be")
    assert len(jb.load_dataset("mnist", data_dir=small_mnist[0]).train_labels) == 6


DAMAGE = {
    "truncated": (lambda blob: blob[:-1], r"train-images-idx3-ubyte.gz: truncated, [\d,]+ bytes where .* Download it again"),
    "too long": (lambda blob: blob + b"x", "too long"),
    "one bit": (lambda blob: blob[:-1] + bytes([blob[-1] ^ 1]), "checksum is [0-9a-f]{64}, and that of the official file is"),
    "empty": (lambda blob: b"", "truncated, 0 bytes"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files(cache, small_mnist, name):
    damage, message = DAMAGE[name]
    path = small_mnist[0] / "mnist" / f"{IDX_ROLES[0]}.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as error:
        jb.load_dataset("mnist", data_dir=small_mnist[0])
    assert "\n" not in str(error.value)


def test_missing_file_is_named(cache, small_mnist):
    (small_mnist[0] / "mnist" / f"{IDX_ROLES[3]}.gz").unlink()
    with pytest.raises(ValueError, match="3 of 4 official files; missing: t10k-labels-idx1-ubyte.gz"):
        jb.load_dataset("mnist", data_dir=small_mnist[0])


@pytest.mark.parametrize("plain", [False, True])
def test_another_data_set_s_files_are_recognised(cache, small_mnist, monkeypatch, plain):
    # Fashion-MNIST uses MNIST's file names; plain files have no published digest of their own.
    folder = small_mnist[0] / "fashion_mnist"
    shutil.copytree(small_mnist[0] / "mnist", folder)
    if plain:
        for path in list(folder.iterdir()):
            path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
            path.unlink()
    else:
        sizes = {role: FileFacts(facts.length, "0" * 64) for role, facts in IDX_GZ["mnist"].items()}
        monkeypatch.setitem(IDX_GZ, "fashion_mnist", sizes)
    with pytest.raises(ValueError, match="this is mnist's train-images-idx3-ubyte"):
        jb.load_dataset("fashion_mnist", data_dir=small_mnist[0])


@pytest.mark.parametrize("blob", [b"", b"\0\0\x08", b"\0\0\x0d\x01\0\0\0\x01x", b"\0\0\x08\x01\0\0\0\x05abc", b"\0\0\x08\x03\0\0\0\x01"])
def test_decode_idx_refuses_what_is_no_idx(blob):
    with pytest.raises(ValueError, match="IDX|header"):
        official.decode_idx(blob)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("cifar-10", "cifar10"), ("CIFAR_100", "cifar100"), ("minst", "mnist"), ("FashionMNIST", "fashion_mnist"), ("digit", "digits")],
)
def test_near_misses(wrong, right):
    with pytest.raises(ValueError, match=f"Did you mean '{right}'"):
        jb.load_dataset(wrong)


def test_unknown_names():
    with pytest.raises(ValueError, match="Known: digits, mnist"):
        jb.load_dataset("llama")


def test_data_dir_must_exist(cache, monkeypatch):
    with pytest.raises(FileNotFoundError, match="data_dir='/no/such' is not a folder"):
        jb.load_dataset("mnist", data_dir="/no/such")
    monkeypatch.setenv("JAXBATCH_DATA_DIR", "/no/such")
    with pytest.raises(FileNotFoundError, match="JAXBATCH_DATA_DIR='/no/such'"):
        jb.load_dataset("mnist")
