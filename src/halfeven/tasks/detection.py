"""Detection: the metrics of boxes. Losses and post-processing are the detector's own (`detection_by_library`).

Targets are dicts with "boxes", [boxes, 4] as left, top, right, bottom in pixels of the input, and "labels", [boxes].
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor
from torch.utils.data import default_collate

from halfeven.imports import extra
from halfeven.renamed import renamed_attributes
from halfeven.tasks.task import Metrics, Task

if TYPE_CHECKING:
    from torchmetrics import Metric

Targets = Sequence[dict[str, Tensor]]

MOST_FOUND = 100
"""Largest number of boxes of an image that `best_boxes` returns."""


def best_boxes(boxes: Tensor, scores: Tensor) -> dict[str, Tensor]:
    """Return the boxes of an image with the largest scores, without suppression of overlaps.

    Args:
        boxes: [boxes, 4].
        scores: [boxes, classes].

    Returns:
        "boxes", [found, 4], "scores" and "labels", [found], from 0; a box may be found with several labels.
    """
    classes = scores.shape[1]
    # [boxes * classes]: the quotient of an index by `classes` is the box, the remainder the label.
    best, index = scores.flatten().topk(min(MOST_FOUND, scores.numel()))
    return {"boxes": boxes[index // classes], "scores": best, "labels": index % classes}


class Detection(Task):
    """A detector's metrics: `mAP`, COCO's mean average precision over overlaps of 0.5 to 0.95, and `mAP50`, at 0.5."""

    key = "mAP"
    class_axis: int | Literal["auto"] = -1

    def metrics(self) -> "Metric":
        """Return a new mean average precision, which pycocotools computes.

        Raises:
            ConfigError: torchmetrics or pycocotools is not installed.
        """
        with extra("train", "The metrics of a task"):
            from torchmetrics.detection import MeanAveragePrecision

        with extra("detection", "Mean average precision"):
            metric: Metric = MeanAveragePrecision(box_format="xyxy", iou_type="bbox")
        return metric

    def figures(self, computed: Mapping[str, Tensor]) -> Metrics:
        """Return mAP and mAP50 in percent. Where the data set has no boxes, torchmetrics gives -1, and this 0."""
        return super().figures({"mAP": computed["map"].clamp(min=0), "mAP50": computed["map_50"].clamp(min=0)})

    def collate(self, items: Sequence[tuple[Any, Any]]) -> tuple[Any, Any]:
        """Return the images as a batch, and the targets as a list, since images differ in their number of boxes."""
        images = default_collate([image for image, _ in items])
        return images, [target for _, target in items]


__getattr__ = renamed_attributes(__name__, TorchvisionDetection="tasks.torchvision_detection.TorchvisionDetection")
