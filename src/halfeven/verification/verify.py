"""Verification of a deployed file: its integers against the trained ones, its kernels, its accuracy and latency."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfeven.deployment.deployed import Deployed
from halfeven.deployment.quantize_op import WEIGHT_SUFFIX, ExportedQuantizer
from halfeven.errors import VerificationError
from halfeven.evaluation import evaluating
from halfeven.graph.capture import inputs_of
from halfeven.graph.view import module_of
from halfeven.placement.execution_graph import as_planned
from halfeven.placement.make_plan import regions
from halfeven.quantization.quantizer import Quantizer, quantizers, weights_quantized_once
from halfeven.runtimes.cpu import pair_fits
from halfeven.runtimes.deploy import deploy, runtime_of
from halfeven.runtimes.exact_model import ExactModel
from halfeven.runtimes.layer_execution import LayerExecution
from halfeven.runtimes.runtime import Runtime
from halfeven.tasks.task import first_tensor
from halfeven.verification.integer_macs import integer_share
from halfeven.verification.latency import latency
from halfeven.verification.report import Report, TensorParity

MAX_MERGED_SHARE = 0.1
"""Largest fraction of tensors that a converter may merge away; above it the file belongs to another model."""


def verify(
    qmodel: nn.Module,
    path: str | Path,
    batches: Iterable[Any],
    float_model: nn.Module | None = None,
    *,
    target: str | None = None,
    timed: bool = True,
    class_axis: int = 1,
) -> Report:
    """Run a deployed file in its runtime and compare its integers with those of the model.

    The *exact* simulation computes as the runtime does, layer by layer; the *float* simulation is the model itself, as
    it was trained.

    Args:
        qmodel: the model that the file was written from.
        path: the `.xml` or `.onnx` file.
        batches: inputs, as for `calibrate`; with labels, `(inputs, labels)`, accuracies are reported too.
        float_model: the original model, for its accuracy.
        target: the runtime that the file was written for; None: that of the model. TensorRT is not run: its file is
            evaluated as ONNX defines its operators.
        timed: measure latencies too, for which the float model is written as well.
        class_axis: axis of the first output whose largest value is an answer: one for a sample, pixel or anchor.

    Raises:
        VerificationError: no batch was given, the file cannot be read, or it was not written from this model.
        ConfigError: there is no such runtime.
    """
    batches = list(batches)
    if not batches:
        raise VerificationError(
            "verify got no batch, so there is nothing to compare the file with. Give at least one batch of inputs."
        )
    quantized = next((p.device for p in qmodel.parameters()), torch.device("cpu"))
    runtime = runtime_of(qmodel, target)
    comparison = _Comparison(qmodel, deploy(qmodel, runtime), Path(path), runtime)
    with as_planned(qmodel):
        rows = _compare(comparison, batches, quantized, float_model, class_axis)
    layers = comparison.file.executed_layers(comparison.layers)
    weights_only = not comparison.activations  # float kernels read the weights then, as they should
    milliseconds = latency(qmodel, Path(path), inputs_of(batches[0]), runtime) if timed else {}
    return Report(
        path=str(path),
        runtime=comparison.file.runtime,
        samples=rows.samples,
        integer_layers=sum(layer.integer for layer in layers),
        quantizable_layers=len(layers),
        weight_layers=sum(layer.stored and not layer.integer for layer in layers),
        float_layers=[_in_float(layer) for layer in layers if not (layer.integer or (layer.stored and weights_only))],
        output_difference=rows.difference / rows.largest if rows.largest else 0.0,
        integer_macs=integer_share(comparison.parts, layers, comparison.file.executed_products()),
        top1_agreement=rows.same_exact / rows.answers,
        float_simulation_top1_agreement=rows.same_float / rows.answers,
        accuracy=rows.accuracy(),
        latency_ms=milliseconds,
        latency_batch=_size(inputs_of(batches[0])),
        latency_ratio=milliseconds["deployed"] / milliseconds["float"] if timed else float("nan"),
        **comparison.parity(),
    )


def _in_float(layer: LayerExecution) -> str:
    return f"{layer.layer} ({layer.precision} {layer.kernel})".replace(" )", ")")


class _Comparison:
    """A file that is opened with all its integers as outputs, and its two simulations."""

    def __init__(self, qmodel: nn.Module, deployed: Deployed, path: Path, runtime: Runtime) -> None:
        self.runtime = runtime
        self.weights = [q for q in deployed.quantizers if q.weight]
        self.layers = [q.name.removesuffix(WEIGHT_SUFFIX) for q in self.weights]
        self.activations = in_graph_order(deployed.model)
        self.parts = regions(deployed.model)  # which the exact simulation takes over
        self.modules = dict(deployed.model.named_modules())
        self.exact = ExactModel(deployed, runtime.interpreter)
        self.qmodel = qmodel
        self.file = runtime.open_file(path, list(self.activations))
        self.names = [name for name in self.activations if name in self.file.tensors]
        self.unseen = [name for name in self.activations if name not in self.file.tensors]
        if len(lacking := self._lacking()) > MAX_MERGED_SHARE * len(self.activations):
            raise VerificationError(
                f"{path} lacks the quantized tensors {', '.join(lacking[:3])}, so it was not written from "
                "this model. Export the model again, then verify."
            )
        first = {q.number: q.name for q in deployed.quantizers}
        self.calls: dict[str, list[str]] = {}  # quantizer of the model -> its tensors, in the order of the graph
        for name, quantizer in self.activations.items():
            self.calls.setdefault(first[quantizer.grid_number], []).append(name)
        self.tensors = [TensorParity(name.removeprefix("quantizers.")) for name in self.names]

    def _lacking(self) -> list[str]:
        """Return the tensors that the file lacks, except for those on the grid of a tensor that it has: the converter
        merges equal tensors."""
        grids = {_grid(self.activations[name]) for name in self.names}
        return [name for name in self.unseen if _grid(self.activations[name]) not in grids]

    def run(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Compare the integers of all activations; return the first output of the file and of the exact simulation."""
        deployed_outputs, reals = self.file.run(inputs)
        found = {name: _codes(reals[name], self.activations[name]) for name in self.names}
        simulation = self.exact.simulation
        simulation.watched = True
        exact_output = first_tensor(self.exact(*inputs))
        exact = dict(self.exact.codes)
        matters = simulation.watching_matters
        layer_alone = exact
        if not all(torch.equal(found[name], exact[name]) for name in self.names):
            simulation.given.update(found)
            self.exact(*inputs)
            layer_alone = dict(self.exact.codes)
            simulation.given.clear()
        if matters:  # the outputs are of the file as users run it
            simulation.watched = False
            exact_output = first_tensor(self.exact(*inputs))
        simulated = self.simulated_codes
        for tensor, name in zip(self.tensors, self.names, strict=True):
            # A mean over positions keeps or loses their axes: the runtime's form may be another than the model's.
            tensor.add(found[name], exact[name], layer_alone[name], simulated[name].reshape(found[name].shape))
        return deployed_outputs[0], exact_output

    def simulate(self, args: Sequence[Tensor], kwargs: dict[str, Tensor]) -> Tensor:
        """Return the first output of the float simulation, and keep its codes in `simulated_codes`."""
        self.simulated_codes: dict[str, Tensor] = {}
        handles = []
        for name, quantizer in quantizers(self.qmodel).items():
            if name in self.calls:
                handles.append(quantizer.register_forward_hook(self._keep_codes(self.calls[name])))
        try:
            with torch.no_grad():
                return first_tensor(self.qmodel(*args, **kwargs)).cpu()
        finally:
            for handle in handles:
                handle.remove()

    def _keep_codes(self, names: list[str]) -> Any:
        waiting = iter(names)

        def hook(module: Quantizer, inputs: Any, output: Tensor) -> None:
            name = next(waiting)
            self.simulated_codes[name] = _codes(output.cpu().float(), self.activations[name])

        return hook

    def parity(self) -> dict[str, Any]:
        """Return the report's fields about integers."""
        total = sum(tensor.count for tensor in self.tensors) or float("nan")  # shares of nothing are NaN
        last = self.tensors[-1] if self.tensors else TensorParity("")
        return {
            "integer_match": 1 - sum(t.different for t in self.tensors) / total,
            "alone_match": 1 - sum(t.different_alone for t in self.tensors) / total,
            "last_integer_match": 1 - last.different / (last.count or float("nan")),
            "float_simulation_match": 1 - sum(t.different_float for t in self.tensors) / total,
            "max_lsb_difference": max((t.largest for t in self.tensors), default=0),
            "weights_match": self.weights_match(),
            "first_difference": next((t.name for t in self.tensors if t.different), ""),
            "overflows": any(t.different_alone for t in self.tensors) and self.may_overflow(),
            "tensors": self.tensors,
            "unseen": [name.removeprefix("quantizers.") for name in self.unseen],
        }

    def may_overflow(self) -> bool:
        """Return True where a pair of products of an executed kernel can be too large for the 16 bits that hold it."""
        if not self.runtime.sums_in_16_bits():
            return False
        found = list(quantizers(self.qmodel).values())
        steps = max((q.scheme.quant_max - q.scheme.quant_min for q in found if not q.weight), default=0)
        largest = max((q.scheme.quant_max for q in found if q.weight), default=0)
        if any(product.integer for product in self.file.executed_products()):
            largest = max(largest, (steps + 1) // 2)
        return not pair_fits(steps, largest)

    def weights_match(self) -> bool:
        """Return True if the file holds all integer weights of the model."""
        stored = self.file.stored_integers(self.layers)
        renamed = [integers for name, integers in stored.items() if name not in self.layers]
        for quantizer, layer in zip(self.weights, self.layers, strict=True):
            module = self.modules.get(layer)
            if module is None or not isinstance(module.weight, Tensor):
                continue  # a weight that is computed in the graph has no constant of its own
            shape = [1] * module.weight.ndim
            if quantizer.scale.ndim:
                shape[quantizer.axis] = -1
            integers = torch.round(module.weight / quantizer.scale.reshape(shape))
            candidates = [stored[layer]] if layer in stored else renamed
            if not any(torch.equal(one.flatten(), integers.flatten()) for one in candidates):
                return False
        return True


def _grid(quantizer: ExportedQuantizer) -> tuple[float, ...]:
    ends = (quantizer.quant_min, quantizer.quant_max, quantizer.axis)
    return (*quantizer.scale.flatten().tolist(), *quantizer.zero_point.flatten().tolist(), *ends)


def _codes(real: Tensor, quantizer: ExportedQuantizer) -> Tensor:
    """Return the integers of real numbers on a quantizer's grid, counted from the smallest integer of its type."""
    return torch.round(real / quantizer.scale) + quantizer.zero_point - (-128 if quantizer.signed else 0)


def in_graph_order(model: nn.Module) -> dict[str, ExportedQuantizer]:
    """Return the quantizers of activations by name, in the order of the graph."""
    calls = [module_of(n) for region in regions(model).values() for n in region.graph.nodes if n.op == "call_module"]
    return {q.name: q for q in calls if isinstance(q, ExportedQuantizer) and not (q.weight or q.repeats)}


@dataclass
class _Rows:
    class_axis: int = 1
    samples: int = 0
    answers: int = 0
    same_exact: int = 0
    same_float: int = 0
    difference: float = 0.0
    largest: float = 0.0
    labelled: int = 0
    right: dict[str, int] = field(default_factory=dict)

    def accuracy(self) -> dict[str, float]:
        return {name: 100 * count / self.labelled for name, count in self.right.items()} if self.labelled else {}


def _compare(
    comparison: _Comparison,
    batches: list[Any],
    device: torch.device,
    float_model: nn.Module | None,
    class_axis: int,
) -> _Rows:
    rows = _Rows(class_axis)
    with ExitStack() as stack:
        stack.enter_context(evaluating(comparison.qmodel))
        stack.enter_context(weights_quantized_once(comparison.qmodel))
        if float_model is not None:
            stack.enter_context(evaluating(float_model))
        for batch in batches:
            _compare_batch(comparison, batch, device, float_model, rows)
    return rows


def _compare_batch(
    comparison: _Comparison, batch: Any, device: torch.device, float_model: nn.Module | None, rows: _Rows
) -> None:
    args, kwargs = inputs_of(batch)
    simulated = comparison.simulate([a.to(device) for a in args], {k: v.to(device) for k, v in kwargs.items()})
    inputs = [x.cpu() for x in (*args, *kwargs.values())]
    found, exact = comparison.run(inputs)
    axis = rows.class_axis
    choices = {"simulated": _choice(simulated, axis), "deployed": _choice(found, axis)}
    rows.samples += len(found)
    rows.difference = max(rows.difference, float((found.float() - exact.float()).abs().max()))
    rows.largest = max(rows.largest, float(exact.abs().max()))
    rows.answers += choices["deployed"].numel()
    rows.same_exact += int((choices["deployed"] == _choice(exact, axis)).sum())
    rows.same_float += int((choices["deployed"] == choices["simulated"]).sum())
    labels = batch[1] if isinstance(batch, list | tuple) and len(batch) > 1 else None
    if not isinstance(labels, Tensor) or labels.shape != choices["deployed"].shape:
        return
    if float_model is not None:
        where = next((p.device for p in float_model.parameters()), device)
        with torch.no_grad():
            floats = float_model(*(a.to(where) for a in args), **{k: v.to(where) for k, v in kwargs.items()})
        choices = {"float": _choice(first_tensor(floats).cpu(), axis), **choices}
    rows.labelled += labels.numel()
    for name, choice in choices.items():
        rows.right[name] = rows.right.get(name, 0) + int((choice == labels.cpu()).sum())


def _choice(output: Tensor, class_axis: int) -> Tensor:
    """Return the index of the largest value over the class axis: [samples, ...], without that axis."""
    return output.argmax(class_axis) if output.ndim > 1 else output.round()


def _size(inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> int:
    return len(next(x for x in (*inputs[0], *inputs[1].values()) if isinstance(x, Tensor)))
