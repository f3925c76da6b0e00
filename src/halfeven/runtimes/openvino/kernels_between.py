"""The plugin's own kernels between quantizers: parts of a file, cut out and run for the exact simulation.

The plugin fuses elementwise operators between layers into kernels that it compiles for the processor. The order of
their operations, fused multiply-adds and merged constants differ from kernel to kernel, and move one integer in ten
million. A part of the file, from the quantizers before to the quantizer behind, is therefore run by the plugin itself.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from halfeven.deployment.exported_program import exported_program
from halfeven.deployment.quantize_op import ExportedQuantizer
from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.torch_private import pytree
from halfeven.runtimes.openvino.exact_values import Codes
from halfeven.runtimes.openvino.executed import operators_in
from halfeven.runtimes.openvino.session import as_file, compile_model, read, run_compiled, with_outputs
from halfeven.runtimes.openvino.sums_in_kernels import MARK_LEVELS
from halfeven.runtimes.openvino.writer import convert
from halfeven.runtimes.simulation import Simulation


@dataclass(frozen=True, eq=False)
class _Node:
    """An operator of the file, and its neighbours by their unique names."""

    operator: Any
    kind: str
    sources: tuple[str, ...]
    readers: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Extent:
    """The operators of a part. All quantizers are named as operators."""

    end: str
    """The quantizer whose integers are computed."""
    reads: tuple[str, ...]
    """The quantizers before."""
    inputs: tuple[str, ...]
    """The inputs of the model that are read."""
    shared: tuple[str, ...]
    """The quantizers before that are read by more of the file than the part."""
    others: tuple[str, ...]
    """Operators whose results are read by more of the file than the part: they are outputs too, since the plugin fuses
    no operator with several readers."""


@dataclass(frozen=True, eq=False)
class _Part:
    """A compiled part, and the names of the quantizers and the positions of the model's inputs that it reads."""

    compiled: Any
    tensors: tuple[str, ...]
    inputs: tuple[int, ...]


