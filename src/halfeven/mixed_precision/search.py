"""Find the cheapest plan within a budget."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Unpack

from torch import nn

from halfeven.checked_arguments import checked_arguments
from halfeven.errors import AlgorithmError, ConfigError
from halfeven.evaluation import Evaluate
from halfeven.graph.batches import Example
from halfeven.graph.copying import copy_model
from halfeven.mixed_precision.moves import check_candidates, usual_candidates
from halfeven.mixed_precision.options import SearchFields, SearchOptions
from halfeven.mixed_precision.plan_search import search_plan
from halfeven.mixed_precision.result import SearchResult
from halfeven.pipelines import (
    QuantizeFields,
    batches_in_memory,
    prepare_folded,
    quantize_prepared,
    set_rules,
)
from halfeven.placement.insertion import plan_of
from halfeven.placement.options import QuantizationOptions, Rule, rule_text
from halfeven.ptq.options import PTQOptions, check_folds, split_fields
from halfeven.quantization.own_class import plain_values
from halfeven.quantization.scheme import BITS_NAMED_FOR_FLOAT, parse_bits
from halfeven.runtimes.runtime import runtime_named


class SearchedFields(QuantizeFields, SearchFields, total=False):
    """The fields that `search` takes by name in addition to its option objects."""


@checked_arguments(AlgorithmError)
def search(
    model: nn.Module,
    batches: Iterable[Any],
    evaluate: Evaluate | None = None,
    options: QuantizationOptions | None = None,
    ptq: PTQOptions | None = None,
    budgets: SearchOptions | None = None,
    *,
    example: Example | None = None,
    candidates: Sequence[Rule] | None = None,
    log: Callable[[str], None] | None = print,
    resume_dir: Path | None = None,
    **changes: Unpack[SearchedFields],
) -> SearchResult:
    """Find the cheapest plan that keeps its budgets, from the scheme upwards.

    Each step gives another candidate to a group of tensors that the target ties: the step that brings the answers
    nearest to the float model's for the cost that it adds, measured in the context of the whole quantized model.

    Args:
        model: any module; it is not changed.
        batches: calibration batches, as for `quantize`. The first `samples` samples rank the steps, and without
            `evaluate` the others judge the answers.
        evaluate: called with a model, returns its metric on held-out data, more being better: a number for each sample,
            which gives the drop a confidence interval, or one number.
        options: how to quantize.
        ptq: the steps of the final model. Learned rounding and bias correction are left out unless they are switched on
            here, and plans are compared without them.
        budgets: the budgets.
        example: an input, as for `prepare`.
        candidates: rules without a pattern to try on each group; None: 8 bits where the scheme has fewer, another
            observer, and float.
        log: called with each step and its reason; None: nothing is printed.
        resume_dir: folder that keeps measurements, and finished layers where the final model's rounding is learned; an
            interrupted search goes on from them.
        changes: fields of `QuantizationOptions`, `PTQOptions` and `SearchOptions`, for example `max_drop=0.5`.

    Raises:
        ConfigError: no budget, or an option or a candidate that cannot be used; nothing was started.
        CalibrationError, CaptureError, PlacementError: as `quantize` raises them.
    """
    named = {field.name for field in dataclasses.fields(SearchOptions)}
    given: dict[str, Any] = {name: value for name, value in changes.items() if name in named}
    budgets = dataclasses.replace(budgets or SearchOptions(), **given)
    rest = {name: value for name, value in changes.items() if name not in named}
    options, ptq = split_fields(
        options or QuantizationOptions(), ptq or PTQOptions(), rest, verb="search", further=named
    )
    check_folds(options)
    tried = check_search(budgets, options, candidates)
    data = batches_in_memory(batches, None)
    prepared = prepare_folded(model, data, options, example)
    log = log or (lambda text: None)
    return search_prepared(
        prepared, model, data, evaluate, ptq, budgets, candidates=tried, log=log, resume_dir=resume_dir
    )


def search_prepared(
    prepared: nn.Module,
    model: nn.Module,
    batches: Sequence[Any],
    evaluate: Evaluate | None,
    ptq: PTQOptions,
    budgets: SearchOptions,
    *,
    candidates: Sequence[Rule],
    log: Callable[[str], None],
    resume_dir: Path | None,
) -> SearchResult:
    """Search the plan of a model from `prepare` with BatchNorm folded, copies of which are quantized.

    Args:
        prepared: the prepared model, which stays as it is.
        model: the float model that it was made from.
        batches: calibration batches, which are read several times.
        evaluate: the metric; None: answers are compared.
        ptq: the steps of the final model.
        budgets: the budgets.
        candidates: what to try, from `check_search`.
        log: called with each step.
        resume_dir: folder that keeps measurements.
    """
    ranges_alone, final = _compared_and_final_steps(ptq)
    if budgets.cost == "auto" and budgets.latency is None and not plan_of(prepared).tensors:
        budgets = dataclasses.replace(budgets, cost="size")  # float layers do the same work with weights of any bits

    def quantized(rules: tuple[Rule, ...], last: bool) -> nn.Module:
        # A copy for each plan, since the steps change the model in place.
        qmodel = copy_model(prepared)
        if rules:
            set_rules(qmodel, rules)
        # Learned rounding takes the longest, and its blocks fit their own plan alone.
        folder = resume_dir / f"plan_{_digest(rules)}" if resume_dir is not None and last else None
        steps = final if last else ranges_alone
        return quantize_prepared(qmodel, batches, steps, log=lambda text: None, resume_dir=folder)

    # Of reconstruction alone, which only the final model has.
    steps = plain_values(dataclasses.replace(ranges_alone, memory=1.0, cache_folder="auto"))
    return search_plan(
        model, batches, evaluate, budgets, candidates, quantized=quantized, steps=steps, log=log, resume_dir=resume_dir
    )


def _digest(rules: Sequence[Rule]) -> str:
    return hashlib.sha256(repr(rules).encode()).hexdigest()[:12]


def _compared_and_final_steps(ptq: PTQOptions) -> tuple[PTQOptions, PTQOptions]:
    """Return the steps of the plans that are compared, ranges alone, and those of the final model."""
    # Learned rounding holds for the grids of one plan alone, so only the final model is worth its time.
    ranges_alone = dataclasses.replace(ptq, reconstruct="off", correct_biases="off")
    final = dataclasses.replace(
        ptq,
        reconstruct="off" if ptq.reconstruct == "auto" else ptq.reconstruct,
        correct_biases="off" if ptq.correct_biases == "auto" else ptq.correct_biases,
    )
    return ranges_alone, final


def check_search(
    options: SearchOptions, quantization: QuantizationOptions, candidates: Sequence[Rule] | None
) -> tuple[Rule, ...]:
    """Return the candidates of a search, or refuse it before any work.

    Raises:
        ConfigError: there is no budget, a candidate cannot be tried, or the runtime's time cannot be measured here.
    """
    budgets = ("max_drop", "latency", "bits", "tensors")
    if all(getattr(options, name) is None for name in budgets):
        raise ConfigError(
            f"A search needs a budget, or every plan would do. Give at least one of {', '.join(budgets)}, for example "
            "max_drop=0.5 (on the command line --search.max-drop 0.5)."
        )
    runtime = runtime_named(quantization.target)
    timed = options.latency is not None or options.cost == "latency"
    if timed and runtime.exact is None:
        raise ConfigError(
            f"latency is a budget or the cost, and {runtime.name} is not run here, so nothing could be timed. Give a "
            'budget of max_drop or bits, with cost="bops" or "size".'
        )
    _check_has_effect(options, quantization.scheme)
    found = usual_candidates(quantization) if candidates is None else tuple(candidates)
    check_candidates(found)
    if timed and (wide := [c for c in found if (c.activation_bits or 0) > max(runtime.target.activation_bits)]):
        raise ConfigError(
            f"latency is a budget or the cost, and the candidate {rule_text(vars(wide[0]))} can only be simulated: "
            f"{runtime.name} has activations of at most {max(runtime.target.activation_bits)} bits, so no file could "
            'be timed. Give a budget of max_drop or bits, with cost="bops" or "size", or leave the candidate out.'
        )
    return found


def _check_has_effect(options: SearchOptions, scheme: str) -> None:
    """Refuse budgets and a cost that are the same for all plans of a scheme of weights alone.

    Raises:
        ConfigError: there is one.
    """
    if parse_bits(scheme)[1] != BITS_NAMED_FOR_FLOAT:
        return
    given = [f"a budget of {name}" for name in ("bits", "tensors") if getattr(options, name) is not None]
    if given := given + (['cost="bops"'] if options.cost == "bops" else []):
        raise ConfigError(
            f'scheme="{scheme}" leaves activations in float, so that layers compute in float with weights of any bits, '
            f"and {' and '.join(given)} would be the same for all plans. Give max_drop, whose steps are weighed by the "
            "size of the weights then, or latency."
        )
