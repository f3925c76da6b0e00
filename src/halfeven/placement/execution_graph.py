"""How a quantized graph runs, where another order of the same operators is faster.

The graph that algorithms, plans and exporters read stays as it is; only the code made of it differs. Values are the
same bit for bit: rounding is monotonic, so quantizing commutes with a maximum and with a clip.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import fx, nn

from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.view import Op
from halfeven.placement.make_plan import regions
from halfeven.quantization.quantizer import Quantizer


def fused_graph(region: CapturedModule) -> fx.Graph:
    """A copy of a region's graph in the order in which it is run.

    A quantizer before a max pool, which alone reads it, runs after it, on a fraction of the elements, and so does the
    activation before the quantizer. An activation that clips, and that one quantizer alone reads, becomes the
    quantizer's own clip: its result is neither written nor kept for the backward pass.
    """
    graph = copy.deepcopy(region.graph)
    graph.owning_module = region
    for node in list(graph.nodes):
        if _is_quantizer(node):
            _sink_below_pools(node)
            _fuse_clip(node)
    return graph


@contextmanager
def as_planned(model: nn.Module) -> Iterator[None]:
    """Within, a model runs its graphs as they are, so that hooks on its quantizers see the tensors of the plan."""
    fused = [region for region in regions(model).values() if region.execution_graph is not None]
    _run_as(fused, None)
    try:
        yield
    finally:
        _run_as(fused, fused_graph)


def _run_as(fused: Iterable[CapturedModule], graph: Callable[[CapturedModule], fx.Graph] | None) -> None:
    for region in fused:
        region.execution_graph = graph
        region.recompile()


def _is_quantizer(node: fx.Node) -> bool:
    return isinstance(Op(node).module, Quantizer)


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _sink_below_pools(quantizer: fx.Node) -> None:
    """From `clip -> quantizer -> pool` to `pool -> clip -> quantizer`, pool after pool."""
    while (pool := _only_reader(quantizer)) is not None and Op(pool).row.takes_maximum:
        source = quantizer.all_input_nodes[0]
        moved = [quantizer]
        if Op(source).bounds is not None and _only_reader(source) is quantizer:
            moved = [source, quantizer]
        before = moved[0].all_input_nodes[0]
        pool.replace_all_uses_with(quantizer)
        pool.replace_input_with(quantizer, before)
        moved[0].replace_input_with(before, pool)
        for node in reversed(moved):
            pool.append(node)


def _fuse_clip(quantizer: fx.Node) -> None:
    activation = quantizer.all_input_nodes[0]
    bounds = Op(activation).bounds
    if bounds is None or _only_reader(activation) is not quantizer:
        return
    quantizer.args = (activation.all_input_nodes[0], bounds)
    quantizer.graph.erase_node(activation)