class KernelsBetween:
    """The parts of the file that a region is in, each made when it is first needed.

    They are cut out of the simulated file where there is one, and else out of the region's own.
    """

    def __init__(self, region: CapturedModule, simulation: Simulation) -> None:
        self.region = region
        self.simulation = simulation
        self.parts: dict[tuple[str, bool], _Part | None] = {}
        self.model: Any = None
        self.whole = False
        """True where `model` is the whole model's file."""
        self.nodes: dict[str, _Node] = {}
        self.quantizers: dict[str, str] = {}
        """Name of a quantizer -> its operator's name in the file."""
        self.orders: dict[str, tuple[int, ...]] = {}
        """The permutation of axes that the front end moved from before a quantizer to behind it."""
        self.in_convolutions: dict[bool, Set[str]] = {}
        """Operators in kernels of convolutions, where all quantized tensors are outputs (True) and as users run it."""

    def compute(self, quantizer: str, inputs: Sequence[Any]) -> Tensor | None:
        """Return the real values behind a quantizer as the plugin computes them.

        None where the converter merged the quantizer with others, so that the file has none of that name.

        Args:
            quantizer: its name; the tensors before it were simulated.
            inputs: the values of the region's placeholders.
        """
        if self.model is None:
            self._open_file([x for x in inputs if isinstance(x, Tensor)])
        watched = self.simulation.watched
        if (quantizer, watched) not in self.parts:
            self.parts[quantizer, watched] = self._part_before(quantizer, watched)
        part = self.parts[quantizer, watched]
        if part is None:
            return None
        # The whole model's file reads the inputs of the model, the region's own file those of the region.
        given = [x for x in (self.simulation.inputs if self.whole else inputs) if isinstance(x, Tensor)]
        read = [self._before_permutation(name, self._real_values(name)) for name in part.tensors]
        result = run_compiled(part.compiled, [*read, *(given[index] for index in part.inputs)])[0]
        order = self.orders.get(quantizer)
        return result if order is None else result.permute(order)

    def is_in_convolution(self, quantizer: str, inputs: Sequence[Any]) -> bool:
        """Return True if a convolution's kernel computes a quantizer, in the file that is simulated."""
        if self.model is None:
            self._open_file([x for x in inputs if isinstance(x, Tensor)])
        watched = self.simulation.watched
        if watched not in self.in_convolutions:
            model = self.model.clone()
            with_outputs(model, list(self.quantizers) if watched else [])
            self.in_convolutions[watched] = operators_in(compile_model(model), "Convolution")
        return quantizer in self.in_convolutions[watched]

    def _real_values(self, name: str) -> Tensor:
        tensor = self.simulation.tensors[name]
        assert isinstance(tensor, Codes)
        return tensor.before_loss()

    def _before_permutation(self, name: str, values: Tensor) -> Tensor:
        order = self.orders.get(name)
        return values if order is None else values.permute([order.index(axis) for axis in range(len(order))])

    def _open_file(self, inputs: Sequence[Tensor]) -> None:
        """Open the file and read its graph."""
        path = self.simulation.file
        self.whole = path is not None and path.suffix == ".xml"
        self.model = read(path) if path is not None and self.whole else file_of(self.region, inputs)
        operators = self.model.get_ordered_ops()
        self.nodes = {node.get_name(): _describe_node(node) for node in operators}
        for node in operators:
            if not node.get_output_size():
                continue
            # The front end may move a transposition from before a FakeQuantize to behind it. The tensor's name is then
            # that of the transposition's result.
            source = node.input_value(0).get_node() if node.get_type_name() == "Transpose" else node
            if not _is_quantizer(source):
                continue
            for name in node.output(0).get_names():
                self.quantizers[name] = source.get_name()
                if source is not node:
                    self.orders[name] = tuple(node.input_value(1).get_node().get_data().tolist())

    def _part_before(self, quantizer: str, watched: bool) -> _Part | None:
        if quantizer not in self.quantizers:
            return None
        # Quantizers whose integers are simulated already, by name, with their operators in the file.
        known = {name: node for name, node in self.quantizers.items() if name in self.simulation.tensors}
        extent = _extent_before(
            self.nodes, set(self.quantizers.values()), self.quantizers[quantizer], set(known.values())
        )
        names = {node: name for name, node in known.items()}
        positions = [port.get_node().get_name() for port in self.model.inputs]
        return _Part(
            compile_model(_cut_out(self.nodes, extent, watched)),
            tuple(names[node] for node in extent.reads),
            tuple(positions.index(name) for name in extent.inputs),
        )


def _is_quantizer(node: Any) -> bool:
    """Return True for a quantizer; the mark of a sum in a kernel is none, and does not end a part."""
    return node.get_type_name() == "FakeQuantize" and bool(node.get_attributes()["levels"] != MARK_LEVELS)


def file_of(region: CapturedModule, inputs: Sequence[Tensor]) -> Any:
    """Return a region as OpenVINO reads it from a file."""
    named = {q.number: q.name for q in region.modules() if isinstance(q, ExportedQuantizer)}
    names = [named.get(number, "") for number in range(max(named) + 1)]
    return as_file(convert(_region_program(region, inputs), names))


