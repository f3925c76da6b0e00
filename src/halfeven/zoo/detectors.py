"""The part of a detector that is quantized: from a batch of images to the tensors of its heads."""

from typing import Any

from torch import Tensor, nn

from halfeven.tasks.detection import check_detector


class TensorPart(nn.Module):
    """Compute a torchvision detector's heads from images, [samples, 3, height, width], with its backbone and heads.

    The state dict is the detector's. The data gives the images normalized, and all of one size.

    Args:
        detector: torchvision's RetinaNet, FCOS, SSD or SSDlite.

    Raises:
        ConfigError: another detector.
    """

    def __init__(self, detector: Any) -> None:
        super().__init__()
        check_detector(detector)
        self.backbone: nn.Module = detector.backbone
        self.head: nn.Module = detector.head

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return, for each anchor, the logits of the classes, [samples, anchors, classes], and the box's offsets."""
        features = self.backbone(images)
        found: dict[str, Tensor] = self.head([features] if isinstance(features, Tensor) else list(features.values()))
        return found
