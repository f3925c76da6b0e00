"""LayerNorms whose channels linear layers read: their factors and offsets can move into those layers' weights."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from halfeven.graph.operators import OperatorKind
from halfeven.graph.view import Op, kind_of, module_of
from halfeven.placement.channel_affine import ChannelAffine, readers
from halfeven.placement.make_plan import named_nodes
from halfeven.ptq.equalization.layer_pairs import rewritable_layers
from halfeven.quantization.quantizer import Quantizer


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
            left.append(f"{name} (read by {', '.join(dict.fromkeys(Op(end).name for end in others))})")
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
        if isinstance(module, Quantizer):
            return module.scheme.axis is None
    return Op(node).passes_features
