"""The part of a detector that is quantized: from a batch of images to the tensors of its heads."""

from typing import Any

from torch import Tensor, nn

from halfeven.tasks.set_prediction import is_set_prediction
from halfeven.tasks.torchvision_detection import check_detector


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


class _SetOutputs:
    """Makes a detector of transformers return only the tensors that its loss and its boxes need."""

    def forward(self: Any, images: Tensor) -> Any:
        found = super().forward(images)  # type: ignore[misc]
        return type(found)(**{name: found[name] for name in SET_OUTPUTS if found.get(name) is not None})


SET_OUTPUTS = (
    *("logits", "pred_boxes", "intermediate_logits", "intermediate_reference_points"),
    *("enc_topk_logits", "enc_topk_bboxes"),
)
"""Outputs that losses and post-processing read."""


def tensor_part(model: nn.Module) -> nn.Module:
    """Return the part of a detector that is quantized; any other model as it is.

    A detector of transformers gets a class with fewer outputs, in place, and is returned itself.

    Raises:
        ConfigError: a detector of torchvision whose part from tensor to tensor is not known.
    """
    if is_set_prediction(model):
        # A subclass, not a wrapper: the state dict stays the detector's.
        model.__class__ = type(type(model).__name__, (_SetOutputs, type(model)), {})
        return model
    from_torchvision = any(kind.__module__.startswith("torchvision.models.detection") for kind in type(model).__mro__)
    return TensorPart(model) if from_torchvision else model
