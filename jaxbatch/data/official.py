"""Finds, verifies and decodes the data sets' official files.

MNIST, Fashion-MNIST and KMNIST come as IDX files (plain or gzipped). CIFAR comes in a "binary" and a "python" version, each
as a folder or as its original archive. A file is used only if its length and checksum agree with the published ones. So a
broken download gives an error here, and not a strange accuracy later.
"""

import gzip
import hashlib
import io
import pathlib
import pickle
import tarfile
import zlib

import numpy as np

from jaxbatch.data.published import CIFAR, FOLDERS, IDX_GZ, IDX_ROLES, PLAIN_IDX_LENGTHS, PLAIN_MNIST_DIGESTS, CifarVersion, FileFacts

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # train images, labels, test images, labels


def find_files(name: str, data_dir: pathlib.Path) -> list[pathlib.Path] | None:
    """The official files (or the one archive) of data set ``name`` under ``data_dir``, or None.

    Raises:
        ValueError: some of the data set's files are there and others are missing.
    """
    folders = [data_dir / folder for folder in FOLDERS[name]] + [data_dir]
    if name in IDX_GZ:
        sets = [[_either(folder / role) for role in IDX_ROLES] for folder in folders]
    else:
        sets = []
        for version in CIFAR[name]:
            for folder in folders:
                sets.append([folder / version.folder / file for file in version.files])
                sets.append([folder / version.archive])
            if data_dir.name == version.folder:
                sets.append([data_dir / file for file in version.files])
    for paths in sets:
        missing = [path for path in paths if not path.exists()]
        if not missing:
            return paths
        if len(missing) < len(paths):
            raise ValueError(
                f"{name}: {missing[0].parent} holds {len(paths) - len(missing)} of {len(paths)} official files; "
                f"missing: {', '.join(path.name for path in missing)}. Copy them there, or remove the folder."
            )
    return None


def _either(path: pathlib.Path) -> pathlib.Path:
    gzipped = path.with_name(path.name + ".gz")
    return path if path.exists() and not gzipped.exists() else gzipped


def read_files(name: str, paths: list[pathlib.Path]) -> Arrays:
    """Verifies and decodes what :func:`find_files` found.

    Returns:
        ``uint8`` images ``(N, H, W, C)`` and ``int32`` labels ``(N,)``: train images, train labels, test
        images, test labels.

    Raises:
        ValueError: a file is truncated, too long, has a wrong checksum, or does not decode.
    """
    if name in IDX_GZ:
        return _read_idx_set(name, paths)
    if len(paths) == 1 and paths[0].name.endswith(".tar.gz"):
        version = next(v for v in CIFAR[name] if v.archive == paths[0].name)
        blobs = _read_archive(paths[0], version)
    else:
        version = next(v for v in CIFAR[name] if list(v.files) == [path.name for path in paths])
        blobs = {path.name: path.read_bytes() for path in paths}
    decode = decode_cifar_python if "py" in version.folder else decode_cifar_binary
    parts = []
    for file, facts in version.files.items():
        verify(blobs[file], facts, f"{name}: {paths[0].parent / file}")
        parts.append(decode(blobs.pop(file), name))
    images, labels = zip(*parts)
    return np.concatenate(images[:-1]), np.concatenate(labels[:-1]), images[-1], labels[-1]


def _read_idx_set(name: str, paths: list[pathlib.Path]) -> Arrays:
    arrays = []
    for role, path in zip(IDX_ROLES, paths):
        blob, label = path.read_bytes(), f"{name}: {path}"
        if path.suffix == ".gz":
            verify(blob, IDX_GZ[name][role], label)
            try:
                blob = gzip.decompress(blob)
            except (OSError, EOFError, zlib.error) as error:
                raise ValueError(f"{label}: cannot be unzipped ({error}). Download it again.") from None
        else:
            digest = PLAIN_MNIST_DIGESTS[role] if name == "mnist" else None
            verify(blob, FileFacts(PLAIN_IDX_LENGTHS[role], digest), label)
        arrays.append(decode_idx(blob, label))
    train_images, train_labels, test_images, test_labels = arrays
    return train_images[..., None], train_labels.astype(np.int32), test_images[..., None], test_labels.astype(np.int32)


