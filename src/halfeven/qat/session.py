"""Quantization-aware training by a recipe: the hooks that the trainer, or a loop of your own, calls.

session = halfeven.pipelines.setup_qat(qmodel, float_model, calibration_loader, log=print)
for step, (images, labels) in enumerate(batches):
    qmodel.train()
    session.before_step(qmodel, step / steps)
    outputs = qmodel(images)
    loss = session.loss(outputs, images, labels, F.cross_entropy(outputs, labels))
    if (penalty := session.penalty(step / steps)) is not None:
        loss = loss + penalty
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    session.after_step(step, (step + 1) / steps)
for model in (qmodel, *session.other_models.values()):
    session.before_validation(model)  # then measure its accuracy, and keep the best
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from halfeven.errors import ConfigError
from halfeven.layerwise.clipping import ClippingWatch
from halfeven.layerwise.re_estimate import re_estimate
from halfeven.qat.batchnorm_schedule import ScheduleOptions, frozen_after, schedule
from halfeven.qat.bit_schedule import BitSchedule
from halfeven.qat.distillation import Distillation
from halfeven.qat.ema import WeightEMA
from halfeven.qat.histograms import histograms
from halfeven.qat.options import QATOptions
from halfeven.qat.oscillation import Oscillations
from halfeven.qat.recipe import QATRecipe
from halfeven.renamed import renamed_attributes
from halfeven.tasks.task import first_tensor
from halfeven.training.callback import Stateful, TrainerCallback


class QATSession(TrainerCallback):
    """The methods that a recipe adds to the training of a model. With none of them the task's loss alone is minimized.

    Args:
        qmodel: a calibrated model from `prepare`.
        float_model: the teacher of a distillation; None where there is none.
        recipe: the methods in use, from `halfeven.qat.recipe.decide`.
        options: how each method is carried out.
        schedule_options: when ranges and BatchNorm stop moving.
        loader: calibration batches, as `calibrate` takes them; a bit schedule sets all ranges anew with them.
        inputs: returns batches for BatchNorm's statistics, as `re_estimate` takes them; None: the loader.
        logits: takes the logits, [samples, ..., classes], out of a model's outputs, for a distillation.

    Raises:
        ConfigError: the recipe distils, and there is no float model.
    """

    def __init__(
        self,
        qmodel: nn.Module,
        float_model: nn.Module | None,
        recipe: QATRecipe,
        options: QATOptions,
        schedule_options: ScheduleOptions,
        loader: Iterable[Any],
        inputs: Callable[[], Iterable[Any]] | None = None,
        logits: Callable[[Any], Tensor] = first_tensor,
    ) -> None:
        self.recipe = recipe
        self.inputs = inputs or (lambda: loader)
        self.schedule_options = schedule_options
        until = frozen_after(qmodel, schedule_options)  # by the plan's bits: a bit schedule starts with more
        # With a number for "auto", the schedule does not look at the bits that its first step finds.
        self._schedule = schedule(dataclasses.replace(schedule_options, freeze_batchnorm_after=until))
        self.distillation = _make_distillation(qmodel, float_model, recipe, options, logits)
        self.average = WeightEMA(qmodel, options.averaging) if recipe.average.enabled else None
        self.bit_schedule = BitSchedule(qmodel, options.progression, loader) if recipe.progress.enabled else None
        self.oscillations = _make_oscillations(qmodel, recipe, options)
        self.counts_from = options.progression.share if self.bit_schedule else 0.0
        self.clipping = ClippingWatch(qmodel)

    def before_step(self, model: nn.Module, done: float) -> None:
        """Set the bits that are due, and stop ranges and BatchNorm statistics when their time has come."""
        if self.bit_schedule is not None:
            self.bit_schedule.before_step(model, done)
        self._schedule(model, done)
        self.clipping.before_step()

    def loss(self, outputs: Any, inputs: Any, targets: Any, task_loss: Tensor) -> Tensor:
        """Return the loss of a batch, []: that of the distillation, or else the task's."""
        if self.distillation is None:
            return task_loss
        return self.distillation.loss(outputs, inputs, targets, task_loss)

    def penalty(self, done: float) -> Tensor | None:
        """Return the dampening of oscillations, [], to add to the loss, or None where nothing is dampened."""
        return self.oscillations.dampening(done) if self.oscillations and self.recipe.dampen.enabled else None

    def after_step(self, step: int, done: float) -> None:
        """Follow oscillations and average the weights, after an optimizer step; warn where training clips much.

        Args:
            step: number of the step, from 0.
            done: fraction of the run that is done with this step.
        """
        self.clipping.after_step()
        if self.bit_schedule is not None and not self.bit_schedule.is_over:
            return  # weights and integers under other bits than the plan's do not count
        if self.oscillations is not None:
            self.oscillations.after_step(done)
        if self.average is not None:
            self.average.update(step)

    def before_validation(self, model: nn.Module) -> None:
        """Re-estimate BatchNorm's statistics, where the recipe says so."""
        self.clipping.due = True  # training goes on with other weights
        if self.recipe.re_estimate.enabled:
            re_estimate(model, self.inputs(), self.schedule_options.re_estimate_batches)

    @property
    def has_passing_hooks(self) -> bool:
        """Return True in a step whose clipped values are counted."""
        return self.clipping.counting

    @property
    def other_models(self) -> Mapping[str, nn.Module]:
        """Return the models to validate beside the trained model, by name: the average of its weights."""
        return {} if self.average is None else {"average": self.average.model}

    @property
    def stateful(self) -> Mapping[str, Stateful]:
        """Return the objects with a state to save for a resumed run, by name."""
        # The names are those in the files of training states.
        found = {"oscillations": self.oscillations, "average": self.average, "progression": self.bit_schedule}
        return {name: method for name, method in found.items() if method is not None}

    def figures(self) -> dict[str, float]:
        """Return the percentages of the weights that oscillate and that are frozen; {} where none is followed."""
        return {} if self.oscillations is None else self.oscillations.shares()

    def histograms(self) -> dict[str, Tensor]:
        """Return the scales of all quantizers, and the shares that activations clip in training, by name."""
        return histograms(self.clipping.qmodel, self.clipping.shares.values())


def _make_distillation(
    qmodel: nn.Module,
    float_model: nn.Module | None,
    recipe: QATRecipe,
    options: QATOptions,
    logits: Callable[[Any], Tensor],
) -> Distillation | None:
    if not recipe.distill.enabled:
        return None
    if float_model is None:
        raise ConfigError(
            "Distillation is on, and there is no float model to learn from, so the loss would have no teacher. Give "
            'the float model with its weights, or set qat.distill="off".'
        )
    return Distillation(float_model, qmodel, options.distillation, logits)


def _make_oscillations(qmodel: nn.Module, recipe: QATRecipe, options: QATOptions) -> Oscillations | None:
    oscillation = dataclasses.replace(
        options.oscillation,
        freeze=recipe.freeze.enabled,
        dampening=options.oscillation.dampening if recipe.dampen.enabled else 0.0,
    )
    follow = recipe.freeze.enabled or recipe.dampen.enabled or oscillation.track
    return Oscillations(qmodel, oscillation) if follow else None


__getattr__ = renamed_attributes(__name__, Course="qat.session.QATSession")
