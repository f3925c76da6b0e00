"""Which data a run has."""

from dataclasses import dataclass, field
from typing import Literal

from halfeven.errors import ConfigError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """How texts become tokens."""

    tokenizer: str = ""
    """Tokenizer of transformers: a folder, or a name of its hub."""
    max_length: int = 128
    """Tokens of a text; longer ones are cut, shorter ones filled up, as deployed files have one length."""
    columns: tuple[str, ...] = ("sentence",)
    """Columns of the text, or of the two that are compared."""
    label_column: str = "label"
    """Column of the class."""

    def __post_init__(self) -> None:
        if self.max_length < 1 or not 1 <= len(self.columns) <= 2:
            raise ConfigError(
                f"data.text.max_length={self.max_length} and columns={list(self.columns)} give no text: the first "
                "must be at least 1, and there are one or two columns."
            )


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which data, and how it is read."""

    source: Literal[
        "digits", "fashion_mnist", "image_folder", "voc_segmentation", "coco_detection", "texts", "callable"
    ] = "image_folder"
    """Kind of data; "callable": your own function, which returns a `Datasets`."""
    root: str = ""
    """Folder of the data; "" for the place where it is usually installed (not for "image_folder")."""
    function: str = ""
    """For "callable": "package.module:function", called with these options."""
    image_size: int = 224
    """Side of the images: of "image_folder" after cropping, of segmentation and detection after scaling."""
    resize: int = 256
    """Short side to which "image_folder" scales evaluation images before the centre crop."""
    keep_aspect: bool = True
    """Whether images of segmentation and detection are scaled to fit into the square; else they are stretched to it."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean of the colours, which is taken off images read from files."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Standard deviation of the colours, by which they are divided."""
    text: TextOptions = field(default_factory=TextOptions)
    """How "texts" are read."""
    calibration_images: int = 512
    """Training samples, drawn once with the seed, that set the ranges."""
    calibration_seed: int = 0
    """Seed of that draw."""
    workers: int = 2
    """Processes that load images; 0 to load them in the main one."""
    evaluation_batch_size: int = 128
    """Images at a time in validation and calibration."""

    def __post_init__(self) -> None:
        if self.calibration_images < 1 or self.evaluation_batch_size < 1 or self.workers < 0:
            raise ConfigError(
                f"data.calibration_images={self.calibration_images}, "
                f"data.evaluation_batch_size={self.evaluation_batch_size} "
                f"and data.workers={self.workers} leave nothing to load. The first two must be at least 1, workers 0 "
                "or more."
            )
        if self.image_size < 1 or min(self.std) <= 0:
            raise ConfigError(
                f"data.image_size={self.image_size} and data.std={self.std} make no image: the first must be at least "
                "1, and the other divides colours."
            )
        if self.source == "image_folder" and not 1 <= self.image_size <= self.resize:
            raise ConfigError(
                f"data.image_size={self.image_size} cannot be cropped out of images whose short side is "
                f"data.resize={self.resize}. Set data.resize to at least data.image_size."
            )
