"""The configs of segmentation, detection and texts, from the float model to a verified file, on made-up data."""

import json
from pathlib import Path

import effdet.config.model_config
import pytest

from runtimes.parity import SCHEME
from scenes import write_bert, write_coco, write_glue, write_voc
from sweeps import sweep
from tasks.small import small_retinanet, small_segmenter

from .running import halfeven

CONFIGS = Path(__file__).parents[2] / "configs"
SEGMENTERS = (small_segmenter.__name__, "deeplabv3_mobilenet_v3_large")
DETECTORS = (small_retinanet.__name__, "ssdlite320_mobilenet_v3_large")
SMALL = ("--data.workers", "0", "--device.kind", "cpu", "--device.threads", "1", "--export.verify-samples", "8")
SMALL += ("--quantization.scheme", SCHEME, "--export.timed", "False")
SHORT = ("--pretraining.learning-rate", "2e-3", "--pretraining.optimizer", "adamw", "--model.weights", "")


def run(command, config, folder, *options):
    """What a run says, and its results."""
    done = halfeven(command, CONFIGS / config, "--work-dir", folder, *SMALL, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((folder / "results.json").read_text())


def assert_deployed_as_simulated(results, key, *, figures=1.0):
    """The file computes the simulation's integers, in integers, and is as good."""
    (report,) = results["verification"].values()
    assert report["weights_match"]
    assert report["alone_match"] >= 0.9999 or report["overflows"]  # attention's products, without VNNI
    assert report["integer_macs"] >= 0.95
    assert report["top1_agreement"] >= 0.99
    assert results["deployed"][key] == pytest.approx(results["simulated"][key], abs=figures)
    return report


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    root = write_voc(tmp_path_factory.mktemp("voc") / "data", train=16, val=8)
    return ("--data.root", root, "--data.image-size", "80", "--data.evaluation-batch-size", "4")


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    root = write_coco(tmp_path_factory.mktemp("coco") / "data", train=8, val=4)
    return ("--data.root", root, "--data.evaluation-batch-size", "2", "--model.num-classes", "3")


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glue")
    bert = write_bert(folder / "bert")
    texts = ("--data.root", write_glue(folder / "data"), "--data.text.tokenizer", bert, "--data.text.max-length", "12")
    return (*texts, "--model.name", bert)


@pytest.mark.parametrize("name", sweep(SEGMENTERS, SEGMENTERS[0]))
def test_a_segmentation_model_from_float_to_files(name, voc, tmp_path):
    given = (*voc, *SHORT, "--model.name", name, "--pretraining.epochs", "2", "--pretraining.batch-size", "8")
    said, results = run("ptq", "ptq/deeplabv3_voc.py", tmp_path / "ptq", *given)
    assert_deployed_as_simulated(results, "mIoU")
    assert set(results["float"]) == {"mIoU", "pixel_accuracy"}
    assert "8 validation samples" in said
    assert "mIoU, %" in said
    weights = ("--model.weights", tmp_path / "ptq" / "float" / "best.safetensors")
    trained = (*voc, *weights, "--model.name", name, "--training.epochs", "1", "--training.batch-size", "8")
    taught = ("--qat.distill", "on", "--qat.distillation.weight", "0.5")
    said, results = run("train", "qat/deeplabv3_voc.py", tmp_path / "qat", *trained, *taught)
    # Two steps leave a network in which single roundings spread. At 7 bits mIoU of 8 small scenes moved by 6 with them.
    assert_deployed_as_simulated(results, "mIoU", figures=1.0 if SCHEME == "w8a8" else 10.0)
    assert f"{SCHEME}: mIoU" in said


@pytest.mark.parametrize("name", sweep(("small", "tf_efficientdet_lite0"), "small"))
def test_efficientdet_from_float_to_files(name, coco, tmp_path, monkeypatch):
    known = effdet.config.model_config.efficientdet_model_param_dict
    fewer = {"fpn_channels": 16, "fpn_cell_repeats": 1, "box_class_repeats": 1, "backbone_name": "resnet10t"}
    fewer |= {"max_level": 5, "num_levels": 3}
    monkeypatch.setitem(known, "small", {**known["tf_efficientdet_lite0"], "name": "small", **fewer})
    small = ("--model.name", name, "--model.weights", "", "--data.image-size", "128")
    sized = ("--model.arguments", "image_size", "128")
    given = (*coco, *small, *sized, "--pretraining.epochs", "1", "--pretraining.batch-size", "4")
    _, results = run("ptq", "ptq/efficientdet_d1_coco.py", tmp_path / "ptq", *given)
    assert_deployed_as_simulated(results, "mAP")
    assert set(results["float"]) == {"mAP", "mAP50"}


@pytest.mark.parametrize("name", sweep(DETECTORS, DETECTORS[0]))
def test_detectors_of_torchvision_from_float_to_files(name, coco, tmp_path):
    given = (*coco, *SHORT, "--model.name", name, "--pretraining.epochs", "1", "--pretraining.batch-size", "4")
    said, results = run("ptq", "ptq/ssdlite_coco.py", tmp_path / "ptq", *given)
    assert_deployed_as_simulated(results, "mAP")
    assert "4 validation samples" in said


def test_a_text_classifier_from_float_to_files(glue, tmp_path):
    pretraining = ("--pretraining.epochs", "6", "--pretraining.batch-size", "16")
    said, results = run("ptq", "ptq/bert_base_sst2.py", tmp_path / "ptq", *glue, *SHORT, *pretraining)
    assert_deployed_as_simulated(results, "top1")
    assert results["float"]["top1"] > 90
    assert results["deployed"]["top1"] > 85
    assert "60 validation samples" in said
    weights = ("--model.weights", tmp_path / "ptq" / "float" / "best.safetensors")
    trained = ("--training.epochs", "1", "--training.learning-rate", "1e-3")
    said, results = run("train", "qat/bert_base_sst2.py", tmp_path / "qat", *glue, *weights, *trained)
    assert_deployed_as_simulated(results, "top1")
    assert results["deployed"]["top1"] > 85


def test_models_and_data_that_do_not_go_together(glue, voc, tmp_path):
    for config, given, message in (
        (
            "ptq/bert_base_sst2.py",
            (*glue, "--model.source", "timm", "--model.name", "resnet18"),
            "the data gives texts",
        ),
        ("ptq/deeplabv3_voc.py", (*voc, "--model.num-classes", "5"), "the data has 21"),
        ("ptq/deeplabv3_voc.py", (*voc, "--task.kind", "detection", "--model.source", "timm"), "are loss and post"),
    ):
        done = halfeven("ptq", CONFIGS / config, "--work-dir", tmp_path / "work", *SMALL, *given, "--model.weights", "")
        said = " ".join(done.stderr.split())
        assert done.returncode == 2
        assert message in said or "has no weights" in said
        assert "Traceback" not in said
        assert not (tmp_path / "work").exists()
