"""How a model is trained: the options of the trainer."""

from dataclasses import dataclass
from typing import Literal

from halfeven.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Optimizer, schedule and length of a training run."""

    epochs: int = 10
    """Passes over the training images."""
    max_steps: int = 0
    """Stop after so many optimizer steps, and let the schedule end there; 0: after `epochs`."""
    batch_size: int = 32
    """Images a process takes at a time."""
    accumulation: int = 1
    """Batches whose gradients are averaged for one optimizer step."""
    drop_last: bool = True
    """Leave out the last, smaller batch of an epoch."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW."""
    learning_rate: float = 1e-3
    """Highest learning rate."""
    momentum: float = 0.9
    """Momentum of SGD."""
    scale_rate: float = 0.1
    """Factor on the learning rate for learned scales under SGD; AdamW sets its own pace for each parameter."""
    weight_decay: float = 1e-4
    """Weight decay; the scales of quantizers never decay."""
    decay_norms_and_biases: bool = False
    """Whether weight decay also applies to biases and to the parameters of normalization layers."""
    schedule: Literal["constant", "cosine", "step"] = "cosine"
    """Learning rate after the warm-up: constant, cosine to 0, or times `step_factor` at each of `step_epochs`."""
    schedule_by: Literal["step", "epoch"] = "step"
    """Whether the cosine moves at every optimizer step or only between epochs."""
    warmup_steps: int = 0
    """Optimizer steps in which the learning rate rises linearly from 0."""
    step_epochs: tuple[int, ...] = ()
    """Epochs after which schedule "step" lowers the learning rate."""
    step_factor: float = 0.1
    """What schedule "step" multiplies the learning rate by."""
    clip_norm: float = 0.0
    """Largest norm of the gradient; longer ones are shortened to it; 0: no clipping."""
    label_smoothing: float = 0.0
    """Share of a label's probability that is spread over all classes."""
    base_batch_size: int = 256
    """Batch over all processes that `learning_rate` is meant for; --auto-scale-lr fits the rate to the actual one."""
    save_every: int = 200
    """Optimizer steps between saves of the state that --resume goes on from; every epoch's end is saved too."""
    log_every: int = 10
    """Optimizer steps between lines of the log."""

    def __post_init__(self) -> None:
        least = {
            "epochs": 0,
            "max_steps": 0,
            "batch_size": 1,
            "accumulation": 1,
            "warmup_steps": 0,
            "base_batch_size": 1,
        }
        least |= {"save_every": 1, "log_every": 1, "learning_rate": 0, "momentum": 0, "weight_decay": 0, "clip_norm": 0}
        mistakes = [
            f"{name}={getattr(self, name)} (at least {low})" for name, low in least.items() if getattr(self, name) < low
        ]
        if not 0 <= self.label_smoothing < 1:
            mistakes.append(f"label_smoothing={self.label_smoothing} (at least 0, less than 1)")
        if self.schedule == "step" and not self.step_epochs:
            mistakes.append('schedule="step" without step_epochs (give the epochs that lower the rate)')
        if self.schedule != "step" and self.step_epochs:
            mistakes.append(
                f'step_epochs={self.step_epochs} with schedule="{self.schedule}" (they would have no effect)'
            )
        if mistakes:
            raise ConfigError(
                f"These training options cannot be followed: {'; '.join(mistakes)}. No training is possible with them. "
                "Set them as said in the parentheses."
            )
