"""Artificial scenes for detectors: discs, squares, triangles and crosses on noise, with their boxes; no download."""

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from halfeven.zoo.options import DataOptions

SHAPES = ("disc", "square", "triangle", "cross")
"""Class 1 is a disc, and so on; class 0 is the background."""
MOST_SHAPES = 4
"""Largest number of shapes in a scene; the smallest is 1."""
SMALLEST_SHAPE = 0.15
LARGEST_SHAPE = 0.4
"""Sides of a shape, as shares of the side of the scene."""
LEAST_CONTRAST = 90.0
"""Smallest distance between the colours of a shape and of the background, in levels of 255."""
NOISE_STD = 12.0
"""Standard deviation of the noise, in levels of 255."""
PLACE_TRIES = 20
"""Places that are tried for a shape until it touches no earlier shape."""
TRAINING, VALIDATION = 1600, 200
"""Number of scenes of each part."""


class Shapes(Dataset[Any]):
    """Scenes by index. The same seed and index give the same scene, whatever was read before.

    An item is an image, [3, side, side], normalized, and its target: "boxes", [shapes, 4] as left, top, right, bottom
    in pixels, and "labels", [shapes], from 1.

    Args:
        count: number of scenes.
        seed: of the scenes.
        options: size, mean and standard deviation of the images.
    """

    def __init__(self, count: int, seed: int, options: DataOptions) -> None:
        self.count = count
        self.seed = seed
        self.side = options.image_size
        self.mean = 255 * torch.tensor(options.mean).reshape(3, 1, 1)
        self.std = 255 * torch.tensor(options.std).reshape(3, 1, 1)
        self.scene = functools.lru_cache(maxsize=None)(self._scene_at)  # epochs read the same scenes

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        pixels, boxes, labels = self.scene(index)
        image = (torch.from_numpy(pixels).permute(2, 0, 1).float() - self.mean) / self.std
        return image, {"boxes": torch.from_numpy(boxes.copy()), "labels": torch.from_numpy(labels.copy())}

    def __getstate__(self) -> dict[str, Any]:
        # The cache cannot be pickled, as for a worker process, which begins with an empty one.
        return {name: value for name, value in vars(self).items() if name != "scene"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.scene = functools.lru_cache(maxsize=None)(self._scene_at)

    def _scene_at(self, index: int) -> tuple[Any, Any, Any]:
        return scene(np.random.default_rng([self.seed, index]), self.side)


def scene(generator: np.random.Generator, side: int) -> tuple[Any, Any, Any]:
    """Draw a scene.

    Returns:
        Pixels, [side, side, 3] in bytes; boxes, [shapes, 4] in float32; classes, [shapes].
    """
    background = generator.uniform(30, 225, 3)
    pixels = background + generator.normal(0, NOISE_STD, (side, side, 3))
    boxes: list[list[float]] = []
    classes: list[int] = []
    for _ in range(int(generator.integers(1, MOST_SHAPES + 1))):
        place = _free_place(generator, side, boxes)
        if place is None:
            continue
        left, top, size = place
        kind = int(generator.integers(len(SHAPES)))
        inside = _shape_mask(SHAPES[kind], size)
        patch = pixels[top : top + size, left : left + size]
        patch[inside] = _contrasting_colour(generator, background) + generator.normal(
            0, NOISE_STD, (int(inside.sum()), 3)
        )
        boxes.append([left, top, left + size, top + size])
        classes.append(kind + 1)
    image = pixels.clip(0, 255).astype(np.uint8)
    return image, np.asarray(boxes, np.float32).reshape(-1, 4), np.asarray(classes, np.int64)


def _free_place(generator: np.random.Generator, side: int, boxes: list[list[float]]) -> tuple[int, int, int] | None:
    for _ in range(PLACE_TRIES):
        size = round(float(generator.uniform(SMALLEST_SHAPE, LARGEST_SHAPE)) * side)
        left, top = (int(start) for start in generator.integers(0, side - size + 1, 2))
        if all(left >= b[2] or b[0] >= left + size or top >= b[3] or b[1] >= top + size for b in boxes):
            return left, top, size
    return None


def _shape_mask(shape: str, size: int) -> Any:
    """Return the pixels of a shape that touches all four sides of its box, [size, size]."""
    # Centres of the pixels, from -1 to 1 across the box.
    y, x = (np.mgrid[:size, :size] + 0.5) / size * 2 - 1
    if shape == "disc":
        return x**2 + y**2 <= 1
    if shape == "square":
        return np.ones((size, size), bool)
    if shape == "triangle":
        # Half a pixel more: of an even number of columns, none would reach the tip, and the box would not fit.
        return abs(x) <= (y + 1) / 2 + 1 / size
    return (abs(x) <= 1 / 3) | (abs(y) <= 1 / 3)


def _contrasting_colour(generator: np.random.Generator, background: Any) -> Any:
    while True:
        colour = generator.uniform(0, 255, 3)
        if np.linalg.norm(colour - background) >= LEAST_CONTRAST:
            return colour
