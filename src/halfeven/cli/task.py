"""Make the task that a config names, for its model and data."""

from torch import Tensor

from halfeven.config import Experiment
from halfeven.errors import ConfigError
from halfeven.imports import call_function
from halfeven.tasks import Classification, Segmentation, Task
from halfeven.tasks.detection import Detection, TorchvisionDetection
from halfeven.zoo.datasets import Datasets
from halfeven.zoo.models import effdet_model, torchvision_model


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
        return _detection(experiment, datasets)
    task = call_function(options.function, "task.function", classes)
    if not isinstance(task, Task):
        raise ConfigError(
            f"{options.function} returned a {type(task).__name__}, whose loss and metrics are unknown. It must return "
            "a halfeven.tasks.Task."
        )
    return task


def _detection(experiment: Experiment, datasets: Datasets) -> Detection:
    model = experiment.model
    example = datasets.example()
    if not isinstance(example, Tensor) or model.source not in ("torchvision", "effdet"):
        raise ConfigError(
            f'The loss and the post-processing of a detector with model.source="{model.source}" are not known, so it '
            'cannot be trained or measured. Take a detector of "torchvision" or "effdet", or give a task of your own '
            '(task.kind="callable").'
        )
    if model.source == "torchvision":
        return TorchvisionDetection(torchvision_model(model), example)
    from halfeven.tasks.efficientdet import EfficientDetDetection

    return EfficientDetDetection(effdet_model(model), example)
