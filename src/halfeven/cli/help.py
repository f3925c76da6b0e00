"""Print the help of a command: its own arguments, the options that matter first, then all others by their part."""

import ast
import dataclasses
import inspect
import itertools
import shutil
import textwrap
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from halfeven.cli.values import is_nested_dict, is_sequence_of_options

MAX_LINE_WIDTH = 100
"""Columns beyond which lines are hard to read."""
MEANING_COLUMN = 34
"""Column at which descriptions begin; a longer option has a line of its own."""
LONGEST_FORM = 30
"""Characters of choices that stand behind an option; longer ones are told with its meaning."""

POSITIONALS = {"config": "CONFIG", "checkpoint": "CKPT", "file": "FILE", "folder": "FOLDER"}
"""Arguments without dashes, in the order in which they are given."""

MODEL_AND_DATA = (
    *("model.source", "model.name", "model.weights", "model.num_classes"),
    *("data.source", "data.root", "data.calibration_samples", "task.kind"),
)
QUANTIZATION = ("quantization.target", "quantization.scheme", "quantization.per_channel", "quantization.batchnorm")
FILES = ("export.target", "export.formats", "export.verify_samples", "export.timed")

FIRST_OPTIONS = {
    "train": (
        *MODEL_AND_DATA,
        *(*QUANTIZATION, "quantization.ranges", "pretraining.epochs"),
        *("training.epochs", "training.batch_size", "training.optimizer", "training.learning_rate"),
        *("device.kind", "seed"),
    ),
    "ptq": (
        *MODEL_AND_DATA,
        *(*QUANTIZATION, "pretraining.epochs"),
        *("ptq.equalize", "ptq.smooth", "ptq.reconstruct", "ptq.correct_biases"),
        *("export.formats", "device.kind", "seed"),
    ),
    "search": (
        *MODEL_AND_DATA,
        *QUANTIZATION,
        *("search.max_drop", "search.latency", "search.bits", "search.tensors", "search.cost"),
        *("export.formats", "device.kind", "seed"),
    ),
    "test": ("model.weights", "data.root", "data.workers", "data.evaluation_batch_size", "export.target"),
    "export": ("model.weights", "data.root", *FILES),
    "verify": ("model.weights", "data.root", "export.target", "export.verify_samples", "export.timed"),
    "diagnose": ("model.weights", "data.root", "data.calibration_samples", "data.workers", *QUANTIZATION),
}
"""The options that matter first, by command."""


@dataclass(frozen=True)
class Option:
    """An option as the help shows it."""

    name: str
    """The field, "training.epochs" for example."""
    form: str
    """The option with the form of its value, "--training.epochs INT" for example."""
    meaning: str


def help_text(command: str, arguments: Any, *, from_config: bool) -> str:
    """Return the help of a command.

    Args:
        command: its name.
        arguments: an object of its class of arguments, whose values are shown.
        from_config: the values are those of a config, rather than the defaults.
    """
    fields = vars(arguments)
    lines = [f"usage: halfeven {' '.join((command, *_positionals(type(arguments))))} [OPTIONS]", ""]
    lines += _wrapped_lines(_first_paragraph(type(arguments)))
    lines += ["", *_option_lines(_command_arguments(arguments))]
    if (experiment := fields.get("experiment")) is None:
        return "\n".join(lines)
    parts = _options_by_part("", experiment, _first_paragraph(type(experiment)))
    options = {option.name: option for group in parts.values() for option in group}
    # Taken out, so that they are not listed once more with their part.
    first = [options.pop(name) for name in FIRST_OPTIONS[command]]
    values = "the config's values" if from_config else "the defaults"
    lines += ["", *_wrapped_lines(f"The options that matter first (in brackets: {values}):"), *_option_lines(first)]
    for title, group in parts.items():
        if rest := [option for option in group if option.name in options]:
            lines += ["", *_wrapped_lines(title), *_option_lines(rest)]
    return "\n".join(lines)


def option_names(command: str, arguments: Any) -> list[str]:
    """Return the options that a command reads, with dashes, in the order in which its help lists them.

    Args:
        command: its name.
        arguments: an object of its class of arguments.
    """
    names = [option.name for option in _command_arguments(arguments) if option.name not in POSITIONALS]
    if (experiment := vars(arguments).get("experiment")) is not None:
        parts = _options_by_part("", experiment, "")
        rest = (option.name for group in parts.values() for option in group)
        names = [*names, *dict.fromkeys((*FIRST_OPTIONS[command], *rest))]
    return [_option_name(name) for name in names]


def _positionals(kind: Any) -> Iterator[str]:
    """List the arguments without dashes as the usage shows them: in brackets where they may be left out."""
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    for name, label in POSITIONALS.items():
        if name in defaults:
            yield label if defaults[name] is dataclasses.MISSING else f"[{label}]"


