"""`halfeven verify`: a deployed file that exists, compared with its checkpoint in the runtime."""

import math
from dataclasses import dataclass
from pathlib import Path

from halfeven.checkpoint import read_facts
from halfeven.cli.arguments import CheckpointArguments, DeployedFileArgument
from halfeven.cli.deliver import verify_file
from halfeven.cli.float_model import network_of
from halfeven.cli.results import write_json
from halfeven.cli.run import open_run
from halfeven.errors import ConfigError
from halfeven.nearest import did_you_mean_path
from halfeven.options import Auto
from halfeven.pipelines import load
from halfeven.placement.insertion import plan_of
from halfeven.reporting.page import charting_library
from halfeven.reporting.verification_page import save_verification
from halfeven.tables import percent
from halfeven.verification.findings import OVERFLOWS
from halfeven.verification.report import Report

EXACT_MATCH = 0.9999
"""Smallest share of equal integers, each layer alone, unless the user gives another."""

FLOAT16_MATCH = 0.99
"""The same for a file with float16, which no simulation computes to the last bit."""


@dataclass(frozen=True, kw_only=True)
class VerifyArguments(CheckpointArguments):
    """Run a deployed file in its runtime and compare its integers with the checkpoint's. Exits with code 0 where the
    file is verified, with 1 where it is not and the last lines say why, and with 2 where it cannot be compared."""

    file: DeployedFileArgument
    """Deployed file, such as model.xml or model.onnx."""
    json: str = ""
    """File to write the report to as JSON, with the keys verified and problems; "" for none."""
    report: str = ""
    """File to write the report to as a page with charts (.html); "" for none."""
    min_match: float | Auto = "auto"
    """Smallest share of integers, from 0 to 1, that must equal the exact simulation, each layer alone; "auto": 0.9999,
    or 0.99 for a file with float16."""
    allow_float: bool = False
    """Verify the file although layers with quantized weights ran in float."""


def run_verify(arguments: VerifyArguments) -> int:
    """Verify the file, print the report, and return the exit code."""
    checkpoint = arguments.checkpoint
    if arguments.file.suffix == ".safetensors" != checkpoint.suffix:
        raise ConfigError(
            f"{arguments.file} is a checkpoint and stands where the deployed file belongs, so nothing can be compared. "
            f"Write `halfeven verify {arguments.config} {arguments.file} {checkpoint}`."
        )
    read_facts(checkpoint)  # wrong paths show before the data is read
    if not arguments.file.is_file():
        raise ConfigError(
            f"There is no file {arguments.file}, so nothing can be verified.{did_you_mean_path(arguments.file)} Give "
            "the file that `halfeven export` wrote."
        )
    if arguments.min_match != "auto" and not 0 <= arguments.min_match <= 1:
        raise ConfigError(
            f"--min-match {arguments.min_match} is not between 0 and 1, so no file could be judged by it. "
            "Give a number from 0 to 1."
        )
    if arguments.report:
        charting_library()  # a missing package shows before the work
    context = open_run(arguments.experiment, checkpoint.parent)
    qmodel = load(checkpoint, network_of(arguments.experiment), context.datasets.example())
    report = verify_file(context, qmodel, arguments.file, arguments.json or "--json FILE")
    problems = problems_of(report, arguments.min_match, allow_float=arguments.allow_float)
    context.log("\n".join(["NOT verified:", *(f"  {problem}" for problem in problems)]) if problems else "Verified.")
    if arguments.report and context.accelerator.is_main_process:
        page = save_verification(report, arguments.report, plan=plan_of(qmodel))
        context.log(f"Report with charts, to open in a browser: {page}")
    if arguments.json and context.accelerator.is_main_process:
        write_json(Path(arguments.json), {"verified": not problems, "problems": problems, **report.to_dict()})
    return 1 if problems else 0


def problems_of(report: Report, min_match: float | Auto, *, allow_float: bool) -> list[str]:
    """List the reasons why a file is not verified; none where it is.

    Args:
        report: of the file.
        min_match: smallest share of equal integers, each layer alone; not compared where no activation is quantized.
            "auto": `EXACT_MATCH`, or `FLOAT16_MATCH` for a file with float16.
        allow_float: accept layers with quantized weights that ran in float.
    """
    if not report.weights_match:
        # All other differences follow from this one.
        return [
            "The integer weights in the file are not the checkpoint's: it was written from another checkpoint, or with "
            "other bits. Export the checkpoint again."
        ]
    problems = []
    # A file that leaves the precision of floats to the runtime is judged by its integers in float32.
    compared = report.float32_session or report
    least = _least_match(report) if min_match == "auto" else min_match
    if compared.alone_match < least:
        problems.append(
            f"{percent(compared.alone_match, 4)} of the integers equal the exact simulation, each layer alone; "
            f"at least {percent(least, 4)} are required. The first that differs is in {compared.first_difference}."
            + (f" {OVERFLOWS}" if report.overflows and not report.findings else "")
        )
    if report.float_layers and not allow_float:
        weights_alone = math.isnan(report.alone_match)  # then all layers compute in float
        ran = "with quantized weights read them as floats" if weights_alone else "with quantized weights ran in float"
        problems.append(
            f"{len(report.float_layers)} of {report.quantizable_layers} layers {ran}: "
            f"{', '.join(report.float_layers)}. {_reason_sentence(report)}--allow-float accepts that."
        )
    return problems + report.findings


def _reason_sentence(report: Report) -> str:
    return f"The likely reason: {report.float_reason}. " if report.float_reason else ""


def _least_match(report: Report) -> float:
    # Where float32 is not in the file, nothing was proved in it.
    half = report.float_precision == "runtime" and report.float32_session is None
    return FLOAT16_MATCH if half else EXACT_MATCH
