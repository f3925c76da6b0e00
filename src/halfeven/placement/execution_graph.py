"""Reorder the operators of a quantized graph for faster execution.

The graph that algorithms, plans and exporters read stays as it is; only the generated code differs. In eval mode all
values are equal bit for bit: rounding is monotonic, so quantizing commutes with a maximum and with a clip. In training
recurrent cells drop out what the float model's do.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import fx, nn

from halfeven.graph.operators.layers import RECURRENT
from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.torch_private import parameters_of
from halfeven.graph.view import Op
from halfeven.placement.make_plan import regions
from halfeven.quantization.quantizer import Quantizer


def fused_graph(region: CapturedModule) -> fx.Graph:
    """Return a copy of a region's graph in the order of execution.

    A quantizer whose only reader is a max pool runs after the pool, on a fraction of the elements; so does the
    activation before the quantizer. A clipping activation whose only reader is a quantizer becomes the quantizer's
    clip, so that its result is neither written nor kept for the backward pass. Recurrent cells, whose operators were
    recorded in eval mode, follow the region's mode.
    """
    graph = copy.deepcopy(region.graph)
    # deepcopy leaves the owner out, through which `Op` finds the modules that nodes call.
    graph.owning_module = region
    for node in list(graph.nodes):
        if Op(node).is_function and Op(node).row in RECURRENT:
            _follow_mode(node, region)
        if _is_quantizer(node):
            _sink_below_pools(node)
            _fuse_clip(node)
    return graph


@contextmanager
def as_planned(model: nn.Module) -> Iterator[None]:
    """Run a model's graphs unchanged within the context, so that hooks on its quantizers see the plan's tensors."""
    fused = [region for region in regions(model).values() if region.execution_graph is not None]
    _set_execution_graph(fused, None)
    try:
        yield
    finally:
        _set_execution_graph(fused, fused_graph)


def _set_execution_graph(fused: Iterable[CapturedModule], graph: Callable[[CapturedModule], fx.Graph] | None) -> None:
    for region in fused:
        region.execution_graph = graph
        region.recompile()


def _follow_mode(cells: fx.Node, region: CapturedModule) -> None:
    """Give recurrent cells the mode of their region: for dropout between layers, and for cuDNN's backward pass.

    cuDNN refuses a backward pass through cells that ran in eval mode.
    """
    path = Op(cells).path
    if any(path == frozen or path.startswith(f"{frozen}.") for frozen in region.stays_in_eval):
        return
    # The schema of recurrent operators has the mode as the argument "train", which capture has recorded as False.
    place = [parameter.name for parameter in parameters_of(cells.target)].index("train")
    with cells.graph.inserting_before(cells):
        mode = cells.graph.create_node("get_attr", "training")
    cells.update_arg(place, mode)


def _is_quantizer(node: fx.Node) -> bool:
    return isinstance(Op(node).module, Quantizer)


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _sink_below_pools(quantizer: fx.Node) -> None:
    """Reorder `clip -> quantizer -> pool` to `pool -> clip -> quantizer`, pool after pool."""
    while (pool := _only_reader(quantizer)) is not None and Op(pool).row.takes_maximum:
        source = quantizer.all_input_nodes[0]
        moved = [quantizer]
        if Op(source).bounds is not None and _only_reader(source) is quantizer:
            moved = [source, quantizer]
        before = moved[0].all_input_nodes[0]
        # The quantizer gets the pool's readers, the pool reads what stood before both, and the quantizer, or its clip,
        # reads the pool.
        pool.replace_all_uses_with(quantizer)
        pool.replace_input_with(quantizer, before)
        moved[0].replace_input_with(before, pool)
        # Each is put directly behind the pool, so the last comes first.
        for node in reversed(moved):
            pool.append(node)


def _fuse_clip(quantizer: fx.Node) -> None:
    activation = quantizer.all_input_nodes[0]
    bounds = Op(activation).bounds
    if bounds is None or _only_reader(activation) is not quantizer:
        return
    # `Quantizer.forward(x, clip)` clips and quantizes in one kernel.
    quantizer.args = (activation.all_input_nodes[0], bounds)
    quantizer.graph.erase_node(activation)