def _command_arguments(arguments: Any) -> Iterator[Option]:
    """List the arguments of a command itself: those without dashes, then its switches and values."""
    kind: Any = type(arguments)
    hints = get_type_hints(kind)
    meanings = _field_meanings(kind)
    names = [field.name for field in dataclasses.fields(kind) if field.name != "experiment"]
    for name in sorted(names, key=lambda name: name not in POSITIONALS):
        switch = hints[name] is bool
        form = POSITIONALS.get(name) or _option_name(name) + ("" if switch else f" {_metavar(hints[name])}")
        value = "" if name in POSITIONALS or switch else f" [{_as_typed(getattr(arguments, name))}]"
        yield Option(name, form, meanings[name] + value)
    yield Option("help", "-h, --help", "Show this help.")


def _options_by_part(prefix: str, options: Any, meaning: str) -> dict[str, list[Option]]:
    """Return the options of an option class, and of the option classes in it, by the title of their part."""
    kind: Any = type(options)
    hints = get_type_hints(kind, include_extras=True)
    meanings = _field_meanings(kind)
    own: list[Option] = []
    parts = {f"{prefix or 'experiment'}: {meaning}": own}
    for field in dataclasses.fields(kind):
        name = f"{prefix}.{field.name}".lstrip(".")
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            parts |= _options_by_part(name, value, meanings[field.name])
        elif not is_sequence_of_options(hints[field.name]) and not is_nested_dict(hints[field.name]):
            own.append(_make_option(name, hints[field.name], meanings[field.name], value))
    return parts


def _make_option(name: str, kind: Any, meaning: str, value: Any) -> Option:
    """Return an option with its choices behind its name, or, where they are many, before its meaning."""
    form = _metavar(kind)
    if len(form) > LONGEST_FORM:
        meaning = f"One of {', '.join(form.strip('{}').split(','))}. {meaning}"
        form = "CHOICE"
    return Option(name, f"{_option_name(name)} {form}", f"{meaning} [{_as_typed(value)}]")


def _metavar(kind: Any) -> str:
    """Return the form of a value: INT, {a,b}, STR ... for example."""
    origin = get_origin(kind)
    arguments = get_args(kind)
    if origin is Annotated:
        return _metavar(arguments[0])
    if origin is Literal:
        return f"{{{','.join(map(str, arguments))}}}"
    if origin in (Union, types.UnionType):
        return _metavar_of_union([_metavar(one) for one in arguments])
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"{_metavar(arguments[0])} ..."
    if origin is tuple:
        return " ".join(map(_metavar, arguments))
    if origin is dict:
        return "NAME VALUE ..."
    if kind is types.NoneType:
        return "None"
    return "{True,False}" if kind is bool else str(kind.__name__).upper()


def _metavar_of_union(forms: list[str]) -> str:
    """Return the joint form of a value with several forms, its choices in one set: INT|{auto} or {a,b,auto}."""
    choices = [form[1:-1] for form in forms if form.startswith("{") and form.endswith("}")]
    others = [form for form in forms if form[1:-1] not in choices]
    return "|".join([*others, *([f"{{{','.join(choices)}}}"] if choices else [])])


def _as_typed(value: Any) -> str:
    """Return a value as it is written on the command line."""
    if isinstance(value, dict):
        value = [word for pair in value.items() for word in pair]
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "none"
    return '""' if value == "" else str(value)


@cache
def _field_meanings(kind: Any) -> dict[str, str]:
    """Return the docstring below each field of a dataclass and of its base classes, in one line."""
    found: dict[str, str] = {}
    for base in [base for base in reversed(kind.__mro__) if dataclasses.is_dataclass(base)]:
        # A text below a field is no attribute of anything at run time, so it is read from the source.
        source: Any = ast.parse(textwrap.dedent(inspect.getsource(base)))  # type: ignore[arg-type]
        for field, text in itertools.pairwise(source.body[0].body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[ast.unparse(field.target)] = " ".join(ast.literal_eval(text.value).split())
    return found


def _first_paragraph(kind: type[Any]) -> str:
    return " ".join((inspect.getdoc(kind) or "").partition("\n\n")[0].split())


def _option_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def _option_lines(options: Iterable[Option]) -> Iterator[str]:
    """Return the lines of options, each with its form and its meaning beside it."""
    for option in options:
        form = f"  {option.form}"
        meaning = _wrapped_lines(option.meaning, indent=MEANING_COLUMN)
        if len(form) + 2 > MEANING_COLUMN:
            yield from (form, *meaning)
        else:
            yield form.ljust(MEANING_COLUMN) + meaning[0].lstrip()
            yield from meaning[1:]


def _wrapped_lines(text: str, indent: int = 0) -> list[str]:
    width = min(shutil.get_terminal_size().columns, MAX_LINE_WIDTH)
    margin = " " * indent
    return textwrap.wrap(
        text, width, initial_indent=margin, subsequent_indent=margin, break_long_words=False, break_on_hyphens=False
    )
