"""Losses and metrics of the tasks: against figures worked out by hand, and against the library's own detectors."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from halfeven.errors import ConfigError
from halfeven.evaluation import evaluate, evaluation_loader
from halfeven.tasks import Classification, Segmentation
from halfeven.tasks.efficientdet import EfficientDetDetection
from halfeven.tasks.options import TaskOptions
from halfeven.tasks.torchvision_detection import TorchvisionDetection
from halfeven.zoo import small_detectors
from halfeven.zoo.models import ModelOptions, create_model, effdet_model, torchvision_model
from halfeven.zoo.tensor_part import TensorPart
from sweeps import sweep


def figures(task, outputs, targets):
    metrics = task.metrics()
    metrics.update(*task.judged(outputs, targets))
    return task.figures(metrics.compute())


def pixels(labels, classes=3):
    """Logits that give these classes."""
    return F.one_hot(labels, classes).movedim(-1, 1).float() * 10


def test_classification_takes_the_first_tensor_of_whatever_a_model_returns():
    logits, labels = torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0])
    task = Classification(2)
    for outputs in (logits, {"logits": logits, "hidden": torch.zeros(2, 5)}, (logits, None)):
        assert figures(task, outputs, labels) == {"top1": 50.0}
        assert float(task.loss(outputs, labels)) == pytest.approx(math.log(1 + math.exp(-2)) + 1.0)
    smoothed = F.cross_entropy(logits, labels, label_smoothing=0.2)
    assert torch.equal(task.loss(logits, labels, 0.2), smoothed)


def test_intersection_over_union_is_of_the_whole_data_set():
    """Two images: class 0 has 5 pixels right of 6 in union, class 1 has 1 of 2; the mean of images would be another."""
    found = torch.tensor([[[0, 0], [0, 0]], [[1, 1], [0, 0]]])
    wanted = torch.tensor([[[0, 0], [0, 255]], [[1, 0], [0, 0]]])
    metrics = Segmentation(2).metrics()
    for image in range(2):
        metrics.update(*Segmentation(2).judged(pixels(found[image : image + 1], 2), wanted[image : image + 1]))
    measured = Segmentation(2).figures(metrics.compute())
    assert measured["mIoU"] == pytest.approx(100 * (5 / 6 + 1 / 2) / 2, abs=1e-3)
    assert measured["pixel_accuracy"] == pytest.approx(100 * 6 / 7, abs=1e-3)


def test_auxiliary_heads_and_pixels_that_do_not_count():
    torch.manual_seed(0)
    out, aux = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    labels = torch.randint(0, 3, (2, 4, 4))
    labels[:, 0] = 9
    task = Segmentation(3, ignore_index=9, auxiliary_weight=0.4)
    alone = F.cross_entropy(out[:, :, 1:], labels[:, 1:])
    assert torch.allclose(task.loss(out, labels), alone)
    assert torch.allclose(task.loss((out, aux), labels), alone)
    both = task.loss({"out": out, "aux": aux}, labels)
    assert torch.allclose(both, alone + 0.4 * F.cross_entropy(aux[:, :, 1:], labels[:, 1:]))
    assert task.logits({"aux": aux, "out": out}).shape == (2, 4, 4, 3)


def test_logits_of_a_lower_resolution_are_scaled_up():
    labels = torch.zeros(1, 8, 8, dtype=torch.int64)
    labels[..., 4:] = 1
    coarse = pixels(labels[:, ::4, ::4], 2)
    assert figures(Segmentation(2), coarse, labels)["pixel_accuracy"] == 100.0
    assert float(Segmentation(2).loss(coarse, labels)) < 0.6


TARGETS = [
    {"boxes": torch.tensor([[10.0, 10, 60, 60]]), "labels": torch.tensor([1])},
    {"boxes": torch.tensor([[20.0, 10, 60, 90], [5, 5, 30, 30]]), "labels": torch.tensor([2, 3])},
]
DETECTORS = {
    "ssdlite320_mobilenet_v3_large": 320,
    "retinanet_resnet50_fpn": 128,
    "fcos_resnet50_fpn": 128,
}


class Fixed(nn.Module):
    """In the place of the detector's transform: images as they are."""

    def forward(self, images, targets=None):
        from torchvision.models.detection.image_list import ImageList

        return ImageList(torch.stack(images), [(i.shape[-2], i.shape[-1]) for i in images]), targets

    def postprocess(self, result, image_shapes, original_image_sizes):
        return result


