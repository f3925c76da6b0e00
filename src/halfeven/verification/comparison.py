"""A deployed file that is opened with all its integers as outputs, beside the two simulations of its model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfeven.deployment.deployed import Deployed
from halfeven.deployment.file_interface import FloatPrecision
from halfeven.deployment.quantize_op import WEIGHT_SUFFIX, ExportedQuantizer, grid_values
from halfeven.errors import VerificationError
from halfeven.graph.batches import Inputs, tensors_of
from halfeven.graph.torch_private import pytree
from halfeven.graph.view import module_of
from halfeven.placement.make_plan import regions
from halfeven.quantization.model_quantizers import quantizers
from halfeven.runtimes.cpu import pair_fits
from halfeven.runtimes.exact_model import ExactModel
from halfeven.runtimes.runtime import Runtime
from halfeven.verification.default_session import DefaultSession, default_session
from halfeven.verification.findings import differs_from_exact
from halfeven.verification.float_simulation import FloatSimulation, codes_of, outputs_of
from halfeven.verification.latency import deployed_in_float
from halfeven.verification.outputs import OutputParity, OutputSums, in_form_of, named_outputs
from halfeven.verification.report import TensorParity

MAX_MERGED_SHARE = 0.1
"""Largest fraction of tensors that a converter may merge or move away, a single one always; above it the file belongs
to another model."""


class Comparison:
    """A file and its two simulations, compared batch by batch."""

    def __init__(
        self,
        qmodel: nn.Module,
        deployed: Deployed,
        path: Path,
        runtime: Runtime,
        float_precision: FloatPrecision | None = None,
    ) -> None:
        self.runtime = runtime
        self.path = path
        self.activations = in_graph_order(deployed.model)
        # Without a precision of its own the session is the file's.
        session = {} if float_precision is None else {"float_precision": float_precision}
        self.file = runtime.open_file(path, list(self.activations), **session)
        self.half = False
        if self.file.float_precision == "runtime" and runtime.round_to_file is not None:
            runtime.round_to_file(deployed)
            self.half = True
        self.weights = [q for q in deployed.quantizers if q.weight]
        # The name of a weight's quantizer is its layer's, with a suffix.
        self.layers = [q.name.removesuffix(WEIGHT_SUFFIX) for q in self.weights]
        self.parts = regions(deployed.model)  # which the exact simulation takes over
        self.modules = dict(deployed.model.named_modules())
        self.exact = ExactModel(deployed, runtime.interpreter)
        self.exact.simulation.file = path
        self.exact.simulation.half = self.half
        self.qmodel = qmodel
        self.floating = deployed_in_float(qmodel)
        self.names = [name for name in self.activations if name in self.file.tensors]
        self.unseen = [name for name in self.activations if name not in self.file.tensors]
        if len(lacking := self._lacking_tensors()) > max(1, MAX_MERGED_SHARE * len(self.activations)):
            raise VerificationError(
                f"{path} lacks the quantized tensors {', '.join(lacking[:3])}, so it was not written from "
                "this model. Export the model again, then verify."
            )
        # Tensors on one grid share a quantizer of the model, which is called once for each of them, in the order of the
        # graph.
        first = {q.number: q.name for q in deployed.quantizers}
        calls: dict[str, list[str]] = {}
        for name, quantizer in self.activations.items():
            calls.setdefault(first[quantizer.grid_number], []).append(name)
        self.simulation = FloatSimulation(qmodel, calls, self.activations)
        self.tensors = [
            TensorParity(name.removeprefix("quantizers."), near_zero=self._is_near_zero(name)) for name in self.names
        ]
        self.outputs: dict[str, OutputSums] = {}
        self.default_session: DefaultSession | None = None

    @property
    def floats_may_differ(self) -> bool:
        """True where the file's session computes what stays float otherwise than the exact simulation does."""
        return self.file.float_precision == "runtime" and not self.half

    def _is_near_zero(self, name: str) -> bool:
        grid = self.activations[name]
        low = (grid.quant_min - grid.zero_point) * grid.scale
        return bool(((low < 0) & (low > -self.runtime.lowest_end_taken_for_0)).any())

    def _lacking_tensors(self) -> list[str]:
        """Return the tensors that the file lacks and that no tensor in it can stand for.

        A converter merges equal tensors, so a tensor on the same grid can stand for another.
        """
        grids = {grid_values(self.activations[name]) for name in self.names}
        return [name for name in self.unseen if grid_values(self.activations[name]) not in grids]

    def run(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
        """Compare the integers and the outputs of one batch.

        Returns:
            The outputs by name of the file ("deployed") and of both simulations ("exact", "simulated").
        """
        # The float simulation runs where the model is; the file and the exact simulation run on the CPU.
        simulated, simulated_codes = self.simulation.run(args, kwargs)
        given = pytree.tree_map_only(Tensor, Tensor.cpu, (tuple(args), dict(kwargs)))
        tensors = tensors_of(given)
        found, reals = self.file.run(tensors)
        codes = {name: codes_of(reals[name], self.activations[name]) for name in self.names}
        self._check_sizes(codes, simulated_codes)
        exact = self._compare_exact(given, codes)
        # Where integers differ, the float simulation runs again on the file's integers: what still differs is a layer's
        # own, and not spread from the layers before it.
        alone = simulated
        alone_codes = simulated_codes
        if any(not torch.equal(codes[name].flatten(), simulated_codes[name].flatten()) for name in self.names):
            alone, alone_codes = self.simulation.run(args, kwargs, {name: reals[name] for name in self.names})
        for tensor, name in zip(self.tensors, self.names, strict=True):
            shape = codes[name].shape
            tensor.add_float(codes[name], simulated_codes[name].reshape(shape), alone_codes[name].reshape(shape))
        # The model without quantizers: its distance from the simulation is the cost of quantization itself.
        floating = outputs_of(self.floating, args, kwargs)
        deployed = in_form_of(exact, found, self.path)
        if not self.outputs:  # once: it is another session
            self.default_session = default_session(self.file, tensors, found)
        for name, output in deployed.items():
            sums = self.outputs.setdefault(name, OutputSums(name))
            sums.add(output, exact[name], simulated[name], alone[name], floating[name])
        return {"deployed": deployed, "exact": exact, "simulated": simulated}

    def _check_sizes(self, found: Mapping[str, Tensor], simulated: Mapping[str, Tensor]) -> None:
        """Refuse the file of a network whose tensors bear the same names, and have other sizes."""
        for name in self.names:
            if found[name].numel() != simulated[name].numel():
                raise VerificationError(
                    f"{name.removeprefix('quantizers.')} has shape {list(found[name].shape)} in {self.path}, and "
                    f"{list(simulated[name].shape)} in the model, so the file was not written from this model. Export "
                    "the model again, then verify."
                )

    def _compare_exact(self, inputs: Inputs, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compare the integers of all activations with the exact simulation; return its outputs."""
        simulation = self.exact.simulation
        # The integers are read of a file with each quantized tensor as an output. Some operators are not fused there,
        # and round otherwise.
        simulation.watched = True
        args, kwargs = inputs
        outputs = self.exact(*args, **kwargs)
        exact = dict(self.exact.codes)
        matters = simulation.watching_matters
        layer_alone = exact
        if not all(torch.equal(found[name], exact[name]) for name in self.names):
            # Once more, with the file's integers before each layer: a rounding that fell the other way does not spread.
            simulation.given.update(found)
            self.exact(*args, **kwargs)
            layer_alone = dict(self.exact.codes)
            simulation.given.clear()
        if matters:  # the outputs are of the file as users run it
            simulation.watched = False
            outputs = self.exact(*args, **kwargs)
        for tensor, name in zip(self.tensors, self.names, strict=True):
            tensor.add(found[name], exact[name], layer_alone[name])
        return named_outputs(outputs)

    def parity(self) -> dict[str, Any]:
        """Return the report's fields about integers and outputs."""
        total = sum(tensor.count for tensor in self.tensors) or float("nan")  # shares of nothing are NaN
        last = self.tensors[-1] if self.tensors else TensorParity("")
        outputs = [sums.result() for sums in self.outputs.values()]
        return {
            "integer_match": 1 - sum(t.different for t in self.tensors) / total,
            "alone_match": 1 - sum(t.different_alone for t in self.tensors) / total,
            "last_integer_match": 1 - last.different / (last.count or float("nan")),
            "float_simulation_match": 1 - sum(t.different_float for t in self.tensors) / total,
            "max_lsb_difference": max((t.largest for t in self.tensors), default=0),
            "weights_match": self.weights_match(),
            "first_difference": next((t.name for t in self.tensors if t.different), ""),
            "overflows": self._computes_otherwise(outputs) and self.may_overflow(),
            "output_difference": max(output.difference for output in outputs),
            "outputs": outputs,
            "default_session": self.default_session,
            "tensors": self.tensors,
            "unseen": [name.removeprefix("quantizers.") for name in self.unseen],
        }

    def _computes_otherwise(self, outputs: Sequence[OutputParity]) -> bool:
        """Return True where a layer alone gives other integers, or an output is another."""
        return any(tensor.different_alone for tensor in self.tensors) or any(map(differs_from_exact, outputs))

    def may_overflow(self) -> bool:
        """Return True where a pair of products of an executed kernel can be too large for the 16 bits that hold it."""
        if not self.runtime.sums_in_16_bits():
            return False
        found = list(quantizers(self.qmodel).values())
        activations = [q.scheme for q in found if not q.weight]
        # Kernels see activations as unsigned bytes. A signed integer has 128 added to it, on grids of fewer than 8 bits
        # too, whose codes then lie around 128.
        code = max((scheme.quant_max + 128 * scheme.signed for scheme in activations), default=0)
        # Weights are symmetric, so quant_max bounds them.
        largest = max((q.scheme.quant_max for q in found if q.weight), default=0)
        if any(product.integer for product in self.file.executed_products()):
            # In a product of two activations, signed bytes, up to 128 of 255 steps, take the place of the weights.
            steps = max((scheme.quant_max - scheme.quant_min for scheme in activations), default=0)
            largest = max(largest, (steps + 1) // 2)
        return not pair_fits(code, largest)

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
            # The deployed weight lies on its grid already, so this division finds integers back and decides nothing.
            integers = torch.round(module.weight / quantizer.scale.reshape(shape))
            # A converter that merges a layer with a BatchNorm gives it a new name: any weight under a new name may be
            # its own.
            candidates = [stored[layer]] if layer in stored else renamed
            if not any(torch.equal(one.flatten(), integers.flatten()) for one in candidates):
                return False
        return True


def in_graph_order(model: nn.Module) -> dict[str, ExportedQuantizer]:
    """Return the quantizers of activations by name, in the order of the graph."""
    calls = [module_of(n) for region in regions(model).values() for n in region.graph.nodes if n.op == "call_module"]
    return {q.name: q for q in calls if isinstance(q, ExportedQuantizer) and not (q.weight or q.repeats)}
