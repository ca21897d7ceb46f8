"""Images that come in a stream: where they lie, how they are cut, and that training on them is training all the same."""

import io
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import PIL.Image
import pytest
from flax import linen as nn

import jaxbatch as jb
from jaxbatch.data.images import centre_crop, random_crop
from jaxbatch.layers import ConvBatchNorm
from jaxbatch.streams import image_streams
from tests.conftest import ROOT, make_problem


def photograph(random, label, size=None):
    """A noisy image of one colour, as JPEG bytes."""
    height, width = size or random.integers(20, 60, 2)
    pixels = random.integers(0, 60, (height, width, 3))
    pixels[..., label] += 190
    file = io.BytesIO()
    PIL.Image.fromarray(pixels.astype(np.uint8)).save(file, "jpeg", quality=90)
    return file.getvalue()


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """``colours``: 36 training and 9 validation images of 3 classes in class folders."""
    root, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 3)):
        for label in range(3):
            folder = root / "colours" / split / f"class_{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{number:02d}.JPEG").write_bytes(photograph(random, label))
    return root


@pytest.fixture(scope="session")
def prepared_images(tmp_path_factory):
    """The same form as ``imagenet2012`` in small, prepared by TFDS as array_record without TensorFlow."""
    pytest.importorskip("array_record")
    import tensorflow_datasets as tfds

    root, random = tmp_path_factory.mktemp("prepared"), np.random.default_rng(1)
    with tfds.core.registered.skip_registration():

        class Imagenet2012(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("5.1.0")

            def _info(self):
                features = {
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(num_classes=3),
                    "file_name": tfds.features.Text(),
                }
                return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

            def _split_generators(self, manager):
                return {"train": self._generate_examples(36), "validation": self._generate_examples(9)}

            def _generate_examples(self, count):
                for number in range(count):
                    blob = io.BytesIO(photograph(random, number % 3))
                    yield number, {"image": blob, "label": number % 3, "file_name": f"{number}.JPEG"}

        Imagenet2012(data_dir=str(root), file_format="array_record").download_and_prepare()
    return root


class Network(nn.Module):
    """Small, with batch normalisation."""

    @nn.compact
    def __call__(self, images, train=False):
        return nn.Dense(3)(nn.relu(ConvBatchNorm(4, 3, padding=1)(images, train=train)).mean((1, 2)))


def trained(task, size=6, duration=2, **settings):
    config = jb.FitConfig(optax.sgd(0.05, 0.9), size, jb.epochs(duration), seed=3, **settings)
    return list(jb.fit(task, config))


def numbers(records):
    return [[record[key] for key in ("batches", "loss", "test_loss", "test_accuracy")] for record in records]


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
        (lambda root: write(root, "train/a", "train/b", "val/a", "val/c"), ValueError, "other classes .b, c in one alone"),
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


class Arrays:
    """Arrays as a stream."""

    def __init__(self, arrays):
        self.arrays = [np.asarray(leaf) for leaf in arrays]
        self.num_examples = len(self.arrays[0])
        self.example = tuple(jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for leaf in self.arrays)
        self.longest = 0

    def parts(self, indices, place=(0, 0)):
        for part in indices:
            self.longest = max(self.longest, len(part))
            yield tuple(leaf[part] for leaf in self.arrays)


def streamed(task):
    return task._replace(train_data=Arrays(task.train_data), test_data=Arrays(task.test_data))


@pytest.mark.parametrize(("size", "bound"), [(6, None), (6, 3), (7, 3), (10, 4)])
def test_a_stream_trains_as_data_on_the_device_do(size, bound):
    loss_fn, params, data = make_problem(24)
    names, leaves = sorted(data), tuple(data[name] for name in sorted(data))
    named = lambda batch: dict(zip(names, batch, strict=True))
    task = jb.Task(
        lambda key: params,
        lambda p, batch: loss_fn(p, named(batch)),
        lambda p, batch: {"loss": loss_fn(p, named(batch)), "accuracy": loss_fn(p, named(batch))},
        leaves,
        leaves,
        prepare=lambda keys, batch: (batch[0] + jax.vmap(lambda key: jax.random.normal(key, batch[0].shape[1:]))(keys), batch[1]),
    )
    there = streamed(task)
    rows = trained(there, size, microbatch_size=bound)
    np.testing.assert_allclose(numbers(rows), numbers(trained(task, size)), rtol=2e-5)
    assert there.train_data.longest <= (bound or size) and there.num_examples == 24


def test_batch_normalisation_in_a_stream_is_that_of_accumulation():
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (24, 8, 8, 3), dtype=np.uint8), random.integers(0, 3, 24).astype(np.int32)
    dataset = jb.Dataset("r", images, labels, images[:9], labels[:9], 3, (0.5,) * 3, (0.25,) * 3)
    task = jb.classification_task(Network(), dataset)
    expected = trained(task, 12, microbatch_size=4)
    found = trained(streamed(task), 12, microbatch_size=4)
    np.testing.assert_allclose(numbers(found), numbers(expected), rtol=2e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found[-1]["state"].model_state, expected[-1]["state"].model_state
    )


