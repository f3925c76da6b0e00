"""The command line: train, ptq, test and export. It reads arguments and shows errors; the other files do the work."""

import dataclasses
import difflib
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from halfeven.config import Experiment, load_experiment
from halfeven.errors import HalfevenError
from halfeven.zoo.models import ModelOptions
from halfeven.zoo.options import DataOptions

Config = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CONFIG")]
Checkpoint = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CKPT")]
Fields = Annotated[Experiment, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """Quantization-aware training: a float model becomes a verified integer one."""

    config: Config
    """Python file that ends with `experiment = Experiment(...)`."""
    experiment: Fields
    work_dir: str = ""
    """Folder for checkpoints, logs and exported files; "" for work_dirs/<name of the config>."""
    resume: bool = False
    """Go on with the interrupted run in the work folder; it ends as if it had not been interrupted."""
    overwrite: bool = False
    """Start anew in a work folder that holds a run already."""
    amp: bool = False
    """Train in the mixed precision that the device can do, bfloat16 or float16."""
    auto_scale_lr: bool = False
    """Multiply the learning rate by the batch over all processes / training.base_batch_size."""


@dataclass(frozen=True, kw_only=True)
class PtqArguments:
    """Post-training quantization: a float model becomes a verified integer one without training."""

    config: Config
    """Python file that ends with `experiment = Experiment(...)`."""
    experiment: Fields
    work_dir: str = ""
    """Folder for the checkpoint and the exported files; "" for work_dirs/<name of the config>."""
    resume: bool = False
    """Go on with the interrupted run in the work folder; what it has reconstructed is not done again."""
    overwrite: bool = False
    """Start anew in a work folder that holds a run already."""


@dataclass(frozen=True, kw_only=True)
class TestArguments:
    """Accuracy of the float, the simulated and the deployed model of a checkpoint, in one table."""

    config: Config
    """Python file that ends with `experiment = Experiment(...)`."""
    checkpoint: Checkpoint
    """best.safetensors or last.safetensors of a run."""
    experiment: Fields
    json_file: Annotated[str, tyro.conf.arg(name="json")] = ""
    """File for the same figures as JSON, with the keys float, simulated and deployed."""
    deployed: str = ""
    """Deployed file (.xml or .onnx) to test; "" to export the checkpoint for the test."""


@dataclass(frozen=True, kw_only=True)
class ExportArguments:
    """Write the deployable files of a checkpoint, and verify their integers in the runtime."""

    config: Config
    """Python file that ends with `experiment = Experiment(...)`."""
    checkpoint: Checkpoint
    """best.safetensors or last.safetensors of a run."""
    experiment: Fields
    work_dir: str = ""
    """Folder for the files; "" for that of the checkpoint."""


COMMANDS: dict[str, type[Any]] = {
    "train": TrainArguments,
    "ptq": PtqArguments,
    "test": TestArguments,
    "export": ExportArguments,
}

USAGE = """usage: halfeven COMMAND CONFIG ... [OPTIONS]

  halfeven train CONFIG          train a float model's quantized form, export and verify it
  halfeven ptq CONFIG            quantize a float model without training, export and verify it
  halfeven test CONFIG CKPT      float, simulated and deployed accuracy in one table
  halfeven export CONFIG CKPT    deployable files, verified

halfeven COMMAND [CONFIG] --help lists all options, with the config's values."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; exit with code 2 and a message on input that cannot be used, 130 on an interruption."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # torch.compile looks for CUDA's compiler and warns where only the CPU is there, which is nothing to mend.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        _run(arguments)
    except HalfevenError as error:
        Console(stderr=True).print(f"[bold red]{type(error).__name__}[/]", end=": ")
        Console(stderr=True).print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Interrupted. `--resume` goes on with a run from what it has saved.", file=sys.stderr)
        sys.exit(130)


def _run(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return
    if arguments[0] not in COMMANDS:
        near = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        meant = f"Did you mean {near[0]}?" if near else ""
        print(f'There is no command "{arguments[0]}". {meant}\n\n{USAGE}', file=sys.stderr)
        sys.exit(2)
    parsed = parse(arguments[0], arguments[1:])
    # What imports the runtimes comes last, so that mistakes in the arguments show at once.
    from halfeven.cli.test import run_export, run_test
    from halfeven.cli.ptq import run_ptq
    from halfeven.cli.train import run_training

    options = {f.name: getattr(parsed, f.name) for f in dataclasses.fields(parsed) if f.name != "experiment"}
    run: dict[str, Callable[..., None]] = {
        "train": run_training,
        "ptq": run_ptq,
        "test": run_test,
        "export": run_export,
    }
    run[arguments[0]](parsed.experiment, **options)


def parse(command: str, arguments: list[str]) -> Any:
    """The arguments of a command: the config's experiment, with the fields that the command line changes.

    Raises:
        ConfigError: a config that cannot be run, or values that do not go together.
        SystemExit: with code 2, after a message: an unknown option, or a value of the wrong type.
    """
    path = next((argument for argument in arguments if argument.endswith(".py")), None)
    if path is not None:
        experiment = load_experiment(path)
    else:  # only --help can be answered without a config
        experiment = Experiment(model=ModelOptions(weights="pretrained"), data=DataOptions())
    fields = {field.name for field in dataclasses.fields(COMMANDS[command])}
    required = {name: tyro.MISSING for name in ("config", "checkpoint") if name in fields}
    return tyro.cli(
        COMMANDS[command],
        prog=f"halfeven {command}",
        args=arguments,
        default=COMMANDS[command](experiment=experiment, **required),
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff),
    )


if __name__ == "__main__":
    main()
