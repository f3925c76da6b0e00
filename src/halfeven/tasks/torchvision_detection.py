"""Detection with torchvision's RetinaNet, FCOS, SSD and SSDlite, with their own anchors, losses and post-processing.

A detector of torchvision reads lists of images, and returns losses in training and boxes otherwise. Between them, from
a batch of images to the tensors of its heads, it is a network like any other: that part is captured, quantized and
deployed (`halfeven.zoo.tensor_part.TensorPart`).
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from halfeven.errors import ConfigError
from halfeven.graph.torch_private import pytree
from halfeven.tasks.detection import Detection, Targets


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
            parameter.data = parameter.data.new_empty(0)  # only the shapes of the features were needed
        self.detector.transform = _AsGiven()

    def loss(self, outputs: Any, targets: Targets, label_smoothing: float = 0.0) -> Tensor:
        """Return the sum of the detector's losses.

        Raises:
            ConfigError: `label_smoothing` is not 0; torchvision's losses take labels as they are.
        """
        if label_smoothing:
            raise ConfigError(
                f"training.label_smoothing={label_smoothing} would have no effect: the losses of torchvision's "
                "detectors take labels as they are. Set it to 0."
            )
        losses = self._after_heads(outputs, targets)
        return torch.stack(list(losses.values())).sum()

    def judged(self, outputs: Any, targets: Targets) -> tuple[Any, Any]:
        """Return boxes with scores and labels, after thresholds and non-maximum suppression, and the targets."""
        return self._after_heads(outputs, None), list(targets)

    def _after_heads(self, outputs: dict[str, Tensor], targets: Targets | None) -> Any:
        """Run the detector's own code behind the heads, on outputs that are given."""
        outputs = {name: output.float() for name, output in outputs.items()}
        first = next(iter(outputs.values()))
        # Zeros of the right shapes, without memory: anchors depend on the sizes of features and images alone.
        features = pytree.tree_map(lambda f: first.new_zeros(1).expand(len(first), *f.shape[1:]), self.features)
        self.detector.backbone.forward = lambda images: features
        self.detector.head.forward = lambda features: outputs
        images = first.new_zeros(1).expand(len(first), *self.size)
        # In training mode it returns losses, else boxes.
        self.detector.train(targets is not None)
        return self.detector(list(images), targets)


class _AsGiven(nn.Module):
    """Pass images on unchanged, in place of the detector's scaling and normalization, which the data does."""

    def forward(self, images: list[Tensor], targets: Any = None) -> tuple[Any, Any]:
        from torchvision.models.detection.image_list import ImageList

        return ImageList(torch.stack(images), [tuple(image.shape[-2:]) for image in images]), targets

    def postprocess(self, found: Any, sizes: Any, original_sizes: Any) -> Any:
        return found


def check_detector(detector: nn.Module) -> None:
    """Raise ConfigError for a detector whose part from tensor to tensor is not known."""
    from torchvision.models.detection import FCOS, RetinaNet
    from torchvision.models.detection.ssd import SSD

    if not isinstance(detector, RetinaNet | FCOS | SSD):
        raise ConfigError(
            f"The detector, of class {type(detector).__name__}, cannot be deployed: halfeven knows the part from a "
            "batch of images to fixed tensors only of torchvision's RetinaNet, FCOS, SSD and SSDlite. Take one of "
            'these, give your own module the methods "loss" and "detect", or give its task (task.kind="callable").'
        )
