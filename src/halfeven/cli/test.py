"""`halfeven test`: the accuracy of a checkpoint, in float, simulated and deployed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfeven.checkpoint import read_facts
from halfeven.cli.arguments import CheckpointArguments
from halfeven.cli.deliver import given_target, target_of
from halfeven.cli.float_model import float_model_of
from halfeven.cli.results import print_accuracies, write_json
from halfeven.cli.run import open_run
from halfeven.errors import ConfigError
from halfeven.pipelines import load
from halfeven.runtimes.export import export
from halfeven.runtimes.runtime import load_deployed
from halfeven.tasks.task import Metrics, read_metrics
from halfeven.temporary import temporary_folder


@dataclass(frozen=True, kw_only=True)
class TestArguments(CheckpointArguments):
    """Show the accuracy of the float, the simulated and the deployed model of a checkpoint in one table."""

    json: str = ""
    """File to write the same figures to as JSON, with the keys float, simulated and deployed; "" for none."""
    deployed: str = ""
    """Deployed file to test, such as model.xml or model.onnx; "" to export the checkpoint for the test."""


def run_test(arguments: TestArguments) -> None:
    """Measure the three models on the validation data, and print the table."""
    facts = read_facts(arguments.checkpoint)
    if arguments.deployed and not Path(arguments.deployed).is_file():
        raise ConfigError(
            f"There is no deployed file {arguments.deployed} to test. Give the file that `halfeven export` wrote, or "
            "leave --deployed out: the checkpoint is then exported for the test."
        )
    context = open_run(arguments.experiment, arguments.checkpoint.parent)
    model, has_weights = float_model_of(arguments.experiment, arguments.checkpoint)
    qmodel = load(arguments.checkpoint, model, context.datasets.example())
    rows: dict[str, Metrics] = {}
    if has_weights:
        rows["float"] = context.accuracy(model)
    elif recorded := _recorded_metrics(facts):
        rows["float"] = recorded
        context.log("The float weights are not at hand; their accuracy is the one recorded in the checkpoint.")
    else:
        context.log("The float weights are not at hand, so the table lacks the float model.")
    rows["simulated"] = context.accuracy(qmodel)
    target = target_of(context, qmodel)
    with temporary_folder() as temporary:
        path = Path(arguments.deployed or temporary / f"model{arguments.experiment.endings(target)[0]}")
        if not arguments.deployed:
            precision = context.experiment.export.float_precision
            export(qmodel.cpu().eval(), path, target, float_precision=precision)
        rows["deployed"] = context.accuracy(load_deployed(path, given_target(context), qmodel.cpu().eval()), "cpu")
    if context.accelerator.is_main_process:
        deployed = arguments.deployed or "exported for this test"
        print_accuracies(context, rows, {"simulated": arguments.checkpoint, "deployed": deployed})
        if arguments.json:
            write_json(Path(arguments.json), rows)


def _recorded_metrics(facts: dict[str, Any]) -> Metrics:
    """Return the float model's metrics in the facts of a checkpoint; {} where a run has recorded none.

    With `halfeven.save`, anything may stand under the name.
    """
    found = facts.get("extra", {}).get("float")
    numbers = isinstance(found, dict) and all(isinstance(value, int | float | None) for value in found.values())
    return read_metrics(found) if numbers else {}
