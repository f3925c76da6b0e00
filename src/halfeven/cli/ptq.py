"""Post-training quantization: float model, the pipeline with its choices, and the verified files."""

import shutil
import time
from pathlib import Path
from typing import Any

from torch import nn

from halfeven.checkpoint import read_facts, save
from halfeven.cli.deliver import deliver
from halfeven.cli.float_model import check_has_weights, train_float
from halfeven.cli.run import BEST, PTQ_STATE, Work, default_folder, open_folder, open_work
from halfeven.config import Experiment
from halfeven.distributed import world_size
from halfeven.errors import ConfigError
from halfeven.pipelines import quantize
from halfeven.zoo.models import create_model


def run_ptq(
    experiment: Experiment, *, config: Path, work_dir: str = "", resume: bool = False, overwrite: bool = False
) -> None:
    """Float model, plan, quantization from calibration images, export, verification; then one table."""
    check_has_weights(experiment)
    work = open_work(experiment, default_folder(config, work_dir))
    _check_alone()
    open_folder(work, "ptq", resume=resume, overwrite=overwrite)
    model, facts = create_model(experiment.model), _finished(work, resume=resume)
    if experiment.pretraining.epochs:
        train_float(work, model, resume=resume)
    if facts is None:
        facts = _quantize(work, model)
    deliver(work, model, facts["float"], {"quantization_seconds": facts["quantization_seconds"]})


def _check_alone() -> None:
    if world_size() > 1:
        raise ConfigError(
            f"`halfeven ptq` was started with {world_size()} processes, and all but one would do the same work again: "
            "post-training quantization runs in one. Start it without torchrun or accelerate launch."
        )


def _finished(work: Work, *, resume: bool) -> dict[str, Any] | None:
    """What is known of the quantized model, if the run that is resumed got so far."""
    best = work.folder / BEST
    found: dict[str, Any] | None = read_facts(best)["extra"] if resume and best.is_file() else None
    return found


def _quantize(work: Work, model: nn.Module) -> dict[str, Any]:
    """Quantize, and write the checkpoint with what is known of it: the float accuracy, and the seconds it took."""
    start = time.perf_counter()
    resume_dir = work.folder / PTQ_STATE
    qmodel = quantize(
        model.to(work.accelerator.device),
        work.loader(work.datasets.calibration),
        work.experiment.quantization,
        work.experiment.ptq,
        log=work.say,
        resume_dir=resume_dir,
    )
    seconds = time.perf_counter() - start
    work.say(f"Quantized in {seconds:.0f} s.\n")
    facts = {"float": work.accuracy(model), "quantization_seconds": round(seconds, 1)}
    save(qmodel, work.folder / BEST, facts)
    shutil.rmtree(resume_dir, ignore_errors=True)  # the checkpoint has it all now
    return facts
