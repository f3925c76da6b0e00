"""Write operators on complex numbers as operators on their real and imaginary parts.

Rotary position embeddings are often a product of complex numbers (RoFormer, arXiv 2104.09864, section 3.2.2). OpenVINO
converts few operators on them, and no runtime computes faster with them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.rewrite import calls_before
from halfeven.graph.view import Op

aten = torch.ops.aten
Parts = tuple[Any, Any]
"""The nodes of a complex tensor's real and imaginary parts."""
Known = dict[Any, Parts]
"""The parts of the nodes that are written out so far; of a real result the second is None."""
Call = Callable[..., fx.Node]
Rule = Callable[[Call, Any, Known], Parts]


class _Unknown(Exception):
    """An operator on complex numbers that is not written out."""


def lower_complex(region: CapturedModule) -> int:
    """Write a graph's operators on complex numbers with their real and imaginary parts, in place.

    A graph with an operator on complex numbers that is not known here, such as a Fourier transform, stays as it is.

    Returns:
        The number of operators that were written out.
    """
    nodes = [node for node in region.graph.nodes if _is_complex(node) or any(map(_is_complex, node.all_input_nodes))]
    parts: Known = {}
    try:
        for node in nodes:
            _write_out(node, parts)
    except _Unknown:
        parts.clear()
        region.graph.eliminate_dead_code()  # what was written so far has no readers
        region.recompile()
        return 0
    for node in nodes:
        if not _is_complex(node):
            node.replace_all_uses_with(parts[node][0])
    for node in reversed(nodes):
        if not Op(node).is_constant or not node.users:
            region.graph.erase_node(node)
    region.recompile()
    return sum(not Op(node).is_constant for node in nodes)


def _is_complex(node: fx.Node) -> bool:
    return any(isinstance(x, Tensor) and x.is_complex() for x in _values(Op(node).value))


