"""A small detector of YOLO's shape without non-maximum suppression: each object is learned by a single place.

Convolutions with SiLU, two levels of features, and a head whose distances from a place to the sides of its box are
expectations over bins (Generalized Focal Loss, section 3.2), decoded to pixels inside of the network. Boxes and scores
leave it in one tensor. Objects are assigned to places one to one, by score and overlap together (DeFCN, section 3.2;
YOLOv10, section 3.1).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halfeven.tasks.detection import best_boxes

STRIDES = (8, 16)
BINS = 8
"""Distances are expectations over 0 to 7 strides."""
OVERLAP_WEIGHT = 0.8
"""Exponent of the overlap in the quality of a place for an object; the score has the rest (DeFCN, equation 3)."""


def _layer(inside: int, outside: int, kernel: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outside), nn.SiLU())


class Stage(nn.Module):
    """Split the channels, compute a residual block with one half, and merge all (CSP, as YOLO's C2f)."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.first = _layer(inside, outside, 1)
        self.block = nn.Sequential(_layer(outside // 2, outside // 2, 3), _layer(outside // 2, outside // 2, 3))
        self.merge = _layer(outside // 2 * 3, outside, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = self.first(x).chunk(2, 1)
        merged: Tensor = self.merge(torch.cat([kept, changed, changed + self.block(changed)], 1))
        return merged


class Yolo(nn.Module):
    """Compute, for each place, a box in pixels and the probabilities of the classes: [samples, 4 + classes, places].

    Args:
        num_classes: classes with the background, which has no output.
        width: channels at a quarter of the resolution.
    """

    bins: Tensor

    def __init__(self, num_classes: int, width: int = 16) -> None:
        super().__init__()
        self.classes = num_classes - 1
        wide = 2 * width
        self.stem = nn.Sequential(_layer(3, width, 3, 2), _layer(width, width, 3, 2), Stage(width, width))
        self.middle = nn.Sequential(_layer(width, wide, 3, 2), Stage(wide, wide))
        self.deep = nn.Sequential(_layer(wide, 2 * wide, 3, 2), Stage(2 * wide, 2 * wide))
        self.up = nn.Upsample(scale_factor=2)
        self.join = Stage(3 * wide, wide)
        self.levels = nn.ModuleList(_layer(channels, wide, 3) for channels in (wide, 2 * wide))
        self.boxes = nn.ModuleList(nn.Sequential(_layer(wide, wide, 3), nn.Conv2d(wide, 4 * BINS, 1)) for _ in STRIDES)
        self.scores = nn.ModuleList(
            nn.Sequential(_layer(wide, wide, 3), nn.Conv2d(wide, self.classes, 1)) for _ in STRIDES
        )
        self.register_buffer("bins", torch.arange(BINS).float().reshape(1, 1, BINS, 1))
        for head in self.scores:
            # sigmoid(-4) is 0.02: at first a place has no object, as nearly all of them do not.
            nn.init.constant_(head[-1].bias, -4.0)  # type: ignore[index]

    def forward(self, images: Tensor) -> Tensor:
        middle = self.middle(self.stem(images))
        deep = self.deep(middle)
        features = (self.join(torch.cat([self.up(deep), middle], 1)), deep)
        levels = [level(feature) for level, feature in zip(self.levels, features, strict=True)]
        # [samples, 4 * BINS, places] and [samples, classes, places]: the places of one level after those of the other.
        bins = torch.cat([head(x).flatten(2) for head, x in zip(self.boxes, levels, strict=True)], 2)
        scores = torch.cat([head(x).flatten(2) for head, x in zip(self.scores, levels, strict=True)], 2)
        # A distance is the expectation of its bins (Generalized Focal Loss, section 3.2).
        distances = (bins.reshape(bins.shape[0], 4, BINS, -1).softmax(2) * self.bins).sum(2)
        centres, strides = place_centres(images.shape[-2], images.shape[-1], images)
        # Distances in strides, [samples, 2, places] each: to the left and top sides, and to the right and bottom ones.
        near, far = distances.chunk(2, 1)
        corners = torch.cat([(centres - near) * strides, (centres + far) * strides], 1)
        return torch.cat([corners, scores.sigmoid()], 1)

    def loss(self, outputs: Tensor, targets: Any) -> Tensor:
        """Return the focal loss of the scores and the generalized overlap's loss of the boxes, over all objects."""
        boxes, scores = outputs[:, :4].transpose(1, 2), outputs[:, 4:].transpose(1, 2).clamp(1e-6, 1 - 1e-6)
        wanted = torch.zeros_like(scores)
        # A batch without objects has a gradient, of zeros, too.
        losses = [boxes.sum() * 0]
        for sample, target in enumerate(targets):
            place, found = assign(boxes[sample], scores[sample], target["boxes"], target["labels"] - 1)
            overlap = generalized_overlap(boxes[sample, place], target["boxes"][found])
            wanted[sample, place, target["labels"][found] - 1] = 1.0
            losses.append(2 * (1 - overlap).sum())
        # Focal: a place without an object counts by the square of its score, so that the many easy places weigh little.
        weight = torch.where(wanted > 0, 1.0, 0.75 * scores.detach() ** 2)
        classes = (F.binary_cross_entropy(scores, wanted, reduction="none") * weight).sum()
        objects = max(sum(len(target["boxes"]) for target in targets), 1)
        return (torch.stack(losses).sum() + classes) / objects

    def detect(self, outputs: Tensor) -> list[dict[str, Tensor]]:
        """Return the boxes of each image with the largest scores; none are suppressed."""
        found = [best_boxes(output[:4].T, output[4:].T) for output in outputs]
        return [{**image, "labels": image["labels"] + 1} for image in found]


def place_centres(height: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the centres of all places in strides, [1, 2, places] as x and y, and the strides, [1, 1, places]."""
    centres, strides = [], []
    for stride in STRIDES:
        rows = torch.arange(height // stride, device=like.device, dtype=like.dtype) + 0.5
        columns = torch.arange(width // stride, device=like.device, dtype=like.dtype) + 0.5
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        centres.append(torch.stack([x.flatten(), y.flatten()]))
        strides.append(torch.full((1, x.numel()), float(stride), device=like.device, dtype=like.dtype))
    return torch.cat(centres, 1)[None], torch.cat(strides, 1)[None]


@torch.no_grad()
def assign(boxes: Tensor, scores: Tensor, objects: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Assign each object to one place.

    Args:
        boxes: [places, 4] in pixels.
        scores: [places, classes].
        objects: [objects, 4] in pixels.
        labels: [objects], from 0.

    Returns:
        Indices of places, and of the objects that they have.
    """
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]  # comes with scikit-learn

    # From -1 to 1 moved to 0 to 1, of which a power can be taken.
    overlap = (generalized_overlap(boxes[:, None], objects[None]).clamp(min=-1) + 1) / 2
    quality = scores[:, labels] ** (1 - OVERLAP_WEIGHT) * overlap**OVERLAP_WEIGHT
    place, found = linear_sum_assignment(quality.cpu().numpy(), maximize=True)
    return torch.as_tensor(place), torch.as_tensor(found)


def generalized_overlap(a: Tensor, b: Tensor) -> Tensor:
    """Return the generalized intersection over union of boxes, -1 to 1 (GIoU, algorithm 1)."""
    common = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    # The smallest box around both: how much of it neither covers tells how far apart they are.
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=1e-6).prod(-1)
    areas = [(box[..., 2:] - box[..., :2]).clamp(min=0).prod(-1) for box in (a, b)]
    union = (areas[0] + areas[1] - common).clamp(min=1e-6)
    return common / union - (hull - union) / hull
