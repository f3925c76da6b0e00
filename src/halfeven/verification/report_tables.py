"""The tables of a report: a summary for people, and the whole of it.

`Report` prints itself with these functions, so this file cannot import its class.
"""

import math
import textwrap
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from halfeven.tables import WIDTH, as_text, counted, percent, table
from halfeven.verification.speed import SLOWER_FILE

OVERFLOW = 'this processor has no VNNI, so sums of 8-bit products overflow; with scheme="w7a8" layers do not overflow'

SUMMARY_LINES = 25
"""Largest number of lines of a summary; findings come on top of them."""

NAME_WIDTH = 44
"""Columns of the names of figures; longer names go on in the next line."""

REST = "print(report.table())"
"""The call that shows the rows that a summary leaves out; the command line names a file in its place."""

Row = tuple[str, str]


def summary(report: Any) -> RenderableType:
    """Return a summary: lists are cut so that all but findings has at most `SUMMARY_LINES` lines."""
    # From the longest lists on: the first summary that is short enough is printed.
    for most in (6, 4, 3, 2, 1):
        found = _report_rows(report, most)
        if len(as_text(found).splitlines()) <= SUMMARY_LINES:
            break
    return Group(found, *_finding_texts(report))


def whole_table(report: Any) -> RenderableType:
    """Return all figures, and the parity of each tensor."""
    parts: list[RenderableType] = [_report_rows(report, 10**9)]
    if report.tensors:
        parities = table("activation", "integers#", "differ#", "alone#", "by LSB#", "from float sim.#")
        for tensor in report.tensors:
            parities.add_row(*_parity_row(tensor))
        parts += [Text(), parities]
    return Group(*parts, *_finding_texts(report))


def _parity_row(tensor: Any) -> Sequence[str]:
    counts = (tensor.count, tensor.different, tensor.different_alone, tensor.largest, tensor.different_float)
    return tensor.name, *(str(count) for count in counts)


def _finding_texts(report: Any) -> list[RenderableType]:
    whole = report.latency_ratio_default > SLOWER_FILE
    slower = "SLOWER THAN FLOAT:" if whole else "LAYERS SLOWER THAN FLOAT:"
    titled = ((slower, report.slower), ("FOUND:", report.findings))
    found: list[RenderableType] = []
    for title, sentences in titled:
        if sentences:
            found += [Text(title, "bold red"), *(Padding(Text(sentence), (0, 0, 0, 2)) for sentence in sentences)]
    return found


def _report_rows(report: Any, most: int) -> RenderableType:
    rows = [
        *(_integer_rows(report, most) if report.tensors else []),
        *_float32_rows(report),
        ("largest difference of the output", difference(report.output_difference)),
        *(_output_rows(report, most) if len(report.outputs) > 1 else []),
        *_default_rows(report),
        ("integer weights equal", "yes" if report.weights_match else "NO"),
        *_executed_rows(report, most),
        ("same top-1 as the exact simulation", compared(report.top1_agreement)),
        ("same top-1 as the float simulation", compared(report.float_simulation_top1_agreement)),
        *((f"top-1 {name}", f"{value:.2f} %") for name, value in report.accuracy.items()),
        *(("  note", note) for note in report.notes),
        *_file_rows(report),
        *_latency_rows(report, most),
    ]
    found = table("", "")
    found.show_header = False
    # Names keep their line: what gives way is the text of a kernel. rich cuts what two columns have beyond the width.
    names, values = found.columns
    names.max_width = NAME_WIDTH
    names.min_width = min(NAME_WIDTH, max(len(name) for name, _ in rows) + 2)
    values.max_width = WIDTH - names.min_width - 2
    for name, value in rows:
        found.add_row(_in_lines(f"  {name}"), value)
    where = f" in {report.runtime}, {report.samples} samples"
    room = WIDTH - len(where)
    # The end of a long path is kept, since it names the file.
    path = report.path if len(report.path) <= room else f"…{report.path[1 - room :]}"
    return Group(Text(path + where, "bold"), found)


def _in_lines(name: str) -> str:
    """Return a name in lines of at most `NAME_WIDTH`, the further ones indented below it."""
    indent = " " * (len(name) - len(name.lstrip()) + 2)
    return "\n".join(textwrap.wrap(name, NAME_WIDTH, subsequent_indent=indent, break_on_hyphens=False))


