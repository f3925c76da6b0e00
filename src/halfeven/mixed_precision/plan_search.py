"""Search a plan: measure the steps, walk, make the final model, and judge it."""

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from halfeven.diagnosis.sensitivity import Reference, reference_of
from halfeven.evaluation import Evaluate
from halfeven.graph.batches import Inputs
from halfeven.layerwise.outputs import first_samples
from halfeven.mixed_precision.cost import workload_of, works_of
from halfeven.mixed_precision.final_rules import final_rules
from halfeven.mixed_precision.judge import Judge, Judgement
from halfeven.mixed_precision.moves import moves_of
from halfeven.mixed_precision.options import SearchOptions
from halfeven.mixed_precision.result import SearchResult
from halfeven.mixed_precision.store import MeasurementStore
from halfeven.mixed_precision.units import units_of
from halfeven.mixed_precision.walk import NEGLIGIBLE_DIVERGENCE, SearchStep, Walk, walk
from halfeven.placement.insertion import plan_of
from halfeven.placement.options import Rule
from halfeven.quantization.own_class import plain_values
from halfeven.runtimes.export import export
from halfeven.runtimes.runtime import Runtime, runtime_named
from halfeven.verification.latency import latency
from halfeven.verification.layer_times import LayerTimes

Quantized = Callable[[tuple[Rule, ...], bool], nn.Module]
"""Returns the model quantized with further rules; with True by all steps that the user chose, else by ranges alone."""

FURTHER_TRIES = 3
"""Largest number of further plans that are made whole, where the first was slower than estimated or lost more."""


def search_plan(
    float_model: nn.Module,
    batches: Sequence[Any],
    evaluate: Evaluate | None,
    options: SearchOptions,
    candidates: Sequence[Rule],
    *,
    quantized: Quantized,
    log: Callable[[str], None],
    resume_dir: Path | None,
) -> SearchResult:
    """Return the cheapest plan that keeps the budgets, with its model.

    Args:
        float_model: the float model.
        batches: calibration batches; those behind the first `options.samples` samples judge the answers.
        evaluate: the metric; None: answers are compared.
        options: budgets and measures.
        candidates: what to try, from `usual_candidates` or the user.
        quantized: makes the quantized model of rules.
        log: called with each step.
        resume_dir: folder that keeps measurements.
    """
    # The start: the scheme with ranges alone, and the samples and the judge that all plans meet.
    qmodel = quantized((), False)
    runtime = runtime_named(plan_of(qmodel).options.target)
    ranking = first_samples(batches, options.samples)
    reference = reference_of(qmodel, ranking, samples=options.samples)
    # The samples that rank the steps flatter the plan that they choose, so others judge it.
    held_out = batches[len(ranking) :]
    judge = Judge(float_model, evaluate, _held_out_reference(qmodel, held_out, reference, options))
    # Timing writes and runs files, so it is done only where time is a budget or the price.
    timed = options.latency is not None or options.cost == "latency"
    first = reference.inputs[0]
    times = _time_layers(qmodel, runtime, first) if timed else None
    # The walk: all steps that there are, measured in the context of the present plan and taken one by one.
    moves = moves_of(qmodel, units_of(qmodel), candidates, batches, runtime.target)
    log(f"Searching {len(moves)} steps in {len(units_of(qmodel))} groups of tensors.")
    store = MeasurementStore(resume_dir, _identifying_facts(qmodel, candidates, options, reference))
    state = Walk(qmodel, moves, workload_of(qmodel), times, reference, judge, options, store, log)
    chosen = walk(state)
    # The end: the rules of the chosen plan make a model from scratch, which is judged and timed itself.
    finish = _Finish(state, runtime, quantized, first)
    result = finish.at(chosen)
    # The walk compared estimates: of the time, and of models without learned rounding. Where the real model is slower,
    # an earlier plan may be fast enough; where it loses more, one more step may help.
    for _ in range(FURTHER_TRIES):
        other = _fast_enough_plan(result, state.steps, options)
        if other is not None:
            took = f"{result.latency:.3f} of the float file's time"
            log(f"  the file takes {took}, more than estimated; step {other} ...")
        # Only while no earlier plan was taken for its speed: the two would undo each other.
        elif _loses_too_much(result, options) and chosen == result.chosen < len(state.taken):
            other = chosen = chosen + 1
            log(f"  the model made of the rules loses {result.judgement}; step {other} ...")
        else:
            break
        result = finish.at(other)
    notes = _search_notes(result, state, held_out=bool(held_out), evaluated=evaluate is not None)
    return dataclasses.replace(result, notes=notes)


def _identifying_facts(
    qmodel: nn.Module, candidates: Sequence[Rule], options: SearchOptions, reference: Reference
) -> dict[str, Any]:
    """Return the facts that the measurements depend on, so that those of another search are refused."""
    return {
        "plan": plan_of(qmodel).to_dict()["options"],
        "candidates": [plain_values(candidate) for candidate in candidates],
        "options": plain_values(options),
        # The sum changes with the float weights and with the samples, so it stands for both.
        "answers": float(sum(output.double().sum() for outputs in reference.outputs for output in outputs)),
    }


