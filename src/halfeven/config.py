"""Define an experiment, which holds the options of all parts, and read it from a Python file.

All option classes can be imported from here, and a config needs no other import of halfeven.
"""

import runpy
import sys
import traceback
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, Literal

from halfeven.deployment.file_interface import FloatPrecision
from halfeven.errors import ConfigError, HalfevenError, Interruption
from halfeven.mixed_precision.options import SearchOptions
from halfeven.nearest import similar
from halfeven.options import Auto, NonNegativeInt, Options, PositiveInt, formerly, renamed_from
from halfeven.placement.options import QuantizationOptions, Rule
from halfeven.ptq.options import PTQOptions
from halfeven.qat.batchnorm_schedule import ScheduleOptions
from halfeven.qat.bit_schedule import ProgressionOptions
from halfeven.qat.distillation import DistillationOptions
from halfeven.qat.ema import AveragingOptions
from halfeven.qat.options import QATOptions
from halfeven.qat.oscillation import OscillationOptions
from halfeven.qat.recipe import check_equalize
from halfeven.quantization.own_class import plain_values
from halfeven.runtimes.runtime import runtime_named
from halfeven.tasks.options import TaskOptions
from halfeven.training.accelerator import DeviceOptions
from halfeven.training.options import TrainingOptions
from halfeven.zoo.models import ModelOptions
from halfeven.zoo.options import DataOptions, TextOptions

__all__ = [
    "AveragingOptions",
    "DataOptions",
    "DeviceOptions",
    "DistillationOptions",
    "Experiment",
    "ExportOptions",
    "ModelOptions",
    "OscillationOptions",
    "PTQOptions",
    "ProgressionOptions",
    "QATOptions",
    "QuantizationOptions",
    "Rule",
    "ScheduleOptions",
    "SearchOptions",
    "TaskOptions",
    "TextOptions",
    "TrainingOptions",
    "as_dict",
    "load_experiment",
]


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Options):
    """Options for the files of the runtime and their verification."""

    target: Annotated[str, formerly("")] = "auto"
    """Runtime that the files are for; "auto": the runtime that the model was quantized for."""
    formats: Annotated[tuple[Literal["xml", "onnx"], ...] | Auto, formerly(())] = "auto"
    """Files to write: OpenVINO IR (xml) and QDQ ONNX (onnx); "auto": the target's usual format."""
    float_precision: FloatPrecision = "f32"
    """Precision of the operators that stay float: float32, as simulated (f32), or the runtime's choice (runtime), which
    is bfloat16 in OpenVINO, where the processor has it, and float16 in files for TensorRT."""
    verify_samples: Annotated[PositiveInt, renamed_from("verify_images")] = 512
    """Validation samples on which the file's integers are compared with the simulation's."""
    verify_batch_size: PositiveInt = 32
    """Batch size of the verification and of the measurement of latency."""
    timed: bool = True
    """Measure the latency of the file and of the float model, which is written for this purpose. It takes much of the
    verification's time, and means little on a machine that is busy with other work."""


@dataclass(frozen=True, kw_only=True)
class Experiment(Options):
    """A float model, its data, and the options that turn it into an integer model."""

    model: ModelOptions
    """The float model."""
    data: DataOptions
    """Data for training, calibration and evaluation."""
    task: TaskOptions = field(default_factory=TaskOptions)
    """The task of the model: its loss and its metrics."""
    quantization: QuantizationOptions = field(default_factory=QuantizationOptions)
    """Tensors to quantize, and their bits and ranges."""
    ptq: PTQOptions = field(default_factory=PTQOptions)
    """The steps of post-training quantization (`halfeven ptq`)."""
    search: SearchOptions = field(default_factory=SearchOptions)
    """Budgets of a search for the cheapest plan (`halfeven search`)."""
    training: TrainingOptions = field(default_factory=TrainingOptions)
    """Training of the quantized model."""
    qat: QATOptions = field(default_factory=QATOptions)
    """Algorithms that accompany the training of the quantized model."""
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    """Shares of the run after which ranges and BatchNorm's statistics stop changing."""
    pretraining: TrainingOptions = field(default_factory=lambda: TrainingOptions(epochs=0))
    """Training of the float model before it is quantized. With 0 epochs it has the weights of `model.weights`."""
    export: ExportOptions = field(default_factory=ExportOptions)
    """The deployable files."""
    device: DeviceOptions = field(default_factory=DeviceOptions)
    """Device that runs the work."""
    seed: NonNegativeInt = 0
    """Seed of the order and augmentation of samples, of random weights and of dropout."""

    def __post_init__(self) -> None:
        target = self.quantization.target if self.export.target == "auto" else self.export.target
        self.endings(target)
        # Refused here, before any work: formats that the target does not read, and a precision that it does not have.
        runtime_named(target).settings_for(self.export.float_precision)
        if self.training.epochs == 0:
            raise ConfigError(
                "training.epochs=0 leaves the quantized model untrained: no step would be taken, and no checkpoint "
                "written. Set training.epochs to at least 1 (training.max_steps makes a run shorter than an epoch)."
            )
        if self.task.kind == "detection" and self.qat.distill == "on" and self.qat.distillation.weight > 0:
            raise ConfigError(
                f"qat.distillation.weight={self.qat.distillation.weight} distils from soft labels of classes that "
                "exclude each other, and a detector has no such classes, so the loss would teach nothing useful. Set "
                "it to 0, and name layers in qat.distillation.features."
            )
        check_equalize(self.qat, self.quantization.batchnorm)
        if self.model.weights and self.pretraining.epochs > 0:
            raise ConfigError(
                f'The float model has weights (model.weights="{self.model.weights}") and would be trained from scratch '
                f"(pretraining.epochs={self.pretraining.epochs}), so it is not clear which weights to use. "
                'Set model.weights="" to train it, or pretraining.epochs=0 to use the weights as they are.'
            )

    def endings(self, target: str) -> tuple[str, ...]:
        """Return the file name endings of the files to write for a runtime.

        Raises:
            ConfigError: the runtime does not read a format.
        """
        readable = tuple(runtime_named(target).writers)
        if self.export.formats == "auto":
            return readable[:1]
        if unread := [name for name in self.export.formats if f".{name}" not in readable]:
            raise ConfigError(
                f"export.formats names {', '.join(unread)}, and {target} reads no such files, so nothing "
                f"could be verified. It reads {', '.join(readable)}."
            )
        return tuple(f".{name}" for name in self.export.formats)


