"""The ImageNet study on folders of the same form in small."""

import json

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.imagenet import __main__ as imagenet


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_imagenet_study_end_to_end(prepared_images, tmp_path, capsys):
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
    with pytest.raises(SystemExit) as stopped:
        imagenet.main(["--data-dir", str(image_folder), "--dataset", "colours", "--epochs", "3", *arguments, "--output-dir", str(tmp_path)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and message in error and error.count("\n") == 1


def test_the_arms_of_imagenet():
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


def test_a_growth_that_overflows_is_told_in_words():
    with pytest.raises(ValueError, match="growth=1e[+]300 makes batch_size=1 grow to more than"):
        imagenet.resolve(imagenet.Config(growths=(1.0, 1e300)), 1_281_167)
    assert imagenet.resolve(imagenet.Config(), 1_281_167).batch_size == 8192
    assert imagenet.resolve(imagenet.Config(epochs=3, growths=(1.0, 3.0)), 81).batch_size == 9  # 81 in the end, exactly
