"""Words for True and False on the command line: those of Python, of shells and of YAML, in capitals or not."""

import types
from typing import Annotated, Any, Union, get_args, get_origin

NAMED = {"true": "True", "false": "False"}
WORDS = {**NAMED, "yes": "True", "no": "False", "on": "True", "off": "False", "1": "True", "0": "False"}
"""Words in small letters -> as Python, and so tyro, spells them."""


def boolean_words(kind: Any) -> dict[str, str]:
    """Return the words that mean True or False where a field has this type; {} for a field that takes neither.

    A field that takes numbers or texts too keeps what may be one.
    """
    members = _members(kind)
    if bool not in members:
        return {}
    return NAMED if {int, float, str} & members else WORDS


def _members(kind: Any) -> set[Any]:
    """Return the types of single values: those of a union, and of the items of a tuple or the values of a dict."""
    origin = get_origin(kind)
    arguments = get_args(kind)
    if origin is Annotated:
        return _members(arguments[0])
    if origin in (Union, types.UnionType, tuple):
        return {member for argument in arguments for member in _members(argument)}
    return _members(arguments[1]) if origin is dict else {kind}


def without_switch_values(arguments: list[str], switches: set[str]) -> list[str]:
    """Return the arguments of a command with its switches alone: "--resume true" is "--resume", and with "no" nothing.

    Args:
        arguments: those of a command.
        switches: the options that take no value, with dashes.
    """
    found: list[str] = []
    after_switch = False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        dashed = name.replace("_", "-")
        # A 1 behind a switch may be the name of a folder, and so it is none of the words.
        if after_switch and argument.lower() in WORDS.keys() - {"0", "1"}:
            if WORDS[argument.lower()] == "False":
                found.pop()
            after_switch = False
        elif dashed in switches and equals and value.lower() in WORDS:
            found += [name] if WORDS[value.lower()] == "True" else []
            after_switch = False
        else:
            found.append(argument)
            after_switch = dashed in switches and not equals
    return found
