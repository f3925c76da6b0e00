"""Write resampling to the nearest element at uneven ratios as a choice of rows and columns.

torch chooses element floor(i * (size / new size)) for place i, and runtimes floor(i / (new size / size)), in float32
each: where i * size / new size is a whole number, rounding may take the runtimes to the element before.
"""

import operator
from typing import Any

import torch
from torch import fx

from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.rewrite import calls_before, take_the_place_of
from halfeven.graph.view import Op, record_value

aten = torch.ops.aten

NEAREST = (aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec)


def lower_uneven_resampling(region: CapturedModule) -> int:
    """Write resampling to given sizes whose elements runtimes may choose otherwise as `index_select`, in place.

    Returns:
        The number of operators that were written out.
    """
    written = 0
    for node in [node for node in region.graph.nodes if node.target in NEAREST]:
        values = Op(node).arguments
        if values["output_size"] is None or Op(node).inputs[0].node is not node.args[0]:
            continue  # by a factor, which all take as it is
        ndim = Op(node).ndim
        sizes = [(axis, Op(node.args[0]).shape[axis], Op(node).shape[axis]) for axis in range(2, ndim)]
        if not any(_may_differ(old, new) for _, old, new in sizes):
            continue
        result = node.args[0]
        with region.graph.inserting_before(node):
            for (axis, old, new), given in zip(sizes, values["output_size"], strict=True):
                result = _chosen(node, result, axis, (old, new), given)
        take_the_place_of(node, result)
        written += 1
    region.recompile()
    return written


def _may_differ(old: Any, new: Any) -> bool:
    """Return True where runtimes may choose other elements; of free sizes, where the example becomes smaller."""
    if not (isinstance(old, int) and isinstance(new, int)):
        return bool(_hint(new) < _hint(old))
    places = torch.arange(new, dtype=torch.float32)
    return not torch.equal((places * (old / new)).floor(), (places / torch.tensor(new / old)).floor())


def _hint(size: Any) -> Any:
    return size if isinstance(size, int) else size.node.hint


def _chosen(node: fx.Node, x: Any, axis: int, sizes: tuple[Any, Any], given: Any) -> fx.Node:
    """Return the elements along one axis that torch's nearest element is."""
    call = calls_before(node)
    old, new = sizes
    if isinstance(old, int) and isinstance(new, int):
        ratio: Any = old / new
    else:
        size = old if isinstance(old, int) else call(aten.sym_size.int, x, axis)
        ratio = node.graph.call_function(operator.truediv, (size, given))
        record_value(ratio, old / new)
    places = node.graph.call_function(
        aten.arange.default, (given,), {"dtype": torch.float32, "device": Op(x).value.device}
    )
    with Op(x).value.fake_mode:
        record_value(places, torch.arange(new, dtype=torch.float32, device=Op(x).value.device))
    index = call(aten.floor.default, call(aten.mul.Tensor, places, ratio))
    return call(aten.index_select.default, x, axis, call(aten.to.dtype, index, torch.int64))
