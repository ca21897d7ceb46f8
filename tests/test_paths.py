"""Paths that a user gives: the home is found, addresses are refused before anything runs, no home is no harm."""

import pathlib
import pwd

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxbatch as jb
from experiments.adabatch_figures import __main__ as adabatch_figures
from experiments.cross_check import __main__ as cross_check
from experiments.nose_game import __main__ as nose_game
from experiments.split_backward import __main__ as split_backward
from jaxbatch.paths import cache_folder, local_path
from jaxbatch.results.records import open_run

LOSS = lambda w, x: 0.5 * (x - w) ** 2
TASK = jb.Task(lambda key: jnp.array(0.0), LOSS, None, jnp.arange(4.0), None)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def homeless(tmp_path, monkeypatch):
    """A user without HOME and without an entry in the password file."""

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("JAXBATCH_DATA_DIR", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError):
        pathlib.Path.home()


@pytest.fixture
def no_programs_kept():
    """As for a user who has given JAX no folder."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_a_tilde_is_the_home(home):
    assert local_path("~/x", "y") == home / "x"
    open_run("~/runs", "study", {"a": 1})
    list(jb.fit_with_checkpoints(TASK, jb.FitConfig(optax.sgd(0.1), 4), "~/state"))
    assert (home / "runs" / "study").is_dir() and (home / "state" / "step_1").is_dir()
    assert not pathlib.Path("~").exists()


def test_programs_are_kept_in_a_folder_of_the_home(home, no_programs_kept):
    assert jb.keep_compiled_programs("~/programs") == home / "programs"
    assert (home / "programs").is_dir() and not pathlib.Path("~").exists()


@pytest.mark.parametrize("address", ["s3://bucket/x", "gs://bucket/x", "file:///x"])
@pytest.mark.parametrize(
    "use",
    [
        lambda path: open_run(path, "study", {"a": 1}),
        lambda path: next(jb.fit_with_checkpoints(TASK, jb.FitConfig(optax.sgd(0.1), 4), path)),
        lambda path: jb.load_dataset("mnist", data_dir=path),
        lambda path: jb.open_images("imagenet2012", data_dir=path),
    ],
)
def test_addresses_are_refused(use, address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"='{address}' is an address"):
        use(address)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_for_programs_that_is_an_address(no_programs_kept, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="folder='s3://b' is an address"):
        jb.keep_compiled_programs("s3://b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("study", "arguments"),
    [
        (split_backward, ["--output-dir", "s3://b", "--quick"]),
        (nose_game, ["--output-dir", "s3://b"]),
        (adabatch_figures, ["--output-dir", "s3://b"]),
        (cross_check, ["--quick", "--save", "s3://b.npz"]),
        (cross_check, ["--quick", "--against", "s3://b.npz"]),
    ],
)
def test_studies_refuse_addresses_in_one_line(study, arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        study.main(arguments)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and "is an address" in error
    assert not list(tmp_path.glob("s3:*"))


def test_no_home_is_no_harm(homeless, no_programs_kept, capsys):
    assert cache_folder() is None and jb.keep_compiled_programs() is None
    assert jb.load_dataset("digits").num_classes == 10
    nose_game.main(["--quick"])
    out = capsys.readouterr().out
    assert out.count("No compiled programs are kept between runs") == 1 and "Figure" in out


def test_without_a_home_files_are_found_where_they_are_said_to_be(homeless):
    with pytest.raises(FileNotFoundError, match="no folder is named and there is no home folder for it"):
        jb.load_dataset("mnist")
    with pytest.raises(ValueError, match="data_dir='~/x': the home folder is not known"):
        jb.load_dataset("mnist", data_dir="~/x")
    with pytest.raises(ValueError, match="the home folder is not known"):
        jb.open_images("imagenet2012")


def test_a_home_that_is_read_only_is_no_harm(home, no_programs_kept, monkeypatch):
    home.parent.joinpath("home").write_text("a file where the home should be")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert jb.keep_compiled_programs() is None
    with pytest.raises(OSError):
        jb.keep_compiled_programs(home / "x")
