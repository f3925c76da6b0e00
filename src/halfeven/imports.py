"""What a config names is imported from the user's own modules."""

import importlib
from typing import Any

from halfeven.errors import ConfigError


def import_function(name: str, option: str) -> Any:
    """The function that "package.module:function" names; `option` is the setting to blame.

    Raises:
        ConfigError: it cannot be imported.
    """
    module_name, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f'{option}="{name}" names no function that can be imported: {error}. Write "package.module:function" and '
            "put "
            "the module beside the config, in the current folder or in an installed package."
        ) from error
