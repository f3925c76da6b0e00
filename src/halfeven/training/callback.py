"""The protocol between the trainer and the method that a model is trained by, such as quantization-aware training."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from halfeven.errors import ConfigError
from halfeven.tasks.task import Metrics


class Stateful(Protocol):
    """An object with a state from step to step."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class TrainerCallback:
    """The hooks that the trainer calls. Each of them does nothing here; derive a class and override the hooks you need.

    `done` is the fraction of the run's optimizer steps that are taken, from 0 to 1.
    """

    counts_from: float = 0.0
    """Fraction of the run at which the model gets its final form: only a validation after a step that began there, or
    later, may be the best."""

    @property
    def has_passing_hooks(self) -> bool:
        """Return True in a step for which hooks were put on the model that go again: it is not run compiled."""
        return False

    def before_step(self, model: nn.Module, done: float) -> None:
        """Prepare the model for an optimizer step, after `model.train()`; for example, freeze layers."""

    def loss(self, outputs: Any, inputs: Any, targets: Any, task_loss: Tensor) -> Tensor:
        """Return the loss of a batch, [], made from that of the task; for example, add a teacher's."""
        return task_loss

    def penalty(self, done: float) -> Tensor | None:
        """Return a term, [], to add to the loss of each batch, or None."""
        return None

    def after_step(self, step: int, done: float) -> None:
        """Follow the model after an optimizer step.

        Args:
            step: number of the step, from 0.
            done: fraction of the run that is done with this step.
        """

    def before_validation(self, model: nn.Module) -> None:
        """Prepare a model for its validation, on every process; for example, re-estimate BatchNorm."""

    @property
    def other_models(self) -> Mapping[str, nn.Module]:
        """Return the models to validate beside the trained model, by name: an average of its weights, for example."""
        return {}

    @property
    def stateful(self) -> Mapping[str, Stateful]:
        """Return the objects to save beside the model, by name, so that a resumed run equals an uninterrupted one."""
        return {}

    def figures(self) -> Metrics:
        """Return further figures for the log, by name."""
        return {}

    def histograms(self) -> Mapping[str, Tensor]:
        """Return values whose distribution is logged at each validation, by name."""
        return {}


def is_in_final_form(callback: TrainerCallback, step: int, total: int) -> bool:
    """Return True where a model has its final form after so many of all steps of a run."""
    # A model has the form in which its last step has trained it: that of the fraction at which this step began.
    return (step - 1) / total >= callback.counts_from


def check_final_form(callback: TrainerCallback, total: int) -> None:
    """Check that a run of so many steps trains the model in its final form.

    Raises:
        ConfigError: all steps come before it.
    """
    if total and not is_in_final_form(callback, total, total):
        raise ConfigError(
            f"The model gets its final form after {callback.counts_from:.0%} of the run, and none of its {total} steps "
            "begins there, so no validation could be the best. Train longer (training.epochs, training.max_steps), or "
            "shorten what comes before (qat.progression.share)."
        )
