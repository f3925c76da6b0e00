"""Values from the command line: read as they are written, then checked by the option classes.

tyro would check types and choices by itself, in other words than Python and config files are answered in, and without
the nearest right value. Here it only reads: what cannot be read as a field's type stays the text that it is, and option
objects stay keywords, until `construct_checked` makes them and all mistakes are told at once, by their dotted names.
"""

import contextlib
import dataclasses
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructTypeInfo,
)

from halfeven.cli.boolean_words import boolean_words
from halfeven.options import Options, given_twice, mistakes, new_names, report, up_to_date, warn_of_old


@dataclass(frozen=True)
class Given:
    """The keywords of an option object that is not made yet."""

    kind: type[Options]
    values: dict[str, Any]


def unchecked() -> ConstructorRegistry:
    """Return tyro's rules for reading option classes without checking them."""
    registry = ConstructorRegistry()
    # tyro asks these rules before its own. Where they ask tyro for its usual reading, it asks them again, and they
    # pass.
    inside: list[bool] = []

    @contextlib.contextmanager
    def usual() -> Iterator[None]:
        inside.append(True)
        try:
            yield
        finally:
            inside.pop()

    def primitive(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        if inside:
            return None
        if takes_class(info.type):
            return _NAME
        with usual():
            # Without choices, which tyro would check in words of its own.
            spec = ConstructorRegistry.get_primitive_spec(info)
        if not isinstance(spec, PrimitiveConstructorSpec):
            return None
        return dataclasses.replace(spec, instance_from_str=_read_or_keep_text(spec, info.type), choices=None)

    def struct(info: StructTypeInfo) -> StructConstructorSpec | None:
        if not inside and is_nested_dict(info.type):  # it is set in the config alone
            return StructConstructorSpec(instantiate=lambda: info.default, fields=())
        if inside or not (isinstance(info.type, type) and issubclass(info.type, Options)):
            return None
        kind = info.type
        with usual():
            spec = ConstructorRegistry.get_struct_spec(info)
        assert isinstance(spec, StructConstructorSpec)
        return dataclasses.replace(spec, instantiate=lambda **values: Given(kind, values))

    registry.primitive_rule(primitive)
    registry.struct_rule(struct)
    return registry


def takes_class(kind: Any) -> bool:
    """Return True for a field that takes a name or a class of the user's; the command line can give the name."""
    origin = get_origin(kind)
    if origin is Annotated:
        return takes_class(get_args(kind)[0])
    if origin in (Union, types.UnionType):
        return any(takes_class(member) for member in get_args(kind))
    return origin is type


_NAME: PrimitiveConstructorSpec[Any] = PrimitiveConstructorSpec(
    nargs=1,
    metavar="NAME",
    instance_from_str=lambda words: None if words[0] == "None" else words[0],
    is_instance=lambda value: True,
    str_from_instance=lambda value: [str(value)],
)
"""Reads a name; the option class knows which names there are."""


def is_nested_dict(kind: Any) -> bool:
    """Return True for a dict of dicts, which the command line cannot set."""
    return get_origin(kind) is dict and get_origin(get_args(kind)[1]) is dict


def by_new_names(arguments: list[str], options: Options) -> list[str]:
    """Return the arguments with the new names of renamed options, each with a DeprecationWarning.

    Args:
        arguments: those of a command.
        options: the option object whose fields they may set.

    Raises:
        ConfigError: an option is given by its old and by its new name.
    """
    names = {_option_name(old): _option_name(new) for old, new in _renamed_paths("", options).items()}
    split = [argument.partition("=") for argument in arguments]
    given = {_dashed_option(option) for option, _, _ in split}
    report([given_twice(old, new) for old, new in names.items() if old in given and new in given])
    current = []
    for option, equals, value in split:
        new = names.get(_dashed_option(option))
        if new is not None:
            warn_of_old(f"{option} is now {new}", stacklevel=3)
        current.append(f"{new or option}{equals}{value}")
    return current


def check_settable(arguments: list[str], options: Options) -> None:
    """Refuse options that a config alone can set: their values have several parts.

    Raises:
        ConfigError: one is among the arguments.
    """
    given = {_dashed_option(argument.partition("=")[0]) for argument in arguments}
    report(
        [
            f"{name} has values of several parts, which stand in the config alone: write them there."
            for name in _set_in_config_alone("", options)
            if _option_name(name) in given
        ]
    )


def _set_in_config_alone(path: str, options: Options) -> Iterator[str]:
    hints = get_type_hints(type(options))
    for name, value in vars(options).items():
        if isinstance(value, Options):
            yield from _set_in_config_alone(f"{path}{name}.", value)
        elif is_nested_dict(hints[name]) or is_sequence_of_options(hints[name]):
            yield f"{path}{name}"


def is_sequence_of_options(kind: Any) -> bool:
    """Return True for a sequence of option classes."""
    return any(isinstance(one, type) and dataclasses.is_dataclass(one) for one in get_args(kind))


def _renamed_paths(path: str, value: Any) -> dict[str, str]:
    """Return the new dotted names of the renamed fields of an option object and of those inside it, by the old."""
    prefix = f"{path}." if path else ""
    if isinstance(value, tuple):
        inside = {str(index): item for index, item in enumerate(value)}
        return {
            old: new for name, item in inside.items() for old, new in _renamed_paths(f"{prefix}{name}", item).items()
        }
    if not isinstance(value, Options):
        return {}
    own = {f"{prefix}{old}": f"{prefix}{new}" for old, new in new_names(type(value)).items()}
    for name, item in vars(value).items():
        own |= _renamed_paths(f"{prefix}{name}", item)
    return own


def _option_name(path: str) -> str:
    return "--" + path.replace("_", "-")


def _dashed_option(word: str) -> str:
    """Return an option with the dashes that tyro gives its name; other words stay as they are."""
    return word.replace("_", "-") if word.startswith("--") else word


def construct_checked(given: Given) -> Any:
    """Make the option object that was read, with those inside of it.

    Raises:
        ConfigError: values that their fields cannot have, all of them at once, or that do not go together.
    """
    report(_mistakes_in(given, ""))
    return _construct(given)


def _mistakes_in(value: Any, path: str) -> list[str]:
    if isinstance(value, tuple):
        return [one for index, item in enumerate(value) for one in _mistakes_in(item, f"{path}.{index}")]
    if not isinstance(value, Given):
        return []
    plain = {name: item for name, item in value.values.items() if not _holds_options(item)}
    nested = {name: item for name, item in value.values.items() if _holds_options(item)}
    inside = [one for name, item in nested.items() for one in _mistakes_in(item, f"{path}.{name}".lstrip("."))]
    return mistakes(value.kind, up_to_date(value.kind, plain), path, partial=True) + inside


def _construct(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_construct, value))
    if isinstance(value, Given):
        return value.kind(**{name: _construct(item) for name, item in value.values.items()})
    return value


def _holds_options(value: Any) -> bool:
    return isinstance(value, Given) or (isinstance(value, tuple) and any(map(_holds_options, value)))


def _read_or_keep_text(spec: PrimitiveConstructorSpec[Any], kind: Any) -> Callable[[list[str]], Any]:
    """Return the reader of a type; it returns a text that it cannot read as it is."""
    booleans = boolean_words(kind)

    def read(given: list[str]) -> Any:
        words = [booleans.get(word.lower(), word) for word in given]
        if spec.choices is None or all(word in spec.choices for word in words):
            with contextlib.suppress(ValueError, TypeError):
                return spec.instance_from_str(words)
        return given[0] if len(given) == 1 else tuple(given)

    return read
