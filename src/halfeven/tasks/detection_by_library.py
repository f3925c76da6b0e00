"""Choose the task of a detector by the library that it is from: torchvision, effdet, transformers, or your own code."""

from torch import Tensor, nn

from halfeven.checked_arguments import checked_arguments
from halfeven.errors import ConfigError
from halfeven.tasks.detection import Detection
from halfeven.tasks.own_detection import Detector, OwnDetection
from halfeven.tasks.set_prediction import SetPrediction, is_set_prediction
from halfeven.tasks.torchvision_detection import TorchvisionDetection


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
