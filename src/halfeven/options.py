"""The base of all option classes, which checks every value where an object is made, whoever makes it.

A field's annotation says all that one value must be: its type, its choices (`Literal`), its bounds
(`Annotated[int, at_least(1)]`), further spellings of a choice (`also_spelled`), and the spellings (`formerly`) and the
name (`renamed_from`) of earlier versions. Rules between fields are left to a class's `__post_init__`, which runs after
every value has been found right.
"""

import dataclasses
import math
import operator
import types
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from halfeven.errors import ConfigError
from halfeven.nearest import joined_by_or, nearest, shown, unknown_options

Auto = Literal["auto"]
"""The word for "you choose"."""
Switch = Literal["auto", "on", "off"]
"""A step that is left to the recipe, taken, or left out."""


@dataclass(frozen=True)
class Bound:
    """A limit that a number must keep."""

    words: str
    limit: float
    keeps: Callable[[float, float], bool]
    inclusive: bool


def at_least(limit: float) -> Bound:
    """Bound a number from below; the limit itself is allowed."""
    return Bound("at least", limit, operator.ge, True)


def above(limit: float) -> Bound:
    """Bound a number from below; the limit itself is not allowed."""
    return Bound("above", limit, operator.gt, False)


def at_most(limit: float) -> Bound:
    """Bound a number from above; the limit itself is allowed."""
    return Bound("at most", limit, operator.le, True)


def below(limit: float) -> Bound:
    """Bound a number from above; the limit itself is not allowed."""
    return Bound("below", limit, operator.lt, False)


@dataclass(frozen=True)
class Formerly:
    """A value of an earlier version that stands for "auto"."""

    value: object


def formerly(value: object) -> Formerly:
    """Accept an earlier version's spelling of "auto", with a DeprecationWarning."""
    return Formerly(value)


@dataclass(frozen=True)
class AlsoSpelled:
    """Further spellings of choices: pairs of a spelling and the choice that it stands for."""

    pairs: tuple[tuple[str, str], ...]


def also_spelled(**choices: str) -> AlsoSpelled:
    """Accept further spellings of choices, such as a paper's name; objects hold the choice that they stand for.

    Args:
        choices: spelling -> choice.
    """
    return AlsoSpelled(tuple(choices.items()))


@dataclass(frozen=True)
class Converted:
    """A function that makes a field's value of what the user gives."""

    function: Callable[[Any], Any]
    into: type


def converted(function: Callable[[Any], Any], into: type) -> Converted:
    """Accept another form of a field's value, which a function turns into the value that objects hold.

    Args:
        function: returns the value; what it cannot convert it returns as it is.
        into: the type that objects hold, which users do not write.
    """
    return Converted(function, into)


@dataclass(frozen=True)
class RenamedFrom:
    """The name of a field in an earlier version."""

    name: str


def renamed_from(name: str) -> RenamedFrom:
    """Accept an earlier version's name of a field, as a keyword and as an attribute, with a DeprecationWarning."""
    return RenamedFrom(name)


PositiveInt = Annotated[int, at_least(1)]
NonNegativeInt = Annotated[int, at_least(0)]
PositiveFloat = Annotated[float, above(0)]
NonNegativeFloat = Annotated[float, at_least(0)]
Share = Annotated[float, at_least(0), at_most(1)]
"""A part of a whole, from none of it to all of it."""


class OptionsType(type):
    """Makes an object only of values that its fields can have.

    Checking here, rather than in `__post_init__`, leaves no subclass a way around it and covers `dataclasses.replace`.
    """

    def __call__(cls, *positional: Any, **values: Any) -> Any:
        """Make the object.

        Raises:
            ConfigError: names that are no fields, or values that their fields cannot have; all of them at once.
        """
        values = up_to_date(cls, values)
        report([*(_unnamed_mistakes(cls, positional) if positional else ()), *mistakes(cls, values, cls.__name__)])
        return super().__call__(**values)


class Options(metaclass=OptionsType):
    """Base of all option classes, each of which is a `@dataclass(frozen=True, kw_only=True)`."""

    if not TYPE_CHECKING:  # a type checker would then take every name for a field

        def __getattr__(self, name):
            kind = type(self)
            if name not in new_names(kind):
                raise AttributeError(f"'{kind.__name__}' object has no attribute '{name}'", name=name, obj=self)
            warn_of_old(f"{kind.__name__}.{name} is now {new_names(kind)[name]}", stacklevel=3)
            return getattr(self, new_names(kind)[name])


def report(found: list[str]) -> None:
    """Raise a ConfigError that tells all mistakes, if there are any."""
    if found:
        options = "An option" if len(found) == 1 else f"{len(found)} options"
        told = f" {found[0]}" if len(found) == 1 else "".join(f"\n  {one}" for one in found)
        raise ConfigError(f"{options} cannot be used, so nothing was started:{told}")


