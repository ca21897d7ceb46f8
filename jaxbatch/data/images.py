"""Data sets of photographs too large for memory: compressed images, read in any order, decoded and cropped one by one.

The images come from the first source that has them: a folder that TensorFlow Datasets (TFDS) has prepared as array_record
(read without TensorFlow); a folder with one folder for each class. Nothing here needs a device, so that worker processes can
use it.

Axes: S × S pixels of a crop.
"""

import functools
import io
import math
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from jaxbatch.data import prepared
from jaxbatch.kinds import checked
from jaxbatch.paths import local_path

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SPLITS = {"train": ("train",), "test": ("validation", "val", "test")}  # the names that the sources use
_SUFFIXES = (".jpeg", ".jpg", ".png")


class ImageFiles(NamedTuple):
    """Compressed images in one folder for each class; the classes are in alphabetical order."""

    paths: tuple[str, ...]
    labels: tuple[int, ...]

    def read(self, index: int) -> tuple[bytes, int]:
        """The bytes of image ``index`` as on disk, and its label."""
        return pathlib.Path(self.paths[index]).read_bytes(), self.labels[index]

    def name_of(self, index: int) -> str:
        """What a message calls image ``index``."""
        return self.paths[index]


class PreparedImages(NamedTuple):
    """Compressed images of one split of a folder that TFDS has prepared; a process opens the folder at its first read."""

    folder: str
    split: str

    def read(self, index: int) -> tuple[bytes, int]:
        """The bytes of image ``index`` as TFDS stored them, and its label."""
        example = _open_split(self.folder, self.split)[index]
        return example["image"], int(example["label"])

    def name_of(self, index: int) -> str:
        """What a message calls image ``index``."""
        return f"image {index} of split {self.split} in {self.folder}"


class ImageDataset(NamedTuple):
    """The places of a data set's images. For data sets that fit into memory there is :class:`jaxbatch.Dataset`."""

    name: str
    train: ImageFiles | PreparedImages
    test: ImageFiles | PreparedImages
    num_train: int
    num_test: int
    num_classes: int
    mean: tuple[float, ...] = IMAGENET_MEAN  # per channel, of images scaled to [0, 1]
    std: tuple[float, ...] = IMAGENET_STD


@checked
def open_images(name: str = "imagenet2012", *, data_dir: str | os.PathLike | None = None) -> ImageDataset:
    """Opens a data set of compressed images by name; it reads only the index.

    Args:
        name: ``imagenet2012``, or any folder of the same form under ``data_dir``: prepared by TFDS as array_record with
            the features ``image`` and ``label``, or ``train/<class>/*.jpeg`` and ``val/<class>/*.jpeg``. ImageNet is only given
            to people who sign its terms, so it is never downloaded here.
        data_dir: the folder that holds ``name``. Default: the environment variable ``JAXBATCH_DATA_DIR``, else
            ``~/tensorflow_datasets``.

    Raises:
        FileNotFoundError: there is no such folder; the message says which folders would do.
        ValueError: the folder has no images, its splits have different classes, or TFDS cannot read it.
    """
    source = "data_dir" if data_dir else "JAXBATCH_DATA_DIR"
    root = local_path(data_dir or os.environ.get("JAXBATCH_DATA_DIR") or "~/tensorflow_datasets", source)
    folder = root / name
    if prepared.is_prepared(name, root):
        return _open_prepared(name, folder)
    if not (folder / "train").is_dir():
        raise FileNotFoundError(
            f"{name}: neither a folder prepared by TFDS (file_format='array_record') nor {folder / 'train'}/<class>/*.jpeg is "
            "there. Set --data-dir or JAXBATCH_DATA_DIR to the folder that holds it."
        )
    (train, classes), (test, others) = (_list_files(folder, split) for split in ("train", "test"))
    if classes != others:
        differing = sorted(set(classes) ^ set(others))
        raise ValueError(f"{name}: train and validation have different classes ({', '.join(differing[:3])} in only one of them).")
    return ImageDataset(name, train, test, len(train.paths), len(test.paths), len(classes))


