"""Make the task that a config names, for its model and data."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from halfeven.config import Experiment, ModelOptions
from halfeven.errors import ConfigError, named
from halfeven.imports import call_function
from halfeven.tasks import Classification, Segmentation, Task
from halfeven.tasks.detection import Detection
from halfeven.tasks.detection_by_library import detection_of
from halfeven.zoo.datasets import Datasets
from halfeven.zoo.models import callable_model, effdet_model, torchvision_model, transformers_model


def make_task(experiment: Experiment, datasets: Datasets) -> Task:
    """Return the task of an experiment.

    Raises:
        ConfigError: the detector's loss and post-processing are not known, or the user's function returns no task.
    """
    options = experiment.task
    classes = datasets.num_classes
    if options.kind == "classification":
        return Classification(classes)
    if options.kind == "segmentation":
        return Segmentation(classes, ignore_index=options.ignore_index, auxiliary_weight=options.auxiliary_weight)
    if options.kind == "detection":
        return _detection_task(experiment, datasets)
    task = call_function(options.function, "task.function", classes)
    if not isinstance(task, Task):
        raise ConfigError(
            f"{options.function} returned a {type(task).__name__}, whose loss and metrics are unknown. It must return "
            "a halfeven.tasks.Task."
        )
    return task


def _detection_task(experiment: Experiment, datasets: Datasets) -> Detection:
    """Return the task of the detector that the config names."""
    model = experiment.model
    example = datasets.example()
    makers: dict[str, Callable[[ModelOptions], Any]] = {
        "torchvision": torchvision_model,
        "effdet": effdet_model,
        "transformers": transformers_model,
        "callable": callable_model,
    }
    if not isinstance(example, Tensor) or model.source not in makers:
        raise ConfigError(
            f'The loss and the post-processing of a detector with model.source="{model.source}" are not known, so it '
            f"cannot be trained or measured. Take a detector of {named(sorted(makers))}, or give a task of your own "
            '(task.kind="callable").'
        )
    return detection_of(makers[model.source](model), example)