def mistakes(kind: type, values: Mapping[str, Any], path: str, *, partial: bool = False) -> list[str]:
    """Return a sentence for each keyword that cannot be used to make an option class.

    Args:
        kind: the option class.
        values: the keywords.
        path: how the user calls the object, such as "training", for the messages; "" for an experiment's own fields.
        partial: other keywords are given elsewhere, so that none is missing.
    """
    fields = _fields_by_name(kind)
    hints = _type_hints(kind)
    prefix = f"{path}." if path else ""
    found = []
    for name, value in values.items():
        if name in new_names(kind):
            found.append(given_twice(f"{prefix}{name}", f"{prefix}{new_names(kind)[name]}"))
        elif name not in fields:
            found.append(unknown_options(path or kind.__name__, [name], list(fields)))
        elif not fits(hints[name], value):
            hint = _hint_for(hints[name], value, fields[name])
            found.append(f"{prefix}{name}={shown(value)} must be {describe(hints[name])}.{hint}")
    required = [name for name, field in fields.items() if _is_required(field)]
    missing = [] if partial else [name for name in required if name not in values]
    return found + [f"{prefix}{name} must be given." for name in missing]


def up_to_date(kind: type, values: Mapping[str, Any], *, warn: bool = True) -> dict[str, Any]:
    """Return the keywords of an option class as this version spells them.

    Old names become the new ones, old spellings of "auto" become "auto", further spellings of a choice become that
    choice, and a list becomes the tuple that a field takes. An old name whose new name is given too stays, and is a
    mistake.

    Args:
        kind: the option class.
        values: the keywords.
        warn: give a DeprecationWarning for each old name and spelling.
    """
    given = _without_filled_in(kind, values)
    hints = _type_hints(kind)
    current = {}
    for key, value in given.items():
        new = new_names(kind).get(key, key)
        name = key if new in given else new
        if warn and name != key:
            warn_of_old(f"{kind.__name__}.{key} is now {name}", stacklevel=4)
        old = [note.value for note in _annotations(hints.get(name)) if isinstance(note, Formerly)]
        is_old = any(type(value) is type(one) and value == one for one in old)
        if warn and is_old:
            warn_of_old(f'{kind.__name__}.{name}={shown(value)} is now written "auto"', stacklevel=4)
        current[name] = "auto" if is_old else _as_choice(hints.get(name), _as_tuple(hints.get(name), value))
    return current


def _as_choice(kind: Any, value: Any) -> Any:
    """Return the choice that a further spelling or another form stands for; any other value as it is."""
    members = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else ()
    notes = [note for one in (kind, *members) for note in _annotations(one)]
    for note in notes:
        value = note.function(value) if isinstance(note, Converted) else value
    pairs = [pair for note in notes if isinstance(note, AlsoSpelled) for pair in note.pairs]
    return next((choice for spelling, choice in pairs if value == spelling), value)


def _as_tuple(kind: Any, value: Any) -> Any:
    """Return a list as the tuple that a field takes; any other value as it is."""
    return tuple(value) if kind is not None and isinstance(value, list) and fits(kind, tuple(value)) else value


