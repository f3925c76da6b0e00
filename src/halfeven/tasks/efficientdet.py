"""Detection with EfficientDet of the package effdet: the network, with effdet's anchors, loss and post-processing."""

from typing import Any

from torch import Tensor, nn

from halfeven.errors import ConfigError
from halfeven.imports import extra
from halfeven.tasks.detection import Detection, Targets


class EfficientDetDetection(Detection):
    """The loss and the post-processing of effdet's EfficientDet.

    Outputs are two lists with a tensor for each level: classes, [samples, anchors * classes, height, width], and boxes.
    Labels count from 1, as COCO's do.

    Args:
        detector: the model as effdet makes it; its weights are not used.
        example: a batch of images, [samples, 3, height, width]; it must have the size that the model's config names.
    """

    class_axis = 1

    def __init__(self, detector: nn.Module, example: Tensor) -> None:
        with extra("detection", "A task of EfficientDet"):
            from effdet.bench import DetBenchPredict, DetBenchTrain

        given: Any = _Given(detector)
        height, width = given.config.image_size
        if example.shape[-2:] != (height, width):
            raise ConfigError(
                f"The EfficientDet has anchors for images of {height} x {width}, and the data gives images of "
                f"{example.shape[-2]} x {example.shape[-1]}, so boxes would be in the wrong places. Set "
                "data.image_size, or image_size in model.arguments, so that the two are equal."
            )
        self.given = given
        self.training = DetBenchTrain(given)
        self.predicting = DetBenchPredict(given)

    def loss(self, outputs: Any, targets: Targets, label_smoothing: float = 0.0) -> Tensor:
        """Return the focal loss and the box loss, weighted as the model's config says.

        Raises:
            ConfigError: `label_smoothing` is not 0; the model's own config has that setting.
        """
        if label_smoothing:
            raise ConfigError(
                f"training.label_smoothing={label_smoothing} would have no effect: EfficientDet's loss has its own "
                "setting. Set it to 0, and label_smoothing in model.arguments."
            )
        boxes = [target["boxes"][:, [1, 0, 3, 2]] for target in targets]  # effdet has top, left, bottom, right
        labels = [target["labels"].float() for target in targets]
        images = self._set_outputs(outputs)
        loss: Tensor = self.training.to(images.device).train()(images, {"bbox": boxes, "cls": labels})["loss"]
        return loss

    def judged(self, outputs: Any, targets: Targets) -> tuple[Any, Any]:
        """Return boxes with scores and labels, after non-maximum suppression, and the targets."""
        images = self._set_outputs(outputs)
        # effdet takes the 5,000 likeliest pairs of an anchor and a class; small images have fewer.
        pairs = sum(level[0].numel() for level in self.given.outputs[0])
        self.predicting.max_detection_points = min(self.given.config.max_detection_points, pairs)
        rows = self.predicting.to(images.device).eval()(images)
        found = [row[row[:, 4] > 0] for row in rows]  # effdet pads with zeros
        return [{"boxes": r[:, :4], "scores": r[:, 4], "labels": r[:, 5].long()} for r in found], list(targets)

    def _set_outputs(self, outputs: Any) -> Tensor:
        """Make the network return these outputs. Returns a tensor to pass in place of images."""
        classes, boxes = ([level.float() for level in levels] for levels in _two_lists(outputs))
        self.given.outputs = (classes, boxes)
        return classes[0]


class _Given(nn.Module):
    """Stand for a network, and return outputs that were given."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.config: Any = detector.config

    def forward(self, images: Tensor) -> Any:
        return self.outputs


def _two_lists(outputs: Any) -> tuple[list[Tensor], list[Tensor]]:
    classes, boxes = outputs
    return list(classes), list(boxes)
