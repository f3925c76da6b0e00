"""Write the pages of verified files beside them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from halfeven.cli.run import RunContext
from halfeven.errors import ConfigError
from halfeven.mixed_precision.result_page import with_search
from halfeven.placement.insertion import plan_of
from halfeven.reporting.page import save_page
from halfeven.reporting.verification_page import verification_contents
from halfeven.tasks.task import Metrics
from halfeven.verification.circumstances import file_bytes
from halfeven.verification.report import Report


def write_pages(
    context: RunContext,
    qmodel: nn.Module,
    reports: Mapping[Path, Report],
    rows: Mapping[str, Metrics],
    files: Mapping[str, Path],
    search: Mapping[str, Any] | None = None,
) -> None:
    """Write report.html beside a verified file, or report.xml.html and report.onnx.html where there are both.

    Args:
        context: the run.
        qmodel: the quantized model.
        reports: of the files.
        rows: the metrics of each model; the first is shown.
        files: files whose sizes are shown, by name.
        search: the result of the search that chose the plan, as plain values.
    """
    if not context.accelerator.is_main_process:
        return
    accuracy = {name: next(iter(metrics.values())) for name, metrics in rows.items() if metrics}
    sizes = {name: file_bytes(path) for name, path in files.items() if path.is_file()}
    for path, report in reports.items():
        page = path.with_name("report.html" if len(reports) == 1 else f"report{path.suffix}.html")
        contents = verification_contents(report, plan=plan_of(qmodel), accuracy=accuracy, sizes=sizes)
        try:
            save_page(contents if search is None else with_search(contents, search), page)
        except ConfigError as error:  # the files are written and verified: a page more or less does not fail the run
            context.log(f"{page} was not written. {error}")
            return
        context.log(f"Report with charts, to open in a browser: {page}")
