"""Detectors of transformers and of one's own: the loss and the boxes are those of the complete detector."""

import copy

import pytest
import torch
from torch import nn

import halfeven as he
from halfeven.errors import ConfigError
from halfeven.evaluation import evaluate, evaluation_loader
from halfeven.tasks.detection_by_library import detection_of
from halfeven.tasks.efficientdet import EfficientDetDetection
from halfeven.tasks.own_detection import OwnDetection
from halfeven.tasks.set_prediction import SetPrediction
from halfeven.zoo import small_detectors
from halfeven.zoo.datasets import load_datasets
from halfeven.zoo.options import DataOptions
from halfeven.zoo.tensor_part import tensor_part
from halfeven.zoo.yolo import generalized_overlap
from sweeps import sweep

from .small import fit

IMAGES = torch.zeros(2, 3, 64, 64)
SETS = ("rt_detr", "detr", "yolos")
KINDS = ("yolo", "retinanet", "fcos", "ssdlite", "efficientdet", *SETS)
TARGETS = [
    {"boxes": torch.tensor([[10.0, 10, 30, 24]]), "labels": torch.tensor([1])},
    {"boxes": torch.tensor([[20.0, 10, 60, 40], [5, 5, 30, 30]]), "labels": torch.tensor([2, 3])},
]


def made(kind):
    torch.manual_seed(0)
    return getattr(small_detectors, kind)(5).eval()


@pytest.mark.parametrize("kind", SETS)
def test_losses_and_boxes_of_transformers_detectors(kind):
    detector = made(kind)
    task, part = detection_of(detector, IMAGES), tensor_part(copy.deepcopy(detector))
    assert isinstance(task, SetPrediction)
    assert part.state_dict().keys() == detector.state_dict().keys()
    images = torch.randn(IMAGES.shape)
    size = torch.tensor([64.0] * 4)
    labels = []
    for target in TARGETS:
        corners = target["boxes"] / size
        boxes = torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1)
        labels.append({"class_labels": target["labels"], "boxes": boxes})
    outputs, complete = part(images), detector(images, labels=labels)
    assert torch.allclose(task.loss(outputs, TARGETS), complete.loss, rtol=1e-4)
    found, _ = task.judged(outputs, TARGETS)
    softmax = complete.logits.shape[-1] == 6
    scores = complete.logits.softmax(-1)[..., :-1] if softmax else complete.logits.sigmoid()
    best, index = scores[0].flatten().max(0)
    centre, extent = complete.pred_boxes[0, index // 5].split(2)
    assert found[0]["scores"][0] == best
    assert found[0]["labels"][0] == index % 5
    assert torch.allclose(found[0]["boxes"][0], 64 * torch.cat([centre - extent / 2, centre + extent / 2]))
    with pytest.raises(ConfigError, match="label_smoothing"):
        task.loss(outputs, TARGETS, 0.1)


def test_all_weights_of_a_small_detector_are_trained():
    """transformers freezes DETR's backbone and its BatchNorm, which have no trained weights here."""
    detector = made("detr")
    assert all(parameter.requires_grad for parameter in detector.parameters())
    backbone = detector.model.backbone
    assert not [name for name, module in backbone.named_modules() if "Frozen" in type(module).__name__]
    assert [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.parametrize(
    ("kind", "name"), [("detr", "model.query_position_embeddings.weight"), ("yolos", "vit.embeddings.detection_tokens")]
)
def test_queries_start_apart(kind, name):
    """Queries that start alike find the same box, and one learns what the others learn."""
    detector = made(kind)
    apart = torch.cdist(*2 * [detector.get_parameter(name).flatten(0, -2)])
    assert apart[~torch.eye(len(apart), dtype=bool)].min() > 0.1
    with torch.no_grad():
        boxes = detector(torch.randn(IMAGES.shape)).pred_boxes
    assert boxes.std(1).min() > 1e-5


def test_a_detector_of_ones_own_needs_two_methods():
    yolo = made("yolo")
    task = detection_of(yolo, IMAGES)
    assert isinstance(task, OwnDetection)
    outputs = yolo(torch.randn(IMAGES.shape))
    assert task.loss(outputs, TARGETS).isfinite()
    found, _ = task.judged(outputs, TARGETS)
    assert found[0]["boxes"].shape == (80, 4) or found[0]["boxes"].shape == (100, 4)
    assert isinstance(detection_of(made("efficientdet"), IMAGES), EfficientDetDetection)
    with pytest.raises(ConfigError, match="label_smoothing"):
        task.loss(outputs, TARGETS, 0.1)
    with pytest.raises(ConfigError, match='methods "loss" and "detect"'):
        detection_of(nn.Conv2d(3, 8, 3), IMAGES)


def test_the_generalized_overlap_of_boxes():
    a = torch.tensor([[0.0, 0, 2, 2]])
    assert generalized_overlap(a, a) == 1.0
    assert generalized_overlap(a, torch.tensor([[1.0, 0, 3, 2]])) == pytest.approx(2 / 6)
    apart = generalized_overlap(a, torch.tensor([[4.0, 0, 6, 2]]))  # hull 12, union 8
    assert apart == pytest.approx(-4 / 12)


@pytest.mark.exhaustive
@pytest.mark.parametrize("target", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("kind", sweep(("yolo", "retinanet", "rt_detr"), "yolo"))
def test_integers_keep_what_was_learned(kind, target):
    data = load_datasets(DataOptions(source="shapes", image_size=64, calibration_samples=128))
    detector = made(kind)
    task, model = detection_of(copy.deepcopy(detector), IMAGES), tensor_part(detector)
    fit(model, data.train, task, epochs=6, rate=2e-3)

    def loader(items):
        return list(evaluation_loader(items, 32, collate=task.collate))

    qmodel = he.quantize(model, [batch[0] for batch in loader(data.calibration)], target=target)
    floats, integers = (evaluate(one, loader(data.validation), task)["mAP"] for one in (model, qmodel))
    assert floats > 25
    assert integers > floats - 1.5
