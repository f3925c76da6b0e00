"""`halfeven ptq`: post-training quantization, from the float model to verified files."""

import shutil
import time
from dataclasses import dataclass
from typing import Any

from torch import nn

from halfeven.checkpoint import read_facts, save
from halfeven.cli.arguments import RunArguments
from halfeven.cli.deliver import deliver, write_plan
from halfeven.cli.float_model import check_has_weights, train_float
from halfeven.cli.preflight import check_quantization, prepare_folded
from halfeven.cli.run import (
    BEST,
    PTQ_STATE,
    RunContext,
    check_folder,
    claimed_folder,
    continues,
    default_folder,
    open_run,
)
from halfeven.distributed import world_size
from halfeven.errors import ConfigError
from halfeven.pipelines import check_folds, quantize_prepared
from halfeven.zoo.models import create_model


@dataclass(frozen=True, kw_only=True)
class PtqArguments(RunArguments):
    """Quantize a float model without training (PTQ), write its deployable files and verify them."""


def run_ptq(arguments: PtqArguments) -> None:
    """Quantize, export and verify, and print one table of accuracies."""
    experiment = arguments.experiment
    check_has_weights(experiment)
    check_folds(experiment.quantization)
    context = open_run(experiment, default_folder(arguments.config, arguments.work_dir))
    check_alone("ptq")
    resume = continues(
        context, resume=arguments.resume, auto_resume=arguments.auto_resume, overwrite=arguments.overwrite
    )
    check_folder(context, "ptq", resume=resume, overwrite=arguments.overwrite)
    model = create_model(experiment.model)
    facts = _finished(context, resume=resume)
    prepared = check_quantization(context, model) if facts is None else None
    with claimed_folder(context, "ptq", resume=resume):
        if experiment.pretraining.epochs:
            train_float(context, model, resume=resume)
            prepared = None if prepared is None else prepare_folded(context, model)  # now with the trained weights
        if prepared is not None:
            facts = _quantize(context, model, prepared)
        assert facts is not None
        further = {"quantization_seconds": facts["quantization_seconds"]}
        deliver(context, model, facts["float"], further, json=arguments.json)


def check_alone(command: str) -> None:
    """Refuse to run a command in several processes.

    Raises:
        ConfigError: there are several.
    """
    if world_size() > 1:
        raise ConfigError(
            f"`halfeven {command}` was started with {world_size()} processes, and all but one would do the same work "
            "again: post-training quantization runs in one. Start it without torchrun or accelerate launch."
        )


def _finished(context: RunContext, *, resume: bool) -> dict[str, Any] | None:
    """Return the facts in the checkpoint of the run that is resumed; None if the run was not that far."""
    best = context.folder / BEST
    found: dict[str, Any] | None = read_facts(best)["extra"] if resume and best.is_file() else None
    return found


def _quantize(context: RunContext, model: nn.Module, prepared: nn.Module) -> dict[str, Any]:
    """Quantize and write the checkpoint. Returns the facts in it: the float accuracy, and the seconds it took."""
    start = time.perf_counter()
    resume_dir = context.folder / PTQ_STATE
    qmodel = quantize_prepared(
        prepared.to(context.accelerator.device),
        list(context.loader(context.datasets.calibration)),
        context.experiment.ptq,
        log=context.log,
        resume_dir=resume_dir,
    )
    seconds = time.perf_counter() - start
    context.log(f"Quantized in {seconds:.0f} s.\n")
    write_plan(context, qmodel)
    facts = {"float": context.accuracy(model), "quantization_seconds": round(seconds, 1)}
    save(qmodel, context.folder / BEST, facts)
    shutil.rmtree(resume_dir, ignore_errors=True)  # the checkpoint has it all now
    return facts
