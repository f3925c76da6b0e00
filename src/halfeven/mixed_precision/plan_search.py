"""Search a plan: measure the steps, walk, make the final model, and judge it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
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
from halfeven.mixed_precision.walk import NEGLIGIBLE_DIVERGENCE, Walk, take_step, walk, walk_on
from halfeven.placement.insertion import plan_of
from halfeven.placement.options import Rule
from halfeven.quantization.own_class import plain_values
from halfeven.runtimes.export import export
from halfeven.runtimes.runtime import Runtime, runtime_named
from halfeven.temporary import temporary_folder
from halfeven.verification.latency import latency
from halfeven.verification.layer_times import LayerTime, LayerTimes

Quantized = Callable[[tuple[Rule, ...], bool], nn.Module]
"""Returns the model quantized with further rules; with True by all steps that the user chose, else by ranges alone."""

LARGEST_SENSIBLE_DROP = 0.3
"""Share of the float model's metric above which a budget was probably meant in another unit, such as percent."""
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
    steps: Mapping[str, Any],
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
        steps: what `quantized` does beside setting ranges, as plain values: other measurements come of other steps.
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
    if judge.expected is not None and options.max_drop is not None:
        metric = float(judge.expected.mean())
        log(f"The float model's metric is {metric:.4g}, of which a plan may lose {options.max_drop:g}.")
    facts = _identifying_facts(qmodel, candidates, options, reference, judge, {**steps, "batches": len(batches)})
    store = MeasurementStore(resume_dir, facts)
    # Timing writes and runs files, so it is done only where time is a budget or the price.
    timed = options.latency is not None or options.cost == "latency"
    first = reference.inputs[0]
    times = _stored_times(store, lambda: _time_layers(qmodel, runtime, first)) if timed else None
    # The walk: all steps that there are, measured in the context of the present plan and taken one by one.
    moves = moves_of(qmodel, units_of(qmodel), candidates, batches, runtime.target)
    log(f"Searching {len(moves)} steps in {len(units_of(qmodel))} groups of tensors.")
    state = Walk(qmodel, moves, workload_of(qmodel), times, reference, judge, options, store, log)
    result = _finish_plan(_Finish(state, runtime, quantized, first), walk(state))
    notes = _search_notes(result, state, held_out=bool(held_out), evaluated=evaluate is not None)
    return dataclasses.replace(result, notes=notes)


