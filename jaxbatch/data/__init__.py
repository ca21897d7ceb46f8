"""Loads a data set by name, as arrays: ``load_dataset("digits")``.

The arrays come from the first source that has them: the embedded digits; the official files under ``data_dir`` or
``JAXBATCH_DATA_DIR``; a folder there that TensorFlow Datasets (TFDS) has prepared; a download. Decoded arrays are kept in the
user's cache folder (``XDG_CACHE_HOME`` or ``~/.cache``). The cache key holds the files' paths, sizes and times, so that a
changed file is read and verified again.
"""

import contextlib
import difflib
import functools
import hashlib
import os
import pathlib
import zipfile
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8

from jaxbatch.data import digits, official, prepared
from jaxbatch.kinds import checked
from jaxbatch.paths import cache_folder, local_path

_FORMAT = 1  # raise this number when decoding changes, so that old caches are not used


class Dataset(NamedTuple):
    """Arrays of a data set, on the host. ``N`` train, ``M`` test examples."""

    name: str
    train_images: UInt8[np.ndarray, "N H W C"]
    train_labels: Int32[np.ndarray, "N"]
    test_images: UInt8[np.ndarray, "M H W C"]
    test_labels: Int32[np.ndarray, "M"]
    num_classes: int
    mean: tuple[float, ...]  # per channel, of images scaled to [0, 1]
    std: tuple[float, ...]


_CIFAR_MEAN, _CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
# name: (classes, mean, std). The grey data sets are only scaled to [0, 1], as in the MNIST study that
# this library reproduces; CIFAR's constants are those of the published AdaBatch code for both sets.
_FACTS = {
    "digits": (10, (0.0,), (1.0,)),
    "mnist": (10, (0.0,), (1.0,)),
    "fashion_mnist": (10, (0.0,), (1.0,)),
    "kmnist": (10, (0.0,), (1.0,)),
    "cifar10": (10, _CIFAR_MEAN, _CIFAR_STD),
    "cifar100": (100, _CIFAR_MEAN, _CIFAR_STD),
}
DATASETS = tuple(_FACTS)
TEXTS = ("generated", "tiny_shakespeare")  # those of jaxbatch.load_text