def _values(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _write_out(node: fx.Node, parts: Known) -> None:
    """Add a node's result to `parts`: both parts of a complex result, or a real one with None."""
    with node.graph.inserting_before(node.next if Op(node).is_constant else node):
        call = calls_before(node)
        if Op(node).is_constant:
            parts[node] = _halves(call, call(aten.view_as_real.default, node))
            return
        rule = RULES.get(node.target)
        if rule is not None:
            found = rule(call, node, parts)
        elif node.target in FOR_EACH_PART and _is_complex(node):
            real, imaginary = (call(node.target, *_with_part(node, parts, index)) for index in (0, 1))
            found = real, imaginary
        else:
            raise _Unknown
    parts[node] = found


def _halves(call: Call, pairs: fx.Node) -> Parts:
    return call(aten.select.int, pairs, -1, 0), call(aten.select.int, pairs, -1, 1)


def _with_part(node: fx.Node, parts: Known, index: int) -> list[Any]:
    """Return a node's arguments with one part in the place of each complex tensor."""
    if node.kwargs or any(not _is_complex(source) and Op(source).is_tensor for source in node.all_input_nodes):
        raise _Unknown
    return list(fx.node.map_arg(node.args, lambda source: parts[source][index] if source in parts else source))


def _operands(node: fx.Node, parts: Known) -> list[Parts]:
    """Return both parts of the two operands of an elementwise operator; a real operand has 0 for its second."""
    if node.kwargs or len(node.args) != 2:
        raise _Unknown
    found: list[Parts] = []
    for value in node.args:
        if isinstance(value, fx.Node) and _is_complex(value):
            found.append(parts[value])
        else:
            found.append((value.real, value.imag) if isinstance(value, complex) else (value, 0))
    return found


def _is_zero(value: Any) -> bool:
    return isinstance(value, int | float) and value == 0


def _product(call: Call, a: Any, b: Any) -> Any:
    if _is_zero(a) or _is_zero(b):
        return 0
    return call(aten.mul.Tensor, a, b) if isinstance(a, fx.Node) else call(aten.mul.Tensor, b, a)


def _sum(call: Call, a: Any, b: Any) -> Any:
    if _is_zero(b):
        return a
    if _is_zero(a):
        return b
    return call(aten.add.Tensor, a, b) if isinstance(a, fx.Node) else call(aten.add.Tensor, b, a)


def _difference(call: Call, a: Any, b: Any) -> Any:
    if _is_zero(b):
        return a
    if _is_zero(a):
        return call(aten.neg.default, b)
    return call(aten.sub.Tensor, a, b) if isinstance(a, fx.Node) else call(aten.rsub.Scalar, b, a)


def _multiply(call: Call, node: Any, parts: Known) -> Parts:
    # (a + bi) (c + di) = (ac - bd) + (ad + bc) i
    (a, b), (c, d) = _operands(node, parts)
    real = _difference(call, _product(call, a, c), _product(call, b, d))
    return real, _sum(call, _product(call, a, d), _product(call, b, c))


def _add(call: Call, node: Any, parts: Known) -> Parts:
    (a, b), (c, d) = _operands(node, parts)
    return _broadcast(call, node, _sum(call, a, c), _sum(call, b, d))


def _subtract(call: Call, node: Any, parts: Known) -> Parts:
    (a, b), (c, d) = _operands(node, parts)
    return _broadcast(call, node, _difference(call, a, c), _difference(call, b, d))


def _broadcast(call: Call, node: fx.Node, *found: Any) -> Parts:
    """Refuse a sum of which one part lacks the other operand's axes."""
    if any(not isinstance(part, fx.Node) or Op(part).shape != Op(node).shape for part in found):
        raise _Unknown
    return found[0], found[1]


def _divide(call: Call, node: Any, parts: Known) -> Parts:
    (a, b), (c, d) = _operands(node, parts)
    if not _is_zero(d):
        raise _Unknown
    return call(aten.div.Tensor, a, c), call(aten.div.Tensor, b, c)


def _polar(call: Call, node: Any, parts: Known) -> Parts:
    size, angle = node.args
    cosine = call(aten.cos.default, angle)
    return call(aten.mul.Tensor, size, cosine), call(aten.mul.Tensor, size, call(aten.sin.default, angle))


def _square(call: Call, x: Any) -> Any:
    return call(aten.mul.Tensor, x, x)


def _absolute(call: Call, node: Any, parts: Known) -> Parts:
    real, imaginary = parts[node.args[0]]
    return call(aten.sqrt.default, call(aten.add.Tensor, _square(call, real), _square(call, imaginary))), None


def _conjugate(call: Call, node: Any, parts: Known) -> Parts:
    real, imaginary = parts[node.args[0]]
    return real, call(aten.neg.default, imaginary)


RULES: dict[Any, Rule] = {
    aten.view_as_complex.default: lambda call, node, parts: _halves(call, node.args[0]),
    aten.view_as_real.default: lambda call, node, parts: (
        call(aten.stack.default, list(parts[node.args[0]]), -1),
        None,
    ),
    aten.complex.default: lambda call, node, parts: (node.args[0], node.args[1]),
    aten.real.default: lambda call, node, parts: (parts[node.args[0]][0], None),
    aten.imag.default: lambda call, node, parts: (parts[node.args[0]][1], None),
    aten.angle.default: lambda call, node, parts: (call(aten.atan2.default, *parts[node.args[0]][::-1]), None),
    aten.abs.default: _absolute,
    aten.polar.default: _polar,
    aten.mul.Tensor: _multiply,
    aten.add.Tensor: _add,
    aten.sub.Tensor: _subtract,
    aten.div.Tensor: _divide,
    aten.conj.default: _conjugate,
    aten._conj.default: _conjugate,
    aten.conj_physical.default: _conjugate,
    aten._conj_physical.default: _conjugate,
    aten.resolve_conj.default: lambda call, node, parts: parts[node.args[0]],
    aten.resolve_neg.default: lambda call, node, parts: parts[node.args[0]],
}

FOR_EACH_PART = frozenset(
    {
        aten.alias.default, aten.detach.default, aten.clone.default, aten.contiguous.default, aten.neg.default,
        aten.view.default, aten.reshape.default,
        aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int,
        aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.expand.default,
        aten.transpose.int, aten.permute.default, aten.movedim.int, aten.slice.Tensor, aten.select.int,
        aten.index_select.default, aten.cat.default, aten.stack.default, aten.repeat.default, aten.flip.default,
        aten.roll.default, aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim,
    }
)  # fmt: skip
"""Operators that compute each part of their result from the same part of their input."""
