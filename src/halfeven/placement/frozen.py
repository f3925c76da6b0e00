"""Keep the learned scales of frozen layers frozen: a backbone whose parameters do not train stays the same function."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from torch import fx, nn

from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.view import Op, operations
from halfeven.quantization.quantizer import Quantizer


def freeze_scales(region: CapturedModule, new: Iterable[Quantizer]) -> None:
    """Freeze the learned scales of quantizers that belong to frozen layers alone.

    The scale of a weight is frozen with the weight, and with a BatchNorm that is folded into it live. The scale of a
    tensor is frozen if no parameter before it trains, and no layer that reads it.

    Args:
        region: the captured module.
        new: the quantizers to decide about; those of other regions are ignored.
    """
    wanted = set(new)
    calls: dict[Quantizer, list[fx.Node]] = defaultdict(list)
    for op in operations(region.graph):
        module = op.module
        if isinstance(module, Quantizer):
            calls[module].append(op.node)
        elif getattr(module, "weight_quantizer", None) in wanted:
            _freeze_with(module.weight_quantizer, _weight_parameters(module))
    # A tensor that depends on a trained parameter changes in training, and its range with it.
    before = _depend_on_trained(region.graph)
    for quantizer, nodes in calls.items():
        if quantizer in wanted and not any(before[node] for node in nodes):
            _freeze_with(
                quantizer, [p for node in nodes for p in (*_parameters_upstream(node), *_parameters_downstream(node))]
            )


def _freeze_with(quantizer: Quantizer, parameters: Iterable[nn.Parameter]) -> None:
    found = [parameter.requires_grad for parameter in parameters]
    if found and not any(found):
        quantizer.requires_grad_(False)


def _weight_parameters(layer: Any) -> list[nn.Parameter]:
    norms = layer.live_norms[:1]
    return [layer.weight, *(norm.weight for norm in norms if norm.weight is not None)]


def _parameters_read_by(op: Op) -> list[nn.Parameter]:
    """Return the parameters that a node reads, without those of quantizers."""
    found = [op.constant] if op.is_constant else []
    found += [source.constant for source in op.inputs if source.is_constant]
    if op.module is not None and not isinstance(op.module, Quantizer):
        found += op.module.parameters(recurse=False)
    return [value for value in found if isinstance(value, nn.Parameter)]


def _depend_on_trained(graph: fx.Graph) -> dict[fx.Node, bool]:
    """Return for each node if its result depends on a parameter that trains."""
    trains: dict[fx.Node, bool] = {}
    for op in operations(graph):
        own = any(parameter.requires_grad for parameter in _parameters_read_by(op))
        trains[op.node] = own or any(trains[source.node] for source in op.inputs)
    return trains


def _parameters_upstream(node: fx.Node) -> list[nn.Parameter]:
    """Return the parameters of the nearest nodes before a tensor that have any."""
    return _nearest_parameters(
        [source.node for source in Op(node).inputs], lambda op: [source.node for source in op.inputs]
    )


def _parameters_downstream(node: fx.Node) -> list[nn.Parameter]:
    """Return the parameters of the layers that read a tensor, past operators without parameters, up to a quantizer."""
    return _nearest_parameters(
        [reader.node for reader in Op(node).readers],
        lambda op: [] if isinstance(op.module, Quantizer) else [reader.node for reader in op.readers],
    )


def _nearest_parameters(start: list[fx.Node], step: Any) -> list[nn.Parameter]:
    """Return the parameters that are read first on each way from the start, node by node along `step`."""
    found: list[nn.Parameter] = []
    waiting = list(start)
    seen = set(waiting)
    while waiting:
        op = Op(waiting.pop())
        own = _parameters_read_by(op)
        found += own
        further = [] if own else [node for node in step(op) if node not in seen]
        seen.update(further)
        waiting += further
    return found
