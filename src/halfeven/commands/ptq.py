"""Post-training quantization: float model, the pipeline with its choices, and the verified files."""

import time
from pathlib import Path

from torch import nn

from halfeven.commands.delivery import deliver
from halfeven.commands.float_model import check_has_weights, train_float
from halfeven.commands.work import BEST, PTQ_STATE, Work, default_folder, open_folder, open_work
from halfeven.config import Experiment
from halfeven.distributed import world_size
from halfeven.errors import ConfigError
from halfeven.pipelines import quantize
from halfeven.training.checkpoint import save
from halfeven.training.trainer import Metrics
from halfeven.zoo.models import create_model


def run_ptq(
    experiment: Experiment, *, config: Path, work_dir: str = "", resume: bool = False, overwrite: bool = False
) -> None:
    """Float model, plan, quantization from calibration images, export, verification; then one table."""
    check_has_weights(experiment)
    work = open_work(experiment, default_folder(config, work_dir))
    _check_alone()
    open_folder(work, "ptq", resume=resume, overwrite=overwrite)
    model = create_model(experiment.model)
    if experiment.pretraining.epochs:
        train_float(work, model, resume=resume)
    float_metrics = work.accuracy(model)
    work.say("float: " + ", ".join(f"{name} {value:.2f} %" for name, value in float_metrics.items()))
    model.to(work.accelerator.device)
    seconds = _quantize(work, model, float_metrics)
    deliver(work, model, float_metrics, {"quantization_seconds": round(seconds, 1)})


def _check_alone() -> None:
    if world_size() > 1:
        raise ConfigError(
            f"`halfeven ptq` was started with {world_size()} processes, and all but one would do the same work again: "
            "post-training quantization runs in one. Start it without torchrun or accelerate launch."
        )


def _quantize(work: Work, model: nn.Module, float_metrics: Metrics) -> float:
    """Quantize, and write the checkpoint; the seconds that the quantization took."""
    start = time.perf_counter()
    qmodel = quantize(
        model,
        work.loader(work.datasets.calibration),
        work.experiment.quantization,
        work.experiment.ptq,
        say=work.say,
        state=work.folder / PTQ_STATE,
    )
    seconds = time.perf_counter() - start
    work.say(f"Quantized in {seconds:.0f} s.\n")
    save(qmodel, work.folder / BEST, {"float": float_metrics})
    return seconds
