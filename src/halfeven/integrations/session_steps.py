"""The part that the callbacks of all trainers share: the hooks of a session, at the steps of another trainer."""

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from halfeven.checked_arguments import checked_arguments
from halfeven.errors import CheckpointError, ConfigError, HalfevenWarning, named
from halfeven.evaluation import metric_values
from halfeven.graph.wrappers import own_forward, unwrapped
from halfeven.qat.session import QATSession
from halfeven.training.optimization import parameter_groups
from halfeven.training.options import Optimizer, TrainingOptions

IN_EVAL_MODE = (
    "The quantized model is in eval mode in a training step, so observed ranges and BatchNorm's statistics stay as "
    "they are, and dropout is off. Call qmodel.train() before the batches of each epoch: a validation may leave the "
    "model in eval mode."
)

WITHOUT_BEFORE = (
    "An optimizer step was taken without steps.before_step(), so ranges and BatchNorm do not stop when they are due. "
    "Call it before each forward pass."
)

WITHOUT_AFTER = (
    "No optimizer step was counted, so the average of the weights and the schedule of the recipe stand still. Call "
    "steps.after_step() after each step of the optimizer."
)

TOO_MANY_STEPS = (
    "The training takes more steps than steps.start(total) was given, so the recipe has come to its end already: "
    "ranges and BatchNorm may have stopped too early. Give the number of optimizer steps of the whole run, of all "
    "epochs."
)


