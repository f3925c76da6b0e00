"""What post-training quantization does, step by step."""

from dataclasses import dataclass
from typing import Literal

from halfeven.errors import ConfigError

Switch = Literal["auto", "on", "off"]


@dataclass(frozen=True, kw_only=True)
class PTQOptions:
    """The steps of post-training quantization, each of which can be switched.

    "auto" leaves a step to the pipeline, which chooses from the model, the bit-width and the data at hand, and prints
    each choice with its reason (white paper, figure 8).

    Raises:
        ConfigError: a number that leaves nothing to do.
    """

    equalize: Switch = "auto"
    """Cross-layer equalization: the channels of consecutive layers get equal weight ranges."""
    relu6: Literal["auto", "keep", "replace"] = "auto"
    """Whether ReLU6 becomes ReLU, so that equalization reaches across it; "auto": if the quantized model gains."""
    absorb: Switch = "auto"
    """Bias absorption: large biases move into the next layer."""
    smooth: Switch = "auto"
    """Activation smoothing: the outliers after LayerNorm move into the weights (SmoothQuant)."""
    smoothing_strength: float = 0.5
    """Share of the difficulty that moves from activations to weights, 0 to 1."""
    reparametrize: Switch = "auto"
    """Per-channel ranges after LayerNorm, folded into it and the next layer (RepQ-ViT)."""
    reconstruct: Literal["auto", "off", "layers", "blocks"] = "auto"
    """Learned rounding: "layers" is AdaRound, "blocks" reconstructs residual blocks with learned activation scales."""
    correct_biases: Switch = "auto"
    """Bias correction: the mean shift that quantization gives each channel is taken from the bias."""
    iterations: int = 0
    """Steps of the reconstruction of a layer or block; 0: chosen from the bits."""
    batch_size: int = 32
    """Images in a step of the reconstruction."""
    rounding_rate: float = 3e-2
    """Learning rate of the rounding variables."""
    scale_rate: float = 1e-3
    """Learning rate of activation and weight scales, relative to their size."""
    bias_rate: float = 0.0
    """Learning rate of biases, relative to the size of their layer's weights; 0: biases stay."""
    learn_weight_scales: bool = False
    """Whether the weights' scales are learned with their rounding (Genie)."""
    drop: float = 0.5
    """Probability with which an activation stays in float while blocks are reconstructed (QDrop)."""
    regularization: float = 20.0
    """Weight of the term that drives the rounding to 0 or 1: the mean of 1 - |2h - 1|^beta over a unit's weights, where
    1 is the unit's error with weights rounded to nearest."""
    warm_start: float = 0.2
    """Share of the steps before that term sets in."""
    memory: float = 4.0
    """GB of RAM for the stored activations of a reconstruction; what does not fit goes to a file on disk."""
    cache_folder: str = ""
    """Folder of that file; "" for the system's temporary folder."""
    seed: int = 0
    """Seed of the order of batches and of dropped activations."""

    def __post_init__(self) -> None:
        wrong = [
            name
            for name, right in {
                "iterations": self.iterations >= 0,
                "batch_size": self.batch_size >= 1,
                "rounding_rate": self.rounding_rate > 0,
                "scale_rate": self.scale_rate >= 0,
                "bias_rate": self.bias_rate >= 0,
                "drop": 0 <= self.drop < 1,
                "warm_start": 0 <= self.warm_start < 1,
                "smoothing_strength": 0 <= self.smoothing_strength <= 1,
                "regularization": self.regularization >= 0,
                "memory": self.memory > 0,
            }.items()
            if not right
        ]
        if wrong:
            values = ", ".join(f"ptq.{name}={getattr(self, name)}" for name in wrong)
            raise ConfigError(
                f"{values} cannot be used, so nothing could be reconstructed with it. Give a batch_size of at least 1, "
                "rates that are not negative, shares (drop, warm_start, smoothing_strength) from 0 to below 1, and "
                "memory above 0."
            )
