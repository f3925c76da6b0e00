"""Import what is not halfeven's own: the user's functions by name, and packages that an extra brings."""

import importlib
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from halfeven.errors import ConfigError, HalfevenError, Interruption, last_line


def import_function(name: str, option: str) -> Any:
    """Return the function that "package.module:function" names.

    Args:
        name: the module and the function, with a colon between them.
        option: the setting that has this name as its value, for the message.

    Raises:
        ConfigError: the module or the function cannot be imported.
    """
    module_name, _, function = name.partition(":")
    try:
        with users_code(f"The module {module_name} of {option}", importing=True):
            return getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError, ValueError) as error:
        # An installed module may bear the name of the user's file, and comes first.
        file = getattr(sys.modules.get(module_name), "__file__", None)
        found = f" (the module was read from {file})" if file else ""
        raise ConfigError(
            f'{option}="{name}" names no function that can be imported: {error}{found}. Write '
            '"package.module:function", and put the module beside the config, in the current folder or in an installed '
            "package."
        ) from error


def call_function(name: str, option: str, *arguments: Any, **named: Any) -> Any:
    """Return the result of a call of the function that "package.module:function" names.

    Args:
        name: the module and the function, with a colon between them.
        option: the setting that has this name as its value, for messages.
        arguments: for the function.
        named: for the function.

    Raises:
        ConfigError: the function cannot be imported, raises an error, or ends the program.
    """
    function = import_function(name, option)
    with users_code(f'{option}="{name}"'):
        return function(*arguments, **named)


@contextmanager
def users_code(what: str, *, importing: bool = False) -> Iterator[None]:
    """Say whose error it is where code that is not halfeven's raises an error, or ends the program, in this context.

    The exit code of a `sys.exit(0)` would pass for this command's success.

    Args:
        what: the code, as the subject of a message.
        importing: errors of importing pass, for the caller to explain.

    Raises:
        ConfigError: the code raised an error, which is the cause of this one, or ended the program.
    """
    try:
        yield
    except (HalfevenError, Warning, Interruption, KeyboardInterrupt):
        raise
    except Exception as error:
        if importing and isinstance(error, ImportError | AttributeError | ValueError):
            raise
        raise ConfigError(
            f"{what} cannot be used: {type(error).__name__}: {last_line(error)} ({_raising_line(error)}). Nothing was "
            "done. Correct that line, or what it was given."
        ) from error
    except BaseException as end:
        raise ConfigError(
            f"{what} ends the program ({type(end).__name__}: {end}; {_raising_line(end)}), so nothing would be done, "
            "and the exit code would not tell. Remove that call."
        ) from end


def _raising_line(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"line {frame.lineno} of {frame.filename}"


@contextmanager
def extra(name: str, purpose: str) -> Iterator[None]:
    """Name the extra to install where a package that is imported in this context is missing.

    Args:
        name: the extra of halfeven that brings the package: "train", "text" or "detection".
        purpose: what needs the package, as the subject of the message: "The command line", 'data.source="digits"'.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{purpose} cannot be used: {error}. Install it with `pip install 'halfeven[{name}]'`."
        ) from error
