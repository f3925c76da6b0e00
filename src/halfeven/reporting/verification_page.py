"""The page of a verified file: accuracy, size, latency, integers tensor by tensor, and the plan."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from halfeven.placement.plan import Plan
from halfeven.reporting.page import PageContents, save_page
from halfeven.tables import percent
from halfeven.verification.findings import differs_from_exact
from halfeven.verification.report import Report


def save_verification(
    report: Report,
    path: str | Path,
    *,
    plan: Plan | None = None,
    accuracy: Mapping[str, float] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Path:
    """Write the report of `halfeven.verify` as one HTML page with charts, and return its path.

    Args:
        report: of a file.
        path: of the page.
        plan: the model's plan, from `halfeven.plan_of`; None: the page has none.
        accuracy: in percent, by model; None: the report's own.
        sizes: bytes by file.

    Raises:
        ConfigError: the package that draws the charts is not installed.
        StorageError: the page cannot be written.
    """
    return save_page(verification_contents(report, plan=plan, accuracy=accuracy, sizes=sizes), path)


def verification_contents(
    report: Report,
    *,
    plan: Plan | None = None,
    accuracy: Mapping[str, float] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> PageContents:
    """Return the contents of a report's page; the arguments are those of `save_verification`."""
    shown = dict(report.accuracy if accuracy is None else accuracy)
    return PageContents(
        title=f"{Path(report.path).name} in {report.runtime}",
        verdict=_verdict(report, shown),
        facts=_headline_figures(report),
        accuracy=shown,
        sizes={name: float(size) for name, size in (sizes or {}).items()},
        latency=report.latency_ms,
        layers=tuple(asdict(layer) for layer in report.layer_times),
        plan={} if plan is None else plan.to_dict(),
        tables=_report_tables(report),
        notes=(*report.findings, *report.notes),
    )


def _verdict(report: Report, accuracy: Mapping[str, float]) -> str:
    drop = ""
    if "float" in accuracy and len(accuracy) > 1:
        last = list(accuracy)[-1]
        change = accuracy[last] - accuracy["float"]
        if math.isfinite(change):
            drop = f"; accuracy {last} is {accuracy[last]:.2f} %, {change:+.2f} against float"
    if report.findings:
        exact = report.weights_match and report.alone_match == 1 and not any(map(differs_from_exact, report.outputs))
        which = "float simulation, and equals the exact one" if exact else "simulation"
        return f"The file differs from the {which}{drop}."
    ran = f"{report.integer_layers} of {report.quantizable_layers} layers run in integers"
    return f"The file computes what was simulated, and {ran}{drop}."


def _headline_figures(report: Report) -> dict[str, str]:
    in_float32 = " in float32" if report.float32_session else ""
    compared = report.float32_session or report
    found = {
        "samples": str(report.samples),
        f"integers equal{in_float32}, each layer alone": percent(compared.alone_match, 4),
        "work in integers": percent(report.integer_macs, 1),
        "same top-1 as the exact simulation": percent(report.top1_agreement, 2),
        "same top-1 as the float simulation": percent(report.float_simulation_top1_agreement, 2),
    }
    if report.latency_ms:
        found["latency deployed / float"] = f"{report.latency_ratio:.2f}"
    return {name: value for name, value in found.items() if "nan" not in value}


def _report_tables(report: Report) -> dict[str, tuple[tuple[str, ...], ...]]:
    found: dict[str, Any] = {}
    if report.tensors:
        rows = [
            (t.name, str(t.count), str(t.different), str(t.different_alone), str(t.different_float), str(t.largest))
            for t in report.tensors
        ]
        header = ("activation", "integers", "different", "each layer alone", "from the float simulation", "largest")
        found["Integers in the file"] = (header, *rows)
    if report.float_macs:
        shares = [(name, percent(share, 2)) for name, share in report.float_macs.items()]
        found["Work in float"] = (("layer or operator", "share"), *shares)
    return found
