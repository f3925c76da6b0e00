"""Find the task of a detector: its own loss and post-processing, by the library that it is from."""

import copy
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from halfeven.checked_arguments import checked_arguments
from halfeven.errors import ConfigError
from halfeven.tasks.detection import Detection, Targets, TorchvisionDetection
from halfeven.tasks.set_prediction import SetPrediction, is_set_prediction


@runtime_checkable
class Detector(Protocol):
    """A network of your own, from images to tensors, with the loss and the boxes of these tensors."""

    def loss(self, outputs: Any, targets: Targets, /) -> Tensor:
        """Return the loss of a batch, [].

        Args:
            outputs: what the network returns.
            targets: "boxes", [boxes, 4], and "labels", [boxes], of each image.
        """

    def detect(self, outputs: Any, /) -> list[dict[str, Tensor]]:
        """Return "boxes", [boxes, 4], "scores" and "labels", [boxes], of each image."""


class OwnDetection(Detection):
    """The loss and the post-processing that are methods of the network.

    Args:
        detector: a network with methods `loss` and `detect`, which must not read weights.
    """

    class_axis = 1

    def __init__(self, detector: Detector) -> None:
        self.detector = copy.deepcopy(detector)

    def loss(self, outputs: Any, targets: Targets, label_smoothing: float = 0.0) -> Tensor:
        """Return the detector's loss.

        Raises:
            ConfigError: `label_smoothing` is not 0.
        """
        if label_smoothing:
            raise ConfigError(
                f"training.label_smoothing={label_smoothing} would have no effect: the loss is the detector's own. "
                "Set it to 0."
            )
        return self.detector.loss(outputs, targets)

    def judged(self, outputs: Any, targets: Targets) -> tuple[Any, Any]:
        """Return the boxes of the detector, and the targets."""
        return self.detector.detect(outputs), list(targets)


@checked_arguments(ConfigError)
def detection_of(detector: nn.Module, example: Tensor) -> Detection:
    """Return the task of a detector of torchvision, effdet or transformers, or of your own.

    Args:
        detector: the complete model; its weights are not used.
        example: a batch of images, [samples, 3, height, width]: all images have this size.

    Raises:
        ConfigError: the detector's loss and post-processing are not known.
    """
    if is_set_prediction(detector):
        return SetPrediction(detector, example)
    if type(detector).__module__.startswith("effdet."):
        from halfeven.tasks.efficientdet import EfficientDetDetection

        return EfficientDetDetection(detector, example)
    if isinstance(detector, Detector):
        return OwnDetection(detector)
    return TorchvisionDetection(detector, example)
