"""Semantic segmentation: a class for each pixel."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import functional as F

from halfeven.imports import extra
from halfeven.tasks.task import Task, first_tensor

if TYPE_CHECKING:
    from torchmetrics import MetricCollection


class Segmentation(Task):
    """Cross-entropy over pixels; `mIoU`, the mean over classes of intersection over union, and `pixel_accuracy`.

    Both are of the whole data set, not means of images, as Pascal VOC defines them. Outputs are logits,
    [samples, classes, height, width], alone, or first of several, or under "out" with further ones under "aux", as
    torchvision's models return them. Logits of another size than the labels are scaled to it, bilinearly.

    Args:
        num_classes: classes with the background.
        ignore_index: label of pixels that do not count.
        auxiliary_weight: weight of the cross-entropy of "aux" in the loss (torchvision's training scripts have 0.5).
    """

    key = "mIoU"

    def __init__(self, num_classes: int, *, ignore_index: int = 255, auxiliary_weight: float = 0.5) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.auxiliary_weight = auxiliary_weight

    def loss(self, outputs: Any, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the mean cross-entropy over pixels, plus the auxiliary head's by its weight."""

        def cross_entropy(logits: Tensor) -> Tensor:
            scaled = _at_size_of(logits.float(), targets)
            options: dict[str, Any] = {"ignore_index": self.ignore_index, "label_smoothing": label_smoothing}
            # Not "mean", which is NaN for a batch in which no pixel counts.
            counted = (targets != self.ignore_index).sum().clamp(min=1)
            return F.cross_entropy(scaled, targets, reduction="sum", **options) / counted

        total = cross_entropy(_main_output(outputs))
        if isinstance(outputs, Mapping) and "aux" in outputs:
            total = total + self.auxiliary_weight * cross_entropy(outputs["aux"])
        return total

    def wrong_target(self, target: Any) -> str:
        """Say which class of a mask, [height, width], does not exist; "" where all do."""
        if type(self).loss is not Segmentation.loss or not isinstance(target, Tensor) or target.is_floating_point():
            return ""
        wrong = target[((target < 0) | (target >= self.num_classes)) & (target != self.ignore_index)]
        if not wrong.numel():
            return ""
        return f"its mask holds the class {int(wrong[0])}, and the classes are 0 to {self.num_classes - 1}"

    def metrics(self) -> "MetricCollection":
        """Return new metrics: intersection over union and accuracy over the whole data set."""
        with extra("train", "The metrics of a task"):
            from torchmetrics import MetricCollection
            from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

        ignored: dict[str, Any] = {"ignore_index": self.ignore_index}
        return MetricCollection(
            {
                "mIoU": MulticlassJaccardIndex(self.num_classes, average="macro", **ignored),
                "pixel_accuracy": MulticlassAccuracy(self.num_classes, average="micro", **ignored),
            },
            compute_groups=False,
        )

    def judged(self, outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the class of each pixel, and the labels."""
        return _at_size_of(_main_output(outputs).float(), targets).argmax(1), targets

    def logits(self, outputs: Any) -> Tensor:
        """Return the main head's logits, [samples, height, width, classes]."""
        return _main_output(outputs).movedim(1, -1)


def _main_output(outputs: Any) -> Tensor:
    return outputs["out"] if isinstance(outputs, Mapping) and "out" in outputs else first_tensor(outputs)


def _at_size_of(logits: Tensor, targets: Tensor) -> Tensor:
    if logits.shape[-2:] == targets.shape[-2:]:
        return logits
    return F.interpolate(logits, size=targets.shape[-2:], mode="bilinear", align_corners=False)
