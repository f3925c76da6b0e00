"""Verification of a deployed file: its integers against the trained ones, its kernels, its accuracy and latency."""

import math
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from halfeven.checked_arguments import checked_arguments
from halfeven.deployment.layer_calls import named_calls
from halfeven.errors import HalfevenError, VerificationError
from halfeven.evaluation import evaluating
from halfeven.graph.batches import Inputs, given_batches, inputs_of, label_of, spare_entries, tensors_of
from halfeven.graph.copying import float32_model
from halfeven.graph.inline import without_autocast
from halfeven.layerwise.batches import form_of, naming_batch
from halfeven.options import PositiveInt
from halfeven.placement.execution_graph import as_planned
from halfeven.placement.insertion import plan_of
from halfeven.progress_bar import advancing, progress
from halfeven.quantization.model_quantizers import weights_quantized_once
from halfeven.runtimes.deploy import deploy
from halfeven.runtimes.layer_execution import LayerExecution
from halfeven.runtimes.runtime import Runtime, runtime_of_file
from halfeven.verification.answers import Answers, ClassAxis
from halfeven.verification.circumstances import circumstances
from halfeven.verification.comparison import Comparison
from halfeven.verification.executed_calls import executed_calls
from halfeven.verification.findings import judged, spread_notes
from halfeven.verification.float_simulation import outputs_of
from halfeven.verification.integer_macs import work_of
from halfeven.verification.latency import latency, slowest_kernels
from halfeven.verification.layer_times import LayerTimes
from halfeven.verification.python_work import python_work
from halfeven.verification.report import Report
from halfeven.verification.speed import slower_than_float


@checked_arguments(VerificationError)
@without_autocast()  # both simulations compute in float32, as the file does
def verify(
    qmodel: nn.Module,
    path: str | Path,
    batches: Iterable[Any],
    float_model: nn.Module | None = None,
    *,
    target: str | None = None,
    timed: bool = True,
    class_axis: ClassAxis = "auto",
    samples: PositiveInt | None = None,
) -> Report:
    """Run a deployed file in its runtime and compare its integers and all of its outputs with those of the model.

    The *exact* simulation computes as the runtime does, layer by layer; the *float* simulation is the model itself, as
    it was trained. A difference from either that float rounding does not explain is a finding of the report.

    Args:
        qmodel: the model that the file was written from.
        path: the `.xml` or `.onnx` file.
        batches: inputs, as for `calibrate`; with labels, `(inputs, labels)`, accuracies are reported too.
        float_model: the original model, for its accuracy.
        target: the runtime that the file was written for; None: as the file says. TensorRT's is evaluated, not run.
        timed: measure latencies too, for which the float model is written as well.
        class_axis: axis whose largest value is an answer, one for a sample, pixel, token or anchor; "auto": the axis
            that the labels do not have, or else the last axis of tokens and the second axis of everything else.
        samples: number of samples after which no further batch is read; None: all are read, and kept in memory.

    Raises:
        VerificationError: no batch was given, the file cannot be read, or it was not written from this model.
        CalibrationError: a batch does not fit the example that the model was prepared with.
        ConfigError: there is no such runtime, it does not read files with this ending, or the file is for another.
    """
    qmodel = float32_model(qmodel)
    answers = Answers(class_axis)
    inputs, labels = _inputs_and_labels(qmodel, batches, samples, answers)
    runtime = runtime_of_file(Path(path), target, plan_of(qmodel).options.target)
    with progress(f"Verifying {Path(path).name}", len(inputs)) as advance:
        comparison = Comparison(qmodel, deploy(qmodel, runtime), Path(path), runtime)
        _compare_batches(comparison, advancing(zip(inputs, labels, strict=True), advance), float_model, answers)
        parity = comparison.parity()
        proof = partial(_in_float32, comparison, inputs)
        float32_session, found, notes = judged(parity, proof, needed=comparison.floats_may_differ)
        return Report(
            path=str(path),
            runtime=comparison.file.runtime,
            samples=sum(_batch_size(batch) for batch in inputs),
            top1_agreement=answers.same_exact / (answers.total or math.nan),
            float_simulation_top1_agreement=answers.same_float / (answers.total or math.nan),
            accuracy=answers.accuracy(),
            notes=[*answers.notes(), *notes, *([] if found else spread_notes(parity["tensors"]))],
            findings=found,
            float_precision=comparison.file.float_precision,
            float32_session=float32_session,
            **parity,
            **circumstances(comparison.file, Path(path)),
            **_kernel_fields(comparison),
            latency_batch=_batch_size(inputs[0]),
            slowest_kernels=slowest_kernels(Path(path), inputs[0], runtime) if timed else [],
            **_time_fields(_layer_times(comparison, Path(path), inputs[0], runtime) if timed else None, runtime),
        )


