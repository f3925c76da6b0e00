"""Import what is not halfeven's own: the user's functions by name, and packages that an extra brings."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from halfeven.errors import ConfigError


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
        return getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f'{option}="{name}" names no function that can be imported: {error}. Write "package.module:function", and '
            "put the module beside the config, in the current folder or in an installed package."
        ) from error


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