@pytest.mark.parametrize("name", sweep(DETECTORS, *(name for name in DETECTORS if not name.startswith("retinanet"))))
def test_loss_and_boxes_are_those_of_the_whole_detector(name):
    side = DETECTORS[name]
    arguments = {"score_thresh": 0.0}
    options = ModelOptions(source="torchvision", name=name, num_classes=5, arguments=arguments)
    torch.manual_seed(0)
    detector = torchvision_model(options)
    part, images = TensorPart(detector), torch.randn(2, 3, side, side)
    assert part.state_dict().keys() == detector.state_dict().keys()
    task = TorchvisionDetection(detector, images)
    detector.transform = Fixed()

    # Frozen in eval mode, or the two would see other running statistics and other dropout.
    losses = detector.train()(list(images), TARGETS)
    loss = task.loss(part.train()(images), TARGETS)
    assert torch.allclose(loss, sum(losses.values()), rtol=1e-5)
    loss.backward()
    assert all(p.grad is not None for p in part.parameters() if p.requires_grad)

    with torch.no_grad():
        expected = detector.eval()(list(images))
        found, _ = task.judged(part.eval()(images), TARGETS)
    assert [{k: v.shape for k, v in one.items()} for one in found] == [
        {k: v.shape for k, v in one.items()} for one in expected
    ]
    assert len(found[0]["boxes"]) > 0
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in ("boxes", "scores", "labels"))


def test_efficientdet_is_that_of_effdets_own_benches():
    from effdet.bench import DetBenchPredict, DetBenchTrain

    options = ModelOptions(
        source="effdet", name="tf_efficientdet_lite0", num_classes=4, arguments={"image_size": (128, 128)}
    )
    torch.manual_seed(0)
    model, images = create_model(options), torch.randn(2, 3, 128, 128)
    task = EfficientDetDetection(effdet_model(options), images)
    boxes = [t["boxes"][:, [1, 0, 3, 2]] for t in TARGETS]
    given = {"bbox": boxes, "cls": [t["labels"].float() for t in TARGETS]}
    expected = DetBenchTrain(model).train()(images, given)["loss"]
    assert torch.allclose(task.loss(model.train()(images), TARGETS), expected, rtol=1e-4)
    with torch.no_grad():
        rows = DetBenchPredict(model.eval())(images)
        found, _ = task.judged(model(images), TARGETS)
    for one, row in zip(found, rows, strict=True):
        row = row[row[:, 4] > 0]
        assert torch.equal(torch.cat([one["boxes"], one["scores"][:, None], one["labels"][:, None]], 1), row)
    assert {int(label) for one in found for label in one["labels"]} <= {1, 2, 3}
    with pytest.raises(ConfigError, match="EfficientDet has anchors for images of 128 x 128"):
        EfficientDetDetection(effdet_model(options), torch.randn(2, 3, 64, 64))


def test_efficientdet_judges_images_with_few_anchors():
    """effdet looks for the 5,000 likeliest pairs of an anchor and a class, and 64 pixels have 252."""
    torch.manual_seed(0)
    detector, images = small_detectors.efficientdet(4), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        found, _ = EfficientDetDetection(detector, images).judged(detector.eval()(images), TARGETS)
    assert all(0 < len(one["scores"]) <= 252 for one in found)


def test_mean_average_precision_of_a_detector_that_is_always_right():
    class Right(TorchvisionDetection):
        def __init__(self):
            pass

        def judged(self, outputs, targets):
            return [{**t, "scores": torch.ones(len(t["labels"]))} for t in targets], list(targets)

    items = [(torch.zeros(1), target) for target in TARGETS]
    loader = evaluation_loader(items, 2, collate=Right().collate)
    assert evaluate(lambda x: x, loader, Right()) == {"mAP": 100.0, "mAP50": 100.0}
    nothing = [(torch.zeros(1), {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)})]
    loader = evaluation_loader(nothing, 2, collate=Right().collate)
    assert evaluate(lambda x: x, loader, Right())["mAP"] == 0.0


def test_detectors_without_a_tensor_part_are_refused():
    with pytest.raises(ConfigError, match="of class FasterRCNN, cannot be deployed"):
        create_model(ModelOptions(source="torchvision", name="fasterrcnn_mobilenet_v3_large_fpn", num_classes=3))


def test_smoothed_labels_are_refused_where_the_losses_do_not_know_them():
    options = ModelOptions(source="torchvision", name="ssdlite320_mobilenet_v3_large", num_classes=3)
    task = TorchvisionDetection(torchvision_model(options), torch.zeros(1, 3, 320, 320))
    with pytest.raises(ConfigError, match=r"label_smoothing=0\.1"):
        task.loss({}, TARGETS, 0.1)


def test_a_batch_in_which_no_pixel_counts_has_a_loss_of_0():
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    masks = torch.randint(3, (2, 4, 4)).masked_fill(torch.rand(2, 4, 4) < 0.3, 255)
    for smoothing in (0.0, 0.1):
        expected = F.cross_entropy(logits, masks, ignore_index=255, label_smoothing=smoothing)
        torch.testing.assert_close(Segmentation(3).loss(logits, masks, smoothing), expected)
    loss = Segmentation(3).loss(logits, torch.full((2, 4, 4), 255))
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(kind="callable"), "no task.function"),
        (dict(function="my_tasks:depth"), r"task.function=.*no effect with task.kind=.classification"),
        (dict(kind="detection", ignore_index=0), "set task.kind=.segmentation"),
        (dict(kind="segmentation", auxiliary_weight=-1.0), "auxiliary_weight=-1.0"),
    ],
)
def test_options_that_mean_nothing(given, message):
    with pytest.raises(ConfigError, match=message):
        TaskOptions(**given)