@checked
def load_dataset(name: str, *, data_dir: str | os.PathLike | None = None) -> Dataset:
    """Loads a data set by name.

    Args:
        name: one of ``digits`` (embedded), ``mnist``, ``fashion_mnist``, ``kmnist``, ``cifar10``,
            ``cifar100``.
        data_dir: folder with the official files or a prepared TFDS folder. Default: the environment
            variable ``JAXBATCH_DATA_DIR``, else jaxbatch's own cache folder and ``~/tensorflow_datasets``.

    Returns:
        A :class:`Dataset` of ``uint8`` images and ``int32`` labels.

    Raises:
        ValueError: the name is unknown, or a file is incomplete, truncated or has a wrong checksum.
        FileNotFoundError: ``data_dir`` does not exist.
        ConnectionError: there are no local files, and no network.
        ImportError: a prepared folder needs TensorFlow, which is not installed.

    Example:
        >>> dataset = load_dataset("digits")
        >>> dataset.train_images.shape, dataset.test_images.shape, dataset.num_classes
        ((1442, 28, 28, 1), (355, 28, 28, 1), 10)
    """
    if name == "imagenet2012":
        raise ValueError("name='imagenet2012' does not fit into memory: jb.open_images('imagenet2012') opens it as a stream.")
    if name in TEXTS:
        raise ValueError(f"name={name!r} is a text: jb.load_text({name!r}) loads it.")
    if name not in _FACTS:
        raise ValueError(f"unknown dataset name={name!r}.{did_you_mean(name, (*_FACTS, *TEXTS))} Known: {', '.join(_FACTS)}.")
    arrays = digits.load_digits() if name == "digits" else _load_files(name, data_dir)
    num_classes, mean, std = _FACTS[name]
    return Dataset(name, *arrays, num_classes, mean, std)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question with the nearest of the known names, to stand in a message; nothing if none is near.

    Example:
        >>> did_you_mean("tinyshakespear", TEXTS), did_you_mean("weather", TEXTS)
        (" Did you mean 'tiny_shakespeare'?", '')
    """
    by_plain = {_plain(one): one for one in known}
    near = difflib.get_close_matches(_plain(name), by_plain, n=1, cutoff=0.6)
    return f" Did you mean {by_plain[near[0]]!r}?" if near else ""


def pad_images(dataset: Dataset, side: int) -> Dataset:
    """Pads images to at least ``side`` pixels each way, with a border of zeros that is the same on all sides to within a pixel.

    Example:
        >>> pad_images(load_dataset("digits"), 32).test_images.shape
        (355, 32, 32, 1)
    """

    def pad(images):
        missing = [max(0, side - pixels) for pixels in images.shape[1:3]]
        return np.pad(images, [(0, 0), *((one // 2, one - one // 2) for one in missing), (0, 0)])

    return dataset._replace(train_images=pad(dataset.train_images), test_images=pad(dataset.test_images))


def _plain(name: str) -> str:
    return "".join(letter for letter in str(name).lower() if letter.isalnum())


def folders_to_search(name: str, data_dir: str | os.PathLike | None) -> list[pathlib.Path]:
    """Where the files of data set ``name`` may be; a download goes to the first of them.

    Raises:
        FileNotFoundError: ``data_dir`` does not exist, or no folder is named and there is no home.
    """
    given = data_dir or os.environ.get("JAXBATCH_DATA_DIR")
    if given:
        source = "data_dir" if data_dir else "JAXBATCH_DATA_DIR"
        folder = local_path(given, source)
        if not folder.is_dir():
            raise FileNotFoundError(f"{source}={str(given)!r} is not a folder. Name the folder that holds the files.")
        return [folder]
    cache = cache_folder()
    if cache is None:
        raise FileNotFoundError(f"{name}: no folder is named and there is no home folder for it. Set data_dir, JAXBATCH_DATA_DIR or HOME.")
    folders = [cache / "official"]
    with contextlib.suppress(RuntimeError):  # without a home there is no folder of TensorFlow Datasets in it
        folders.append(pathlib.Path("~/tensorflow_datasets").expanduser())
    return folders


def _load_files(name: str, data_dir: str | os.PathLike | None) -> official.Arrays:
    folders = folders_to_search(name, data_dir)
    for folder in folders:
        paths = official.find_files(name, folder)
        if paths is not None:
            return _cached(name, paths, functools.partial(official.read_files, name, paths))
        if prepared.is_prepared(name, folder):
            files = sorted(path for path in (folder / name).rglob("*") if path.is_file())
            return _cached(name, files, functools.partial(prepared.read_prepared, name, folder))
    paths = prepared.download_official(name, folders[0])
    return _cached(name, paths, lambda: official.read_files(name, paths))


def _cached(name: str, sources: list[pathlib.Path], read: Callable[[], official.Arrays]) -> official.Arrays:
    """Returns ``read()``, or its cached result from an earlier call with the same source files."""
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in sources]
    key = hashlib.sha256(repr((_FORMAT, name, stats)).encode()).hexdigest()[:16]
    cache = cache_folder()
    if cache is None:
        return read()
    path = cache / "decoded" / f"{name}-{key}.npz"
    try:
        with open(path, "rb") as file, np.load(file) as kept:
            return tuple(kept[f"arr_{i}"] for i in range(4))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # the file is missing, or incomplete because a run was killed: decode again
    arrays = read()
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as written:
            np.savez(written, *arrays)
        part.replace(path)
    except OSError:  # a full disk or a read-only home costs time next time, not this run
        with contextlib.suppress(OSError):
            part.unlink()
    return arrays