def _held_out_reference(
    qmodel: nn.Module, held_out: Sequence[Any], ranking: Reference, options: SearchOptions
) -> Reference:
    return reference_of(qmodel, held_out, samples=4 * options.samples) if held_out else ranking


def _time_layers(qmodel: nn.Module, runtime: Runtime, inputs: Inputs) -> LayerTimes:
    """Return the time of a model's file and of its layers, beside those of the float file."""
    names = {work.name.replace(":", "."): work.name for work in works_of(qmodel)}  # as files call them
    with tempfile.TemporaryDirectory() as folder:
        path = export(qmodel, Path(folder) / f"model{next(iter(runtime.writers))}")
        found = latency(qmodel, path, inputs, runtime, list(names))
    layers = tuple(dataclasses.replace(layer, name=names[layer.name]) for layer in found.layers)
    return dataclasses.replace(found, layers=layers)


@dataclasses.dataclass(frozen=True)
class _Finish:
    """Makes the result of a walk."""

    state: Walk
    runtime: Runtime
    quantized: Quantized
    inputs: Inputs

    def at(self, chosen: int) -> SearchResult:
        """Return the result of the plan after some steps: its model is made anew, judged and timed."""
        state = self.state
        rules = final_rules(plan_of(state.qmodel), state.taken[:chosen])
        qmodel = self.quantized(rules, True)
        judgement = state.judge(qmodel) if state.options.max_drop is not None else None
        measured = None
        if state.times is not None:
            times = _time_layers(qmodel, self.runtime, self.inputs)
            measured = times.deployed / times.float_default
        return SearchResult(
            qmodel=qmodel,
            rules=rules,
            reached=_keeps_budgets(state, chosen, judgement, measured),
            chosen=chosen,
            steps=tuple(state.steps),
            unit=state.judge.unit,
            judgement=judgement,
            latency=measured,
        )


def _keeps_budgets(state: Walk, chosen: int, judgement: Judgement | None, measured: float | None) -> bool:
    options = state.options
    if options.max_drop is not None and (judgement is None or judgement.drop > options.max_drop):
        return False
    cost = dataclasses.replace(state.steps[chosen].cost, latency=measured)
    return state.within(cost)


def _loses_too_much(result: SearchResult, options: SearchOptions) -> bool:
    return options.max_drop is not None and result.judgement is not None and result.judgement.drop > options.max_drop


def _fast_enough_plan(result: SearchResult, steps: Sequence[SearchStep], options: SearchOptions) -> int | None:
    """Return the number of steps of an earlier plan whose file should be fast enough; None if the file itself is.

    The estimates are corrected by the ratio of measured to estimated time. The plan is the last that keeps the budget
    then, or else the plan that is estimated the fastest; None if no earlier plan is estimated faster than the present.
    """
    estimated = steps[result.chosen].cost.latency
    if options.latency is None or result.latency is None or estimated is None or result.latency <= options.latency:
        return None
    # An estimate of e is measured as e * (result.latency / estimated), so the budget is this estimate.
    least = estimated * options.latency / result.latency
    faster = {step.number: step.cost.latency for step in steps[: result.chosen] if step.cost.latency is not None}
    kept = [number for number, latency in faster.items() if latency <= least]
    if kept:
        return kept[-1]
    best = min(faster, key=lambda number: faster[number], default=None)
    return best if best is not None and faster[best] < estimated else None


def _search_notes(result: SearchResult, state: Walk, *, held_out: bool, evaluated: bool) -> tuple[str, ...]:
    """Return the budgets that were missed, and the limits of the judgement, a sentence each."""
    options = state.options
    cost = state.steps[result.chosen].cost
    found = []
    if not result.chosen and result.reached and state.steps[0].divergence <= NEGLIGIBLE_DIVERGENCE:
        found.append(
            f"The scheme's divergence of {state.steps[0].divergence:.2g} is below {NEGLIGIBLE_DIVERGENCE:g}, which no "
            "answer shows, so no step was taken."
        )
    if options.max_drop is not None and result.judgement is not None:
        if result.judgement.drop > options.max_drop:
            found.append(
                f"No plan within the budgets has a {result.unit} of at most {options.max_drop:g}: the best has "
                f"{result.judgement}. Train from it (halfeven search goes on with QAT), or allow more."
            )
        interval = result.judgement.interval
        if interval is None:
            found.append("The drop has no confidence interval: return a number for each sample from evaluate.")
        elif interval > max(options.max_drop, abs(result.judgement.drop)):
            found.append(
                f"The samples are too few to tell a drop of {options.max_drop:g}: its interval is ± {interval:.2g}."
            )
        if not evaluated and not held_out:
            found.append("Answers were judged on the samples that ranked the steps: give more batches than samples.")
    for name, value in (("bits", cost.bits), ("tensors", cost.tensors), ("latency", result.latency)):
        budget = getattr(options, name)
        if budget is not None and value is not None and value > budget:
            found.append(
                f"{name} is {value:.3g}, above the budget of {budget:g}, and no plan that was found is cheaper."
            )
    return tuple(found)
