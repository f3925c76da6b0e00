"""Detection: the network is quantized from tensor to tensor; anchors, losses and post-processing are the model's own.

A detector of torchvision reads lists of images, and returns losses in training and boxes otherwise. What lies between,
from a batch of images to the tensors of its heads, is a network like any other: that part is captured, quantized and
deployed (`TensorPart`). Targets are dicts with "boxes", [boxes, 4] as left, top, right, bottom in pixels of the input,
and "labels", [boxes].
"""

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import default_collate

from halfeven.errors import ConfigError
from halfeven.imports import extra
from halfeven.tasks.task import Metrics, Task

if TYPE_CHECKING:
    from torchmetrics import Metric

Targets = Sequence[dict[str, Tensor]]


class Detection(Task):
    """A detector's metrics: `mAP`, COCO's mean average precision over overlaps of 0.5 to 0.95, and `mAP50`, at 0.5."""

    key = "mAP"
    class_axis = -1

    def metrics(self) -> "Metric":
        """Mean average precision; needs pycocotools.

        Raises:
            ConfigError: it is not installed.
        """
        with extra("train", "The metrics of a task"):
            from torchmetrics.detection import MeanAveragePrecision

        with extra("detection", "Mean average precision"):
            metric: Metric = MeanAveragePrecision(box_format="xyxy", iou_type="bbox")
        return metric

    def figures(self, computed: Mapping[str, Tensor]) -> Metrics:
        """The two figures of the many that it computes; -1 there stands for a data set without boxes."""
        return super().figures({"mAP": computed["map"].clamp(min=0), "mAP50": computed["map_50"].clamp(min=0)})

    def collate(self, items: Sequence[tuple[Any, Any]]) -> tuple[Any, Any]:
        """Images in a batch, targets in a list: there are as many boxes as there are."""
        return default_collate([item[0] for item in items]), [item[1] for item in items]


class TorchvisionDetection(Detection):
    """The loss and the post-processing of torchvision's RetinaNet, FCOS, SSD or SSDlite.

    Args:
        detector: the model as torchvision makes it; its weights are not used.
        example: a batch of images, [samples, 3, height, width]: all images have this size.
    """

    def __init__(self, detector: Any, example: Tensor) -> None:
        check_detector(detector)
        self.detector = copy.deepcopy(detector)
        with torch.no_grad():
            self.detector.eval()
            features = self.detector.backbone(example[:1])
        self.features = pytree.tree_map(lambda feature: feature.to("meta"), features)
        self.size = tuple(example.shape[1:])
        for parameter in self.detector.parameters():
            parameter.data = parameter.data.new_empty(0)  # shapes were all that they were needed for
        self.detector.transform = _AsGiven()

    def loss(self, outputs: Any, targets: Targets, label_smoothing: float = 0.0) -> Tensor:
        """The sum of the detector's losses.

        Raises:
            ConfigError: smoothed labels, which torchvision's losses do not know.
        """
        if label_smoothing:
            raise ConfigError(
                f"training.label_smoothing={label_smoothing}, and the losses of torchvision's detectors take labels as "
                "they are. Set it to 0."
            )
        losses = self._after_heads(outputs, targets)
        return torch.stack(list(losses.values())).sum()

    def judged(self, outputs: Any, targets: Targets) -> tuple[Any, Any]:
        """Boxes with scores and labels, after thresholds and suppression of overlapping ones."""
        return self._after_heads(outputs, None), list(targets)

    def _after_heads(self, outputs: dict[str, Tensor], targets: Targets | None) -> Any:
        """Run the detector with the heads' outputs given: its own code does all the rest."""
        outputs = {name: output.float() for name, output in outputs.items()}
        first = next(iter(outputs.values()))
        features = pytree.tree_map(lambda f: first.new_zeros(1).expand(len(first), *f.shape[1:]), self.features)
        self.detector.backbone.forward = lambda images: features
        self.detector.head.forward = lambda features: outputs
        images = first.new_zeros(1).expand(len(first), *self.size)
        self.detector.train(targets is not None)
        return self.detector(list(images), targets)


class TensorPart(nn.Module):
    """Backbone and heads of a detector of torchvision: images, [samples, 3, height, width], to the heads' outputs.

    Its state dict is that of the detector. Images come as the data gives them: normalized, and of one size.
    """

    def __init__(self, detector: Any) -> None:
        super().__init__()
        check_detector(detector)
        self.backbone: nn.Module = detector.backbone
        self.head: nn.Module = detector.head

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """For each anchor the logits of the classes, [samples, anchors, classes], and the offsets of its box."""
        features = self.backbone(images)
        found: dict[str, Tensor] = self.head([features] if isinstance(features, Tensor) else list(features.values()))
        return found


class _AsGiven(nn.Module):
    """In the place of the transform that scales and normalizes images: the data has done so."""

    def forward(self, images: list[Tensor], targets: Any = None) -> tuple[Any, Any]:
        from torchvision.models.detection.image_list import ImageList

        return ImageList(torch.stack(images), [tuple(image.shape[-2:]) for image in images]), targets

    def postprocess(self, found: Any, sizes: Any, original_sizes: Any) -> Any:
        return found


def check_detector(detector: nn.Module) -> None:
    """Raise ConfigError for a detector without a part from tensor to tensor."""
    from torchvision.models.detection import FCOS, RetinaNet
    from torchvision.models.detection.ssd import SSD

    if not isinstance(detector, RetinaNet | FCOS | SSD):
        raise ConfigError(
            f"A {type(detector).__name__} has no part that goes from a batch of images to fixed tensors, or is not one "
            "of torchvision's RetinaNet, FCOS, SSD and SSDlite, whose part is known, so it cannot be deployed. Take "
            'one of these, or give a module of your own and its task (task.kind="callable").'
        )
