"""The options of the trainer."""

from dataclasses import dataclass
from typing import Annotated, Literal

from halfeven.errors import ConfigError
from halfeven.options import (
    Auto,
    NonNegativeFloat,
    NonNegativeInt,
    Options,
    PositiveFloat,
    PositiveInt,
    Share,
    above,
    at_least,
    below,
    formerly,
)

Optimizer = Literal["sgd", "adam", "adamw", "rmsprop"]


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(Options):
    """Optimizer, schedule and length of a training run."""

    epochs: NonNegativeInt = 10
    """Passes over the training samples."""
    max_steps: Annotated[PositiveInt | Auto, formerly(0)] = "auto"
    """Stop after so many optimizer steps, and let the schedule end there; "auto": after `epochs`."""
    batch_size: PositiveInt = 32
    """Samples of a batch in each process."""
    accumulation: PositiveInt = 1
    """Batches whose gradients are averaged for one optimizer step."""
    drop_last: bool = True
    """Leave out the last, smaller batch of an epoch."""
    optimizer: Optimizer = "sgd"
    """Optimizer of torch: SGD, Adam (weight decay as part of the gradient), AdamW (apart from it) or RMSprop."""
    learning_rate: NonNegativeFloat = 1e-3
    """Highest learning rate."""
    momentum: Annotated[float, at_least(0), below(1)] = 0.9
    """Momentum of SGD and RMSprop."""
    nesterov: bool = False
    """Nesterov's momentum in SGD."""
    scale_optimizer: Optimizer | Auto = "auto"
    """Optimizer of learned scales, for example "adam" beside SGD for the weights; "auto": that of the weights."""
    scale_rate: NonNegativeFloat = 0.1
    """Factor on the learning rate for learned scales under SGD, or under an optimizer of their own. Without one, Adam,
    AdamW and RMSprop take no factor: they set their own pace for each parameter."""
    weight_decay: NonNegativeFloat = 1e-4
    """Weight decay; learned scales do not decay, except for those that learn from clipping alone (PACT)."""
    decay_norms_and_biases: bool = False
    """Apply weight decay to biases and to the parameters of normalization layers too."""
    schedule: Literal["constant", "cosine", "step", "linear", "polynomial", "onecycle"] = "cosine"
    """Learning rate after the warm-up: constant; times `step_factor` at each of `step_epochs`; or falling to `end_rate`
    as a cosine, a line or a polynomial. "onecycle" rises as a cosine from 1/25 of `learning_rate` for the share
    `onecycle_rise` of the run, then falls to 4e-6 of it (Smith and Topin, arXiv 1708.07120)."""
    schedule_by: Literal["step", "epoch"] = "step"
    """Move a cosine, line or polynomial at every optimizer step, rather than only between epochs."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps in which the learning rate rises linearly from 0."""
    step_epochs: tuple[PositiveInt, ...] = ()
    """Epochs after which schedule "step" lowers the learning rate."""
    step_factor: NonNegativeFloat = 0.1
    """Factor by which schedule "step" multiplies the learning rate."""
    end_rate: Share = 0.0
    """Share of `learning_rate` to which a cosine, line or polynomial falls."""
    polynomial_power: PositiveFloat = 0.9
    """Power of schedule "polynomial": (1 - done) to this power. 0.9 is usual in segmentation; 1 is a line."""
    onecycle_rise: Annotated[float, above(0), below(1)] = 0.3
    """Share of the run in which the learning rate of schedule "onecycle" rises."""
    clip_norm: NonNegativeFloat = 0.0
    """Largest norm of the gradient; longer ones are shortened to it; 0: no clipping."""
    label_smoothing: Annotated[float, at_least(0), below(1)] = 0.0
    """Share of a label's probability that is spread over all classes."""
    base_batch_size: PositiveInt = 256
    """Batch over all processes that `learning_rate` is meant for; --auto-scale-lr fits the rate to the actual one."""
    validate_every: PositiveInt | Auto = "auto"
    """Optimizer steps between validations; "auto": at the end of each epoch. The end of the run is always validated."""
    save_every: PositiveInt = 200
    """Optimizer steps between saves of the state that --resume goes on from; every epoch's end is saved too."""
    log_every: PositiveInt = 10
    """Optimizer steps between lines of the log."""

    def __post_init__(self) -> None:
        self._check_effects()
        if self.schedule == "step" and not self.step_epochs:
            raise ConfigError(
                'schedule="step" without step_epochs would never lower the learning rate. Set step_epochs.'
            )
        if self.nesterov and self.momentum == 0:
            raise ConfigError(
                "nesterov=True looks ahead along the momentum, and momentum=0 has none, so it would have no effect. "
                "Set momentum, or leave nesterov out."
            )

    def _check_effects(self) -> None:
        """Check that options of a schedule or an optimizer belong to the chosen ones.

        Raises:
            ConfigError: an option would have no effect.
        """
        falls = ("cosine", "linear", "polynomial")
        optimizers = (self.optimizer, self.scale_optimizer)
        for name, effective, wanted in (
            ("step_epochs", self.schedule == "step", 'schedule="step"'),
            ("step_factor", self.schedule == "step", 'schedule="step"'),
            ("schedule_by", self.schedule in falls, 'schedule="cosine", "linear" or "polynomial"'),
            ("end_rate", self.schedule in falls, 'schedule="cosine", "linear" or "polynomial"'),
            ("polynomial_power", self.schedule == "polynomial", 'schedule="polynomial"'),
            ("onecycle_rise", self.schedule == "onecycle", 'schedule="onecycle"'),
            ("warmup_steps", self.schedule != "onecycle", 'another schedule: "onecycle" rises by itself'),
            ("momentum", "sgd" in optimizers or "rmsprop" in optimizers, 'optimizer="sgd" or "rmsprop"'),
            ("nesterov", "sgd" in optimizers, 'optimizer="sgd"'),
        ):
            value = getattr(self, name)
            if not effective and value != getattr(type(self), name):
                raise ConfigError(
                    f'{name}={value!r} would have no effect with schedule="{self.schedule}" and '
                    f'optimizer="{self.optimizer}". Leave {name} out, or set {wanted}.'
                )