def load_experiment(path: str | Path) -> Experiment:
    """Run a config file and return its `experiment`.

    The file's folder is appended to the import path, so that a config can import another config beside it, and no file
    there hides a library.

    Raises:
        ConfigError: no such Python file, an error in it, or no experiment at its end.
    """
    path = Path(path)
    _check_is_python_file(path)
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        names = runpy.run_path(str(path))
    except ConfigError as error:
        raise ConfigError(f"The config {path} cannot be used{_line_in_config(error, path)}. {error}") from error
    except HalfevenError:
        raise
    except (Interruption, KeyboardInterrupt):
        raise
    except BaseException as error:  # sys.exit(0) too, whose exit code would pass for success
        raise ConfigError(
            f"The config {path} cannot be run{_line_in_config(error, path)}: {type(error).__name__}: {error}. It is a "
            "Python file, which must run to its end to define the experiment. Correct the file."
        ) from error
    experiment = names.get("experiment")
    if not isinstance(experiment, Experiment):
        found = "no such name" if experiment is None else f"a {type(experiment).__name__}"
        raise ConfigError(
            f"The config {path} must end with `experiment = Experiment(...)`, and after running it there is {found}, "
            "so nothing says what to do. Assign a halfeven.config.Experiment to `experiment`."
        )
    return experiment


def _check_is_python_file(path: Path) -> None:
    if path.is_file() and path.suffix == ".py":
        return
    if path.is_dir():
        wrong = "is a folder"
        near = sorted(path.glob("*.py"))[:MAX_NAMED_FILES]
    else:
        wrong = "is no Python file" if path.is_file() else "does not exist"
        near = _files_named_like(path)
    meant = f"Did you mean {' or '.join(map(str, near))}?" if near else "Give the path of such a file."
    raise ConfigError(
        f"CONFIG must be a Python file (.py) that ends with `experiment = Experiment(...)`, and {path} {wrong}, so "
        f"nothing says what to do. {meant}"
    )


MAX_NAMED_FILES = 3
"""Largest number of similar files that a message about a missing file names."""
MAX_COMPARED_FILES = 2000
"""Largest number of files that are compared with its name."""


def _files_named_like(path: Path) -> list[Path]:
    """Return the Python files beside a path, or up to two folders below, whose names are most similar to its name."""
    beside = path.parent
    files = chain.from_iterable(beside.glob(pattern) for pattern in ("*.py", "*/*.py", "*/*/*.py"))
    by_name: dict[str, Path] = {}
    for file in islice(files, MAX_COMPARED_FILES):
        by_name.setdefault(file.stem, file)
    return [by_name[name] for name in similar(path.stem, by_name, MAX_NAMED_FILES)]


def _line_in_config(error: BaseException, path: Path) -> str:
    if isinstance(error, SyntaxError):
        return f" (line {error.lineno})"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f" (line {lines[-1]})" if lines else ""


def as_dict(experiment: Experiment) -> dict[str, Any]:
    """Return the experiment as plain values, for JSON."""
    return plain_values(experiment)
