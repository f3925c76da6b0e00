"""Images with more than one label each: Pascal VOC's segmentation (a class per pixel), COCO's detection (boxes).

All images of a model have one size, as deployed files have: they are scaled to a square, or so that they fit into it,
with the mean colour on the right and below, where nothing is labelled.
"""

import contextlib
import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from halfeven.errors import ConfigError
from halfeven.imports import extra
from halfeven.zoo.options import DataOptions

UNLABELLED = 255
"""Pascal VOC's label of object borders; also given to the margin around a smaller image."""
VOC_CLASSES = 21


class Squared:
    """Make tensors of one size from an image and its target.

    Args:
        options: size, mean and standard deviation of the images.
        augment: flip images at random, as in training.
    """

    def __init__(self, options: DataOptions, *, augment: bool) -> None:
        with extra("train", "Transforms of images and their labels"):
            from torchvision.transforms import v2

        self.side = options.image_size
        self.keep_aspect = options.keep_aspect
        square = v2.Resize((self.side, self.side), antialias=True)
        fitting = v2.Resize(None, max_size=self.side, antialias=True)
        steps: list[Any] = [v2.RandomHorizontalFlip()] if augment else []
        steps += [fitting if options.keep_aspect else square]
        steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(options.mean, options.std)]
        self.transform = v2.Compose(steps)

    def __call__(self, image: Any, target: Any) -> tuple[Tensor, Any]:
        """Return the normalized image, [3, side, side], and its target, scaled and padded likewise."""
        image, target = self.transform(image, target)
        height, width = image.shape[-2:]
        # Left, right, top, bottom, as `F.pad` takes them: boxes stay where they are.
        margin = (0, self.side - width, 0, self.side - height)
        pixels = F.pad(image.as_subclass(Tensor), margin)  # 0 is the mean colour
        if isinstance(target, dict):
            return pixels, {
                "boxes": target["boxes"].as_subclass(Tensor).float(),
                "labels": target["labels"].as_subclass(Tensor),
            }
        return pixels, F.pad(target.as_subclass(Tensor).squeeze(0).long(), margin, value=UNLABELLED)


class Labelled(Dataset[Any]):
    """Apply a function of image and target to the items of a data set."""

    def __init__(self, items: Any, files: list[str], transform: Callable[[Any, Any], Any]) -> None:
        self.items = items
        self.transform = transform
        self.samples = [(file, 0) for file in files]  # as torchvision's folders have them, for `leakage`

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.transform(*self.items[index])


def voc_segmentation(options: DataOptions) -> tuple[Labelled, Labelled, Labelled]:
    """Open Pascal VOC 2012's segmentation, root/VOCdevkit/VOC2012 as usually unpacked.

    Returns:
        The training part, the same part without augmentation, and the validation part.

    Raises:
        ConfigError: the data is not there, or torchvision is not installed.
    """
    with extra("train", 'data.source="voc_segmentation"'):
        from torchvision import datasets

    def part(name: str, *, augment: bool) -> Labelled:
        try:
            items = datasets.VOCSegmentation(options.root, year="2012", image_set=name, download=False)
        except (RuntimeError, FileNotFoundError) as error:
            raise ConfigError(
                f"Pascal VOC cannot be read, so there are no images: {error} Set data.root to the folder that has "
                "VOCdevkit/VOC2012 with JPEGImages, SegmentationClass and ImageSets/Segmentation."
            ) from error
        return Labelled(items, items.images, functools.partial(_with_mask, Squared(options, augment=augment)))

    return part("train", augment=True), part("train", augment=False), part("val", augment=False)


def coco_detection(options: DataOptions) -> tuple[Labelled, Labelled, Labelled]:
    """Open COCO's boxes, root/train2017, root/val2017 and root/annotations.

    Returns:
        The training part, the same part without augmentation, and the validation part.

    Raises:
        ConfigError: the data is not there, or torchvision or pycocotools is not installed.
    """
    with extra("train", 'data.source="coco_detection"'):
        from torchvision import datasets

    def part(name: str, *, augment: bool) -> Labelled:
        images = Path(options.root) / f"{name}2017"
        annotations = Path(options.root) / "annotations" / f"instances_{name}2017.json"
        if not (images.is_dir() and annotations.is_file()):
            raise ConfigError(
                f"COCO cannot be read: {images} and {annotations} must both be there. Set data.root to the folder "
                "that has train2017, val2017 and annotations."
            )
        # pycocotools prints its progress
        with extra("detection", 'data.source="coco_detection"'), contextlib.redirect_stdout(io.StringIO()):
            items: Any = datasets.CocoDetection(str(images), str(annotations))
        # Images without boxes teach nothing, and some losses are not defined without a box.
        items.ids = [index for index in items.ids if name == "val" or items.coco.getAnnIds(index, iscrowd=False)]
        items = datasets.wrap_dataset_for_transforms_v2(items, target_keys=("boxes", "labels"))
        files = [str(images / items.coco.loadImgs(index)[0]["file_name"]) for index in items.ids]
        return Labelled(items, files, functools.partial(_with_boxes, Squared(options, augment=augment)))

    return part("train", augment=True), part("train", augment=False), part("val", augment=False)


# Functions of this module, which can be pickled: where processes are not forked, those that read samples are given them
# so.
def _with_mask(squared: Squared, image: Any, mask: Any) -> tuple[Tensor, Any]:
    from torchvision import tv_tensors

    return squared(image, tv_tensors.Mask(mask))


def _with_boxes(squared: Squared, image: Any, target: dict[str, Any]) -> tuple[Tensor, Any]:
    return squared(image, _boxes_target(image, target))


def _boxes_target(image: Any, target: dict[str, Any]) -> dict[str, Any]:
    """Return the target of an image; an empty one where the image has no boxes."""
    from torchvision import tv_tensors

    if "boxes" in target:
        return target
    size = (image.height, image.width)
    empty: Any = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=size)
    return {"boxes": empty, "labels": torch.zeros(0, dtype=torch.int64)}
