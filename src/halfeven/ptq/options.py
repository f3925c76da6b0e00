"""The steps of post-training quantization and their options."""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypedDict

from halfeven.errors import ConfigError
from halfeven.nearest import unknown_options
from halfeven.options import (
    Auto,
    NonNegativeFloat,
    NonNegativeInt,
    Options,
    PositiveFloat,
    PositiveInt,
    Share,
    Switch,
    at_least,
    below,
    formerly,
)
from halfeven.placement.options import QuantizationOptions

ReLU6Choice = Literal["auto", "keep", "replace", "per_channel"]

ITERATIONS = 200
"""Steps of a reconstruction that are chosen where the user names none."""


@dataclass(frozen=True, kw_only=True)
class PTQOptions(Options):
    """The steps of post-training quantization, each of which can be switched.

    "auto" leaves a step to the pipeline, which chooses from the model, the bit-width and the data at hand, and prints
    each choice with its reason (white paper, figure 8).

    Raises:
        ConfigError: a value that its field cannot have.
    """

    equalize: Switch = "auto"
    """Cross-layer equalization: the channels of consecutive layers get equal weight ranges."""
    relu6: ReLU6Choice = "auto"
    """Treatment of ReLU6 by equalization: none ("keep"), as ReLU ("replace"), or with a bound for each channel
    ("per_channel"), which preserves the float model and adds an operator; "auto": as the quantized model gains most."""
    absorb: Switch = "auto"
    """Bias absorption: large biases move into the next layer."""
    smooth: Switch = "auto"
    """Activation smoothing: the outliers after LayerNorm move into the weights (SmoothQuant)."""
    smoothing_strength: Share = 0.5
    """Share of the difficulty that moves from activations to weights, 0 to 1."""
    reparametrize: Switch = "auto"
    """Per-channel ranges after LayerNorm, folded into it and the next layer (RepQ-ViT)."""
    reconstruct: Literal["auto", "off", "layers", "blocks"] = "auto"
    """Learned rounding: "layers" is AdaRound, "blocks" reconstructs residual blocks with learned activation scales."""
    correct_biases: Switch = "auto"
    """Bias correction: the mean shift that quantization gives each channel is taken from the bias."""
    iterations: Annotated[PositiveInt | Auto, formerly(0)] = "auto"
    """Steps of the reconstruction of a layer or block; "auto": 200."""
    batch_size: PositiveInt = 32
    """Samples in a step of the reconstruction."""
    rounding_rate: PositiveFloat = 3e-2
    """Learning rate of the rounding variables."""
    scale_rate: NonNegativeFloat = 1e-3
    """Learning rate of activation and weight scales, relative to their size."""
    bias_rate: NonNegativeFloat = 0.0
    """Learning rate of biases, relative to the size of their layer's weights; 0: biases stay."""
    learn_weight_scales: bool = False
    """Learn the weights' scales with their rounding (Genie)."""
    drop: Annotated[float, at_least(0), below(1)] = 0.5
    """Probability that an element of an activation stays in float while blocks are reconstructed (QDrop)."""
    regularization: NonNegativeFloat = 20.0
    """Weight of the term that drives the rounding to 0 or 1: the mean of 1 - |2h - 1|^beta over a block's weights, in
    units of the block's error with weights rounded to nearest."""
    warm_start: Annotated[float, at_least(0), below(1)] = 0.2
    """Share of the steps before the term of `regularization` sets in."""
    memory: PositiveFloat = 4.0
    """GB of RAM for the stored activations of a reconstruction; what does not fit goes to a file on disk."""
    cache_folder: Annotated[str, formerly("")] = "auto"
    """Folder for stored activations that do not fit into `memory`; "auto" for the system's temporary folder."""
    seed: NonNegativeInt = 0
    """Seed of the order of batches and of dropped activations."""

    @property
    def steps(self) -> int:
        """Return the number of steps that `iterations` stands for."""
        return ITERATIONS if self.iterations == "auto" else self.iterations


class PTQFields(TypedDict, total=False):
    """The fields of `PTQOptions` as keyword arguments, for type checkers."""

    equalize: Switch
    relu6: ReLU6Choice
    absorb: Switch
    smooth: Switch
    smoothing_strength: float
    reparametrize: Switch
    reconstruct: Literal["auto", "off", "layers", "blocks"]
    correct_biases: Switch
    iterations: int | Auto
    batch_size: int
    rounding_rate: float
    scale_rate: float
    bias_rate: float
    learn_weight_scales: bool
    drop: float
    regularization: float
    warm_start: float
    memory: float
    cache_folder: str
    seed: int


def split_fields(
    options: QuantizationOptions,
    ptq: PTQOptions,
    changes: Mapping[str, Any],
    *,
    verb: str = "quantize",
    further: Collection[str] = (),
) -> tuple[QuantizationOptions, PTQOptions]:
    """Return both option objects, each with its part of the changes.

    Args:
        options: how to quantize.
        ptq: the steps.
        changes: fields of both.
        verb: the function that was given the changes.
        further: names of the options that it takes beside them.

    Raises:
        ConfigError: a field that does not exist.
    """
    placing = [field.name for field in dataclasses.fields(options)]
    steps = [field.name for field in dataclasses.fields(ptq)]
    if unknown := [name for name in changes if name not in (*placing, *steps)]:
        told = unknown_options(verb, unknown, [*placing, *steps, *further])
        raise ConfigError(f"An option would have no effect, so nothing was started: {told}")
    placed = {name: value for name, value in changes.items() if name in placing}
    stepped = {name: value for name, value in changes.items() if name in steps}
    return dataclasses.replace(options, **placed), dataclasses.replace(ptq, **stepped)


def check_folds(options: QuantizationOptions) -> None:
    """Refuse options under which post-training quantization would not fold BatchNorm.

    Raises:
        ConfigError: batchnorm is neither "auto" nor "fold".
    """
    if options.batchnorm not in ("auto", "fold"):
        raise ConfigError(
            f'batchnorm="{options.batchnorm}" keeps BatchNorm for training, and post-training quantization does not '
            "train: its steps equalize and round weights that BatchNorm is folded into. Set "
            'batchnorm="fold", or leave it out. To train, use prepare (halfeven train).'
        )
