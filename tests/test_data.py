"""Data sets: decoding, checksums, the order in which sources are tried, and one clear line for what goes wrong."""

import gzip
import hashlib
import io
import shutil
import struct
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

import jaxbatch as jb
from jaxbatch.data import official, prepared, published
from jaxbatch.data.published import CIFAR, IDX_GZ, IDX_ROLES, FileFacts


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
    "one bit": (lambda blob: blob[:-1] + bytes([blob[-1] ^ 1]), "checksum [0-9a-f]{64}, the official file has"),
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
    with pytest.raises(FileNotFoundError, match="data_dir='/no/such' is no folder"):
        jb.load_dataset("mnist", data_dir="/no/such")
    monkeypatch.setenv("JAXBATCH_DATA_DIR", "/no/such")
    with pytest.raises(FileNotFoundError, match="JAXBATCH_DATA_DIR='/no/such'"):
        jb.load_dataset("mnist")


@pytest.mark.filterwarnings("ignore")  # TFDS and protobuf warn as they are imported
def test_no_network_is_one_line(cache, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("socket.create_connection", refuse)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with pytest.raises(ConnectionError, match="kmnist: could not be downloaded .*'digits'") as error:
        jb.load_dataset("kmnist", data_dir=tmp_path)
    assert "\n" not in str(error.value)


def test_reachability_is_left_to_a_proxy_where_there_is_one(monkeypatch):
    monkeypatch.setattr("socket.create_connection", lambda *_: pytest.fail("went past the proxy"))
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://proxy:3128"})
    prepared.check_reachable("https://example.org/file.gz")


@pytest.mark.filterwarnings("ignore")
def test_download_through_tfds(cache, small_mnist, monkeypatch):
    """The official files are fetched from the addresses TFDS has, verified, and found again the next time."""
    import tensorflow_datasets as tfds

    folder, arrays = small_mnist
    asked = []

    def download(self, urls):
        asked.append(urls)
        return {file: folder / "mnist" / url.rsplit("/", 1)[-1] for file, url in urls.items()}

    monkeypatch.setattr(tfds.download.DownloadManager, "download", download)
    monkeypatch.setattr(prepared, "check_reachable", lambda url: None)
    np.testing.assert_array_equal(jb.load_dataset("mnist").train_images[..., 0], arrays[0])
    assert set(asked[0]) == {f"{role}.gz" for role in IDX_ROLES}
    jb.load_dataset("mnist")
    assert len(asked) == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist"])
def test_our_digests_are_those_that_tfds_has_registered(tmp_path, name):
    import tensorflow_datasets as tfds

    registered = tfds.builder(name, data_dir=str(tmp_path)).url_infos
    theirs = {url.rsplit("/", 1)[-1]: (info.size, info.checksum) for url, info in registered.items()}
    assert theirs == {f"{role}.gz": tuple(facts) for role, facts in published.IDX_GZ[name].items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_tfds_fetches_the_archive_that_we_read(tmp_path, name):
    import tensorflow_datasets as tfds

    registered = tfds.builder(name, data_dir=str(tmp_path)).url_infos
    assert CIFAR[name][0].archive in {url.rsplit("/", 1)[-1] for url in registered}


@pytest.fixture
def prepared_folder(tmp_path):
    """A small data set in MNIST's form, prepared by TFDS as array_record without TensorFlow."""
    pytest.importorskip("array_record")
    import tensorflow_datasets as tfds

    images = np.random.default_rng(1).integers(0, 256, (5, 28, 28, 1), dtype=np.uint8)

    with tfds.core.registered.skip_registration():
        return _make_prepare(tfds, tmp_path, images)


def _make_prepare(tfds, folder, images):
    class Mnist(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("3.0.1")

        def _info(self):
            features = {"image": tfds.features.Image(shape=(28, 28, 1)), "label": tfds.features.ClassLabel(num_classes=10)}
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager):
            return {"train": self._generate_examples(0, 3), "test": self._generate_examples(3, 5)}

        def _generate_examples(self, first, last):
            for index in range(first, last):
                png = io.BytesIO()  # TFDS takes encoded images as they are; arrays it would encode with TensorFlow
                PIL.Image.fromarray(images[index, ..., 0]).save(png, "PNG")
                png.seek(0)
                yield index, {"image": png, "label": index}

    def prepare(file_format):
        builder = Mnist(data_dir=str(folder), file_format=file_format)
        builder.download_and_prepare()
        return folder, images

    return prepare


@pytest.mark.filterwarnings("ignore")
def test_prepared_tfds_folder_without_tensorflow(cache, prepared_folder):
    folder, images = prepared_folder("array_record")
    assert prepared.is_prepared("mnist", folder)
    dataset = jb.load_dataset("mnist", data_dir=folder)
    both = np.concatenate([dataset.train_images, dataset.test_images])
    labels = np.concatenate([dataset.train_labels, dataset.test_labels])
    np.testing.assert_array_equal(both, images[labels])  # TFDS shuffles when it writes
    assert sorted(dataset.train_labels.tolist()) == [0, 1, 2]
    assert "tensorflow" not in sys.modules


@pytest.mark.filterwarnings("ignore")
def test_prepared_tfrecord_folder_needs_tensorflow(cache, prepared_folder, monkeypatch):
    folder, _ = prepared_folder("array_record")
    (info,) = folder.glob("mnist/*/dataset_info.json")
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"prepared as tfrecord.*pip install 'jaxbatch\[prepare\]'") as error:
        jb.load_dataset("mnist", data_dir=folder)
    assert "\n" not in str(error.value)


def test_nothing_imports_tensorflow_datasets_before_it_is_needed():
    code = "import sys, jaxbatch as jb; jb.load_dataset('digits'); assert 'tensorflow_datasets' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "train", "test", "first_labels", "mean"),
    [
        ("mnist", 60_000, 10_000, [5, 0, 4, 1, 9], 33.318421),
        ("cifar10", 50_000, 10_000, [6, 9, 9, 4, 1], 120.707566),
        ("cifar100", 50_000, 10_000, [19, 29, 0, 11, 1], 121.936059),
    ],
)
def test_official_files(real_data_dir, name, train, test, first_labels, mean):
    if official.find_files(name, real_data_dir) is None:
        pytest.skip(f"no {name} under JAXBATCH_DATA_DIR")
    dataset = jb.load_dataset(name, data_dir=real_data_dir)
    assert (len(dataset.train_labels), len(dataset.test_labels)) == (train, test)
    assert dataset.train_labels[:5].tolist() == first_labels
    assert dataset.train_images.mean() == pytest.approx(mean, abs=1e-4)
    assert set(np.bincount(dataset.test_labels)) == {test // dataset.num_classes} or name == "mnist"