def test_workers_change_nothing_and_a_run_goes_on_where_it_stopped(image_folder, tmp_path):
    dataset = jb.open_images("colours", data_dir=image_folder)
    alone = jb.streamed_task(Network(), dataset, image_size=16, num_workers=0)
    whole = trained(alone, 8, 3, microbatch_size=4)
    helped = jb.streamed_task(Network(), dataset, image_size=16, num_workers=1, ahead=1)
    try:
        assert numbers(trained(helped, 8, 3, microbatch_size=4)) == numbers(whole)
    finally:
        helped.train_data.decoders.close()
    config = jb.FitConfig(optax.sgd(0.05, 0.9), 8, jb.epochs(3), seed=3, microbatch_size=4)
    first = jb.fit_with_checkpoints(alone, config, tmp_path)
    begun = [next(first), next(first)]
    first.close()
    rest = list(jb.fit_with_checkpoints(alone, config, tmp_path))
    assert numbers([begun[0], *rest]) == numbers(whole) and [record["epoch"] for record in rest] == [2.0, 3.0]


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


def test_a_split_step_takes_no_stream(image_folder):
    task = jb.streamed_task(Network(), jb.open_images("colours", data_dir=image_folder), image_size=8, num_workers=0)
    with pytest.raises(ValueError, match="num_groups=2: a split step needs its batch on the device"):
        trained(task, 4, num_groups=2)


def test_a_batch_of_524288_is_accumulated_exactly():
    count, random = 524_288, np.random.default_rng(0)
    x, y = random.normal(size=(count, 3)).astype(np.float32), random.normal(size=count).astype(np.float32)
    data = Arrays((x, y))
    loss_fn = lambda w, batch: 0.5 * (batch[0] @ w - batch[1]) ** 2
    metrics_fn = lambda w, batch: {"loss": loss_fn(w, batch), "accuracy": batch[1]}
    task = jb.Task(lambda key: jnp.ones(3), loss_fn, metrics_fn, data, Arrays((x[:5], y[:5])))
    (record,) = jb.fit(task, jb.FitConfig(optax.sgd(1.0), count, microbatch_size=8192))
    gradient = x.astype(float).T @ (x.astype(float) @ np.ones(3) - y) / count  # in float64, by hand
    np.testing.assert_allclose(record["state"].params, 1 - gradient, rtol=0, atol=1e-5)
    assert data.longest == 8192 and record["updates"] == 1


