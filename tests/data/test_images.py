"""Compressed images: where they lie, how they are cut."""

import io
import sys

import numpy as np
import PIL.Image
import pytest

import jaxbatch as jb
from jaxbatch.data.images import centre_crop, random_crop
from jaxbatch.data.streams import image_streams
from tests.conftest import photograph


def test_class_folders(image_folder):
    dataset = jb.open_images("colours", data_dir=image_folder)
    assert (dataset.num_train, dataset.num_test, dataset.num_classes) == (36, 9, 3)
    train, test = image_streams(dataset, image_size=8, num_workers=0)
    ((images, labels),) = train.parts([np.arange(36)])
    assert labels.tolist() == [0] * 12 + [1] * 12 + [2] * 12
    assert (images.mean((1, 2)).argmax(1) == labels).all()  # each has its class's colour
    ((images, labels),) = test.parts([np.array([8, 0])])
    assert labels.tolist() == [2, 0] and images.shape == (2, 8, 8, 3)


@pytest.mark.filterwarnings("ignore")
def test_a_prepared_folder_reads_without_tensorflow(prepared_images):
    dataset = jb.open_images("imagenet2012", data_dir=prepared_images)
    assert (dataset.num_train, dataset.num_test, dataset.num_classes) == (36, 9, 3)
    for stream in image_streams(dataset, image_size=8, num_workers=0):
        ((images, labels),) = stream.parts([np.arange(9)])
        assert (images.mean((1, 2)).argmax(1) == labels).all()
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda root: None, FileNotFoundError, "mine: neither a folder prepared by TFDS .*data-dir or JAXBATCH_DATA_DIR"),
        (lambda root: (root / "train/a").mkdir(parents=True), ValueError, "train holds no images"),
        (lambda root: write(root, "train/a", "train/b"), FileNotFoundError, "has no folder validation or val or test"),
        (lambda root: write(root, "train/a", "train/b", "val/a", "val/c"), ValueError, "different classes .b, c in only one of them"),
    ],
)
def test_folders_that_are_not_as_they_should(make, error, message, tmp_path):
    make(tmp_path / "mine")
    with pytest.raises(error, match=message):
        jb.open_images("mine", data_dir=tmp_path)


def write(root, *folders):
    for folder in folders:
        (root / folder).mkdir(parents=True)
        (root / folder / "1.jpg").write_bytes(photograph(np.random.default_rng(0), 0))


def test_the_centre_is_the_centre():
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[4:60, 36:92] = 200  # seven eighths of the shorter side, in the middle
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "png")
    assert (centre_crop(file.getvalue(), 56) == 200).all()
    assert centre_crop(file.getvalue(), 7).shape == (7, 7, 3)


def test_random_crops_are_inside_varied_mirrored_and_repeatable():
    columns = np.broadcast_to(np.arange(100, dtype=np.uint8)[None, :, None], (80, 100, 3))
    file = io.BytesIO()
    PIL.Image.fromarray(np.ascontiguousarray(columns)).save(file, "png")
    crops = [random_crop(file.getvalue(), 16, np.random.default_rng([0, n])).astype(int) for n in range(300)]
    again = [random_crop(file.getvalue(), 16, np.random.default_rng([0, n])) for n in range(3)]
    assert all((a == b).all() for a, b in zip(crops, again, strict=False))
    rises = np.array([crop[0, -1, 0] - crop[0, 0, 0] for crop in crops])
    assert 0.4 < (rises < 0).mean() < 0.6  # mirrored
    widths = np.abs(rises) * 16 / 15 / 100  # of the image's width; an area of 8% has at least 0.22 of it
    assert widths.min() > 0.15 and widths.max() > 0.85 and 0.2 < np.mean(widths > 0.6) < 0.8
    assert min(crop.min() for crop in crops) < 5 and max(crop.max() for crop in crops) > 94  # reaches both sides
    thin = io.BytesIO()
    PIL.Image.fromarray(np.full((3, 300, 3), 9, np.uint8)).save(thin, "png")
    assert (random_crop(thin.getvalue(), 8, np.random.default_rng(0)) == 9).all()  # no crop fits: the middle


def test_a_jpeg_decoded_small_is_that_image():
    random = np.random.default_rng(0)
    smooth = PIL.Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((512, 384), PIL.Image.Resampling.BICUBIC)
    small = []
    for kind in ("jpeg", "png"):  # a PNG is always decoded whole
        file = io.BytesIO()
        smooth.save(file, kind, **({"quality": 98} if kind == "jpeg" else {}))
        small.append(centre_crop(file.getvalue(), 32).astype(float))
    assert np.abs(small[0] - small[1]).mean() < 3


def test_epochs_and_seeds_cut_images_differently(image_folder):
    train, test = image_streams(jb.open_images("colours", data_dir=image_folder), image_size=16, num_workers=0)
    cut = lambda stream, place, order=(4, 5): next(stream.parts([np.array(order)], place))[0]
    assert (cut(train, (0, 0)) != cut(train, (0, 1))).any() and (cut(train, (0, 0)) != cut(train, (1, 0))).any()
    assert (cut(train, (0, 1)) == cut(train, (0, 1), (5, 4))[::-1]).all()
    assert (cut(test, (0, 0)) == cut(test, (0, 1))).all()


def test_a_damaged_image_is_named(tmp_path):
    write(tmp_path / "mine", "train/a", "val/a")
    (tmp_path / "mine/train/a/1.jpg").write_bytes(b"no image")
    train, _ = image_streams(jb.open_images("mine", data_dir=tmp_path), image_size=8, num_workers=0)
    with pytest.raises(ValueError, match=r"train/a/1.jpg cannot be decoded .*Replace or remove it"):
        next(train.parts([np.array([0])]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"image_size": 0}, "image_size=0"), ({"num_workers": -1}, "num_workers=-1"), ({"ahead": 0}, "ahead=0 chunks")],
)
def test_settings_that_make_no_sense(settings, message, image_folder):
    with pytest.raises(ValueError, match=message):
        image_streams(jb.open_images("colours", data_dir=image_folder), **settings)