def _list_files(folder: pathlib.Path, split: str) -> tuple[ImageFiles, list[str]]:
    folders = [folder / name for name in SPLITS[split] if (folder / name).is_dir()]
    if not folders:
        raise FileNotFoundError(f"{folder} has no folder {' or '.join(SPLITS[split])}.")
    classes = sorted(path.name for path in folders[0].iterdir() if path.is_dir())
    pairs = [
        (str(path), label) for label, name in enumerate(classes) for path in sorted((folders[0] / name).iterdir()) if path.suffix.lower() in _SUFFIXES
    ]
    if not pairs:
        raise ValueError(f"{folders[0]} holds no images: <class>/*.jpeg is looked for.")
    paths, labels = zip(*pairs, strict=True)
    return ImageFiles(paths, labels), classes


def _open_prepared(name: str, folder: pathlib.Path) -> ImageDataset:
    version = prepared.newest_version(name, folder.parent)
    with prepared.readable(name, folder.parent):
        builder = prepared.open_builder(version)
        random_access = prepared.is_array_record(builder)
        sizes = {split: info.num_examples for split, info in builder.info.splits.items()}
        num_classes = builder.info.features["label"].num_classes
    if not random_access:
        raise ValueError(
            f"{name}: {folder} was prepared as {builder.info.file_format.value}, which cannot be read in any order. Prepare it "
            "again with file_format='array_record'."
        )
    names = {role: next((split for split in splits if split in sizes), None) for role, splits in SPLITS.items()}
    for role, split in names.items():
        if split is None:
            raise ValueError(f"{name}: {folder} has no split {' or '.join(SPLITS[role])}, only {', '.join(sizes)}.")
    splits = {role: str(split) for role, split in names.items()}
    train, test = (PreparedImages(str(version), splits[role]) for role in ("train", "test"))
    return ImageDataset(name, train, test, sizes[splits["train"]], sizes[splits["test"]], num_classes)


@functools.cache
def _open_split(folder: str, split: str) -> Any:
    import tensorflow_datasets as tfds  # here, because it takes seconds

    builder = prepared.open_builder(pathlib.Path(folder))
    return builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})


def random_crop(blob: bytes, size: int, random: np.random.Generator) -> UInt8[np.ndarray, "S S 3"]:
    """A random part of an image, scaled to ``size`` pixels each way and mirrored half of the time.

    The part has 8 to 100% of the area and an aspect ratio of 3:4 to 4:3. Both are drawn again until the part fits into the
    image. After ten failures the part is the largest one in the middle whose ratio lies in that range.

    References:
        Szegedy et al., `Going Deeper with Convolutions <https://arxiv.org/abs/1409.4842>`_, 2014, section 6.
    """
    image = _open(blob)
    width, height = image.size
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1.0)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            left, top = int(random.integers(0, width - wide + 1)), int(random.integers(0, height - high + 1))
            break
    else:
        wide, high = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, top = (width - wide) // 2, (height - high) // 2
    pixels = _scaled(image, (left, top, left + wide, top + high), size)
    return pixels[:, ::-1] if random.random() < 0.5 else pixels


def centre_crop(blob: bytes, size: int) -> UInt8[np.ndarray, "S S 3"]:
    """The middle square of an image, seven eighths of its shorter side, scaled to ``size`` pixels each way."""
    image = _open(blob)
    width, height = image.size
    side = min(width, height) * 224 / 256
    left, top = (width - side) / 2, (height - side) / 2
    return _scaled(image, (left, top, left + side, top + side), size)


def _open(blob: bytes):
    from PIL import Image

    return Image.open(io.BytesIO(blob))


def _scaled(image, box: tuple[float, ...], size: int) -> UInt8[np.ndarray, "S S 3"]:
    from PIL import Image

    width, height = image.size
    # Decoding a JPEG at 1/2, 1/4 or 1/8 of its size is much cheaper; draft takes the smallest that is large enough.
    image.draft("RGB", (math.ceil(width * size / (box[2] - box[0])), math.ceil(height * size / (box[3] - box[1]))))
    across, down = image.size[0] / width, image.size[1] / height
    box = (box[0] * across, box[1] * down, min(box[2] * across, image.size[0]), min(box[3] * down, image.size[1]))
    return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0))
