"""`halfeven diagnose`: where the accuracy of a quantized model goes, and what brings it back."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from halfeven.checkpoint import read_facts
from halfeven.cli.arguments import ConfigArguments, OptionalCheckpoint
from halfeven.cli.float_model import check_has_weights, float_model_of, loads_own_weights
from halfeven.cli.quantization_run import check_single_process
from halfeven.cli.results import write_json
from halfeven.cli.run import RunContext, open_run
from halfeven.cli.work_folder import default_folder
from halfeven.diagnosis.diagnose import diagnose
from halfeven.errors import ConfigError
from halfeven.layerwise.calibrate import calibrate
from halfeven.pipelines import load, prepare
from halfeven.reporting.page import charting_library
from halfeven.zoo.models import create_model


@dataclass(frozen=True, kw_only=True)
class DiagnoseArguments(ConfigArguments):
    """Find where the accuracy of a quantized model goes, and the cheapest remedies that bring it back. No labels are
    needed. Without a checkpoint, the float model is prepared and calibrated as the config says."""

    checkpoint: OptionalCheckpoint = Path()
    """best.safetensors or last.safetensors of a run."""
    json: str = ""
    """File to write the diagnosis to as JSON; "" for none."""
    report: str = ""
    """File to write the diagnosis to as a page with charts (.html); "" for none."""
    samples: int = 256
    """Calibration samples to compare the quantized with the float model on."""
    no_file: bool = False
    """Write and run no file for the target: nothing is said of where it parts from the simulation, and of its time."""
    accuracy: bool = False
    """Measure the accuracy of the float, the quantized and the repaired model on the validation data, too."""


def run_diagnose(arguments: DiagnoseArguments) -> None:
    """Diagnose the model, and print the findings."""
    experiment = arguments.experiment
    check_single_process("diagnose")
    if arguments.samples < 1:
        raise ConfigError(f"--samples {arguments.samples} gives nothing to compare on. Give at least 1.")
    if arguments.report:
        charting_library()  # a missing package shows before the work
    given = arguments.checkpoint != Path()
    if given:
        read_facts(arguments.checkpoint)  # a wrong path shows before the data is read
        folder = arguments.checkpoint.parent
    else:
        check_has_weights(experiment)
        folder = default_folder(arguments.config, "")
    context = open_run(experiment, folder)
    qmodel, model = (
        _models_of_checkpoint(context, arguments.checkpoint) if given else _models_of_config(context, folder)
    )
    found = diagnose(
        qmodel,
        model,
        context.loader(context.datasets.calibration),
        evaluate=_deciding_metric(context) if arguments.accuracy else None,
        samples=arguments.samples,
        runtime=not arguments.no_file,
        log=context.log,
    )
    context.log(f"\n{found}")
    if arguments.report and context.accelerator.is_main_process:
        context.log(f"Report with charts, to open in a browser: {found.save(arguments.report)}")
    if arguments.json and context.accelerator.is_main_process:
        write_json(Path(arguments.json), found.to_dict())


def _models_of_checkpoint(context: RunContext, checkpoint: Path) -> tuple[nn.Module, nn.Module]:
    """Return the quantized model of a checkpoint, and the float model."""
    model, has_weights = float_model_of(context.experiment, checkpoint)
    if not (has_weights or loads_own_weights(context.experiment)):
        raise ConfigError(
            f"The float model's weights are not at hand, so the outputs of {checkpoint} cannot be compared with its "
            "outputs. Give model.weights, or keep the folder float/ beside the checkpoint."
        )
    return load(checkpoint, model, context.datasets.example()).eval(), model.eval()


def _models_of_config(context: RunContext, folder: Path) -> tuple[nn.Module, nn.Module]:
    """Return the float model of the config, prepared and calibrated, and the float model itself."""
    if context.experiment.pretraining.epochs:
        model, has_weights = float_model_of(context.experiment, folder / "best.safetensors")
        if not has_weights:
            raise ConfigError(
                f"The float model has not been trained yet: there are no weights in {folder}/float. Run `halfeven "
                "train` or `halfeven ptq` first, or give the checkpoint of a run that is in another folder; or give "
                "model.weights and pretraining.epochs=0."
            )
    else:
        model = create_model(context.experiment.model)
    qmodel = prepare(model.eval(), context.datasets.example(), context.experiment.quantization).eval()
    return calibrate(qmodel, context.loader(context.datasets.calibration)), model


def _deciding_metric(context: RunContext) -> Any:
    return lambda model: context.accuracy(model)[context.task.key]
