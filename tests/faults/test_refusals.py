"""A refused run leaves nothing behind, so that the corrected command runs."""

import pytest

from integration.running import halfeven

from .wrong_runs import OF_TRAINING, WRONG


def refused(*arguments):
    done = halfeven(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return " ".join(done.stderr.split())


@pytest.mark.parametrize("wrong", [*WRONG, *OF_TRAINING])
def test_a_refused_training_leaves_no_folder(config, tmp_path, wrong):
    refused("train", config, "--work-dir", tmp_path / "work", *(WRONG | OF_TRAINING)[wrong])
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        wrong if wrong in ("model", "labels", "left out") else pytest.param(wrong, marks=pytest.mark.exhaustive)
        for wrong in WRONG
    ],
)
def test_a_refused_quantization_leaves_no_folder(config, tmp_path, wrong):
    refused("ptq", config, "--work-dir", tmp_path / "work", *WRONG[wrong])
    assert not (tmp_path / "work").exists()


def test_the_message_says_which_part_of_the_data_it_is(config, tmp_path):
    said = refused("train", config, "--work-dir", tmp_path / "work", "--data.function", "faulty_net:raising")
    assert "The train sample 0 cannot be used: RuntimeError: the disk of the images is gone" in said


def test_a_folder_without_anything_to_lose_is_no_obstacle(config, tmp_path, monkeypatch):
    """A run that fails before it has saved anything leaves its record alone."""
    monkeypatch.setattr("halfeven.cli.train.train_float", lambda *_, **__: 1 / 0)
    done = halfeven("train", config, "--work-dir", tmp_path)
    assert "ZeroDivisionError" in done.stderr
    assert (tmp_path / "experiment.json").is_file()
    monkeypatch.undo()
    other = ["--training.epochs", "1", "--export.verify-samples", "8"]
    done = halfeven("train", config, "--work-dir", tmp_path, *other)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "holds a run already" in refused("train", config, "--work-dir", tmp_path, *other)


@pytest.mark.parametrize("damage", ["{", "[]", "", "\\udcff", "[" * 100000])
def test_a_damaged_record_is_a_message(config, tmp_path, damage):
    (tmp_path / "experiment.json").write_text(damage)
    assert "experiment.json is damaged" in refused("train", config, "--work-dir", tmp_path, "--resume")


ENDS = {
    "sys.exit(0)": "SystemExit",
    "raise GeneratorExit": "GeneratorExit",
    "raise type('Mine', (BaseException,), {})('no')": "Mine: no",
    "1 / 0": "ZeroDivisionError",
}


@pytest.mark.parametrize("statement", ENDS)
@pytest.mark.parametrize("place", ["config", "module", "function"])
def test_code_that_ends_the_program_is_an_error(config, tmp_path, monkeypatch, statement, place):
    monkeypatch.syspath_prepend(tmp_path)
    module = f"ending_{abs(hash((statement, place)))}"
    code = f"import sys\n{statement}\n"
    if place == "function":
        code = f"import sys\n\n\ndef data(options):\n    {statement}\n"
    (tmp_path / f"{module}.py").write_text(code)
    if place == "config":
        said = refused("train", tmp_path / f"{module}.py", "--work-dir", tmp_path / "work")
    else:
        given = ["--data.function", f"{module}:data"]
        said = refused("train", config, "--work-dir", tmp_path / "work", *given)
    assert ENDS[statement] in said
    assert module in said
    assert not (tmp_path / "work").exists()
