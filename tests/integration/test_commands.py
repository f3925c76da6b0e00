"""train, test and export, from a config to a deployed file that the runtime reads."""

import json
import shutil

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from halfeven.checkpoint import read_tensors, write_tensors
from runtimes.parity import SCHEME

from .running import halfeven


def test_train_delivers_and_shows_everything(trained):
    folder, said = trained
    for name in (
        "best.safetensors",
        "last.safetensors",
        "state.pt",
        "model.xml",
        "model.bin",
        "log.jsonl",
        "experiment.json",
    ):
        assert (folder / name).is_file(), name
    assert f"Plan for openvino, {SCHEME}" in said
    assert said.index("Plan for") < said.index("float: top1"), "the plan is shown before the work"
    results = json.loads((folder / "results.json").read_text())
    assert results["float"]["top1"] > 50, "the small network learns"
    assert abs(results["deployed"]["top1"] - results["float"]["top1"]) < 10
    verification = results["verification"]["model.xml"]
    assert verification["integer_layers"] == verification["quantizable_layers"] == 3
    for row in ("float", "calibrated", "simulated", "deployed"):
        assert f"{results[row]['top1']:.2f}" in said


def test_the_last_checkpoint_is_reported_beside_the_best(trained):
    folder, said = trained
    results = json.loads((folder / "results.json").read_text())
    assert f"{results['simulated, last']['top1']:.2f}" in said
    assert "best.safetensors was chosen on the 100 validation samples themselves" in " ".join(said.split())


