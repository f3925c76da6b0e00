"""The share of a model's work that ran in integers, and the operators that did the rest."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from halfeven.deployment.layer_calls import named_calls
from halfeven.graph.cost import multiply_accumulates
from halfeven.graph.data_flow import is_read_for_its_size
from halfeven.graph.operators import WEIGHTED, OperatorKind
from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.view import Op, tensor_names
from halfeven.placement.feature_maps import computed_tensors
from halfeven.placement.make_plan import qualified
from halfeven.runtimes.layer_execution import LayerExecution
from halfeven.verification.python_work import PythonWork


@dataclass
class ModelWork:
    """Multiply-accumulates: of the whole model, those in integers, and those in float by the operator's name."""

    whole: float = 0.0
    integer: float = 0.0
    in_float: dict[str, float] = field(default_factory=dict)

    @property
    def integer_share(self) -> float:
        """The share that ran with integer kernels; 0 for a model without work."""
        return self.integer / self.whole if self.whole else 0.0

    def float_shares(self) -> dict[str, float]:
        """Return the shares of the operators that ran in float, by name, the largest first."""
        ordered = sorted(self.in_float.items(), key=lambda row: -row[1])
        return {name: count / self.whole for name, count in ordered}

    def add(self, name: str, count: float, integer: float) -> None:
        """Count an operator's work, of which a share between 0 and 1 ran in integers."""
        self.whole += count
        self.integer += count * integer
        if integer < 1:
            self.in_float[name] = self.in_float.get(name, 0.0) + count * (1 - integer)


def work_of(
    parts: dict[str, CapturedModule],
    layers: Sequence[LayerExecution],
    products: Sequence[LayerExecution],
    beside: PythonWork,
) -> ModelWork:
    """Return the multiply-accumulates of a deployed model, by the runtime's account of what ran in integers.

    Args:
        parts: the deployed model's regions by name, their quantizers written as operators.
        layers: the runtime's account of the calls of layers with quantized weights; calls that it left out are not
            in it.
        products: its account of products of activations. A runtime names them as it likes, so their work is counted by
            the share of the graph's products that ran in integers.
        beside: the work of a model that was captured in parts.
    """
    ran = {layer.layer: layer.integer for layer in layers}
    calls = named_calls(parts)
    of_activations = {node for region in parts.values() for node in _products_of_activations(region)}
    in_integers = sum(product.integer for product in products)
    # A share of the graph's products, so at most 1, however many kernels the runtime makes of them.
    of_products = min(in_integers / len(of_activations), 1.0) if of_activations else 0.0
    work = ModelWork()
    for prefix, region in parts.items():
        names = {node: qualified(prefix, name) for name, node in tensor_names(region.graph).items()}
        counts = {node: count for node in region.graph.nodes if (count := multiply_accumulates(node))}
        # The graph has the work of one call, for the samples that it was traced with.
        calls_of_region = beside.in_regions[prefix] / sum(counts.values()) if beside.in_regions and counts else 1.0
        for node, count in counts.items():
            left_out = node in calls and calls[node] not in ran  # an equal call computes it
            if left_out or (Op(node).kind in WEIGHTED and is_read_for_its_size(node)):
                continue
            integer = of_products if node in of_activations else float(ran.get(calls.get(node, ""), False))
            work.add(calls.get(node, names[node]), count * calls_of_region, integer)
    # What stayed Python runs in float.
    for name, count in beside.in_python.items():
        work.add(name, count, 0.0)
    return work


def _products_of_activations(region: CapturedModule) -> list[fx.Node]:
    """Return the matrix products of a region whose factors are both computed."""
    computed = computed_tensors(region.graph)
    products = [node for node in region.graph.nodes if Op(node).kind is OperatorKind.MATMUL]
    return [node for node in products if computed.issuperset(node.all_input_nodes)]
