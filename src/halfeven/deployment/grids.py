"""The grid that a tensor of a deployed model lies on: which quantizer's integers it holds."""

from torch import fx

from halfeven.deployment.quantize_op import ExportedQuantizer
from halfeven.graph.operators import TRANSPARENT, OperatorKind
from halfeven.graph.view import kind_of, module_of


def quantizer_at(node: fx.Node) -> ExportedQuantizer | None:
    """Return the quantizer of an activation that a node calls, or None."""
    if node.op != "call_module" or not isinstance(module := module_of(node), ExportedQuantizer) or module.weight:
        return None
    return module


def grid_of(node: fx.Node) -> ExportedQuantizer | None:
    """Return the quantizer on whose grid the values of a node lie, or None.

    It is looked for upwards, through operators that keep the scale.
    """
    if (found := quantizer_at(node)) is not None:
        return found
    kind = kind_of(node)
    if kind is OperatorKind.CONCAT:
        # The result lies on a grid where all operands lie on the same.
        grids = [grid_of(operand) for operand in node.all_input_nodes]
        alike = {None if grid is None else grid.grid_number for grid in grids}
        return grids[0] if len(alike) == 1 else None
    return grid_of(node.all_input_nodes[0]) if kind in TRANSPARENT and node.all_input_nodes else None
