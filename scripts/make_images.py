"""Writes a data set as compressed images in class folders, the form that the ImageNet study reads.

    python scripts/make_images.py --dataset digits --output /tmp/images/digits

Images are enlarged to different sizes, like those of photographs, so that cropping and scaling have an effect.
"""

import dataclasses
import pathlib

import numpy as np

import experiments  # noqa: F401 (loads JAX without a message)
import jaxbatch as jb
from experiments.harness.command_line import one_line_errors, parse


@dataclasses.dataclass(frozen=True)
class Config:
    """What to write, and where."""

    output: pathlib.Path
    """New folder to write train/<class>/*.jpeg and val/<class>/*.jpeg into."""
    dataset: str = "digits"
    """Data set, see the README."""
    data_dir: str | None = None
    """Folder with its official files. Default: JAXBATCH_DATA_DIR."""
    num_examples: int | None = None
    """Write only this many training images (the first ones), and a fifth as many for validation."""
    smallest: int = 48
    """Smallest side of an image, in pixels."""
    largest: int = 96
    """Largest side of an image, in pixels."""


def make_images(config: Config) -> int:
    """Writes the folder and returns the number of images."""
    from PIL import Image

    if config.output.exists():
        raise ValueError(f"--output {config.output} exists already. Name a new folder.")
    dataset, random = jb.load_dataset(config.dataset, data_dir=config.data_dir), np.random.default_rng(0)
    count = config.num_examples or len(dataset.train_labels)
    splits = {
        "train": (dataset.train_images[:count], dataset.train_labels[:count]),
        "val": (dataset.test_images[: max(1, count // 5)], dataset.test_labels[: max(1, count // 5)]),
    }
    for split, (images, labels) in splits.items():
        for label in range(dataset.num_classes):
            (config.output / split / f"class_{label:03d}").mkdir(parents=True)
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            size = tuple(random.integers(config.smallest, config.largest + 1, 2).tolist())
            photograph = Image.fromarray(image.squeeze()).convert("RGB").resize(size, Image.Resampling.BICUBIC)
            photograph.save(config.output / split / f"class_{label:03d}" / f"{number:06d}.jpeg", quality=90)
    return sum(len(labels) for _, labels in splits.values())


if __name__ == "__main__":
    config = parse(Config, __doc__)
    with one_line_errors():
        print(f"{make_images(config):,} images in {config.output}")
