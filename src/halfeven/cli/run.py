"""Open a run for a command: the processes, the data, the task and the device, as one `RunContext`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn

from halfeven.cli.task import make_task
from halfeven.config import Experiment
from halfeven.errors import ConfigError
from halfeven.evaluation import evaluate, evaluation_loader
from halfeven.placement.plan_tables import REST
from halfeven.tasks import Task
from halfeven.tasks.task import Metrics
from halfeven.training.accelerator import make_accelerator
from halfeven.training.progress import plain_console
from halfeven.training.run import Run
from halfeven.training.sampling import seed_generators, seeded
from halfeven.zoo.checked_samples import check_targets, with_checks
from halfeven.zoo.datasets import Datasets, load_datasets

PLAN_FILE = "plan.txt"
"""File of the whole plan, in the folder of a run."""


@dataclass(frozen=True)
class RunContext:
    """The experiment, data, task, device and folder that all steps of a command share."""

    experiment: Experiment
    folder: Path
    accelerator: Accelerator
    console: Console
    datasets: Datasets
    task: Task

    def loader(self, items: Any, *, shared: bool = True, batch_size: int = 0) -> Any:
        """Return evaluation batches of a part of the data.

        Args:
            items: the part, such as `datasets.validation`.
            shared: give each process its own share of the items, rather than all.
            batch_size: samples of a batch; 0: as the experiment says.
        """
        data = self.experiment.data
        size = batch_size or data.evaluation_batch_size
        return evaluation_loader(items, size, data.workers, shared=shared, collate=self.task.collate)

    def accuracy(self, model: Callable[..., Any], device: torch.device | str | None = None) -> Metrics:
        """Return the task's metrics on the validation data, computed by all processes of the run together."""
        device = self.accelerator.device if device is None else device
        if isinstance(model, nn.Module):
            model.to(device)
        return evaluate(model, self.loader(self.datasets.validation), self.task, device=device)

    def selection_accuracy(self, model: Callable[..., Any]) -> Metrics:
        """Return the task's metrics on the samples that choose the best checkpoint, by all processes together."""
        if self.datasets.holdout is None:
            return self.accuracy(model)
        if isinstance(model, nn.Module):
            model.to(self.accelerator.device)
        # Samples that only come augmented are augmented alike each time, or chance would choose.
        with seeded(self.experiment.seed):
            loader = self.loader(self.datasets.holdout)
            return evaluate(model, loader, self.task, device=self.accelerator.device)

    @property
    def selection(self) -> str:
        """Return which samples choose the best checkpoint, for messages."""
        part = "validation samples themselves" if self.datasets.holdout is None else "held-out training samples"
        return f"{len(self.datasets.selection)} {part}"

    def selected_name(self, model: str) -> str:
        """Return the name, in logs, of a model's accuracy on the samples that choose the best checkpoint."""
        return model if self.datasets.holdout is None else f"{model}, holdout"

    def place(self, folder: Path, name: str) -> Run:
        """Return where and how a training of this run takes place.

        Args:
            folder: for its state, checkpoints and logs.
            name: of the trained model's accuracy in the logs.
        """
        device = self.experiment.device
        data = self.experiment.data
        return Run(
            folder=folder,
            accelerator=self.accelerator,
            console=self.console,
            seed=self.experiment.seed,
            workers=data.workers,
            prefetch=data.prefetch,
            channels_last=device.channels_last,
            compiled=device.compile,
            name=self.selected_name(name),
        )

    def log(self, text: str) -> None:
        """Print a line, from the first process alone."""
        # What Python prints of a plan is a file of the run.
        self.console.print(text.replace(REST, PLAN_FILE), highlight=False, soft_wrap=True)


def open_run(experiment: Experiment, folder: Path) -> RunContext:
    """Join the processes and open the data.

    Raises:
        ConfigError: data, model and device do not go together.
    """
    accelerator = make_accelerator(experiment.device)
    console = plain_console(quiet=not accelerator.is_main_process)
    datasets = with_checks(load_datasets(experiment.data), experiment.data.on_bad_sample, folder)
    if mismatches := _mismatches(experiment, datasets):
        raise ConfigError(
            f"Model and data do not go together, so no loss can be computed: {'; '.join(mismatches)}. Set the options "
            "of `model` to match the data."
        )
    task = make_task(experiment, datasets)
    with seeded(experiment.seed):
        check_targets(datasets, task.wrong_target, one_size=type(task).collate is Task.collate)
    # For the random weights of the model, which is made next.
    seed_generators(experiment.seed)
    context = RunContext(experiment, folder, accelerator, console, datasets, task)
    if datasets.holdout is not None and datasets.train_as_evaluated is None:
        context.log(
            f"{experiment.data.function} gives no train_as_evaluated, so the held-out samples are read as those of "
            "training, with any augmentation, which is the same in each epoch."
        )
    return context


def _mismatches(experiment: Experiment, datasets: Datasets) -> list[str]:
    """List the options of the model that do not match the data; of a model of the user's own there are none."""
    options = experiment.model
    if options.source == "callable":
        return []
    example = datasets.example()
    found = []
    if options.num_classes != datasets.num_classes:
        found.append(f"model.num_classes={options.num_classes}, and the data has {datasets.num_classes}")
    if isinstance(example, dict) and options.source != "transformers":
        found.append(f'model.source="{options.source}" reads images, and the data gives texts')
    if isinstance(example, Tensor) and options.source == "transformers" and experiment.task.kind != "detection":
        found.append('model.source="transformers" reads texts, and the data gives images')
    if isinstance(example, Tensor) and options.in_chans != example.shape[1]:
        found.append(f"model.in_chans={options.in_chans}, and the images have {example.shape[1]}")
    return found
