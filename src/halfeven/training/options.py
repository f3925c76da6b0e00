"""The options of the trainer."""

from dataclasses import dataclass
from typing import Annotated, Literal

from halfeven.errors import ConfigError
from halfeven.options import Auto, NonNegativeFloat, NonNegativeInt, Options, PositiveInt, at_least, below, formerly


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(Options):
    """Optimizer, schedule and length of a training run."""

    epochs: NonNegativeInt = 10
    """Passes over the training samples."""
    max_steps: Annotated[PositiveInt | Auto, formerly(0)] = "auto"
    """Stop after so many optimizer steps, and let the schedule end there; "auto": after `epochs`."""
    batch_size: PositiveInt = 32
    """Samples a process takes at a time."""
    accumulation: PositiveInt = 1
    """Batches whose gradients are averaged for one optimizer step."""
    drop_last: bool = True
    """Leave out the last, smaller batch of an epoch."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW."""
    learning_rate: NonNegativeFloat = 1e-3
    """Highest learning rate."""
    momentum: NonNegativeFloat = 0.9
    """Momentum of SGD."""
    scale_rate: NonNegativeFloat = 0.1
    """Factor on the learning rate for learned scales under SGD; AdamW sets its own pace for each parameter."""
    weight_decay: NonNegativeFloat = 1e-4
    """Weight decay; learned scales do not decay, except for those that learn from clipping alone (PACT)."""
    decay_norms_and_biases: bool = False
    """Apply weight decay to biases and to the parameters of normalization layers too."""
    schedule: Literal["constant", "cosine", "step"] = "cosine"
    """Learning rate after the warm-up: constant, cosine to 0, or times `step_factor` at each of `step_epochs`."""
    schedule_by: Literal["step", "epoch"] = "step"
    """Move the cosine at every optimizer step, rather than only between epochs."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps in which the learning rate rises linearly from 0."""
    step_epochs: tuple[PositiveInt, ...] = ()
    """Epochs after which schedule "step" lowers the learning rate."""
    step_factor: NonNegativeFloat = 0.1
    """Factor by which schedule "step" multiplies the learning rate."""
    clip_norm: NonNegativeFloat = 0.0
    """Largest norm of the gradient; longer ones are shortened to it; 0: no clipping."""
    label_smoothing: Annotated[float, at_least(0), below(1)] = 0.0
    """Share of a label's probability that is spread over all classes."""
    base_batch_size: PositiveInt = 256
    """Batch over all processes that `learning_rate` is meant for; --auto-scale-lr fits the rate to the actual one."""
    save_every: PositiveInt = 200
    """Optimizer steps between saves of the state that --resume goes on from; every epoch's end is saved too."""
    log_every: PositiveInt = 10
    """Optimizer steps between lines of the log."""

    def __post_init__(self) -> None:
        if self.schedule == "step" and not self.step_epochs:
            raise ConfigError(
                'schedule="step" without step_epochs would never lower the learning rate. Set step_epochs.'
            )
        if self.schedule != "step" and self.step_epochs:
            raise ConfigError(
                f'step_epochs={self.step_epochs} with schedule="{self.schedule}" would have no effect. '
                'Leave step_epochs out, or set schedule="step".'
            )
