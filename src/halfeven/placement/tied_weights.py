"""Find weights that several operators read, and give a layer a weight of its own before its weight is changed.

A language model's output layer often shares its weight with the embedding. Where an algorithm changes the weight of one
of them (BatchNorm is folded, channels are equalized, the weight is put on its grid), the other must not see it.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import fx, nn

from halfeven.graph.batchnorm import foldable
from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.torch_private import own_parameters
from halfeven.graph.view import Op, module_calls, operations
from halfeven.placement.make_plan import named_nodes, regions

OWN_SUFFIX = "_of_other_readers"
"""Suffix of a parameter's name for the operators that read the parameter of a layer without calling the layer."""


@dataclass(frozen=True)
class _Reader:
    """A place that reads a parameter: a called module, an operator, or Python code outside of the captured regions."""

    region: CapturedModule | None
    path: str
    """The parameter's path in its region, or in the model."""
    called: bool
    """The module that holds the parameter is called, as a layer is."""


def tied_parameters(model: nn.Module) -> tuple[str, ...]:
    """Return the parameters of called modules, such as "head.weight", that have another reader too.

    The module is named as a plan names it. Of two layers that share a weight both are named.
    """
    readers = _parameter_readers(model)
    return tuple(
        f"{name}.{parameter}"
        for name, region, node in _first_calls(model)
        for parameter in _shared_names(region, Op(node).path, readers)
    )


def untie(model: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    """Give layers parameters of their own, in place, where they have another reader too; the other readers stay tied.

    Args:
        model: a captured or quantized model.
        names: parameters, as `tied_parameters` names them; of two layers that share one, the last keeps the original.

    Returns:
        The names of the parameters that are copies now.
    """
    wanted = set(names)
    changed = []
    if not wanted:
        return ()
    readers = _parameter_readers(model)
    for name, region, node in _first_calls(model):
        for parameter in list(_shared_names(region, Op(node).path, readers)):
            if f"{name}.{parameter}" in wanted:
                _give_copy(region, Op(node).path, parameter)
                changed.append(f"{name}.{parameter}")
                # With a copy of its own, a layer is no longer a reader of the original.
                readers = _parameter_readers(model)
    for region in regions(model).values():
        region.recompile()
    return tuple(changed)


def _first_calls(model: nn.Module) -> Iterator[tuple[str, CapturedModule, fx.Node]]:
    """Return the first call of each module with parameters of its own: its name in a plan, its region and its node."""
    seen: set[tuple[CapturedModule, str]] = set()
    for name, (region, node) in named_nodes(model).items():
        key = (region, Op(node).path)
        if Op(node).is_module and key not in seen and own_parameters(Op(node).module):
            seen.add(key)
            yield name, region, node


def _parameter_readers(model: nn.Module) -> dict[int, list[_Reader]]:
    """Return the readers of each parameter, by the identity of the parameter."""
    found: dict[int, list[_Reader]] = defaultdict(list)
    captured: set[nn.Module] = set()
    for region in regions(model).values():
        captured.update(region.modules())
        # Parameters that operators of the graph read.
        for path in {op.path for op in operations(region.graph) if op.is_constant and op.node.users}:
            owner, _, name = path.rpartition(".")
            parameter = own_parameters(region.get_submodule(owner)).get(name)
            if parameter is not None:
                found[id(parameter)].append(_Reader(region, path, called=False))
        # Parameters of the modules that the graph calls.
        for path in {op.path for op in module_calls(region.graph)}:
            for name, parameter in region.get_submodule(path).named_parameters():
                found[id(parameter)].append(_Reader(region, f"{path}.{name}", called=True))
    # Parameters that code outside of the captured regions may read.
    for prefix, module in model.named_modules():
        for name, held in own_parameters(module).items():
            if module not in captured and held is not None:
                found[id(held)].append(_Reader(None, f"{prefix}.{name}", called=True))
    return found


def _shared_names(region: CapturedModule, path: str, readers: dict[int, list[_Reader]]) -> Iterator[str]:
    """Return the names of a called module's own parameters that have another reader too."""
    for name, parameter in own_parameters(region.get_submodule(path)).items():
        mine = _Reader(region, f"{path}.{name}", called=True)
        if parameter is not None and any(reader != mine for reader in readers[id(parameter)]):
            yield name


def _give_copy(region: CapturedModule, path: str, name: str) -> None:
    """Give a layer a copy of a parameter; other readers of the layer's attribute keep the original."""
    layer = region.get_submodule(path)
    original = own_parameters(layer)[name]
    assert original is not None
    setattr(layer, name, nn.Parameter(original.detach().clone(), requires_grad=original.requires_grad))
    # Operators that read the layer's attribute without a call of the layer keep the original, under a name of its own.
    reads = [op.node for op in operations(region.graph) if op.is_constant and op.path == f"{path}.{name}"]
    if reads:
        layer.register_parameter(f"{name}{OWN_SUFFIX}", original)
    for node in reads:
        node.target = f"{path}.{name}{OWN_SUFFIX}"


def untie_for_folding(model: nn.Module) -> tuple[str, ...]:
    """Untie, in place, the layers of a captured model that a BatchNorm will be folded into; return the parameters."""
    folded = {layer for region in regions(model).values() for layer, _ in foldable(region.graph)}
    layers = [name for name, (_, node) in named_nodes(model).items() if node in folded]
    return untie(model, [f"{name}.{parameter}" for name in layers for parameter in ("weight", "bias")])
