"""The dropouts that the graph of eval mode lacks, because their probability is 0 there: restored from training mode.

They are inside of attention, or called as `F.dropout(x, self.p if self.training else 0.0)`.
"""

from collections.abc import Iterator, Sequence

from torch import fx, nn

from halfeven.graph.dropout_calls import DropoutCall
from halfeven.graph.operators import OperatorKind
from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.rewrite import DROPOUT, is_attention
from halfeven.graph.torch_private import AnyDropout
from halfeven.graph.tree import place
from halfeven.graph.view import Op, operations

NAME = "attention_dropout"
"""Name of the dropout among the parts of the module whose code calls the attention."""


def restore_dropouts(
    captured: nn.Module, original: nn.Module, calls: Sequence[DropoutCall], *, in_attention: bool
) -> int:
    """Give the dropouts of a captured model the probabilities of training mode, in place.

    A call is found in the graph by the module whose code makes it, and by its number among the calls of this module.

    Args:
        captured: the captured model, before its attention is written as products.
        original: the model.
        calls: what the original called in training mode.
        in_attention: True for the dropouts inside of torch's function for attention, whose probabilities
            `add_attention_dropouts` reads; False for all others.

    Returns:
        The number of dropouts that are not in the graph.
    """
    modules = dict(original.named_modules())
    told: dict[str, list[float]] = {}
    for call in calls:
        # Modules that are dropouts follow the mode by themselves, and torch's own attention says its probability.
        if call.is_attention == in_attention and not isinstance(
            modules.get(call.path), AnyDropout | nn.MultiheadAttention
        ):
            told.setdefault(call.path, []).append(call.probability)
    found = _attention_calls(captured, modules) if in_attention else _dropout_calls(captured, modules)
    lost = 0
    for path, probabilities in told.items():
        if not _is_in_graph(captured, path):
            continue  # Python code, which drops out by itself
        ops = found.get(path, [])
        if len(ops) != len(probabilities) and len(set(probabilities)) > 1:
            lost += sum(probability > 0 for probability in probabilities)
            continue
        lost += max(0, len(probabilities) - len(ops)) if any(probabilities) else 0
        repeated = probabilities if len(ops) == len(probabilities) else probabilities[:1] * len(ops)
        for op, probability in zip(ops, repeated, strict=True):
            _set_probability(op, probability)
    return lost


def may_lack_dropouts(captured: nn.Module, original: nn.Module) -> bool:
    """Return True if a captured model has calls whose probability in training is not known from eval mode."""
    modules = dict(original.named_modules())
    called = [op for ops in _dropout_calls(captured, modules).values() for op in ops]
    return any(op.module.p == 0 for op in called) or bool(_attention_calls(captured, modules))


def _is_in_graph(captured: nn.Module, path: str) -> bool:
    """Return True if the own code of the original's module at a path was captured."""
    for prefix, region in _regions(captured):
        inside = path == prefix or not prefix or path.startswith(f"{prefix}.")
        kept = [_joined(prefix, name) for name in region.kept_rows]
        if inside and not any(path == name or path.startswith(f"{name}.") for name in kept):
            return True
    return False


def _regions(captured: nn.Module) -> Iterator[tuple[str, CapturedModule]]:
    for name, module in captured.named_modules():
        if isinstance(module, CapturedModule):
            yield name, module


def _joined(prefix: str, path: str) -> str:
    return ".".join(part for part in (prefix, path) if part)


Calls = dict[str, list[Op]]
"""Calls by the path of the original's module whose code makes them, in their order."""


def _dropout_calls(captured: nn.Module, modules: dict[str, nn.Module]) -> Calls:
    """Return the calls of dropouts that are functions in the original."""
    found: Calls = {}
    for prefix, region in _regions(captured):
        for op in operations(region.graph):
            path = _joined(prefix, op.path) if op.is_module else ""
            if isinstance(op.module, AnyDropout) and not isinstance(modules.get(path), AnyDropout):
                found.setdefault(path.rpartition(".")[0], []).append(op)
    return found


def _attention_calls(captured: nn.Module, modules: dict[str, nn.Module]) -> Calls:
    """Return the calls of torch's function for attention, except for those in torch's own module."""
    found: Calls = {}
    for prefix, region in _regions(captured):
        for op in filter(is_attention, operations(region.graph)):
            path = _joined(prefix, op.path)
            if not isinstance(modules.get(path), nn.MultiheadAttention):
                found.setdefault(path, []).append(op)
    return found


def _set_probability(op: Op, probability: float) -> None:
    if op.is_module:
        op.module.p = probability
    else:
        op.node.meta[DROPOUT] = probability


def add_attention_dropouts(region: CapturedModule, original: nn.Module) -> int:
    """Put the dropout of attention behind its softmax, in place.

    Args:
        region: a graph whose attention is written as products and a softmax.
        original: the module that it was captured of.

    Returns:
        The number of dropouts in attention that is not written so, which has none.
    """
    for op in operations(region.graph):
        probability = _probability(op, original) if op.kind is OperatorKind.SOFTMAX else 0.0
        if probability > 0:
            _call_behind(op.node, _placed_dropout(region, original, op.path, probability))
    region.recompile()
    return sum(_probability(op, original) > 0 for op in filter(is_attention, operations(region.graph)))


def _probability(op: Op, original: nn.Module) -> float:
    """Return the probability of the dropout of an attention, or of its softmax."""
    attention = _part(original, op.path)
    if isinstance(attention, nn.MultiheadAttention):
        return float(attention.dropout)
    return float(op.node.meta.get(DROPOUT, 0.0))


def _part(original: nn.Module, path: str) -> nn.Module | None:
    """Return the module at a path; None where the path is that of no module."""
    try:
        return original.get_submodule(path)
    except AttributeError:
        return None


def _placed_dropout(region: CapturedModule, original: nn.Module, path: str, probability: float) -> str:
    """Return the path of a dropout among the parts of a module, which calls with the same probability share."""
    present = dict(region.named_modules())
    name = _joined(path, NAME)
    # The name may be taken: by a setting of the model, or by a dropout with another probability.
    while (
        hasattr(_part(original, path), name.rpartition(".")[2])
        or getattr(present.get(name), "p", probability) != probability
    ):
        name += "_"
    if name not in present:
        place(region, name, nn.Dropout(probability).train(region.training))
    return name


def _call_behind(node: fx.Node, path: str) -> None:
    with node.graph.inserting_after(node):
        dropped = node.graph.call_module(path, (node,))
    dropped.meta = {key: value for key, value in node.meta.items() if key != "halfeven_name"}
    node.replace_all_uses_with(dropped, delete_user_cb=lambda reader: reader is not dropped)
