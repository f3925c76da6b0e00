"""Classification of images, texts, or anything else: one label for a sample."""

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import functional as F

from halfeven.imports import extra
from halfeven.tasks.task import Task

if TYPE_CHECKING:
    from torchmetrics import MetricCollection


class Classification(Task):
    """Cross-entropy; `top1`, and `top5` where there are more than 5 classes.

    The first tensor of the outputs is the logits, [samples, classes]; targets are class numbers, [samples].
    """

    key = "top1"

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def loss(self, outputs: Any, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the mean cross-entropy over samples."""
        return F.cross_entropy(self.logits(outputs).float(), targets, label_smoothing=label_smoothing)

    def metrics(self) -> "MetricCollection":
        """Return new metrics: top-1 and, where there are more than 5 classes, top-5 accuracy."""
        with extra("train", "The metrics of a task"):
            from torchmetrics import MetricCollection
            from torchmetrics.classification import MulticlassAccuracy

        ranks = {"top1": 1, "top5": 5} if self.num_classes > 5 else {"top1": 1}
        return MetricCollection(
            {name: MulticlassAccuracy(self.num_classes, top_k=k, average="micro") for name, k in ranks.items()},
            compute_groups=False,
        )

    def judged(self, outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits and the labels."""
        return self.logits(outputs).float(), targets
