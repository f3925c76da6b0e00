"""Read images of any bit depth as RGB."""

from pathlib import Path
from typing import Any

import numpy as np

LEVELS_OF_16_BITS = 65535 / 255
"""Levels of 16 bits for each level of 8 bits."""


def read_image(path: str | Path) -> Any:
    """Return the image of a file as PIL's, in RGB with 8 bits."""
    from PIL import Image  # comes with torchvision

    with Path(path).open("rb") as file, Image.open(file) as image:
        # PIL converts 16 bits by clipping them to 255, so that nearly all would be white.
        if image.mode.startswith("I"):
            levels = np.round(np.asarray(image).astype(np.float64) / LEVELS_OF_16_BITS)
            return Image.fromarray(levels.clip(0, 255).astype(np.uint8)).convert("RGB")
        return image.convert("RGB")
