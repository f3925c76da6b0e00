"""Print tables as text of a fixed width, in a terminal's colours, or as HTML in a notebook."""

import io
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

WIDTH = 80
"""Columns of a printed text: the narrowest usual terminal."""

WIDE = 120
"""Columns of a long table in a notebook, which scrolls."""

HTML = '<pre style="white-space:pre;overflow-x:auto;line-height:normal">{code}</pre>'


def table(*columns: str) -> Table:
    """Return an empty table without lines. A column whose name ends with "#" holds numbers, aligned to the right."""
    found = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        name = column.removesuffix("#")
        found.add_column(name, justify="right" if name != column else "left", overflow="fold")
    return found


def as_text(content: RenderableType, width: int = WIDTH) -> str:
    """Return the printed text, without colours and spaces at the ends of lines."""
    console = _silent_console(width, color_system=None)
    with console.capture() as capture:
        console.print(content)
    return "\n".join(line.rstrip() for line in capture.get().rstrip().split("\n"))


def as_html(content: RenderableType, width: int = WIDTH) -> str:
    """Return the printed text as HTML, for a notebook."""
    console = _silent_console(width, record=True)
    console.print(content)
    return console.export_html(inline_styles=True, code_format=HTML)


def _silent_console(width: int, **options: Any) -> Console:
    """Return a console without output. By default rich prints into a notebook too, whatever file it was given."""
    return Console(
        width=width, file=io.StringIO(), force_jupyter=False, markup=False, emoji=False, highlight=False, **options
    )


def text_as_html(text: str) -> str:
    """Return a printed text as HTML, for a notebook."""
    return as_html(Text(text), max(map(len, text.splitlines()), default=1))


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural where it is not one."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def percent(share: float, digits: int) -> str:
    """Return a share as a percentage, which is rounded down near the whole: 100 stands for all of it."""
    rounded = f"{100 * share:.{digits}f}"
    short_of_all = share < 1 and float(rounded) >= 100
    return f"{100 - 10.0**-digits:.{digits}f} %" if short_of_all else f"{rounded} %"


class Shown:
    """A table to print: as text of `WIDTH` columns, on a rich console, or in a notebook."""

    def __init__(self, content: RenderableType) -> None:
        self.content = content

    def __str__(self) -> str:
        return as_text(self.content)

    def __rich__(self) -> RenderableType:
        return self.content

    def _repr_html_(self) -> str:
        return as_html(self.content, WIDE)