def _in_float32(comparison: Comparison, inputs: list[Inputs]) -> dict[str, Any]:
    """Return the fields about integers and outputs of a session that computes float operators in float32."""
    qmodel = comparison.qmodel
    proved = Comparison(qmodel, deploy(qmodel, comparison.runtime), comparison.path, comparison.runtime, "f32")
    _compare_batches(proved, ((batch, None) for batch in inputs), None, Answers("auto"))
    return proved.parity()


def _layer_times(comparison: Comparison, path: Path, inputs: Inputs, runtime: Runtime) -> LayerTimes:
    return latency(comparison.qmodel, path, inputs, runtime, list(named_calls(comparison.parts).values()))


def _inputs_and_labels(
    qmodel: nn.Module, batches: Iterable[Any], samples: int | None, answers: Answers
) -> tuple[list[Inputs], list[Any]]:
    """Return the inputs and labels of batches until there are so many samples; `answers` notes missing labels."""
    inputs: list[Inputs] = []
    labels: list[Any] = []
    form = None
    read = 0
    for number, batch in enumerate(given_batches(batches, name="batches")):
        form = form or form_of(qmodel, batch)
        inputs.append(inputs_of(batch, form, number))
        labels.append(label_of(batch, form))
        if labels[-1] is None:
            answers.note_unread(spare_entries(batch, form))
        read += _batch_size(inputs[-1])
        if samples is not None and read >= samples:
            break
    if not inputs:
        raise VerificationError(
            "verify got no batch, so there is nothing to compare the file with. Give at least one batch of inputs."
        )
    return inputs, labels


def _time_fields(times: LayerTimes | None, runtime: Runtime) -> dict[str, Any]:
    """Return the report's fields about time."""
    if times is None:
        return {"latency_ms": {}, "latency_ratio": math.nan}
    return {
        "latency_ms": {"float": times.float32, "deployed": times.deployed},
        "latency_ratio": times.deployed / times.float32,
        "float_default_ms": times.float_default,
        "latency_ratio_default": times.deployed / times.float_default,
        "layer_times": list(times.layers),
        "slower": slower_than_float(times) if runtime.exact is not None else [],  # else the file was not run
    }


def _kernel_fields(comparison: Comparison) -> dict[str, Any]:
    """Return the report's fields about kernels."""
    layers = executed_calls(comparison.file, comparison.parts)
    products = comparison.file.executed_products()
    work = work_of(comparison.parts, layers, products, python_work(comparison.qmodel))
    weights_only = not comparison.activations  # float kernels read the weights then, as they should
    in_float = [layer for layer in layers if not (layer.integer or (layer.stored and weights_only))]
    return {
        "integer_layers": sum(layer.integer for layer in layers),
        "quantizable_layers": len(layers),
        "weight_layers": sum(layer.stored and not layer.integer for layer in layers),
        "float_layers": [_float_layer_text(layer) for layer in in_float],
        "float_reason": _reason_of_target(comparison) if in_float else "",
        "integer_macs": work.integer_share,
        "float_macs": work.float_shares(),
    }


def _reason_of_target(comparison: Comparison) -> str:
    """Return the sentence about a model that was made for another runtime than the file; "" for the same."""
    made_for, runs_in = plan_of(comparison.qmodel).options.target, comparison.runtime.name
    return "" if made_for == runs_in else f'made for {made_for}; use target="{runs_in}"'


def _float_layer_text(layer: LayerExecution) -> str:
    return f"{layer.layer} ({layer.precision} {layer.kernel})".replace(" )", ")")


def _compare_batches(
    comparison: Comparison, batches: Iterable[tuple[Inputs, Any]], float_model: nn.Module | None, answers: Answers
) -> None:
    """Compare all batches of inputs and labels."""
    with ExitStack() as stack:
        # Hooks on quantizers must see the tensors of the plan, and the graph that runs otherwise has some behind their
        # pools.
        stack.enter_context(as_planned(comparison.qmodel))
        stack.enter_context(evaluating(comparison.qmodel))
        stack.enter_context(weights_quantized_once(comparison.qmodel))
        if float_model is not None:
            stack.enter_context(evaluating(float_model))
        for number, ((args, kwargs), labels) in enumerate(batches):
            try:
                with naming_batch(number):
                    outputs = comparison.run(args, kwargs)
                if float_model is not None and labels is not None:
                    outputs["float"] = outputs_of(float_model, args, kwargs)
                answers.add(outputs, labels)
            except HalfevenError:
                raise
            except Exception as error:  # the model's own code raises whatever it likes
                raise VerificationError(
                    f"Batch {number} could not be compared: {type(error).__name__}: {str(error).strip()}\nSo nothing "
                    "is known about the file. Give batches as for calibrate, of the sizes that prepare was given."
                ) from error


def _batch_size(inputs: Inputs) -> int:
    """Return the number of samples: the first size of the first input that has axes."""
    return next((len(x) for x in tensors_of(inputs) if x.ndim), 1)