def _integer_rows(report: Any, most: int) -> list[Row]:
    return [
        ("integers equal to the exact simulation", compared(report.integer_match)),
        ("  each layer alone", compared(report.alone_match)),
        ("  of the last feature map", compared(report.last_integer_match)),
        ("  largest difference", f"{report.max_lsb_difference} LSB"),
        ("  first difference", report.first_difference or "none"),
        *([("  likely reason", OVERFLOW)] if report.overflows else []),
        *_first_rows([("  not compared, merged by the converter", name) for name in report.unseen], most),
        ("integers equal to the float simulation", compared(report.float_simulation_match)),
    ]


def _float32_rows(report: Any) -> list[Row]:
    """Return the rows of the session in float32, where the file leaves the precision of floats to the runtime."""
    session = report.float32_session
    if session is None:
        return []
    return [
        ("with float operators in float32", ""),
        ("  integers equal to the exact simulation", compared(session.integer_match)),
        ("  each layer alone", compared(session.alone_match)),
        ("  largest difference of the output", difference(session.output_difference)),
    ]


def _output_rows(report: Any, most: int) -> list[Row]:
    rows = [
        (f"  {output.name}", f"{difference(output.difference)}, {compared(output.equal)} equal")
        for output in report.outputs
    ]
    return _first_rows(rows, most)


def _default_rows(report: Any) -> list[Row]:
    default = report.default_session
    if default is None:
        return []
    lacking = [("  due to the lack of", setting) for setting in default.settings] if default.difference else []
    return [("difference of the default session", difference(default.difference)), *lacking]


def _executed_rows(report: Any, most: int) -> list[Row]:
    in_float = _first_rows([("  in float", name) for name in report.float_layers], most)
    if not report.tensors:
        readers = f"{report.weight_layers} of {report.quantizable_layers}, in floating point"
        return [("layers that read integer weights", readers), *in_float]
    shares = list(report.float_macs.items())
    shown = shares if len(shares) <= most else shares[: most - 1]
    if rest := shares[len(shown) :]:
        shown = [*shown, (f"{len(rest)} {'others' if shown else 'together'}", sum(share for _, share in rest))]
    return [
        ("layers executed in integers", f"{report.integer_layers} of {report.quantizable_layers}"),
        ("  share of multiply-accumulates", percent(report.integer_macs, 2)),
        *((f"  in float, {name}", percent(share, 2)) for name, share in shown),
        *in_float,
        *([("  likely reason", report.float_reason)] if report.float_reason else []),
    ]


def _file_rows(report: Any) -> list[Row]:
    size = [("file size", f"{report.file_bytes / 1e6:.2f} MB")] if report.file_bytes else []
    own = report.float_precision == "runtime"
    precision = [("precision of float operators", "the runtime's choice")] if own else []
    return size + precision + _setting_rows(report.settings)


def _setting_rows(settings: Sequence[str]) -> list[Row]:
    """Return a single setting as a row, and several as a row each: their names are long."""
    if len(settings) < 2:
        return [("settings of the session", setting) for setting in settings]
    halves = (setting.partition("=") for setting in settings)
    return [("settings of the session", ""), *((f"  {name}", value) for name, _, value in halves)]


def _latency_rows(report: Any, most: int) -> list[Row]:
    if not report.latency_ms:
        return []
    threads = f", {counted(report.threads, 'thread')}" if report.threads else ""
    return [
        *(
            (f"latency {name}, batch {report.latency_batch}{threads}", f"{v:.2f} ms")
            for name, v in report.latency_ms.items()
        ),
        ("latency deployed / float", f"{report.latency_ratio:.2f}{_default_precision(report)}"),
        *_first_rows([("  slowest kernel", kernel) for kernel in report.slowest_kernels], most),
    ]


def _default_precision(report: Any) -> str:
    """Return the ratio to the float file in the runtime's default precision, as a part of a row."""
    return f" (default type {report.latency_ratio_default:.2f})"


def _first_rows(rows: list[Row], most: int) -> list[Row]:
    """Return the first rows, and a row that says how many more there are."""
    if len(rows) <= most:
        return rows
    if most == 1:
        name, value = rows[0]
        return [(name, f"{value}; {len(rows) - 1} more: {REST}")]
    return [*rows[: most - 1], (f"  and {len(rows) - most + 1} more", REST)]


def difference(relative: float) -> str:
    """Return a relative difference as text."""
    return f"{relative:.1e} of the largest" if relative else "none"


def compared(share: float) -> str:
    """Return a share as a percentage; "none compared" where there is none."""
    return percent(share, 4) if math.isfinite(share) else "none compared"
