"""Detection with transformers' detectors that predict a set (DETR, RT-DETR, YOLOS, ...), with the model's own loss."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from halfeven.errors import ConfigError
from halfeven.tasks.detection import Detection, Targets, best_boxes


class SetPrediction(Detection):
    """The loss of transformers' detector, which matches objects and queries, and its boxes in pixels.

    Outputs have "logits", [samples, queries, classes], and "pred_boxes", [samples, queries, 4] as centre, width and
    height in parts of the image. If there is a logit more than labels, the last is "no object" and a softmax gives the
    scores; else a sigmoid of each logit does.

    Args:
        detector: transformers' model; its weights are not used.
        example: a batch of images, [samples, 3, height, width]: all images have this size.
    """

    def __init__(self, detector: Any, example: Tensor) -> None:
        self.config = copy.deepcopy(detector.config)
        self.compute = detector.loss_function
        height, width = example.shape[-2:]
        self.size = torch.tensor([width, height, width, height], dtype=torch.float32)

    def loss(self, outputs: Any, targets: Targets, label_smoothing: float = 0.0) -> Tensor:
        """Return the weighted sum of the detector's losses.

        Raises:
            ConfigError: `label_smoothing` is not 0; the model's loss takes labels as they are.
        """
        if label_smoothing:
            raise ConfigError(
                f"training.label_smoothing={label_smoothing} would have no effect: the losses of transformers' "
                "detectors take labels as they are. Set it to 0."
            )
        outputs = {name: output.float() for name, output in outputs.items() if isinstance(output, Tensor)}
        logits, boxes = outputs["logits"], outputs["pred_boxes"]
        size = self.size.to(boxes.device)
        labels = [
            {"class_labels": target["labels"], "boxes": _centre_and_size(target["boxes"] / size)} for target in targets
        ]
        layers = {name: outputs.get(f"intermediate_{name}") for name in ("logits", "reference_points")}
        # The loss asks its config for the layers between, which the outputs have or have not.
        self.config.auxiliary_loss = layers["logits"] is not None
        proposed = {name: outputs[name] for name in ("enc_topk_logits", "enc_topk_bboxes") if name in outputs}
        found = self.compute(
            logits, labels, logits.device, boxes, self.config, layers["logits"], layers["reference_points"], **proposed
        )
        loss: Tensor = found[0]
        return loss

    def judged(self, outputs: Any, targets: Targets) -> tuple[Any, Any]:
        """Return the boxes with the largest scores, their scores and labels, and the targets."""
        logits, boxes = outputs["logits"].float(), outputs["pred_boxes"].float()
        has_no_object = logits.shape[-1] == self.config.num_labels + 1
        # DETR's last logit is "no object", whose probability is no box's score; RT-DETR has a sigmoid for each class.
        scores = logits.softmax(-1)[..., :-1] if has_no_object else logits.sigmoid()
        corners = _corners(boxes) * self.size.to(boxes.device)
        return [best_boxes(*pair) for pair in zip(corners, scores, strict=True)], list(targets)


def is_set_prediction(model: nn.Module) -> bool:
    """Return True for a detector of transformers whose outputs are logits and boxes of queries."""
    names = [kind.__name__ for kind in type(model).__mro__]
    return "PreTrainedModel" in names and type(model).__name__.endswith("ForObjectDetection")


def _centre_and_size(boxes: Tensor) -> Tensor:
    """Return centre, width and height of boxes given by their corners."""
    return torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1)


def _corners(boxes: Tensor) -> Tensor:
    """Return the corners of boxes given by centre, width and height."""
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)
