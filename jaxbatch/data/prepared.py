"""Data sets through TensorFlow Datasets (TFDS): reads a folder that it has prepared, or downloads the official files.

tensorflow-datasets is imported inside the functions, because the import takes seconds and most runs never need it.
"""

import contextlib
import importlib.util
import pathlib
import shutil
import socket
import urllib.parse
import urllib.request

import numpy as np

from jaxbatch.data.published import CIFAR, IDX_GZ


def is_prepared(name: str, folder: pathlib.Path) -> bool:
    """Whether ``folder`` holds data set ``name`` as TFDS prepares it. This looks at files and imports nothing."""
    return any((folder / name).glob("*/dataset_info.json"))


def read_prepared(name: str, folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Reads a prepared TFDS folder: array_record files without TensorFlow, TFRecord files with it.

    Raises:
        ImportError: the folder holds TFRecord files and TensorFlow is not installed.
        ValueError: the folder cannot be read.
    """
    with readable(name, folder):
        builder = open_builder(newest_version(name, folder))
        if is_array_record(builder):
            splits = [_stack(builder.as_data_source(split=split)) for split in ("train", "test")]
        elif importlib.util.find_spec("tensorflow") is None:
            raise ImportError(
                f"{name}: {folder / name} was prepared as {builder.info.file_format.value}, which only TensorFlow "
                "reads. Run pip install 'jaxbatch[prepare]', or prepare it again with file_format='array_record'."
            )
        else:
            import tensorflow_datasets as tfds

            splits = [_stack(tfds.as_numpy(builder.as_dataset(split=split))) for split in ("train", "test")]
    (train_images, train_labels), (test_images, test_labels) = splits
    return train_images, train_labels, test_images, test_labels


@contextlib.contextmanager
def readable(name: str, folder: pathlib.Path):
    """Turns the many kinds of errors that TFDS raises into one line."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(f"{name}: the prepared folder {folder / name} cannot be read ({_one_line(error)}). Prepare it again.") from error


def newest_version(name: str, folder: pathlib.Path) -> pathlib.Path:
    """The folder of the highest prepared version of ``name``."""

    def version(path):
        return [int(part) for part in path.parent.name.split(".") if part.isdigit()]

    return max((folder / name).glob("*/dataset_info.json"), key=version).parent


def open_builder(folder: pathlib.Path):
    """The TFDS builder of a prepared folder."""
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(str(folder))


def is_array_record(builder) -> bool:
    """Whether the folder can be read in any order and without TensorFlow."""
    return builder.info.file_format.value == "array_record"


def _stack(examples) -> tuple[np.ndarray, np.ndarray]:
    images, labels = zip(*((example["image"], example["label"]) for example in examples))
    return np.stack(images).astype(np.uint8), np.asarray(labels, np.int32)


def download_official(name: str, destination: pathlib.Path) -> list[pathlib.Path]:
    """:func:`download_files` for images; the paths are in the order that :func:`official.read_files` takes."""
    wanted = [f"{role}.gz" for role in IDX_GZ[name]] if name in IDX_GZ else [CIFAR[name][0].archive]
    return download_files(name, wanted, destination, embedded="digits")


def download_files(name: str, wanted: list[str], destination: pathlib.Path, *, embedded: str) -> list[pathlib.Path]:
    """Downloads official files of ``name`` from the addresses that TFDS knows; this does not need TensorFlow.

    Args:
        name: of the data set, as TFDS knows it.
        wanted: the names of the files, the last parts of their addresses.
        destination: the folder in which the folder ``name`` is made.
        embedded: the data set that needs no download; the error names it.

    Returns:
        The files under ``destination / name``, in the order of ``wanted``.

    Raises:
        ConnectionError: nothing could be fetched.
    """
    folder = destination / name
    try:
        import tensorflow_datasets as tfds

        builder = tfds.builder(name, data_dir=str(destination / "tfds"))
        urls = {url.rsplit("/", 1)[-1]: url for url in builder.url_infos}
        check_reachable(urls[wanted[0]])
        manager = tfds.download.DownloadManager(
            download_dir=str(destination / "tfds" / "downloads"),
            url_infos=builder.url_infos,
            dataset_name=name,
        )
        fetched = manager.download({file: urls[file] for file in wanted})
    except Exception as error:  # requests, DNS, TLS, TFDS's own: the user needs one line
        raise ConnectionError(
            f"{name}: could not be downloaded ({_one_line(error)}). Put {', '.join(wanted)} into {folder} "
            f"(or pass --data-dir / set JAXBATCH_DATA_DIR to where they are), or use the embedded data set {embedded!r}."
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for file in wanted:
        part = folder / f"{file}.part"
        shutil.copyfile(fetched[file], part)
        paths.append(part.replace(folder / file))
    return paths


def check_reachable(url: str, timeout: float = 10.0) -> None:
    """Raises an OSError at once if a server cannot be reached. TFDS would retry for minutes, with a warning each time.

    Args:
        url: the address of the download.
        timeout: seconds to wait for an answer. Behind a proxy nothing is checked, because only the proxy can reach the server.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme in urllib.request.getproxies():
        return
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    try:
        socket.create_connection((parts.hostname, port), timeout).close()
    except OSError as error:
        raise ConnectionError(f"{parts.hostname} cannot be reached: {error}") from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__