def verify(blob: bytes, facts: FileFacts, label: str) -> None:
    """Compares a file's bytes with the published length and digest; ``label`` names the file in the error."""
    if facts.length is not None and len(blob) != facts.length:
        state = "truncated" if len(blob) < facts.length else "too long"
        raise ValueError(f"{label}: {state}, {len(blob):,} bytes where the official file has {facts.length:,}. Download it again.")
    sha256 = hashlib.sha256(blob).hexdigest()
    # Fashion-MNIST and KMNIST use MNIST's file names, so files are easily mixed up: the error says which file this is.
    owner = _known_digests().get(sha256)
    if facts.digest is None:
        if owner is not None:
            raise ValueError(f"{label}: this is {owner}. Put the right file in its place.")
        return
    digest = sha256 if len(facts.digest) == 64 else hashlib.md5(blob).hexdigest()
    if digest != facts.digest:
        what = f"this is {owner}" if owner else f"its checksum is {digest}, and that of the official file is {facts.digest}"
        raise ValueError(f"{label}: {what}. Download it again.")


def _known_digests() -> dict[str | None, str]:
    known = {facts.digest: f"{name}'s {role}.gz" for name, files in IDX_GZ.items() for role, facts in files.items()}
    return known | {digest: f"mnist's {role}" for role, digest in PLAIN_MNIST_DIGESTS.items()}


def decode_idx(blob: bytes, label: str = "IDX file") -> np.ndarray:
    """Decodes an IDX file of unsigned bytes (two zero bytes, type 8, rank, big-endian sizes, data).

    Example:
        >>> decode_idx(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9]))
        array([7, 8, 9], dtype=uint8)
    """
    if len(blob) < 4 or blob[:3] != b"\x00\x00\x08" or len(blob) < 4 + 4 * blob[3]:
        raise ValueError(f"{label}: this is not an IDX file of unsigned bytes (header {blob[:4].hex() or 'empty'}).")
    rank = blob[3]
    shape = tuple(int(size) for size in np.frombuffer(blob, ">u4", rank, 4))
    expected = 4 + 4 * rank + int(np.prod(shape, dtype=np.int64))
    if len(blob) != expected:
        raise ValueError(f"{label}: {len(blob):,} bytes where its header {shape} asks for {expected:,}.")
    return np.frombuffer(blob, np.uint8, offset=4 + 4 * rank).reshape(shape)


def decode_cifar_binary(blob: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Decodes a CIFAR "binary version" file: label byte(s), then 3,072 bytes as R, G, B planes, a row.

    CIFAR-100 rows begin with the coarse label and the fine label; the fine label (100 classes) is returned.
    """
    num_labels = 1 if name == "cifar10" else 2
    if len(blob) % (num_labels + 3072):
        raise ValueError(f"{name}: {len(blob):,} bytes are not a whole number of rows of {num_labels + 3072}.")
    rows = np.frombuffer(blob, np.uint8).reshape(-1, num_labels + 3072)
    return _planes_to_images(rows[:, num_labels:]), rows[:, num_labels - 1].astype(np.int32)


def decode_cifar_python(blob: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Decodes a CIFAR "python version" file without running any code that it names.

    The file is a pickle of a dict that holds one NumPy array. Every class or function that the pickle names is replaced by
    :class:`_Inert`, which only stores its arguments, so nothing is imported or called. Then the array is rebuilt from the
    stored shape and bytes.
    """
    try:
        table = _InertUnpickler(io.BytesIO(blob), encoding="bytes").load()
        shape, raw = table[b"data"].state[1], table[b"data"].state[4]
        labels = table[b"labels" if name == "cifar10" else b"fine_labels"]
        rows = np.frombuffer(raw, np.uint8).reshape(shape)
        return _planes_to_images(rows), np.asarray(labels, np.int32)
    except (pickle.UnpicklingError, EOFError, KeyError, AttributeError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: this is not a CIFAR python-version file ({type(error).__name__}: {error}).") from None


class _Inert:
    """Stands in for every class and function that a pickle names."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __setstate__(self, state):
        self.state = state


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        return _Inert


def _planes_to_images(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _read_archive(path: pathlib.Path, version: CifarVersion) -> dict[str, bytes]:
    blobs = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                file = pathlib.PurePosixPath(member.name).name
                if member.isfile() and file in version.files:
                    blobs[file] = archive.extractfile(member).read()  # type: ignore[union-attr]  # a file, as was asked
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: the archive is broken ({error}). Download it again.") from None
    missing = [file for file in version.files if file not in blobs]
    if missing:
        raise ValueError(f"{path}: the archive lacks {', '.join(missing)}. Download it again.")
    return blobs
