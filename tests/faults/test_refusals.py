"""A refused run leaves nothing behind, so that the corrected command runs."""

import pytest

from integration.running import halfeven

WRONG = {
    "scheme": ["--quantization.scheme", "w5a33"],
    "model": ["--model.name", "faulty_net:Missing"],
    "weights": ["--model.weights", "missing.safetensors", "--pretraining.epochs", "0"],
    "left out": ["--quantization.leave-out", "no.such.layer"],
    "labels": ["--data.function", "faulty_net:labels_beyond"],
    "labels that are no integers": ["--data.function", "faulty_net:float_labels"],
    "images of float64": ["--data.function", "faulty_net:doubles"],
    "a data set that raises": ["--data.function", "faulty_net:raising"],
    "images of two sizes": ["--data.function", "faulty_net:sizes_differ"],
    "data": ["--data.function", "faulty_net:missing"],
}
OF_TRAINING = {
    "batch": ["--training.batch-size", "1000"],
    "a layer to distil": ["--qat.distill", "on", "--qat.distillation.features", "no.such.layer"],
    "smoothing and labels": ["--pretraining.batch-size", "1000"],
}


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
