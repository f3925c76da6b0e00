"""LayerNorms whose channels linear layers read: their factors and offsets can move into those layers' weights."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from halfeven.graph.operators import OperatorKind, kind_of, module_of, operator_name
from halfeven.graph.rebuild import arguments
from halfeven.placement.channel_affine import ChannelAffine, readers
from halfeven.placement.make_plan import named_nodes
from halfeven.ptq.equalization.layer_pairs import rewritable_layers
from halfeven.quantization.quantizer import Quantizer

aten = torch.ops.aten


@dataclass(frozen=True)
class NormSite:
    """A LayerNorm, and the linear layers that read it."""

    name: str
    norm: nn.LayerNorm
    names: tuple[str, ...]
    readers: tuple[nn.Linear, ...]
    added: bool
    """Additions read it too, as the residual stream of a transformer with its LayerNorms last."""

    @property
    def offset(self) -> Tensor | None:
        """What the LayerNorm adds to each channel, [channels]."""
        return self.norm.bias


def norm_sites(qmodel: nn.Module) -> tuple[list[NormSite], tuple[str, ...]]:
    """The LayerNorms whose factor and offset can change, in the order of the graph; and the others, with the reason."""
    rewritable, _ = rewritable_layers(qmodel)
    layers = {node: name for name, node in rewritable.items()}
    calls = Counter(id(module_of(node)) for _, node in named_nodes(qmodel).values() if node.op == "call_module")
    owners = Counter(id(p) for _, p in qmodel.named_parameters(remove_duplicate=False))
    sites, left = [], []
    for name, (_, node) in named_nodes(qmodel).items():
        if kind_of(node) is not OperatorKind.NORMALIZATION:
            continue
        norm: Any = module_of(node) if node.op == "call_module" else None
        if not isinstance(norm, nn.LayerNorm) or len(norm.normalized_shape) != 1:
            left.append(f"{name} (no LayerNorm over the last axis with a factor of its own)")
            continue
        ends = list(_ends(node))
        linear = [end for end in ends if end in layers]
        others = [end for end in ends if end not in layers]
        if others and not (linear and _only_additions(node, others)):
            left.append(f"{name} (read by {', '.join(dict.fromkeys(operator_name(end) for end in others))})")
        elif calls[id(norm)] > 1 or any(owners[id(p)] > 1 for p in norm.parameters()):
            left.append(f"{name} (used more than once)")
        elif linear:
            modules: Any = tuple(module_of(end) for end in linear)
            sites.append(NormSite(name, norm, tuple(layers[end] for end in linear), modules, bool(others)))
    return sites, tuple(left)


def _only_additions(node: fx.Node, others: list[fx.Node]) -> bool:
    """Whether these readers are additions that read a tensor directly: they can be given it as it was."""
    direct = readers(node)
    rescaled = [end for end in others if end.op == "call_module" and isinstance(module_of(end), ChannelAffine)]
    return all(end in direct and (end in rescaled or kind_of(end) is OperatorKind.ADD) for end in others)


def _ends(node: fx.Node) -> Iterator[fx.Node]:
    """What reads a tensor at last: linear layers, and anything else that mixes or bends its channels."""
    for reader in node.users:
        if _passes(reader):
            yield from _ends(reader)
        else:
            yield reader


def _passes(node: fx.Node) -> bool:
    """Whether an operator leaves the last axis as it is, and does to each channel what commutes with X = r X' + c."""
    if node.op == "call_module":
        module = module_of(node)
        if isinstance(module, nn.Dropout):
            return module.p == 0  # what it drops would become 0 here, and c there
        return (isinstance(module, Quantizer) and module.scheme.axis is None) or isinstance(module, nn.Identity)
    rule = PASSED.get(node.target)
    return rule is not None and rule(node)


def _dims_of(argument: str) -> Callable[[fx.Node], bool]:
    """A rule for operators on the axes that an argument names, which must not be the last."""

    def rule(node: fx.Node) -> bool:
        given = arguments(node)[argument]
        ndim = node.all_input_nodes[0].meta["val"].ndim
        dims = given if isinstance(given, list | tuple) else [given]
        return all(dim % ndim != ndim - 1 for dim in dims) and bool(dims)

    return rule


def _keeps_last_size(node: fx.Node) -> bool:
    return bool(node.meta["val"].shape[-1] == node.all_input_nodes[0].meta["val"].shape[-1])


def _adds_nothing(node: fx.Node) -> bool:
    """A padding by 0 elements, which models write for the sizes that do not divide."""
    return all(isinstance(amount, int) and amount == 0 for amount in arguments(node)["pad"])


def _keeps_last_place(node: fx.Node) -> bool:
    dims = arguments(node)["dims"]
    return bool(dims[-1] % len(dims) == len(dims) - 1)


PASSED: dict[Any, Callable[[fx.Node], bool]] = {
    **dict.fromkeys((aten.contiguous.default, aten.clone.default, aten.alias.default), lambda node: True),
    **dict.fromkeys((aten.view.default, aten.reshape.default, aten.flatten.using_ints), _keeps_last_size),
    **dict.fromkeys((aten.pad.default, aten.constant_pad_nd.default), _adds_nothing),
    aten.permute.default: _keeps_last_place,
    aten.transpose.int: lambda node: _dims_of("dim0")(node) and _dims_of("dim1")(node),
    aten.roll.default: _dims_of("dims"),
    aten.mean.dim: _dims_of("dim"),
    **dict.fromkeys((aten.slice.Tensor, aten.select.int), _dims_of("dim")),
}
"""Operators between a LayerNorm and its readers that the channels pass one by one, with the condition on a call."""