def _extent_before(nodes: Mapping[str, _Node], quantizers: set[str], end: str, known: set[str]) -> _Extent:
    """Return the extent of the part that ends at a quantizer.

    It holds all that leads from quantizers to `end`, and all that reads tensors between, as far as it depends on known
    quantizers alone: what the plugin fuses depends on the readers of a tensor, too.
    """
    computed: set[str] = set()  # from the inputs of the model
    late: set[str] = set()  # from quantizers that are not known yet
    for name, node in nodes.items():
        # Forwards, in the order of the file: operators that depend on inputs, and on quantizers that are not simulated
        # yet.
        if node.kind == "Parameter" or any(source in computed for source in node.sources):
            computed.add(name)
        unknown = (quantizers - known) & computed
        if any(source in late or source in unknown for source in node.sources):
            late.add(name)
    # Backwards from the end, up to known quantizers and inputs; and from each tensor on the way forwards to its other
    # readers.
    reads: set[str] = set()
    inputs: set[str] = set()
    others: set[str] = set()
    ends = {end}
    seen: set[tuple[str, bool]] = set()
    waiting = [(end, True)]
    while waiting:
        name, followed = waiting.pop()
        if (name, followed) in seen:
            continue
        seen.add((name, followed))
        node = nodes[name]
        for source in node.sources:
            if source in known:
                reads.add(source)
            elif nodes[source].kind == "Parameter":
                inputs.add(source)
            elif source in computed:
                # ShapeOf reads a size, not values: other readers of its tensor do not matter for it.
                waiting.append((source, followed and node.kind != "ShapeOf"))
        if name in ends or not followed:
            continue
        for reader in node.readers:
            if reader in late or nodes[reader].kind == "Result":
                others.add(name)
                continue
            if reader in quantizers:
                ends.add(reader)
            waiting.append((reader, True))
    # Quantizers at which other readers end have to be computed too: without them their tensors would have fewer
    # readers.
    others |= ends - {end}
    part = {name for name, _ in seen}
    shared = {name for name in reads if not part.issuperset(nodes[name].readers)}
    return _Extent(end, *(tuple(sorted(names)) for names in (reads, inputs, shared, others)))


def _cut_out(nodes: Mapping[str, _Node], extent: _Extent, watched: bool) -> Any:
    """Return a part as a model of its own. Its first output is its quantizer's.

    It reads real values on the grids of the quantizers before, each through a quantizer like the file's.
    """
    import openvino
    from openvino import opset13 as opset

    parameters = []
    again = []
    ends = [nodes[name].operator.output(0) for name in (extent.end, *extent.others)]
    moved: list[tuple[Any, Any]] = []
    for name in extent.reads:
        operator = nodes[name].operator
        parameters.append(opset.parameter(operator.input_value(0).get_partial_shape(), np.float32))
        limits = [operator.input_value(index) for index in range(1, 5)]
        again.append(opset.fake_quantize(parameters[-1], *limits, levels=operator.get_attributes()["levels"]))
        moved += [(port, operator.output(0)) for port in operator.output(0).get_target_inputs()]
        for port in operator.output(0).get_target_inputs():
            port.replace_source_output(again[-1].output(0))
    # The plugin brings that operand of a sum to the other's scale which has no other reader.
    ends += [new.output(0) for name, new in zip(extent.reads, again, strict=True) if watched or name in extent.shared]
    inputs = [nodes[name].operator for name in extent.inputs]
    # The part is cloned, so that the file's graph can be put together again for the next part.
    part = openvino.Model([opset.result(end) for end in ends], [*parameters, *inputs], "part").clone()
    for port, source in moved:
        port.replace_source_output(source)
    return part


def _describe_node(node: Any) -> _Node:
    sources = tuple(port.get_source_output().get_node().get_name() for port in node.inputs())
    readers = [reader.get_node() for port in node.outputs() for reader in port.get_target_inputs()]
    return _Node(node, node.get_type_name(), sources, tuple(reader.get_name() for reader in readers))


def _region_program(region: CapturedModule, inputs: Sequence[Tensor]) -> torch.export.ExportedProgram:
    """Return a region as a program of its placeholders, which returns all that the region returns in a tuple."""
    graph = fx.Graph()
    result = graph.graph_copy(region.graph, {})
    graph.output(tuple(leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, fx.Node)))
    # The sizes that are free in the file: the same kernels run at all of them, and the parts serve later batches.
    free = [tuple(known.free) for known in region.region_inputs if known is not None]
    return exported_program(
        fx.GraphModule(region, graph).eval(), tuple(inputs), {}, free if len(free) == len(inputs) else None
    )
