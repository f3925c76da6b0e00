"""`halfeven ptq`: post-training quantization, from the float model to verified files."""

import time
from dataclasses import dataclass
from typing import Any

from torch import nn

from halfeven.checkpoint import read_facts, save
from halfeven.cli.arguments import RunArguments
from halfeven.cli.deliver import deliver, write_plan
from halfeven.cli.quantization_run import claimed_run, open_quantization
from halfeven.cli.run import RunContext
from halfeven.cli.work_folder import BEST_FILE, PTQ_STATE, remove_state
from halfeven.pipelines import quantize_prepared
from halfeven.tasks.task import read_metrics


@dataclass(frozen=True, kw_only=True)
class PtqArguments(RunArguments):
    """Quantize a float model without training (PTQ), write its deployable files and verify them."""


def run_ptq(arguments: PtqArguments) -> None:
    """Quantize, export and verify, and print one table of accuracies."""
    run = open_quantization(arguments, "ptq")
    facts = _facts_of_finished_run(run.context, resume=run.resume)
    with claimed_run(run, quantizes=facts is None) as prepared:
        if prepared is not None:
            facts = _quantize_and_save(run.context, run.model, prepared)
        assert facts is not None
        remove_state(run.context.folder, PTQ_STATE)  # the checkpoint has it all now
        further = {"quantization_seconds": facts["quantization_seconds"]}
        deliver(run.context, run.model, facts["float"], further, json=arguments.json)


def _facts_of_finished_run(context: RunContext, *, resume: bool) -> dict[str, Any] | None:
    """Return the facts in the checkpoint of the run that is resumed; None if the run was not that far."""
    best = context.folder / BEST_FILE
    if not (resume and best.is_file()):
        return None
    found: dict[str, Any] = read_facts(best)["extra"]
    return found | {"float": read_metrics(found["float"])}


def _quantize_and_save(context: RunContext, model: nn.Module, prepared: nn.Module) -> dict[str, Any]:
    """Quantize and write the checkpoint. Returns the facts in it: the float accuracy, and the seconds it took."""
    start = time.perf_counter()
    qmodel = quantize_prepared(
        prepared.to(context.accelerator.device),
        list(context.loader(context.datasets.calibration)),
        context.experiment.ptq,
        log=context.log,
        resume_dir=context.folder / PTQ_STATE,
    )
    seconds = time.perf_counter() - start
    context.log(f"Quantized in {seconds:.0f} s.\n")
    write_plan(context, qmodel)
    facts = {"float": context.accuracy(model), "quantization_seconds": round(seconds, 3)}
    save(qmodel, context.folder / BEST_FILE, facts)
    return facts
