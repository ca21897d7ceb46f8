"""The cross-check's table, files and command line, and studies on a machine that fails."""

import dataclasses
import json

import numpy as np
import pytest

import jaxbatch as jb
from experiments.cross_check import __main__ as cross_check
from experiments.cross_check.report import closing, word
from experiments.harness import study
from tests.conftest import ROOT


def test_words_of_the_table():
    base = {"passed": True, "tf32": False, "error": 1.0, "bound": 4.0}
    fine = base | {"error": 1e-7, "bound": 4e-7}
    assert word([fine]) == "ok 0.25" and word([base]) == "bound > 1"
    assert word([fine, fine | {"passed": False, "tf32": True}]) == "tf32"
    assert word([fine, fine | {"passed": False, "error": float("nan")}]) == "WRONG"
    place = {"computation": "sum", "precision": "float32"}
    machines = {"cpu": {"device": "a CPU", "jax": "1", "jaxlib": "2"}}
    assert "All 1 computations on cpu (a CPU, jaxlib 2) agree" in closing([fine | place], machines)
    assert "1 of 1 computations" in closing([fine | place | {"passed": False}], machines)


def test_a_file_is_compared_with(tmp_path, capsys):
    arguments = ["--quick", "--only", "dense", "--output-dir", str(tmp_path)]
    file = tmp_path / "here.npz"
    cross_check.main([*arguments, "--save", str(file)])
    cross_check.main([*arguments, "--against", str(file)])
    assert "4 computations: 4 are equal to the bit, 0 within the bounds, 0 beyond them." in capsys.readouterr().out
    with np.load(file) as saved:
        arrays = {name: saved[name] for name in saved.files}
    about = json.loads(str(arrays.pop("about")))
    about["records"][0]["digest"] = about["records"][1]["digest"] = "another"
    arrays["output_0"] = arrays["output_0"] * (1 + 1e-8)
    arrays["output_1"] = arrays["output_1"] * (1 + 1e-3)
    np.savez(file, about=np.array(json.dumps(about)), **arrays)
    with pytest.raises(SystemExit) as stopped:
        cross_check.main([*arguments, "--against", str(file)])
    out = capsys.readouterr().out
    assert stopped.value.code == 1 and "2 are equal to the bit, 1 within the bounds, 1 beyond them" in out and "DIFFERENT: dense" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precision", "float16"], "--precision float16 must be one of float64, float32, bfloat16, default."),
        (["--only", "nothing"], "--only nothing: no computation has this in its name."),
        (["--backend", "abacus"], "--backend abacus must be cpu, gpu or tpu."),
        (["--backend", "tpu"], "--backend tpu: JAX finds only cpu here."),
        (["--seed", "-1"], "--seed -1 must be at least 0."),
        (["--only", "random bits", "--against", "nowhere.npz"], "nowhere.npz"),
        (["--only", "random bits", "--against", "README.md"], "README.md is not a file that --save wrote"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        cross_check.main(["--quick", *arguments, "--output-dir", str(tmp_path)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_wrong_path_ends_before_the_work_and_removes_nothing(tmp_path, capsys, monkeypatch):
    arguments = ["--quick", "--only", "random bits", "--output-dir", str(tmp_path)]
    cross_check.main(arguments)
    (figure,) = tmp_path.rglob("figure.png")
    figure.with_name("records.jsonl").write_text("damaged\n")  # written anew every time, so no reason to stop
    with pytest.raises(SystemExit) as stopped:
        cross_check.main([*arguments, "--save", str(tmp_path)])
    assert stopped.value.code == 2 and f"--save {tmp_path}: no file can be written there" in capsys.readouterr().err
    cross_check.main([*arguments, "--save", str(tmp_path / "random.npz")])
    with pytest.raises(SystemExit):  # known only in the end: the new figure is there
        cross_check.main(["--quick", "--only", "updates of sgd", "--output-dir", str(tmp_path), "--against", str(tmp_path / "random.npz")])
    assert "random.npz: it has no computation of this run" in capsys.readouterr().err and len(list(tmp_path.rglob("figure.png"))) == 2
    monkeypatch.setattr(cross_check, "check_here", lambda *a: pytest.fail("computed first"))
    for wrong_path in (["--against", str(tmp_path / "nothing.npz")], ["--save", str(tmp_path / "none" / "a.npz")]):
        with pytest.raises(SystemExit) as stopped:
            cross_check.main([*arguments, *wrong_path])
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.count("\n") == 1 and wrong_path[1] in error
    assert figure.exists()


def test_other_inputs_are_not_compared(tmp_path, capsys):
    arguments = ["--quick", "--only", "random bits", "--output-dir", str(tmp_path)]
    cross_check.main([*arguments, "--save", str(tmp_path / "a.npz")])
    with pytest.raises(SystemExit) as stopped:
        cross_check.main([*arguments, "--seed", "3", "--against", str(tmp_path / "a.npz")])
    assert stopped.value.code == 2 and "its inputs were made with --seed 0, not 3" in capsys.readouterr().err


def test_a_study_stops_on_a_machine_that_fails_and_writes_down_what_it_found(tmp_path, monkeypatch):
    config = study.StudyConfig(output_dir=str(tmp_path))
    run = study.open_study("any", config, None)
    found = json.loads((run.path / "config.json").read_text())["provenance"]["backend_checks"]
    assert found["matrix product"]["passed"] and 0 < found["matrix product"]["error"] < found["matrix product"]["bound"]
    bad = (jb.BackendCheck("a sum", float("nan"), 1e-6), jb.BackendCheck("a product", 0.0, 1e-6))
    monkeypatch.setattr(jb, "check_backend", lambda: bad)
    with pytest.raises(ValueError, match=r"wrong numbers \(a sum: relative error nan.*--no-check-backend runs anyway"):
        study.open_study("any", config, None)
    run = study.open_study("other", dataclasses.replace(config, check_backend=False), None)
    found = json.loads((run.path / "config.json").read_text())["provenance"]["backend_checks"]
    assert found["a sum"] == {"error": None, "bound": 1e-6, "passed": False}


def test_the_library_s_own_check_notices(monkeypatch):
    real = jb.backend.group_gradients
    monkeypatch.setattr(jb.backend, "group_gradients", lambda *a: real(*a) * (1 + 1e-3))
    jb.check_backend.cache_clear()
    try:
        assert [check.name for check in jb.check_backend() if not check.passed] == ["gradients of groups"]
    finally:
        jb.check_backend.cache_clear()
