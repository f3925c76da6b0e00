"""Open a run that quantizes a trained float model: the part that `halfeven ptq` and `halfeven search` share."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from halfeven.cli.arguments import RunArguments
from halfeven.cli.float_model import check_has_weights, tell_own_weights, train_float
from halfeven.cli.preflight import check_quantization, prepare_folded
from halfeven.cli.run import RunContext, open_run
from halfeven.cli.work_folder import check_folder, claimed_folder, default_folder, is_continued
from halfeven.distributed import world_size
from halfeven.errors import ConfigError
from halfeven.ptq.options import check_folds
from halfeven.zoo.models import create_model


@dataclass(frozen=True)
class QuantizationRun:
    """A run that was checked, and has written nothing yet."""

    command: str
    context: RunContext
    model: nn.Module
    """The float model; if the run trains it first, `claimed_run` gives it the trained weights."""
    resume: bool
    """True if the run in the folder is continued."""


def open_quantization(arguments: RunArguments, command: str) -> QuantizationRun:
    """Open the data, and check the folder and the options.

    Args:
        arguments: of the command.
        command: "ptq" or "search".

    Raises:
        ConfigError: the float model has no weights, BatchNorm is kept, there are several processes, or the work folder
            cannot be used.
    """
    experiment = arguments.experiment
    check_has_weights(experiment)
    check_folds(experiment.quantization)
    context = open_run(experiment, default_folder(arguments.config, arguments.work_dir))
    check_single_process(command)
    resume = is_continued(
        context, resume=arguments.resume, auto_resume=arguments.auto_resume, overwrite=arguments.overwrite
    )
    check_folder(context, command, resume=resume, overwrite=arguments.overwrite)
    tell_own_weights(context)
    return QuantizationRun(command, context, create_model(experiment.model), resume)


@contextmanager
def claimed_run(run: QuantizationRun, *, quantizes: bool) -> Iterator[nn.Module | None]:
    """Claim the work folder within the context, and train the float model if the experiment says so.

    Args:
        run: the run.
        quantizes: True if the model is still to be quantized.

    Yields:
        The prepared model, with the float model's weights; None if there is nothing to quantize.
    """
    context = run.context
    # Before the folder is claimed, since this may refuse the run.
    prepared = check_quantization(context, run.model) if quantizes else None
    with claimed_folder(context, run.command, resume=run.resume):
        if context.experiment.pretraining.epochs:
            train_float(context, run.model, resume=run.resume)
            prepared = prepare_folded(context, run.model) if quantizes else None  # now with the trained weights
        yield prepared


def check_single_process(command: str) -> None:
    """Refuse to run a command in several processes.

    Raises:
        ConfigError: there are several.
    """
    if world_size() > 1:
        raise ConfigError(
            f"`halfeven {command}` was started with {world_size()} processes, and all but one would do the same work "
            "again. Start it without torchrun or accelerate launch."
        )