class SessionSteps:
    """Calls a session's hooks at the optimizer steps of a trainer: ranges, BatchNorm, oscillations, weight average.

    Args:
        session: from `halfeven.pipelines.setup_qat`.
        qmodel: the quantized model, as it was given to `setup_qat`.
    """

    @checked_arguments(ConfigError)
    def __init__(self, session: QATSession, qmodel: nn.Module) -> None:
        self.session = session
        self.qmodel = qmodel
        self.step = 0
        self.total = 0
        self._changes_loss = session.recipe.distill.enabled or session.recipe.dampen.enabled
        self._loss_seen = False
        self._warned: set[str] = set()
        self._begun = 0
        self._taken = 0

    def parameter_groups(
        self, learning_rate: float, *, optimizer: Optimizer = "sgd", weight_decay: float | None = None
    ) -> list[dict[str, Any]]:
        """Return the parameter groups of the quantized model, for an optimizer of torch.

        Learned scales do not decay, and under SGD they get a tenth of the learning rate (white paper, section 4.4).
        Biases and normalization layers do not decay either.

        Args:
            learning_rate: of the weights. Do not give the optimizer another one.
            optimizer: kind of the optimizer.
            weight_decay: of the weights; None: as the optimizer is given it.
        """
        decay = 1.0 if weight_decay is None else weight_decay
        options = TrainingOptions(optimizer=optimizer, learning_rate=learning_rate, weight_decay=decay)
        groups = [{"lr": learning_rate, **group} for group in parameter_groups(self.qmodel, options)]
        for group in groups:
            # A group without the entry gets the optimizer's own.
            if weight_decay is None and group["weight_decay"]:
                del group["weight_decay"]
        return groups

    def start(self, total: int, step: int = 0) -> None:
        """Begin the training.

        Args:
            total: number of optimizer steps of the run.
            step: number of steps taken before, in a run that goes on.
        """
        self.total = max(total, 1)
        self.step = step

    def check_trained(self, model: nn.Module | None) -> None:
        """Refuse a trainer whose model does not contain the quantized model.

        Args:
            model: the trainer's model; None: it is not known.

        Raises:
            ConfigError: it does not contain it, as a copy of it would not.
        """
        if model is not None and unwrapped(self.qmodel) not in set(model.modules()):
            raise ConfigError(
                f"The {type(model).__name__} that is trained does not contain the quantized model of the callback, so "
                "ranges, BatchNorm and the average would follow a model that is not trained. Give the callback and the "
                "trainer the same object, not a copy."
            )

    def before_step(self) -> None:
        """Call the hook before the forward pass of an optimizer step, after `model.train()`.

        Raises:
            ConfigError: `start` was not called.
        """
        done = self._share(self.step)
        self._begun += 1
        if not self.qmodel.training:
            self._warn_once(IN_EVAL_MODE)
        if done >= 1:
            self._warn_once(TOO_MANY_STEPS)
        self.session.before_step(self.qmodel, min(done, 1.0))

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(text, HalfevenWarning, stacklevel=3)

    def loss(self, outputs: Any, inputs: Any, targets: Any, task_loss: Tensor) -> Tensor:
        """Return the loss of a batch, []: with the teacher's part and the dampening, where the recipe has them.

        Call it where the trainer computes its loss. Without it, a recipe with one of the two is refused.

        Raises:
            ConfigError: `start` was not called.
        """
        self._loss_seen = True
        loss = self.session.loss(outputs, inputs, targets, task_loss)
        penalty = self.session.penalty(min(self._share(self.step), 1.0))
        return loss if penalty is None else loss + penalty

    def after_step(self, step: int | None = None) -> None:
        """Call the hook after an optimizer step.

        Args:
            step: number of optimizer steps taken so far; None: one more than before. A number that was counted already
                has no effect, as after a batch of gradient accumulation that ends no step.

        Raises:
            ConfigError: the recipe changes the loss, and `loss` was not called; or `start` was not called.
        """
        step = self.step + 1 if step is None else step
        if step == self.step:
            return
        if self._changes_loss and not self._loss_seen:
            raise ConfigError(
                "The recipe distils or dampens oscillations, which changes the loss, and the trainer took a step "
                "without callback.loss(outputs, inputs, targets, loss). Call it where the loss is computed, or set "
                'qat.distill="off" and qat.dampen_oscillations="off".'
            )
        self._taken += 1
        if not self._begun:
            self._warn_once(WITHOUT_BEFORE)
        # The session numbers the steps from 0; `step` counts those that are taken.
        self.session.after_step(step - 1, min(self._share(step), 1.0))
        self.step = step

    def _share(self, step: int) -> float:
        """Return the share of the run that is done after so many steps."""
        if self.total == 0:
            raise ConfigError(
                "The steps of the run were not given, and the recipe acts at shares of the run. Call "
                "steps.start(total) first, with the number of optimizer steps of the whole run."
            )
        return step / self.total

    def before_validation(self) -> None:
        """Prepare the weights, and their average, for a validation."""
        if self._begun and not self._taken:
            self._warn_once(WITHOUT_AFTER)
        for model in self.models().values():
            self.session.before_validation(model)

    def models(self) -> dict[str, nn.Module]:
        """Return the model in training and the average of its weights, if there is one, by name."""
        # A trainer may have moved the model at its end, as Lightning does, and knows of no other.
        device = next(self.qmodel.parameters()).device
        return {"weights": self.qmodel, **{name: m.to(device) for name, m in self.session.other_models.items()}}

    def best(self, evaluate: Callable[[nn.Module], float]) -> nn.Module:
        """Return the better of the weights and their average, in eval mode.

        Args:
            evaluate: returns a score of a model, of which more is better.

        Raises:
            ConfigError: `evaluate` fails, or returns no finite number.
        """
        self.before_validation()
        found = self.models()
        # Without an average there is no choice, so no evaluation is paid for.
        if len(found) == 1:
            return self.qmodel.eval()
        with own_forward(unwrapped(self.qmodel)):  # as the average computes, and the file
            scores = {name: float(metric_values(evaluate, model).mean()) for name, model in found.items()}
        return found[max(scores, key=lambda name: scores[name])].eval()

    def report(self) -> str:
        """Return the recipe and how many weights oscillate, as text."""
        figures = ", ".join(f"{name} {value:.2f} %" for name, value in self.session.figures().items())
        return f"{self.session.recipe}\n{f'Oscillations: {figures}' if figures else 'Oscillations were not followed.'}"

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the session, for a run that may be interrupted."""
        return {name: each.state_dict() for name, each in self.session.stateful.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of the session.

        Raises:
            CheckpointError: it is the state of a run with another recipe or model.
        """
        wanted = self.session.stateful
        if state.keys() != wanted.keys():
            raise CheckpointError(
                f"The state has {named(state) or 'nothing'}, and this recipe keeps {named(wanted) or 'nothing'}, so "
                "the run would go on with another recipe than it began with. Give setup_qat the options and the bits "
                "of the run that saved the state."
            )
        for name, each in wanted.items():
            each.load_state_dict(state[name])
