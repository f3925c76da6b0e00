"""Arguments that several commands take, and how they are read: a config's experiment, with single fields changed."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from halfeven.cli.boolean_words import without_switch_values
from halfeven.cli.help import help_text, option_names
from halfeven.cli.unknown_options import check_known
from halfeven.cli.values import by_new_names, check_settable, construct_checked, unchecked
from halfeven.config import Experiment, load_experiment
from halfeven.errors import ConfigError
from halfeven.zoo.models import ModelOptions
from halfeven.zoo.options import DataOptions

Config = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CONFIG")]
Checkpoint = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CKPT")]
OptionalCheckpoint = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="[CKPT]")]
DeployedFileArgument = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
Folder = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
Fields = Annotated[Experiment, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
"""The config's experiment; each of its fields is an option, `--training.epochs` for example."""


@dataclass(frozen=True, kw_only=True)
class ConfigArguments:
    """Arguments of the commands that take a config."""

    config: Config
    """Python file that ends with `experiment = Experiment(...)`."""
    experiment: Fields


@dataclass(frozen=True, kw_only=True)
class CheckpointArguments(ConfigArguments):
    """Arguments of the commands that take a config and a checkpoint."""

    checkpoint: Checkpoint
    """best.safetensors or last.safetensors of a run."""


@dataclass(frozen=True, kw_only=True)
class RunArguments(ConfigArguments):
    """Arguments of the commands that make a run in a work folder."""

    work_dir: str = ""
    """Folder for checkpoints, logs and exported files; "" for work_dirs/<name of the config>."""
    resume: bool = False
    """Continue the interrupted run in the work folder. Finished work is not repeated, and the result is that of a run
    without interruption."""
    auto_resume: bool = False
    """Continue the run in the work folder if there is one, and start it otherwise: for jobs that are restarted."""
    overwrite: bool = False
    """Start anew in a work folder that holds a run already."""
    json: str = ""
    """File to write the content of results.json to as well; "" for none."""


def parsed(command: str, kind: type[Any], arguments: list[str]) -> Any:
    """Return the arguments of a command as an object of `kind`.

    Raises:
        ConfigError: no config, one that cannot be run, an unknown option, or values that are wrong or do not go
            together.
        SystemExit: the help was asked for (code 0); an option without a value, or one argument too many (code 2).
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    wants_help = bool({"-h", "--help"} & set(arguments))
    values: dict[str, Any] = {
        name: tyro.MISSING for name, field in fields.items() if field.default is dataclasses.MISSING
    }
    path = None
    if "experiment" in fields:
        # The config is run before the options are read: its experiment gives them their defaults, and the help its
        # values.
        path = _find_config(arguments, required=not wants_help)
        values["experiment"] = load_experiment(path) if path else _default_experiment()
    default = kind(**values)
    if wants_help:
        print(help_text(command, default, from_config=path is not None))
        raise SystemExit(0)
    switches = {f"--{name.replace('_', '-')}" for name, field in fields.items() if field.type is bool}
    arguments = without_switch_values(arguments, switches)
    if "experiment" in fields:
        check_settable(arguments, default.experiment)
        arguments = by_new_names(arguments, default.experiment)
    check_known(command, arguments, option_names(command, default))
    found: Any = tyro.cli(
        kind,
        prog=f"halfeven {command}",
        args=arguments,
        default=default,
        # Dotted options without subcommands, and switches without a --no- form.
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff),
        registry=unchecked(),
    )
    # `_find_config` takes the first .py file for the config, tyro the first positional argument.
    if path is not None and found.config != path:
        raise ConfigError(
            f"{found.config} stands where the config belongs, and {path} behind it, so it is not clear what to do. "
            f"Write `halfeven {command} {path} ...`."
        )
    return (
        dataclasses.replace(found, experiment=construct_checked(found.experiment)) if "experiment" in fields else found
    )


def _find_config(arguments: list[str], *, required: bool) -> Path | None:
    """Return the first argument that is a Python file; None where there is none and none is required."""
    found = next((Path(argument) for argument in arguments if argument.endswith(".py")), None)
    if found is not None or not required:
        return found
    if arguments and not arguments[0].startswith("-"):
        return Path(arguments[0])  # loading it says why it is no config
    raise ConfigError(
        "No CONFIG was given, so nothing says which model and data to use. Give the path of a Python file that makes "
        "an Experiment; `halfeven init` writes some to begin with."
    )


def _default_experiment() -> Experiment:
    return Experiment(model=ModelOptions(), data=DataOptions())