def _identifying_facts(
    qmodel: nn.Module,
    candidates: Sequence[Rule],
    options: SearchOptions,
    reference: Reference,
    judge: Judge,
    steps: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the facts that the measurements depend on, so that those of another search are refused."""
    expected = judge.expected
    return {
        "plan": plan_of(qmodel).to_dict()["options"],
        "candidates": [plain_values(candidate) for candidate in candidates],
        "options": plain_values(options),
        "steps": dict(steps),
        # The sums change with the float weights and with the samples, so they stand for both.
        "answers": _answer_sums(reference),
        "metric": None if expected is None else [expected.numel(), float(expected.mean())],
        "held-out answers": _answer_sums(judge.reference) if expected is None else None,
    }


def _answer_sums(reference: Reference) -> list[float]:
    """Return the sum of the magnitudes of all finite float answers, batch by batch."""
    return [float(sum(x[x.isfinite()].double().abs().sum() for x in outputs)) for outputs in reference.outputs]


def _stored_times(store: MeasurementStore, measure: Callable[[], LayerTimes]) -> LayerTimes:
    """Return times that a resumed search finds again: with others it would take other steps."""
    values = store.measured("times", lambda: dataclasses.asdict(measure()))
    return LayerTimes(**{**values, "layers": tuple(LayerTime(**layer) for layer in values["layers"])})


def _held_out_reference(
    qmodel: nn.Module, held_out: Sequence[Any], ranking: Reference, options: SearchOptions
) -> Reference:
    return reference_of(qmodel, held_out, samples=4 * options.samples) if held_out else ranking


def _time_layers(qmodel: nn.Module, runtime: Runtime, inputs: Inputs) -> LayerTimes:
    """Return the time of a model's file and of its layers, beside those of the float file."""
    names = {work.name.replace(":", "."): work.name for work in works_of(qmodel)}  # as files call them
    with temporary_folder() as folder:
        path = export(qmodel, folder / f"model{next(iter(runtime.writers))}")
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
        judged = state.options.max_drop is not None or state.judge.evaluate is not None
        judgement = state.judge(qmodel) if judged else None
        measured = None
        if state.times is not None:
            measured = state.store.measured(f"latency after {chosen}", lambda: self._ratio(qmodel))
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

    def _ratio(self, qmodel: nn.Module) -> float:
        """Return the time of a model's file over the float file's in the runtime's default precision."""
        times = _time_layers(qmodel, self.runtime, self.inputs)
        return times.deployed / times.float_default


def _finish_plan(finish: _Finish, chosen: int) -> SearchResult:
    """Return the result of the plan after some steps, or of another where its own model does not keep the budgets."""
    # The rules of the plan make a model from scratch, which is judged and timed itself.
    result = finish.at(chosen)
    state = finish.state
    # The walk compared estimates: of the time, and of models without learned rounding. Where the real model is slower,
    # another plan may be fast enough; where it loses more, one more step may help.
    for _ in range(FURTHER_TRIES):
        other = _faster_plan(result, state)
        if other is not None:
            took = f"{result.latency:.3f} of the float file's time"
            state.log(f"  the file takes {took}, more than estimated; step {other} ...")
        # Only while no other plan was taken for its speed: the two would undo each other.
        elif _loses_too_much(result, state.options) and chosen == result.chosen and _has_step(state, chosen + 1):
            other = chosen = chosen + 1
            state.log(f"  the model made of the rules loses {result.judgement}; step {other} ...")
        else:
            break
        result = finish.at(other)
    return result


def _has_step(state: Walk, count: int) -> bool:
    """Return True if there is a plan of so many steps; the walk takes one more where it ended before."""
    if count <= len(state.taken):
        return True
    state.go_to(len(state.taken))
    return take_step(state)


def _keeps_budgets(state: Walk, chosen: int, judgement: Judgement | None, measured: float | None) -> bool:
    options = state.options
    if options.max_drop is not None and (judgement is None or judgement.drop > options.max_drop):
        return False
    cost = dataclasses.replace(state.steps[chosen].cost, latency=measured)
    return state.within(cost)


def _loses_too_much(result: SearchResult, options: SearchOptions) -> bool:
    return options.max_drop is not None and result.judgement is not None and result.judgement.drop > options.max_drop


def _faster_plan(result: SearchResult, state: Walk) -> int | None:
    """Return the number of steps of a plan whose file should be fast enough; None if the file itself is, or none is.

    The estimates are corrected by the ratio of measured to estimated time. The plan is the last before the present that
    keeps the budget then; or else further steps are taken until a plan does; or else it is the plan that is estimated
    the fastest, if that is another.
    """
    budget = state.options.latency
    estimated = state.steps[result.chosen].cost.latency
    if budget is None or result.latency is None or estimated is None or result.latency <= budget:
        return None
    # An estimate of e is measured as e * (result.latency / estimated), so the budget is this estimate.
    least = estimated * budget / result.latency
    if kept := [step.number for step in state.steps[: result.chosen] if (step.cost.latency or 0.0) <= least]:
        return kept[-1]
    last = walk_on(state, least)
    estimates = {step.number: step.cost.latency for step in state.steps if step.cost.latency is not None}
    if estimates[last] <= least:
        return last
    fastest = min(estimates, key=lambda number: estimates[number])
    return fastest if estimates[fastest] < estimated else None


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
        expected = state.judge.expected
        if expected is not None and options.max_drop > LARGEST_SENSIBLE_DROP * abs(float(expected.mean())):
            found.append(
                f"max_drop={options.max_drop:g} is more than {LARGEST_SENSIBLE_DROP:.0%} of the float model's metric, "
                f"{float(expected.mean()):.4g}: it is a difference in the unit that evaluate returns."
            )
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