def test_the_best_can_be_chosen_on_held_out_training_samples(config, tmp_path):
    short = ["--pretraining.epochs", "1", "--training.epochs", "2", "--data.selection", "holdout"]
    short += ["--json", tmp_path / "r.json"]
    done = halfeven("train", config, "--work-dir", tmp_path / "w", *short)
    assert done.returncode == 0, done.stdout + done.stderr
    said = " ".join(done.stdout.split())
    assert "gives no train_as_evaluated" in said
    assert "best.safetensors was chosen on the 26 held-out training samples, and not on these" in said
    lines = [json.loads(line) for line in (tmp_path / "w" / "log.jsonl").read_text().splitlines()]
    chosen = [line[f"{SCHEME}, holdout"]["top1"] for line in lines if f"{SCHEME}, holdout" in line]
    assert len(chosen) == 2
    start = next(v for line in lines for name, v in line.items() if name == f"{SCHEME}, holdout, calibrated")["top1"]
    with safe_open(tmp_path / "w" / "best.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["extra"])
    assert facts["selection"] == "holdout"
    assert facts[f"{SCHEME}, holdout"]["top1"] == max([start, *chosen])
    results = json.loads((tmp_path / "w" / "results.json").read_text())
    assert {"float", "simulated", "simulated, last", "deployed"} <= results.keys()
    assert "calibrated" not in results, "it was measured on other samples than the rest of the table"
    assert json.loads((tmp_path / "r.json").read_text()) == results
    assert "conv1" in (tmp_path / "w" / "plan.txt").read_text()


def test_the_log_tells_of_both_models(trained):
    lines = [json.loads(line) for line in (trained[0] / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if SCHEME in line] == [1, 2, 3]
    assert [line["step"] for line in lines if "float" in line] == [0], "the float model is evaluated once"
    assert [line["step"] for line in lines if "loss" in line] == [10, 20, 30, 40, 48]


def test_the_checkpoint_says_what_it_is(trained):
    with safe_open(trained[0] / "best.safetensors", "pt") as file:
        metadata = file.metadata()
    assert {"plan", "halfeven", "torch", "format"} <= metadata.keys()
    assert json.loads(metadata["extra"])["float"]["top1"] > 50


def test_channels_are_equalized_where_weights_have_one_scale(config, tmp_path):
    short = ["--pretraining.epochs", "1", "--training.epochs", "1"]
    folded = ["--quantization.batchnorm", "fold", "--quantization.per-channel", "False"]
    done = halfeven("train", config, "--work-dir", tmp_path / "w", *short, *folded)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cross-layer equalization        yes" in done.stdout
    assert "Equalization: " in done.stdout
    results = json.loads((tmp_path / "w" / "results.json").read_text())
    assert results["verification"]["model.xml"]["integer_match"] == 1.0


def test_a_run_is_not_resumed_with_other_options(config, trained):
    folder = trained[0]
    recorded, checkpoint = (folder / "experiment.json").read_text(), (folder / "last.safetensors").read_bytes()
    done = halfeven("train", config, "--work-dir", folder, "--resume", "--quantization.scheme", "w4a8")
    assert done.returncode == 2
    assert f'quantization.scheme was "{SCHEME}" and is "w4a8"' in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert (folder / "experiment.json").read_text() == recorded
    assert (folder / "last.safetensors").read_bytes() == checkpoint


def test_test_writes_the_three_accuracies(config, trained, tmp_path):
    done = halfeven("test", config, trained[0] / "best.safetensors", "--json", tmp_path / "t.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "t.json").read_text())
    results = json.loads((trained[0] / "results.json").read_text())
    assert found == {row: results[row] for row in ("float", "simulated", "deployed")}
    assert list(found) == ["float", "simulated", "deployed"]


def test_test_needs_no_float_weights(config, trained, tmp_path):
    checkpoint = shutil.copy(trained[0] / "best.safetensors", tmp_path)
    options = ["--deployed", trained[0] / "model.xml", "--json", tmp_path / "t.json"]
    done = halfeven("test", config, checkpoint, *options)
    assert done.returncode == 0, done.stderr
    assert "recorded in the checkpoint" in done.stdout
    results = json.loads((trained[0] / "results.json").read_text())
    assert json.loads((tmp_path / "t.json").read_text())["float"] == results["float"]


def test_export_writes_both_formats(config, trained, tmp_path):
    options = ["--export.formats", "xml", "onnx", "--export.timed", "True"]
    done = halfeven("export", config, trained[0] / "best.safetensors", "--work-dir", tmp_path, *options)
    assert done.returncode == 0, done.stderr
    reports = json.loads((tmp_path / "verification.json").read_text())
    assert reports.keys() == {"model.xml", "model.onnx"}
    for name, report in reports.items():
        assert (tmp_path / name).is_file()
        assert report["integer_layers"] == 3
        assert report["latency_ratio"] > 0


def test_verify_tells_a_file_from_one_of_other_weights(config, trained, tmp_path):
    folder = trained[0]
    options = ("--export.timed", "False", "--export.verify-samples", "40", "--json", tmp_path / "v.json")
    untimed = (*options, "--report", tmp_path / "v.html")
    done = halfeven("verify", config, folder / "best.safetensors", folder / "model.xml", *untimed)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "v.html").is_file()
    assert done.stdout.splitlines().count("Verified.") == 1
    report = json.loads((tmp_path / "v.json").read_text())
    recorded = json.loads((folder / "results.json").read_text())["verification"]["model.xml"]
    assert (report["verified"], report["problems"], report["samples"]) == (True, [], 40)
    assert report["integer_match"] == recorded["integer_match"]

    # The same network with the classes in another order: every tensor is there, the last layer's weights differ.
    tensors, facts = read_tensors(folder / "best.safetensors")
    tensors["fc.weight"] = tensors["fc.weight"].flip(0).contiguous()
    write_tensors(tensors, tmp_path / "best.safetensors", facts)
    done = halfeven("verify", config, tmp_path / "best.safetensors", folder / "model.xml", *untimed)
    assert done.returncode == 1, done.stderr
    assert "The integer weights in the file are not the checkpoint's: it was written" in done.stdout
    report = json.loads((tmp_path / "v.json").read_text())
    assert not report["verified"]
    assert not report["weights_match"]


def test_diagnose_measures_a_checkpoint_and_says_so(config, trained, tmp_path):
    written = tmp_path / "diagnosis.json"
    done = halfeven("diagnose", config, trained[0] / "best.safetensors", "--json", written, "--samples", "16")
    assert done.returncode == 0, done.stderr
    found = json.loads(written.read_text())
    assert found["samples"] >= 16
    assert len(found["tensors"]) == 3 + len(found["plan"]["tensors"])
    assert found["verdict"].split()[0] in done.stdout


def test_one_checkpoint_goes_to_another_runtime(config, trained, tmp_path):
    to = ["--export.target", "onnxruntime"]
    done = halfeven("export", config, trained[0] / "best.safetensors", "--work-dir", tmp_path, *to)
    assert done.returncode == 0, done.stderr
    assert "latency" not in done.stdout
    report = json.loads((tmp_path / "verification.json").read_text())["model.onnx"]
    assert (report["latency_ms"], report["latency_ratio"]) == ({}, None)
    assert report["runtime"] == "ONNX Runtime"
    assert report["weights_match"]
    assert report["top1_agreement"] > 0.99
    wrong = halfeven("export", config, trained[0] / "best.safetensors", *to, "--export.formats", "xml")
    assert wrong.returncode == 2
    assert "onnxruntime reads no such files" in " ".join(wrong.stderr.split())


def test_a_model_for_onnx_runtime(config, tmp_path):
    folder = tmp_path / "work"
    short = ["--pretraining.epochs", "1", "--training.epochs", "1"]
    done = halfeven("train", config, "--work-dir", folder, "--quantization.target", "onnxruntime", *short)
    assert done.returncode == 0, done.stdout + done.stderr
    verification = json.loads((folder / "results.json").read_text())["verification"]["model.onnx"]
    assert verification["integer_layers"] == verification["quantizable_layers"] == 3
    assert verification["integer_match"] == 1.0
    tested = halfeven("test", config, folder / "best.safetensors", "--json", tmp_path / "t.json")
    assert tested.returncode == 0, tested.stderr
    rows = json.loads((tmp_path / "t.json").read_text())
    assert abs(rows["deployed"]["top1"] - rows["simulated"]["top1"]) <= 2


def test_a_checkpoint_of_another_model_is_refused(config, trained, tmp_path):
    checkpoint = shutil.copy(
        trained[0] / "best.safetensors", tmp_path
    )  # away from the float weights, which do not fit either
    for command in ("test", "export"):
        done = halfeven(command, config, checkpoint, "--model.arguments", "width", "4")
        assert done.returncode == 2
        assert "is not a checkpoint of this model" in done.stderr
        assert "conv1.weight (8, 1, 3, 3) instead of (4, 1, 3, 3)" in done.stderr


def test_float_weights_are_no_quantized_checkpoint(config, trained, tmp_path):
    save_file(load_file(trained[0] / "float" / "best.safetensors"), tmp_path / "float.safetensors")
    done = halfeven("test", config, tmp_path / "float.safetensors")
    assert done.returncode == 2
    assert "weights without a plan" in done.stderr
