"""Find what is wrong with an experiment before anything is written: a refused run leaves no folder behind."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from halfeven.cli.run import RunContext
from halfeven.config import Experiment
from halfeven.errors import ConfigError, HalfevenError
from halfeven.evaluation import evaluate, evaluating, evaluation_loader
from halfeven.graph.batches import run_on
from halfeven.pipelines import check_features, prepare, without_training
from halfeven.placement.grids import check_deployable
from halfeven.placement.insertion import plan_of
from halfeven.ptq.recipe import decide as decide_ptq
from halfeven.qat.distillation import Distillation
from halfeven.qat.recipe import decide as decide_qat
from halfeven.runtimes.runtime import runtime_named
from halfeven.tasks import Task
from halfeven.tasks.task import Metrics
from halfeven.training.optimization import make_optimizer
from halfeven.training.options import TrainingOptions
from halfeven.training.sampling import TrainingBatches, seeded


def check_training(context: RunContext, model: nn.Module) -> nn.Module:
    """Return the prepared model, after first batches were computed with the float model.

    Raises:
        HalfevenError: scheme, rules, recipe, batch size or data cannot be used.
    """
    experiment = context.experiment
    qmodel = prepare(model, context.datasets.example(), experiment.quantization)
    _check_deployable(qmodel, experiment)
    recipe = decide_qat(qmodel, experiment.qat, experiment.schedule)
    check_features(qmodel, recipe, experiment.qat)
    if recipe.distill.enabled:  # its options may name layers that do not exist
        Distillation(model, qmodel, experiment.qat.distillation, context.task.logits).close()
    make_optimizer(qmodel, experiment.training)  # its options may name an optimizer for scales that are not learned
    _check_data(context, model, [experiment.pretraining, experiment.training])
    return qmodel


def check_quantization(context: RunContext, model: nn.Module) -> nn.Module:
    """Return the prepared model, after first batches were computed with the float model.

    Raises:
        HalfevenError: scheme, rules, recipe or data cannot be used.
    """
    experiment = context.experiment
    qmodel = prepare_folded(context, model)
    _check_deployable(qmodel, experiment)
    decide_ptq(qmodel, experiment.ptq, data=True)
    _check_data(context, model, [experiment.pretraining])
    return qmodel


def prepare_folded(context: RunContext, model: nn.Module) -> nn.Module:
    """Prepare the experiment's model with BatchNorm folded, as post-training quantization needs it."""
    options = without_training(context.experiment.quantization)
    return prepare(model, context.datasets.example(), options)


def _check_deployable(qmodel: nn.Module, experiment: Experiment) -> None:
    """Refuse a plan that no file of the target can hold: a run ends with files."""
    name = experiment.quantization.target if experiment.export.target == "auto" else experiment.export.target
    check_deployable(plan_of(qmodel).tensors, runtime_named(name).target)


def _check_data(context: RunContext, model: nn.Module, trainings: list[TrainingOptions]) -> None:
    """Compute the float model on a first batch of each part of the data, with its loss or its metrics."""
    device = context.accelerator.device
    model.to(device)
    with seeded(context.experiment.seed):  # what data sets draw here leaves the run's random numbers alone
        for options in trainings:
            if options.epochs:
                with _naming_the_part("training"):
                    _check_training_batch(context, model, options, device)
        with _naming_the_part("calibration"), torch.no_grad(), evaluating(model):
            inputs, _ = next(iter(_in_this_process(context, context.datasets.calibration, shared=False)))
            run_on(model, send_to_device(inputs, device))
        with _naming_the_part("validation"):
            batches = islice(_in_this_process(context, context.datasets.validation, shared=True), 1)
            metrics = evaluate(model, batches, context.task, device=device)
            if any(options.epochs for options in trainings):
                _check_key(context.task, metrics)


def _check_key(task: Task, metrics: Metrics) -> None:
    """Check that the metric that decides on the best model is among a task's metrics."""
    key = getattr(task, "key", None)
    if key not in metrics:
        raise ConfigError(
            f"The key of the task, {key!r}, is none of its metrics ({', '.join(metrics)}), so that nothing says which "
            f"model is the best. Set the attribute `key` of {type(task).__name__} to one of them."
        )


def _in_this_process(context: RunContext, items: Any, *, shared: bool) -> Any:
    """Return evaluation batches that this process reads: a single batch is read before workers would have started."""
    size = context.experiment.data.evaluation_batch_size
    return evaluation_loader(items, size, 0, shared=shared, collate=context.task.collate)


def _check_training_batch(
    context: RunContext, model: nn.Module, options: TrainingOptions, device: torch.device
) -> None:
    seed = context.experiment.seed
    batches = TrainingBatches(context.datasets.train, options, seed=seed, workers=0, collate=context.task.collate)
    inputs, targets = send_to_device(next(batches.epoch(0)), device)
    with torch.no_grad(), evaluating(model):
        context.task.loss(run_on(model, inputs), targets, options.label_smoothing)


@contextmanager
def _naming_the_part(part: str) -> Iterator[None]:
    """Say, in an error of the model or the data within the context, which part of the data it met."""
    try:
        yield
    except HalfevenError:
        raise
    except Exception as error:  # models and data sets are the user's code, and raise what they like
        reason = next(iter(str(error).strip().splitlines()), "no reason given")
        raise ConfigError(
            f"The float model cannot be computed on a first {part} batch: {type(error).__name__}: {reason}. So there "
            f"is nothing to quantize, and nothing was written. Look at the {part} part of the data, its labels and "
            "sizes, and at the options of `model` and `task`."
        ) from error
