"""Group what a target ties: tensors that an operator reads together get other grids together."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import fx, nn

from halfeven.graph.operators import WEIGHTED, OperatorKind
from halfeven.graph.view import kind_of
from halfeven.placement.insertion import plan_of
from halfeven.placement.make_plan import named_nodes
from halfeven.placement.plan import Plan, PlannedTensor

K = OperatorKind


@dataclass(frozen=True)
class Unit:
    """Tensors that change together, with the operators that read them."""

    name: str
    tensors: tuple[str, ...]
    """One place of each quantized tensor."""
    layers: tuple[str, ...]
    """Layers with quantized weights that read them."""
    readers: tuple[str, ...]
    """All operators that read them; in float all of them are."""


def units_of(qmodel: nn.Module) -> tuple[Unit, ...]:
    """Return the units of a quantized model, in the order of its graph.

    The operands of a sum, of a concatenation and of a product belong together, and so do all tensors of an attention:
    queries and keys, its softmax, and the values. A layer belongs to the tensor that it reads.
    """
    plan = plan_of(qmodel)
    known = named_nodes(qmodel)
    weights = [weight.name for weight in plan.weights]
    found = []
    for members in _tied_tensors(plan, {name: node for name, (_, node) in known.items()}):
        tensors = tuple(tensor.places[0] for tensor in members)
        readers = tuple(dict.fromkeys(name for tensor in members for name in tensor.consumers if name in known))
        layers = tuple(name for name in weights if name in readers)
        found.append(Unit(_unit_name(members), tensors, layers, readers))
    # Layers that read no quantized activation, with a quantized weight all the same, are units by themselves.
    covered = {name for unit in found for name in unit.layers}
    return (*found, *(Unit(name, (), (name,), (name,)) for name in weights if name not in covered))


def _unit_name(members: Iterable[PlannedTensor]) -> str:
    return " + ".join(tensor.quantizer_name for tensor in members)


def _tied_tensors(plan: Plan, nodes: dict[str, fx.Node]) -> list[list[PlannedTensor]]:
    """Return the tensors in groups that share a reader."""
    groups: list[tuple[set[str], list[PlannedTensor]]] = []
    for tensor in plan.tensors:
        # Operators that read a tensor tie it to the others that they read: a sum, a concatenation, a product.
        readers = {name for name in tensor.consumers if name in nodes}
        if tensor.fixed_range is not None:  # a softmax, whose logits are a product of tensors of the same attention
            readers |= {name for place in tensor.places for name in _products_before(nodes[place], nodes)}
        # A tensor that shares readers with several groups joins them to one, in the place of the first.
        joined = [group for group in groups if group[0] & readers]
        members = [member for _, group in joined for member in group]
        merged = (readers.union(*(names for names, _ in joined)), [*members, tensor])
        place = groups.index(joined[0]) if joined else len(groups)
        groups = [group for group in groups if group not in joined]
        groups.insert(place, merged)
    return [members for _, members in groups]


def _products_before(node: fx.Node, nodes: dict[str, fx.Node]) -> Iterator[str]:
    """Yield the names of the nearest products of two activations before a softmax."""
    names = {other: name for name, other in nodes.items()}
    waiting = list(node.all_input_nodes)
    seen = set(waiting)
    while waiting:
        source = waiting.pop()
        if kind_of(source) is K.MATMUL and source in names:
            yield names[source]
        elif kind_of(source) not in WEIGHTED:
            further = [node for node in source.all_input_nodes if node not in seen]
            seen.update(further)
            waiting += further
