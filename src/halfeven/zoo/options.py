"""The data of a run."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from halfeven.errors import ConfigError
from halfeven.options import NonNegativeInt, Options, PositiveFloat, PositiveInt, above, below, formerly, renamed_from

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class TextOptions(Options):
    """The tokens of texts."""

    tokenizer: str = ""
    """Tokenizer of transformers: a folder, or a name of its hub."""
    max_length: PositiveInt = 128
    """Tokens of a text: longer texts are cut, shorter texts filled up, because deployed files have a fixed length."""
    columns: tuple[str, ...] = ("sentence",)
    """Columns of the text, or of the two that are compared."""
    label_column: str = "label"
    """Column of the class."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.columns) <= 2:
            raise ConfigError(
                f"data.text.columns={list(self.columns)} gives no text. Name the column of the texts, or the "
                "two columns that are compared."
            )


@dataclass(frozen=True, kw_only=True)
class DataOptions(Options):
    """The data and the way in which it is read."""

    source: Literal[
        "digits", "fashion_mnist", "image_folder", "voc_segmentation", "coco_detection", "shapes", "texts", "callable"
    ] = "image_folder"
    """Kind of data; "shapes": artificial scenes for detectors; "callable": your function that returns `Datasets`."""
    root: Annotated[str, formerly("")] = "auto"
    """Folder of the data; "auto" for the place where "fashion_mnist" is usually installed."""
    function: str = ""
    """For "callable": "package.module:function", called with these `DataOptions`."""
    image_size: PositiveInt = 224
    """Side of the images: of "image_folder" after cropping, of segmentation and detection after scaling."""
    resize: PositiveInt = 256
    """Short side to which "image_folder" scales evaluation images before the centre crop."""
    keep_aspect: bool = True
    """Scale images of segmentation and detection to fit into the square; else they are stretched to it."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean of the colours, which is subtracted from images read from files."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = IMAGENET_STD
    """Standard deviation of the colours, by which images read from files are divided after that."""
    text: TextOptions = field(default_factory=TextOptions)
    """Tokenizer and columns of "texts"."""
    calibration_samples: Annotated[PositiveInt, renamed_from("calibration_images")] = 512
    """Training samples, drawn once with the seed, that set the ranges."""
    calibration_seed: NonNegativeInt = 0
    """Seed of the draw of calibration samples."""
    selection: Literal["validation", "holdout"] = "validation"
    """Samples that choose the best checkpoint: those of validation, on which it then looks better than it is, or a part
    of the training samples that is held out, and never trained or calibrated on."""
    holdout_share: Annotated[float, above(0), below(1)] = 0.1
    """Share of the training samples that is held out."""
    holdout_seed: NonNegativeInt = 0
    """Seed of the draw of held-out samples."""
    on_bad_sample: Literal["error", "skip"] = "error"
    """Treatment of a sample that cannot be read or has an impossible label: "error" ends the run; "skip" takes the
    next good sample in its place, and counts it."""
    workers: NonNegativeInt = 2
    """Processes that load samples; 0 to load them in the main process."""
    prefetch: PositiveInt = 2
    """Training batches that each of these processes reads ahead."""
    evaluation_batch_size: PositiveInt = 128
    """Samples of a batch in validation and calibration."""

    def __post_init__(self) -> None:
        if self.source == "image_folder" and self.image_size > self.resize:
            raise ConfigError(
                f"data.image_size={self.image_size} cannot be cropped out of images whose short side is "
                f"data.resize={self.resize}. Set data.resize to at least data.image_size."
            )
        if self.selection == "validation" and (self.holdout_share, self.holdout_seed) != (0.1, 0):
            raise ConfigError(
                f"data.holdout_share={self.holdout_share} and data.holdout_seed={self.holdout_seed} have no effect "
                'with data.selection="validation": nothing is held out. Set data.selection="holdout".'
            )
