"""`halfeven search`: the cheapest plan within a budget, from the float model to verified files."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from halfeven.checkpoint import read_facts, save
from halfeven.cli.arguments import RunArguments
from halfeven.cli.deliver import deliver, write_plan
from halfeven.cli.quantization_run import claimed_run, open_quantization
from halfeven.cli.results import write_json
from halfeven.cli.run import RunContext
from halfeven.cli.train import train_and_deliver
from halfeven.cli.work_folder import BEST_FILE, SEARCH_RESULT_FILE, SEARCH_STATE, remove_state
from halfeven.errors import CheckpointError
from halfeven.evaluation import evaluating
from halfeven.graph.batches import run_on
from halfeven.mixed_precision.moves import usual_candidates
from halfeven.mixed_precision.search import check_search, search_prepared
from halfeven.pipelines import prepare
from halfeven.placement.options import Rule
from halfeven.tasks.task import read_metrics
from halfeven.training.sampling import seeded
from halfeven.training.state import STATE_FILE


@dataclass(frozen=True, kw_only=True)
class SearchArguments(RunArguments):
    """Search for the cheapest plan within a budget, export and verify it; train from the best plan if none keeps it."""

    no_train: bool = False
    """Stop where no plan keeps search.max_drop, instead of training (QAT) from the best plan."""


def run_search(arguments: SearchArguments) -> None:
    """Search, export and verify, and print one table of accuracies."""
    experiment = arguments.experiment
    check_search(experiment.search, experiment.quantization, None)
    run = open_quantization(arguments, "search")
    context, model = run.context, run.model
    training = run.resume and (context.folder / STATE_FILE).is_file()
    facts = _facts_of_finished_search(context) if run.resume else None
    with claimed_run(run, quantizes=facts is None) as prepared:
        if prepared is not None:
            facts = _search_and_save(context, model, prepared)
        assert facts is not None
        remove_state(context.folder, SEARCH_STATE)
        if not arguments.no_train and _loses_too_much(facts["search"], experiment.search.max_drop):
            _train_from_plan(context, model, facts["search"], resume=training, json_file=arguments.json)
        else:
            deliver(context, model, facts["float"], {"search": facts["search"]}, json=arguments.json)


def _loses_too_much(found: dict[str, Any], max_drop: float | None) -> bool:
    """Return True if the best plan misses the budget of the drop: training cannot mend the others."""
    return max_drop is not None and bool(found["drop"]["drop"] > max_drop)


def _facts_of_finished_search(context: RunContext) -> dict[str, Any] | None:
    """Return the facts of a search that is finished; None if the run was not that far.

    Raises:
        CheckpointError: the file of the result is damaged.
    """
    found = context.folder / SEARCH_RESULT_FILE
    best = context.folder / BEST_FILE
    if not (found.is_file() and best.is_file()):
        return None
    try:
        metrics = read_metrics(read_facts(best)["extra"]["float"])
        return {"float": metrics, "search": json.loads(found.read_text(encoding="utf-8"))}
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"{found} or {best} is damaged ({type(error).__name__}), so the run cannot go on from them. Give "
            "--overwrite to start anew."
        ) from error


def _search_and_save(context: RunContext, model: nn.Module, prepared: nn.Module) -> dict[str, Any]:
    """Search, and write the checkpoint. Returns the facts in it: the float accuracy, and the result."""
    experiment = context.experiment
    context.log(f"Plans are judged on the {context.selection}.")
    found = search_prepared(
        prepared.to(context.accelerator.device),
        model.to(context.accelerator.device),
        list(context.loader(context.datasets.calibration)),
        _selection_metric(context),
        experiment.ptq,
        experiment.search,
        candidates=usual_candidates(experiment.quantization),
        log=context.log,
        resume_dir=context.folder / SEARCH_STATE,
    )
    context.log(f"\n{found}\n")
    write_plan(context, found.qmodel)
    facts = {"float": context.accuracy(model), "search": {**found.to_dict(), "judged_on": context.selection}}
    save(found.qmodel, context.folder / BEST_FILE, facts)
    write_json(context.folder / SEARCH_RESULT_FILE, facts["search"])
    return facts


def _selection_metric(context: RunContext) -> Callable[[nn.Module], Any]:
    """Return the task's metric on the samples that choose: for classification a value for each sample, in percent."""
    if context.experiment.task.kind != "classification":
        return lambda model: context.selection_accuracy(model)[context.task.key]
    return lambda model: _right_answers(context, model)


def _right_answers(context: RunContext, model: nn.Module) -> Tensor:
    """Return 100 for each sample that a model classifies right, and 0 for the others."""
    device = context.accelerator.device
    model.to(device)
    found = []
    # Samples that only come augmented are augmented alike each time, or chance would choose.
    with torch.no_grad(), evaluating(model), seeded(context.experiment.seed):
        for inputs, targets in context.loader(context.datasets.selection):
            outputs = run_on(model, send_to_device(inputs, device))
            logits, labels = context.task.judged(outputs, targets.to(device))
            found.append(100.0 * (logits.argmax(1) == labels).double().cpu())
    return torch.cat(found)


def _train_from_plan(
    context: RunContext, model: nn.Module, found: dict[str, Any], *, resume: bool, json_file: str
) -> None:
    """Train from the best plan, with its rules, and deliver the result."""
    experiment = context.experiment
    rules = tuple(Rule(**rule) for rule in found["rules"])
    context.log("No plan keeps the budget after calibration alone; training from the best plan (QAT).\n")
    quantization = dataclasses.replace(experiment.quantization, rules=(*experiment.quantization.rules, *rules))
    context = dataclasses.replace(context, experiment=dataclasses.replace(experiment, quantization=quantization))
    prepared = None if resume else prepare(model, context.datasets.example(), quantization)
    # `resume=True`: the float model that the search has trained in this folder is not trained again.
    train_and_deliver(context, model, prepared, resume=True, facts={"search": found}, json_file=json_file)