def _without_filled_in(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out current values that `dataclasses.replace` gives beside an old name that the caller gave.

    It gives the caller's keywords first, then all other fields in their order. A call with both names looks the same
    only where it gives every field, the new name in its place behind the old one.
    """
    names = list(values)
    kept = dict(values)
    for old, new in new_names(kind).items():
        first = names[: names.index(new)] if new in names else []
        if old in first and names[len(first) :] == [name for name in _fields_by_name(kind) if name not in first]:
            del kept[new]
    return kept


def warn_of_old(text: str, stacklevel: int) -> None:
    """Give a DeprecationWarning of an old name or spelling; the caller of this function is level 2."""
    warnings.warn(f"{text}; the next version refuses it.", DeprecationWarning, stacklevel=stacklevel)


def given_twice(old: str, new: str) -> str:
    """Return the sentence for an option that is given by its old and by its new name."""
    return f"{old} is the old name of {new}, and both are given. Leave {old} out."


def fits(kind: Any, value: Any) -> bool:
    """Return True where a value has a type, is one of its choices and keeps its bounds."""
    origin = get_origin(kind)
    arguments = get_args(kind)
    if origin is Annotated:
        bounds = [note for note in kind.__metadata__ if isinstance(note, Bound)]
        return fits(arguments[0], value) and (not _is_number(value) or all(b.keeps(value, b.limit) for b in bounds))
    if origin is Literal:
        # By type too: 1, 1.0 and True are equal in Python.
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if origin in (Union, types.UnionType):
        return any(fits(member, value) for member in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and _fit_each(arguments, value)
    if origin is type:
        return isinstance(value, type)
    if origin is dict:
        key, item = arguments
        return isinstance(value, dict) and all(fits(key, k) and fits(item, v) for k, v in value.items())
    # An integer is a number too; NaN and infinity are no setting of anything.
    if kind is float:
        return _is_number(value) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def describe(kind: Any) -> str:
    """Return the words for the values that a field takes, such as 'an integer (at least 1) or "auto"'."""
    return joined_by_or(_alternatives(kind))


def _alternatives(kind: Any) -> list[str]:
    origin = get_origin(kind)
    arguments = get_args(kind)
    if origin is Annotated:
        held = [describe(note.into) for note in kind.__metadata__ if isinstance(note, Converted)]
        if held:
            return [words for words in _alternatives(arguments[0]) if words not in held]
        bounds = [f"{note.words} {note.limit:g}" for note in kind.__metadata__ if isinstance(note, Bound)]
        return [f"{describe(arguments[0])} ({' and '.join(bounds)})"] if bounds else _alternatives(arguments[0])
    if origin is Literal:
        return [shown(choice) for choice in arguments]
    if origin in (Union, types.UnionType):
        return [words for member in arguments for words in _alternatives(member)]
    if origin is tuple and arguments[-1] is Ellipsis:
        return [f"a tuple, each value {describe(arguments[0])}"]
    if origin is tuple:
        return [f"a tuple of {len(arguments)} values, each {joined_by_or(dict.fromkeys(map(describe, arguments)))}"]
    if origin is dict:
        return [f"a dict of {describe(arguments[0])} to {describe(arguments[1])}"]
    if origin is type:
        return [f"a class like {arguments[0].__name__}"]
    words = {bool: ["True", "False"], int: ["an integer"], float: ["a finite number"], str: ["a text (str)"]}
    return words.get(kind) or ["None" if kind is types.NoneType else f"{kind.__name__}(...)"]


def _hint_for(kind: Any, value: Any, field: dataclasses.Field[Any]) -> str:
    """Return the nearest right value, or else the default, as a sentence with a space before it."""
    near = meant(kind, value)
    if near is not None:
        return f" Did you mean {shown(near)}?"
    usual = field.default
    return "" if usual in (dataclasses.MISSING, "", (), None) else f" Its default is {shown(usual)}."


def meant(kind: Any, value: Any) -> Any:
    """Return the right value that is nearest to a wrong value, or None."""
    if fits(kind, value):
        return value
    origin = get_origin(kind)
    arguments = get_args(kind)
    if origin is Annotated:
        near = meant(arguments[0], value)
        bounds = [note for note in kind.__metadata__ if isinstance(note, Bound) and note.inclusive]
        broken = [b.limit for b in bounds if _is_number(near) and not b.keeps(near, b.limit)]
        near = type(near)(broken[0]) if broken else near
        return near if fits(kind, near) else None
    if origin is Literal:
        return nearest(value, arguments)
    if origin in (Union, types.UnionType):
        return next((near for member in arguments if (near := meant(member, value)) is not None), None)
    if origin is tuple:
        several = tuple(value) if isinstance(value, list | tuple) else (value,)
        kinds = arguments[:1] * len(several) if arguments[-1] is Ellipsis else arguments
        near = tuple(meant(each, one) for each, one in zip(kinds, several, strict=False))
        return near if fits(kind, near) else None
    if kind is bool:
        return {"on": True, "off": False}.get(nearest(value, ("on", "off")))
    return _as_number(kind, value) if kind in (int, float) else None


def _as_number(kind: type[int] | type[float], value: Any) -> int | float | None:
    """Return the number of a kind that a text or another number stands for; None where there is none."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return (kind(number) if math.isfinite(number) else None) if not isinstance(value, bool) else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _fit_each(kinds: tuple[Any, ...], values: tuple[Any, ...]) -> bool:
    if kinds[-1] is Ellipsis:
        return all(fits(kinds[0], value) for value in values)
    return len(kinds) == len(values) and all(map(fits, kinds, values))


def _unnamed_mistakes(kind: type, positional: tuple[Any, ...]) -> list[str]:
    names = ", ".join(list(_fields_by_name(kind))[: len(positional)])
    return [f"{kind.__name__} takes every option by its name, and {len(positional)} came without. It has {names}, ..."]


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _annotations(kind: Any) -> tuple[Any, ...]:
    return kind.__metadata__ if get_origin(kind) is Annotated else ()


@cache
def _fields_by_name(kind: Any) -> dict[str, dataclasses.Field[Any]]:
    return {field.name: field for field in dataclasses.fields(kind) if field.init}


@cache
def _type_hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


@cache
def new_names(kind: type) -> Mapping[str, str]:
    """Return the new name of each renamed field of an option class, by its old name."""
    notes = [(name, note) for name, hint in _type_hints(kind).items() for note in _annotations(hint)]
    return {note.name: name for name, note in notes if isinstance(note, RenamedFrom)}
