"""Detection with EfficientDet of the package effdet: its own anchors, loss and post-processing around the network."""

from typing import Any

from torch import Tensor, nn

from halfeven.errors import ConfigError
from halfeven.imports import extra
from halfeven.tasks.detection import Detection, Targets


class EfficientDetDetection(Detection):
    """The loss and the post-processing of effdet's EfficientDet.

    Outputs are two lists of a tensor for each level, of classes, [samples, anchors * classes, height, width], and of
    boxes. Labels count from 1, as COCO's do.

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
                f"The anchors of the EfficientDet are those of images of {height} x {width}, and the data gives "
                f"{example.shape[-2]} x {example.shape[-1]}: boxes would lie elsewhere. Set data.image_size, or "
                "image_size in model.arguments, to the other's."
            )
        self.given, self.training, self.predicting = given, DetBenchTrain(given), DetBenchPredict(given)

    def loss(self, outputs: Any, targets: Targets, label_smoothing: float = 0.0) -> Tensor:
        """Focal and box loss, weighted as the model's config says.

        Raises:
            ConfigError: smoothed labels, which are a setting of the model's own config.
        """
        if label_smoothing:
            raise ConfigError(
                f"training.label_smoothing={label_smoothing} is not for EfficientDet, whose loss has its own. Set it "
                "to 0, and label_smoothing in model.arguments."
            )
        boxes = [target["boxes"][:, [1, 0, 3, 2]] for target in targets]  # effdet has top, left, bottom, right
        labels = [target["labels"].float() for target in targets]
        images = self._give(outputs)
        loss: Tensor = self.training.to(images.device).train()(images, {"bbox": boxes, "cls": labels})["loss"]
        return loss

    def judged(self, outputs: Any, targets: Targets) -> tuple[Any, Any]:
        """Boxes with scores and labels, after suppression of overlapping ones."""
        images = self._give(outputs)
        rows = self.predicting.to(images.device).eval()(images)
        found = [row[row[:, 4] > 0] for row in rows]  # it fills up with zeros
        return [{"boxes": r[:, :4], "scores": r[:, 4], "labels": r[:, 5].long()} for r in found], list(targets)

    def _give(self, outputs: Any) -> Tensor:
        """Let the network give these outputs; what stands for the images is returned."""
        classes, boxes = ([level.float() for level in levels] for levels in _two_lists(outputs))
        self.given.outputs = classes, boxes
        return classes[0]


class _Given(nn.Module):
    """A network whose outputs are given."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.config: Any = detector.config

    def forward(self, images: Tensor) -> Any:
        return self.outputs


def _two_lists(outputs: Any) -> tuple[list[Tensor], list[Tensor]]:
    classes, boxes = outputs
    return list(classes), list(boxes)
