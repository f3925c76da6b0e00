"""The experiment: the options of all parts together, read from a Python file."""

import dataclasses
import difflib
import re
import runpy
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from halfeven.errors import ConfigError, HalfevenError
from halfeven.placement.plan import QuantizationOptions, Rule
from halfeven.ptq.options import PTQOptions
from halfeven.qat.batchnorm_schedule import ScheduleOptions
from halfeven.qat.bit_schedule import ProgressionOptions
from halfeven.qat.distillation import DistillationOptions
from halfeven.qat.ema import AveragingOptions
from halfeven.qat.options import QATOptions
from halfeven.qat.oscillation import OscillationOptions
from halfeven.qat.recipe import check_equalize
from halfeven.runtimes.runtime import runtime_named
from halfeven.tasks.options import TaskOptions
from halfeven.training.accelerator import DeviceOptions
from halfeven.training.options import TrainingOptions
from halfeven.zoo.models import ModelOptions
from halfeven.zoo.options import DataOptions, TextOptions


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What is written for the runtime, and how it is checked."""

    target: str = ""
    """Runtime that the files are for; "": the one that the model was quantized for."""
    formats: tuple[Literal["xml", "onnx"], ...] = ()
    """Files to write: OpenVINO IR (xml) and QDQ ONNX (onnx); none: the usual one of the target."""
    verify_images: int = 512
    """Validation images on which the file's integers are compared with the simulation's."""
    verify_batch_size: int = 32
    """Images at a time in that comparison, and in the latency it measures."""
    timed: bool = True
    """Whether the file's latency is measured beside that of the model in float, which is written for that: much of
    a verification's time, and where other work runs it tells little."""

    def __post_init__(self) -> None:
        if self.verify_images < 1 or self.verify_batch_size < 1:
            raise ConfigError(
                f"export.verify_images={self.verify_images} and verify_batch_size={self.verify_batch_size} leave "
                "nothing to verify a file on. The numbers must be at least 1."
            )


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A float model, its data, and how it becomes an integer one."""

    model: ModelOptions
    """The float model."""
    data: DataOptions
    """What it is trained, calibrated and measured on."""
    task: TaskOptions = field(default_factory=TaskOptions)
    """What the model's outputs are for: the loss and the metrics."""
    quantization: QuantizationOptions = field(default_factory=QuantizationOptions)
    """What is quantized, and how."""
    ptq: PTQOptions = field(default_factory=PTQOptions)
    """The steps of post-training quantization (`halfeven ptq`)."""
    training: TrainingOptions = field(default_factory=TrainingOptions)
    """Training of the quantized model."""
    qat: QATOptions = field(default_factory=QATOptions)
    """What accompanies the training of the quantized model."""
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    """When ranges and BatchNorm stop moving."""
    pretraining: TrainingOptions = field(default_factory=lambda: TrainingOptions(epochs=0))
    """Training of the float model before it is quantized; 0 epochs: none, its weights are given."""
    export: ExportOptions = field(default_factory=ExportOptions)
    """The deployable files."""
    device: DeviceOptions = field(default_factory=DeviceOptions)
    """Where the work is done."""
    seed: int = 0
    """Seed of the order and augmentation of images, of random weights and of dropout."""

    def __post_init__(self) -> None:
        self.endings(self.export.target or self.quantization.target)
        if self.training.epochs == 0:
            raise ConfigError(
                "training.epochs=0 leaves the quantized model untrained: no step would be taken and no checkpoint "
                "written. "
                "Set training.epochs to at least 1 (training.max_steps makes a run shorter than an epoch)."
            )
        if self.task.kind == "detection" and self.qat.distill == "on" and self.qat.distillation.weight > 0:
            raise ConfigError(
                f"qat.distillation.weight={self.qat.distillation.weight} compares soft labels of classes that exclude "
                "each other, and a detector has none: nothing sensible would be taught. Set it to 0, and name layers "
                "in qat.distillation.features."
            )
        check_equalize(self.qat, self.quantization.batchnorm)
        if self.model.weights and self.pretraining.epochs > 0:
            raise ConfigError(
                f'The float model has weights (model.weights="{self.model.weights}") and shall be trained first '
                f"(pretraining.epochs={self.pretraining.epochs}); only one of them can be meant. "
                'Set model.weights="" to train it, or pretraining.epochs=0 to take it as it is.'
            )

    def endings(self, target: str) -> tuple[str, ...]:
        """The endings of the files to write for a runtime.

        Raises:
            ConfigError: a format that it does not read.
        """
        readable = tuple(runtime_named(target).writers)
        if unread := [one for one in self.export.formats if f".{one}" not in readable]:
            raise ConfigError(
                f"export.formats names {', '.join(unread)}, and {target} reads no such files, so nothing "
                f"could be verified. It reads {', '.join(readable)}."
            )
        return tuple(f".{one}" for one in self.export.formats) or readable[:1]


OPTIONS = {
    cls.__name__: cls
    for cls in (
        *(Experiment, ModelOptions, DataOptions, TextOptions, TaskOptions, QuantizationOptions, Rule, PTQOptions),
        *(TrainingOptions, ScheduleOptions, ExportOptions, DeviceOptions),
        *(QATOptions, DistillationOptions, AveragingOptions, OscillationOptions, ProgressionOptions),
    )
}
"""The option classes by name, to name the nearest field where one is misspelt."""


def load_experiment(path: str | Path) -> Experiment:
    """Run a config file and take its `experiment`.

    The file's folder is put on the import path, so that a config can derive from another one beside it.

    Raises:
        ConfigError: no such file, an error in it, or no experiment at its end.
    """
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], n=3)
        raise ConfigError(
            f"There is no config {path}, so nothing says what to do. "
            + (
                f"Did you mean {' or '.join(near)}?"
                if near
                else "Give the path of a Python file that makes an Experiment."
            )
        )
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        names = runpy.run_path(str(path))
    except HalfevenError:
        raise
    except Exception as error:
        raise ConfigError(
            f"The config {path} cannot be run{_line_of(error, path)}: {type(error).__name__}: {error}. It is a Python "
            "file, and "
            f"nothing is known of the experiment before it runs to its end.{_nearest_field(str(error))}"
        ) from error
    experiment = names.get("experiment")
    if not isinstance(experiment, Experiment):
        found = "no such name" if experiment is None else f"a {type(experiment).__name__}"
        raise ConfigError(
            f"The config {path} must end with `experiment = Experiment(...)`; after running it there is {found}. "
            "Make a halfeven.config.Experiment there."
        )
    return experiment


def _line_of(error: Exception, path: Path) -> str:
    if isinstance(error, SyntaxError):
        return f" (line {error.lineno})"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f" (line {lines[-1]})" if lines else ""


def _nearest_field(message: str) -> str:
    """ " Did you mean ...?" where the message is Python's about an unknown keyword of an option class."""
    match = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", message)
    if match is None or match[1] not in OPTIONS:
        return ""
    names = [f.name for f in dataclasses.fields(OPTIONS[match[1]])]
    near = difflib.get_close_matches(match[2], names, n=1)
    return f" Did you mean {near[0]}?" if near else f" {match[1]} has {', '.join(names)}."


def as_dict(experiment: Experiment) -> dict[str, Any]:
    """The experiment as plain values, for JSON."""
    return dataclasses.asdict(experiment)
