"""Print tables as text of a fixed width, in a terminal's colours, or as HTML in a notebook."""

import io
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table

WIDTH = 80
"""Columns of a printed text: the narrowest usual terminal."""

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


class Shown:
    """A table to print: as text of `WIDTH` columns, on a rich console, or in a notebook."""

    def __init__(self, content: RenderableType) -> None:
        self.content = content

    def __str__(self) -> str:
        return as_text(self.content)

    def __rich__(self) -> RenderableType:
        return self.content

    def _repr_html_(self) -> str:
        return as_html(self.content)
