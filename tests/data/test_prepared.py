"""Data through TensorFlow Datasets: downloads, its checksums, folders that it prepared; and the official files."""

import io
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

import jaxbatch as jb
from jaxbatch.data import official, prepared, published
from jaxbatch.data.published import CIFAR, IDX_ROLES
from tests.data.test_data import small_mnist  # noqa: F401 (fixtures among them)


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
