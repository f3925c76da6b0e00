"""Give each reader of a tied weight the name under which its own module holds the weight.

`torch.export` gives a parameter that several modules share a single name, so that a layer seems to read another
layer's weight.
"""

from torch import fx, nn

from halfeven.graph.view import Op


def name_readers(graph: fx.Graph, original: nn.Module) -> None:
    """Make each operator read a shared parameter under the name of the module that calls the operator, in place.

    Args:
        graph: an exported graph of the original.
        original: the model whose parameters the graph reads.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in original.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    tied = {name: group for group in names.values() if len(group) > 1 for name in group}
    for node in list(graph.nodes):
        if not Op(node).is_constant or Op(node).path not in tied:
            continue
        for reader in list(node.users):
            # An operator's path is that of the module whose code calls it.
            own = _own_name(tied[Op(node).path], Op(reader).path if Op(reader).is_function else "")
            if own is not None and own != Op(node).path:
                with graph.inserting_before(node):
                    renamed = graph.create_node("get_attr", own)
                renamed.meta = dict(node.meta)
                reader.replace_input_with(node, renamed)
        if not node.users:
            graph.erase_node(node)


def _own_name(names: list[str], module: str) -> str | None:
    """Return the name of a shared parameter that a module holds itself; None where it holds none."""
    return next((name for name in names if module and name.rpartition(".")[0] == module), None)
