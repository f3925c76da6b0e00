"""Detection with a network of your own that has its loss and its post-processing as methods."""

import copy
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from halfeven.errors import ConfigError
from halfeven.tasks.detection import Detection, Targets


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
