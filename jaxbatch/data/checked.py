"""Checks a user's data set before training, to find errors with which training would run but give wrong results."""

import numpy as np

from jaxbatch.data import Dataset

_SCALED = 2.0  # floating-point images must be scaled to [0, 1]; some sharpening goes a little beyond


def check_dataset(dataset: Dataset) -> None:
    """Checks the shapes, types and ranges of images and labels.

    Raises:
        ValueError: images are not ``(N, H, W, C)``, are floating-point and not scaled, or hold values that are not finite;
            labels are not whole numbers ``(N,)`` from 0 to ``num_classes - 1``; the numbers of labels and images differ;
            ``mean`` or ``std`` is not one number for each channel.

    Example:
        >>> from jaxbatch import load_dataset
        >>> digits = load_dataset("digits")
        >>> check_dataset(digits)
        >>> check_dataset(digits._replace(train_images=digits.train_images.astype(np.float32)))
        Traceback (most recent call last):
        ValueError: dataset.train_images go up to 255 and are float32: divide them by 255, or give them as uint8.
    """
    for part in ("train", "test"):
        name = f"dataset.{part}"
        images, labels = (np.asarray(getattr(dataset, f"{part}_{kind}")) for kind in ("images", "labels"))
        if images.ndim != 4:
            raise ValueError(f"{name}_images have shape {images.shape} and must be (examples, rows, columns, channels): add an axis.")
        if labels.ndim != 1:
            raise ValueError(f"{name}_labels have shape {labels.shape} and must be (examples,): use labels.reshape(-1), or argmax if one-hot.")
        if len(images) != len(labels):
            raise ValueError(f"{name}: {len(images)} images and {len(labels)} labels. Each image needs its own.")
        if len(labels) == 0:
            raise ValueError(f"{name} is empty.")
        if not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"{name}_labels are {labels.dtype} and must be whole numbers, as int32.")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= dataset.num_classes:
            raise ValueError(f"{name}_labels go from {low} to {high}, and num_classes={dataset.num_classes} allows 0 to {dataset.num_classes - 1}.")
        if np.issubdtype(images.dtype, np.floating):
            largest = float(np.abs(images).max())
            if not np.isfinite(largest):
                raise ValueError(f"{name}_images hold values that are not finite.")
            if largest > _SCALED:
                raise ValueError(f"{name}_images go up to {largest:g} and are {images.dtype}: divide them by 255, or give them as uint8.")
        elif images.dtype != np.uint8:
            raise ValueError(f"{name}_images are {images.dtype} and must be uint8, or of a floating type and scaled to [0, 1].")
    channels = dataset.train_images.shape[3]
    for name in ("mean", "std"):
        if len(getattr(dataset, name)) not in (1, channels):
            raise ValueError(f"dataset.{name} has {len(getattr(dataset, name))} numbers for {channels} channels.")
