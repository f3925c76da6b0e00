"""Small segmenters and detectors learn made-up scenes, and keep what they learned in integers on the runtimes."""

import pytest

import halfeven as he
from halfeven.evaluation import evaluate, evaluation_loader
from halfeven.runtimes.runtime import load_deployed
from halfeven.tasks import Segmentation
from halfeven.tasks.torchvision_detection import TorchvisionDetection
from halfeven.zoo.datasets import load_datasets
from halfeven.zoo.options import DataOptions
from halfeven.zoo.tensor_part import TensorPart
from runtimes.parity import SCHEME
from scenes import write_coco, write_voc

from .small import Segmenter, fit, small_retinanet


def assert_survives(model, data, task, target, path, *, loss):
    """8 bits, calibrated, cost little; and what the runtime computes is as good, to the last answer."""

    def loader(items):
        return evaluation_loader(items, 6, collate=task.collate)

    qmodel = he.quantize(model, loader(data.calibration), target=target, scheme=SCHEME)
    figures = [evaluate(one, loader(data.validation), task)[task.key] for one in (model, qmodel)]
    assert figures[1] >= figures[0] - loss
    he.export(qmodel, path)
    report = he.verify(
        qmodel, path, [batch[0] for batch in loader(data.validation)], timed=False, class_axis=task.class_axis
    )
    assert report.integer_match >= 0.9999
    assert report.integer_layers == report.quantizable_layers
    assert report.integer_macs == 1.0
    assert report.top1_agreement >= 0.999
    deployed = evaluate(load_deployed(path, target, qmodel), loader(data.validation), task)[task.key]
    assert deployed == pytest.approx(figures[1], abs=1.0)


TARGETS = (("openvino", "model.xml"), ("onnxruntime", "model.onnx"))


def test_a_segmenter_learns_and_keeps_it_in_integers(tmp_path):
    options = DataOptions(
        source="voc_segmentation", root=str(write_voc(tmp_path / "voc", train=48)), image_size=80, workers=0
    )
    data, task, model = load_datasets(options), Segmentation(3), Segmenter()
    losses = fit(model, data.train, task, epochs=10)
    assert losses[-1] < 0.2 * losses[0]
    assert evaluate(model, evaluation_loader(data.validation, 6), task)["mIoU"] > 80
    for target, file in TARGETS:
        assert_survives(model, data, task, target, tmp_path / file, loss=1.0)


@pytest.mark.exhaustive
def test_a_detector_learns_and_keeps_it_in_integers(tmp_path):
    options = DataOptions(
        source="coco_detection", root=str(write_coco(tmp_path / "coco", train=48)), image_size=80, workers=0
    )
    data, detector = load_datasets(options), small_retinanet()
    task, model = TorchvisionDetection(detector, data.example()), TensorPart(detector)
    losses = fit(model, data.train, task, epochs=30)
    assert losses[-1] < 0.4 * losses[0]
    loader = evaluation_loader(data.validation, 6, collate=task.collate)
    assert evaluate(model, loader, task)["mAP50"] > 70
    for target, file in TARGETS:
        assert_survives(model, data, task, target, tmp_path / file, loss=5.0)
