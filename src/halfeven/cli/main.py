"""Find the command that the command line names, run it, and print errors. Each command has a file of its own."""

import importlib
import importlib.util
import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import halfeven
from halfeven.errors import HalfevenError
from halfeven.imports import extra
from halfeven.nearest import did_you_mean


@dataclass(frozen=True)
class Command:
    """A command, named as texts: what it needs is imported when it is run, and takes seconds."""

    name: str
    takes: str
    """The arguments behind the name, in their shortest form."""
    summary: str
    arguments: str
    """"module:class" of a dataclass with the command's arguments."""
    run: str
    """"module:function" that takes these arguments, and returns the exit code or None for 0."""


COMMANDS = (
    Command(
        name="train",
        takes="CONFIG",
        summary="train a quantized model, export and verify it",
        arguments="halfeven.cli.train:TrainArguments",
        run="halfeven.cli.train:run_train",
    ),
    Command(
        name="ptq",
        takes="CONFIG",
        summary="quantize without training, export and verify",
        arguments="halfeven.cli.ptq:PtqArguments",
        run="halfeven.cli.ptq:run_ptq",
    ),
    Command(
        name="search",
        takes="CONFIG",
        summary="find the cheapest plan within a budget, export it",
        arguments="halfeven.cli.search:SearchArguments",
        run="halfeven.cli.search:run_search",
    ),
    Command(
        name="test",
        takes="CONFIG CKPT",
        summary="print float, simulated and deployed accuracy",
        arguments="halfeven.cli.test:TestArguments",
        run="halfeven.cli.test:run_test",
    ),
    Command(
        name="export",
        takes="CONFIG CKPT",
        summary="write a checkpoint's deployable files, verify them",
        arguments="halfeven.cli.export:ExportArguments",
        run="halfeven.cli.export:run_export",
    ),
    Command(
        name="verify",
        takes="CONFIG CKPT FILE",
        summary="run a file and compare it with its checkpoint",
        arguments="halfeven.cli.verify:VerifyArguments",
        run="halfeven.cli.verify:run_verify",
    ),
    Command(
        name="diagnose",
        takes="CONFIG [CKPT]",
        summary="say where accuracy goes, and what brings it back",
        arguments="halfeven.cli.diagnose:DiagnoseArguments",
        run="halfeven.cli.diagnose:run_diagnose",
    ),
    Command(
        name="init",
        takes="[FOLDER]",
        summary="write the quickstart's config and all recipes",
        arguments="halfeven.cli.init:InitArguments",
        run="halfeven.cli.init:run_init",
    ),
)
"""All commands, in the order in which the help lists them."""
RESUMED_COMMANDS = ("train", "ptq", "search")
"""Commands that keep what an interrupted run has done."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Exits with the command's own code, with 2 and a message on input that cannot be used, with 130 where the user
    interrupts it, and with 75 where SIGTERM or SIGUSR1 has stopped it.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # torch.compile looks for CUDA's compiler, and warns where there is only the CPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # Python hides DeprecationWarnings outside of __main__, and a user of the command line has no code there.
    ours = ".*; (the next version refuses it|the old name goes with the next version)"
    warnings.filterwarnings("default", message=ours, category=DeprecationWarning)
    try:
        code = run(arguments)
    except HalfevenError as error:
        _print_error(error)
        sys.exit(2)
    except OSError as error:
        from halfeven.files import storage_error

        _print_error(storage_error(error))
        sys.exit(2)
    except KeyboardInterrupt:
        resumed = " `--resume` continues from the last saved state." if arguments[0] in RESUMED_COMMANDS else ""
        print(f"Interrupted.{resumed}", file=sys.stderr)
        # 128 + the number of SIGINT, as shells report it.
        sys.exit(130)
    if code:
        sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run the command that the arguments name, and return its exit code.

    Raises:
        HalfevenError: the input cannot be used.
    """
    if arguments[:1] == ["--version"]:
        print(f"halfeven {halfeven.__version__}")
        return 0
    with extra("train", "The command line"):
        # Looked for rather than imported, which would take seconds before the help.
        for package in ("tyro", "accelerate"):
            if importlib.util.find_spec(package) is None:
                raise ModuleNotFoundError(f"No module named '{package}'")
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    command = next((command for command in COMMANDS if command.name == arguments[0]), None)
    if command is None:
        meant = did_you_mean(arguments[0], [command.name for command in COMMANDS])
        print(f'There is no command "{arguments[0]}". {meant}\n\n{usage()}', file=sys.stderr)
        return 2
    return _run_stoppable(command, parse(command.name, arguments[1:]))


def _run_stoppable(command: Command, arguments: Any) -> int:
    """Run a command until its end, or until a signal asks it to stop. Returns the exit code."""
    from halfeven.cli.results import check_file
    from halfeven.training.stopping import EXIT_CODE, StopRequested, stoppable

    check_file(arguments.json, "--json")
    run_command = imported(command.run)
    try:
        with stoppable():
            return run_command(arguments) or 0
    except StopRequested as stop:
        print(stop if command.name in RESUMED_COMMANDS else f"Stopped by {stop.reason}.", file=sys.stderr)
        return EXIT_CODE


def usage() -> str:
    """Return the text of `halfeven --help`."""
    width = max(len(f"{command.name} {command.takes}") for command in COMMANDS)
    lines = [f"  {f'{command.name} {command.takes}':{width}}  {command.summary}" for command in COMMANDS]
    return "\n".join(
        [
            "usage: halfeven COMMAND ... [OPTIONS]",
            "",
            *lines,
            "",
            "halfeven COMMAND [CONFIG] --help lists all options, with the config's values.",
            "halfeven --version prints the version.",
        ]
    )


def parse(command: str, arguments: list[str]) -> Any:
    """Return the arguments of a command, as an object of its class of arguments.

    Raises:
        ConfigError: a config that cannot be run, or values that do not go together.
        SystemExit: the help was asked for (code 0); an unknown option, or a value of the wrong type (code 2).
    """
    from halfeven.cli.arguments import parsed

    kind = next(one.arguments for one in COMMANDS if one.name == command)
    return parsed(command, imported(kind), arguments)


def imported(name: str) -> Any:
    """Import the object that "module:name" names, in a module of halfeven."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _print_error(error: HalfevenError) -> None:
    from rich.console import Console

    console = Console(stderr=True, emoji=False)
    console.print(f"[bold red]{type(error).__name__}[/]", end=": ")
    console.print(str(error), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