MEMORY = """
import resource, sys
import numpy as np, optax
import jax, jaxbatch as jb
from tests.test_streams import Network
from flax import linen as nn

class Noise:
    num_examples = 4096
    example = (jax.ShapeDtypeStruct((64, 64, 3), np.uint8), jax.ShapeDtypeStruct((), np.int32))

    def parts(self, indices, place=(0, 0)):
        for part in indices:
            yield np.random.default_rng(0).integers(0, 256, (len(part), 64, 64, 3), dtype=np.uint8), np.zeros(len(part), np.int32)

test = Noise()
test.num_examples = 32
random = np.zeros((1, 64, 64, 3), np.uint8)
task = jb.classification_task(Network(), jb.Dataset("r", random, np.zeros(1, np.int32), random, np.zeros(1, np.int32), 3, (0.5,) * 3, (0.25,) * 3))
task = task._replace(train_data=Noise(), test_data=test)
for size in (64, 4096):
    record, = jb.fit(task, jb.FitConfig(optax.sgd(0.1), size, jb.examples(4096), microbatch_size=64))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def test_memory_does_not_grow_with_the_batch():
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, env=env, cwd=ROOT, check=True)
    small, large = map(float, done.stdout.split())
    # The batch of 4,096 is 48 MiB as bytes and 1 GiB of activations; 64 at a time need what 64 need.
    assert large < small + 40


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_imagenet_study_end_to_end(prepared_images, tmp_path, capsys):
    from experiments import imagenet

    arguments = ["--data-dir", str(prepared_images), "--quick", "--batch-size", "8", "--microbatch-size", "4", "--num-workers", "1"]
    imagenet.main([*arguments, "--growths", "1,2", "--output-dir", str(tmp_path)])
    out = capsys.readouterr().out
    (file,) = tmp_path.glob("imagenet/*/records.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    sizes = {arm: [r["batch_size"] for r in rows if r["arm"] == arm] for arm in ("growth_1", "growth_2")}
    assert sizes == {"growth_1": [8, 8, 8], "growth_2": [8, 16, 32]}
    assert [r["updates"] for r in rows if r["arm"] == "growth_2"] == [4, 6, 7]
    assert "Growth 2 against 1" in out and file.with_name("figure.png").exists()
    imagenet.main([*arguments, "--growths", "1,2", "--output-dir", str(tmp_path)])  # redrawn, not trained again
    assert len(file.read_text().splitlines()) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "nothing"], "nothing: neither a folder prepared by TFDS"),
        (["--batch-size", "30"], "batch_size=60 at epoch 1 is larger than the data set"),
        (["--growths", "0.5"], "growth=0.5 must be at least 1"),
        (["--num-workers", "-1"], "--num-workers -1 must be at least 0."),
        (["--microbatch-size", "0"], "--microbatch-size 0 must be above 0"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, image_folder, tmp_path, capsys):
    from experiments import imagenet

    with pytest.raises(SystemExit) as stopped:
        imagenet.main(["--data-dir", str(image_folder), "--dataset", "colours", "--epochs", "3", *arguments, "--output-dir", str(tmp_path)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and message in error and error.count("\n") == 1


def test_the_arms_of_imagenet():
    from experiments import imagenet

    config = imagenet.resolve(imagenet.Config(), 1_281_167)
    assert (config.batch_size, config.learning_rate, config.every) == (8192, 3.2, 30)
    sizes = {growth: [imagenet.make_schedule(config, growth)(epoch) for epoch in (0, 30, 60)] for growth in config.growths}
    assert sizes[8.0] == [8192, 65_536, 524_288] and sizes[1.0] == [8192] * 3
    for growth in config.growths:  # rate ÷ batch falls by a tenth at each change
        steps = [1_281_167 // size for size in sizes[growth]]
        fit_config = imagenet.make_fit_config(config, growth, 0, 1_281_167)
        rates = [rate_at(fit_config, 30 * sum(steps[:stage]) + 6 * steps[stage]) for stage in range(3)]
        np.testing.assert_allclose([r / s * 8192 for r, s in zip(rates, sizes[growth], strict=True)], [3.2, 0.32, 0.032], rtol=1e-4)


def rate_at(config, step):
    state = config.optimizer.init(jnp.ones(()))
    moved = [leaf._replace(count=jnp.array(step)) if isinstance(leaf, optax.ScaleByScheduleState) else leaf for leaf in state[1]]
    updates, _ = config.optimizer.update(jnp.zeros(()), (state[0], tuple(moved)), jnp.ones(()))
    return -updates / 1e-4
