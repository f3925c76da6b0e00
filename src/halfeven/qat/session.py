"""A training of a quantized model and what accompanies it, as a recipe says: for the trainer here, or a loop of yours.

course = halfeven.pipelines.accompany(qmodel, float_model, calibration_loader, log=print)
for step, (images, labels) in enumerate(batches):
    course.before_step(qmodel, step / steps)
    outputs = qmodel(images)
    loss = course.loss(outputs, images, labels, F.cross_entropy(outputs, labels))
    if (penalty := course.penalty(step / steps)) is not None:
        loss = loss + penalty
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    course.after_step(step, (step + 1) / steps)
for model in (qmodel, *course.others.values()):
    course.before_validation(model)  # then measure it, and keep the better one
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from halfeven.errors import ConfigError
from halfeven.layerwise.re_estimate import re_estimate
from halfeven.qat.batchnorm_schedule import ScheduleOptions, frozen_after, schedule
from halfeven.qat.bit_schedule import Progression
from halfeven.qat.distillation import Distillation
from halfeven.qat.ema import WeightAverage
from halfeven.qat.options import QATOptions
from halfeven.qat.oscillation import Oscillations
from halfeven.qat.recipe import Recipe
from halfeven.tasks.task import first_tensor


class Course:
    """What a recipe puts beside the training of a model. With nothing chosen every method does next to nothing.

    Args:
        qmodel: a calibrated model from `prepare`.
        float_model: the teacher of a distillation; None where there is none to be had.
        recipe: what is done, from `decide`.
        options: how it is done.
        schedule_options: when ranges and BatchNorm stop moving.
        calibrate: sets all ranges of a model anew, which a progression needs.
        inputs: batches for BatchNorm's statistics, as for `re_estimate`; called when they are needed.
        logits: takes the logits, [samples, ..., classes], out of what the models return, for a distillation.

    Raises:
        ConfigError: a distillation without a float model.
    """

    def __init__(
        self,
        qmodel: nn.Module,
        float_model: nn.Module | None,
        recipe: Recipe,
        options: QATOptions,
        schedule_options: ScheduleOptions,
        calibrate: Callable[[nn.Module], Any],
        inputs: Callable[[], Iterable[Any]],
        logits: Callable[[Any], Tensor] = first_tensor,
    ) -> None:
        if recipe.distill.enabled and float_model is None:
            raise ConfigError(
                "Distillation was chosen, and there is no float model to learn from, so the loss would have no "
                'teacher. Give the float model with its weights, or set qat.distill="off".'
            )
        self.recipe, self.inputs, self.schedule_options = recipe, inputs, schedule_options
        until = frozen_after(qmodel, schedule_options)  # by the plan's bits: a progression starts with others
        self._schedule = schedule(dataclasses.replace(schedule_options, freeze_batchnorm_after=until))
        teacher = float_model if recipe.distill.enabled else None
        distilled = None if teacher is None else Distillation(teacher, qmodel, options.distillation, logits)
        self.distillation = distilled
        self.average = WeightAverage(qmodel, options.averaging) if recipe.average.enabled else None
        self.progression = Progression(qmodel, options.progression, calibrate) if recipe.progress.enabled else None
        oscillation = dataclasses.replace(
            options.oscillation,
            freeze=recipe.freeze.enabled,
            dampening=options.oscillation.dampening if recipe.dampen.enabled else 0.0,
        )
        follow = recipe.freeze.enabled or recipe.dampen.enabled or oscillation.track
        self.oscillations = Oscillations(qmodel, oscillation) if follow else None
        self.counts_from = options.progression.share if self.progression else 0.0

    def before_step(self, model: nn.Module, done: float) -> None:
        """To be called before each step, after `model.train()`, with the share of the run that is done."""
        if self.progression is not None:
            self.progression.before_step(model, done)
        self._schedule(model, done)

    def loss(self, outputs: Any, inputs: Any, labels: Any, task_loss: Tensor) -> Tensor:
        """The loss of a batch, made of that of the task, []."""
        return task_loss if self.distillation is None else self.distillation.loss(outputs, inputs, labels, task_loss)

    def penalty(self, done: float) -> Tensor | None:
        """What is added to the loss of a step; None: nothing."""
        return self.oscillations.dampening(done) if self.oscillations and self.recipe.dampen.enabled else None

    def after_step(self, step: int, done: float) -> None:
        """To be called after each step with its number, from 0, and the share of the run that is done then."""
        if done < self.counts_from:
            return  # integers of other bits are others, and so are the weights that suit them
        if self.oscillations is not None:
            self.oscillations.after_step(done)
        if self.average is not None:
            self.average.update(step)

    def before_validation(self, model: nn.Module) -> None:
        """To be called before each form of the model is validated."""
        if self.recipe.re_estimate.enabled:
            re_estimate(model, self.inputs(), self.schedule_options.re_estimate_batches)

    @property
    def others(self) -> dict[str, nn.Module]:
        """Other forms of the model, to be validated beside it."""
        return {} if self.average is None else {"average": self.average.model}

    @property
    def stateful(self) -> dict[str, Any]:
        """Whatever keeps a state from step to step, for a run that may be interrupted."""
        found = {"oscillations": self.oscillations, "average": self.average, "progression": self.progression}
        return {name: one for name, one in found.items() if one is not None}

    def figures(self) -> dict[str, float]:
        """Shares of the weights, in percent, that oscillate and that are frozen."""
        return {} if self.oscillations is None else self.oscillations.shares()
