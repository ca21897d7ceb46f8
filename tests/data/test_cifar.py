"""CIFAR's official files: binary and python version, folder and archive, and what pretends to be one."""

import hashlib
import pickle
import shutil
import struct
import tarfile

import numpy as np
import pytest

import jaxbatch as jb
from jaxbatch.data import official
from jaxbatch.data.published import CIFAR, CifarVersion, FileFacts


# CIFAR: images as planes; row r of the made-up batch holds bytes that tell channel, row and column apart.
def cifar_rows(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


def python2_pickle(rows, labels, label_key):
    """What Python 2's cPickle wrote for {'data': uint8 array, label_key: list}, protocol 2."""

    def short_string(text):
        return b"U" + bytes([len(text)]) + text.encode()

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01"
        + b"M" + struct.pack("<H", rows.shape[0]) + b"M" + struct.pack("<H", rows.shape[1])
        + b"\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + struct.pack("<i", rows.size) + rows.tobytes() + b"tb"
    )  # fmt: skip
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + short_string(label_key) + numbers + short_string("data") + array + b"u."


@pytest.mark.parametrize(("name", "key"), [("cifar10", "labels"), ("cifar100", "fine_labels")])
def test_cifar_python_version_decodes_as_the_binary_version(name, key):
    rows, labels = cifar_rows(5), [3, 1, 4, 1, 5]
    blob = python2_pickle(rows, labels, key)
    theirs = pickle.loads(blob, encoding="bytes")  # the made-up file is what Python itself can read
    np.testing.assert_array_equal(theirs[b"data"], rows)
    images, found = official.decode_cifar_python(blob, name)
    coarse = [] if name == "cifar10" else [np.zeros(5, np.uint8)[:, None]]
    binary = np.concatenate([*coarse, np.array(labels, np.uint8)[:, None], rows], axis=1).tobytes()
    expected_images, expected = official.decode_cifar_binary(binary, name)
    np.testing.assert_array_equal(images, expected_images)
    np.testing.assert_array_equal(found, expected)
    assert found.tolist() == labels
    assert images[2, 5, 7, 1] == rows[2, 1024 + 5 * 32 + 7]  # green plane, row 5, column 7


def test_cifar_python_version_runs_nothing_it_names(tmp_path):
    class Evil:
        def __reduce__(self):
            return (eval, (f"open({str(tmp_path / 'evil')!r}, 'w')",))

    with pytest.raises(ValueError, match="not a CIFAR python-version file"):
        official.decode_cifar_python(pickle.dumps({b"data": Evil(), b"labels": Evil()}, protocol=2), "cifar10")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("blob", [b"", b"garbage", pickle.dumps([1]), pickle.dumps({b"data": 3}), b"\x80\x02}q\x01."])
def test_cifar_python_version_refuses_other_pickles(blob):
    with pytest.raises(ValueError, match="not a CIFAR python-version file"):
        official.decode_cifar_python(blob, "cifar10")


def test_cifar_binary_of_a_wrong_length():
    with pytest.raises(ValueError, match="not a whole number of rows"):
        official.decode_cifar_binary(b"x" * 3074, "cifar10")


@pytest.fixture
def small_cifar(tmp_path, monkeypatch):
    """CIFAR-10's two forms in small, registered as the published ones; writes one of them where asked."""
    rows = {name: cifar_rows(2, seed) for seed, name in enumerate(CIFAR["cifar10"][0].files)}
    labels = {name: [index, 9 - index] for index, name in enumerate(rows)}
    blobs = [{}, {}]
    for binary, python in zip(*(version.files for version in CIFAR["cifar10"])):
        joined = np.concatenate([np.array(labels[binary], np.uint8)[:, None], rows[binary]], axis=1)
        blobs[0][binary] = joined.tobytes()
        blobs[1][python] = python2_pickle(rows[binary], labels[binary], "labels")
    versions = []
    for version, files in zip(CIFAR["cifar10"], blobs):
        facts = {file: FileFacts(len(blob), hashlib.md5(blob).hexdigest()) for file, blob in files.items()}
        versions.append(CifarVersion(version.folder, version.archive, facts))
    monkeypatch.setitem(CIFAR, "cifar10", tuple(versions))
    expected = np.concatenate([rows[name] for name in list(rows)[:5]]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)

    def write(form, as_archive):
        version, files = versions[form], blobs[form]
        folder = tmp_path / "data" / version.folder
        folder.mkdir(parents=True)
        for file, blob in files.items():
            (folder / file).write_bytes(blob)
        (folder / "readme.html").write_text("not needed")
        if as_archive:
            with tarfile.open(tmp_path / "data" / version.archive, "w:gz") as archive:
                archive.add(folder, arcname=version.folder)
            shutil.rmtree(folder)
        return tmp_path / "data", version

    return write, expected


@pytest.mark.parametrize("as_archive", [False, True])
@pytest.mark.parametrize("form", [0, 1])
def test_cifar_folders_and_archives(cache, small_cifar, form, as_archive):
    write, expected = small_cifar
    folder, _ = write(form, as_archive)
    dataset = jb.load_dataset("cifar10", data_dir=folder)
    np.testing.assert_array_equal(dataset.train_images, expected)
    assert dataset.test_labels.tolist() == [5, 4] and dataset.mean == (0.4914, 0.4822, 0.4465)


def test_broken_archives(cache, small_cifar):
    write, _ = small_cifar
    folder, version = write(0, True)
    path = folder / version.archive
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="archive is broken"):
        jb.load_dataset("cifar10", data_dir=folder)
    with tarfile.open(path, "w:gz"):
        pass
    with pytest.raises(ValueError, match="archive lacks data_batch_1.bin"):
        jb.load_dataset("cifar10", data_dir=folder)
