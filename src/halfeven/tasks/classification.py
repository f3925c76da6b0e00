"""Classification of images, texts, or anything else: one label for a sample."""

from typing import TYPE_CHECKING, Any

import numpy as np
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

    def wrong_target(self, target: Any) -> str:
        """Say what is wrong with a label (a class number, or the probabilities of all classes); "" where nothing is."""
        if type(self).loss is not Classification.loss:
            return ""  # a task of the user's own may have other targets
        if isinstance(target, Tensor | np.generic | np.ndarray):
            if target.ndim:
                return ""
            target = target.item()
        if isinstance(target, bool) or not isinstance(target, int):
            return f"its label is {target!r}, and must be an integer, the number of a class"
        if not 0 <= target < self.num_classes:
            return f"its label is {target}, and the classes are 0 to {self.num_classes - 1}"
        return ""

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
