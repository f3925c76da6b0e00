"""Get the float model of a run: from its weights, or by training it first."""

import dataclasses
from pathlib import Path

from torch import nn

from halfeven.checkpoint import save_weights
from halfeven.cli.run import RunContext
from halfeven.cli.work_folder import BEST_FILE, FLOAT_FOLDER
from halfeven.config import Experiment
from halfeven.errors import ConfigError
from halfeven.training.state import STATE_FILE
from halfeven.training.trainer import Trainer
from halfeven.zoo.models import PRETRAINED, ModelOptions, create_model
from halfeven.zoo.weights import load_weights


def check_has_weights(experiment: Experiment) -> None:
    """Raise ConfigError where the float model would have random weights."""
    if not (experiment.model.weights or experiment.pretraining.epochs or experiment.model.source == "callable"):
        raise ConfigError(
            f'The float model {experiment.model.name} has no weights (model.weights="") and is not trained first '
            "(pretraining.epochs=0), so random numbers would be quantized. Give model.weights a file or "
            '"pretrained", or pretraining.epochs at least 1.'
        )


def tell_own_weights(context: RunContext) -> None:
    """Say that the float weights are those of the user's function, where they come from nowhere else."""
    if loads_own_weights(context.experiment):
        name = context.experiment.model.name
        context.log(f'model.weights is "": the float weights are those of the model that {name} returns.')


def train_float(context: RunContext, model: nn.Module, *, resume: bool) -> None:
    """Train the float model, and load its best weights into it.

    Args:
        context: the run.
        model: the float model.
        resume: continue its training, if it has begun.
    """
    folder = context.folder / FLOAT_FOLDER
    run = context.place(folder, "float")
    trainer = Trainer(
        model,
        context.datasets.train,
        context.experiment.pretraining,
        run,
        task=context.task,
        validate=context.selection_accuracy,
        save=save_weights,
    )
    trainer.run(resume=resume and (folder / STATE_FILE).is_file())
    # The quantized training needs the memory of this optimizer's state.
    context.accelerator.free_memory()
    load_weights(model, folder / BEST_FILE)


def network_of(experiment: Experiment) -> nn.Module:
    """Return the float model of a checkpoint whose own weights take the place of the float ones."""
    options = experiment.model
    # The networks of some libraries depend on whether their weights are loaded.
    if options.weights == PRETRAINED:
        return _pretrained_if_there(options)[0]
    return create_model(dataclasses.replace(options, weights=""))


def _pretrained_if_there(options: ModelOptions) -> tuple[nn.Module, bool]:
    """Return a library's model, and True if it has its own weights, which a machine without a network may lack."""
    try:
        return create_model(options), True
    except ConfigError:  # what is wrong with the model itself is raised once more
        return create_model(dataclasses.replace(options, weights="")), False


def float_model_of(experiment: Experiment, checkpoint: Path) -> tuple[nn.Module, bool]:
    """Return the float model of a checkpoint, and True if it has its weights: testing works without them too."""
    options = experiment.model
    if experiment.pretraining.epochs:
        trained = checkpoint.parent / FLOAT_FOLDER / BEST_FILE
        options = dataclasses.replace(options, weights=str(trained) if trained.is_file() else "")
        return create_model(options), bool(options.weights)
    if options.weights == PRETRAINED:
        return _pretrained_if_there(options)
    # The file that the run started from may be gone; the quantized model's weights are in the checkpoint.
    if options.weights and not Path(options.weights).is_file():
        return create_model(dataclasses.replace(options, weights="")), False
    return create_model(options), bool(options.weights)


def loads_own_weights(experiment: Experiment) -> bool:
    """Return True where only the user's function can know whether its model has weights."""
    options = experiment.model
    return options.source == "callable" and not options.weights and not experiment.pretraining.epochs
