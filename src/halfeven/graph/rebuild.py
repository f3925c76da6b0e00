"""Put modules back into an exported graph, under their own names and around the model's own parameters."""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from halfeven.errors import CaptureError
from halfeven.graph.build_module import build_module
from halfeven.graph.constant_inputs import ConstantInput
from halfeven.graph.followed import followed
from halfeven.graph.functionalize import make_functional
from halfeven.graph.graph_in_pickle import PackedGraph, packed, unpacked
from halfeven.graph.kept_in_python import Calls, restore_kept
from halfeven.graph.labels import with_labels
from halfeven.graph.model_inputs import ModelInput
from halfeven.graph.operators import Operator
from halfeven.graph.parts import Original, arrange, complete, picklable
from halfeven.graph.size_relations import SizeRelation, sizes_checked
from halfeven.graph.tied_names import name_readers
from halfeven.graph.torch_private import (
    KeepsTypes,
    in_order_of,
    input_keywords,
    own_sources,
    pytree,
    set_contents,
)
from halfeven.graph.training_outputs import (
    TRAINING_OUTPUTS,
    TrainingOutputs,
    by_mode,
    graph_in_training,
    has_training_outputs,
)
from halfeven.graph.tree import adopt, has_value, owner_of, place
from halfeven.graph.view import Op, operations, replace_call

CHECK_OPERATORS = ("_assert", "sym_constrain", "_guards")
KEPT_FIELDS = (
    *("halfeven_plan", "halfeven_example", "halfeven_entries", "halfeven_inputs"),
    *("region_inputs", "constant_inputs", "region_name", "size_relations"),
    *("fixed_batch", "execution_graph", "after_call", "kept_rows", "stays_in_eval"),
)
"""Fields of a captured module that its copies have too."""


class CapturedModule(KeepsTypes, fx.GraphModule):
    """A graph module that also keeps, and copies, parameters that its graph does not use.

    The fields that other packages fill are declared here; a model cannot have submodules of these names.
    """

    execution_graph: "Callable[[CapturedModule], fx.Graph] | None" = None
    """Returns the graph that runs in the place of `graph`: the same operators in a faster order. Code that reads or
    changes the module's graph sees `graph`; `recompile` updates the code that runs."""
    after_call: "Callable[[CapturedModule], None] | None" = None
    """Runs at the end of each call, with the module."""
    halfeven_plan: Any = None
    """The plan of the whole model that this is a region of; None before quantizers are inserted."""
    kept_rows: "dict[str, Operator]" = {}  # noqa: RUF012 (never changed, only replaced)
    """The facts of the modules that stay Python inside of the graph, by path."""
    stays_in_eval: tuple[str, ...] = ()
    """The modules that the original's own `train()` leaves in eval mode, by path."""
    halfeven_example: Any = None
    """Two samples of the whole model's inputs: (positional, keyword) arguments."""
    halfeven_entries: tuple[str, ...] = ()
    """Names of the entries of an example in which labels stand between the inputs; () for any other example."""
    halfeven_inputs: Any = None
    """The whole model's inputs: (positional, keyword) arguments with a `ModelInput` for each tensor."""
    region_inputs: tuple[ModelInput | None, ...] = ()
    """The region's own inputs, in the order of its graph; None for one that is no tensor."""
    constant_inputs: tuple[ConstantInput, ...] = ()
    """The region's own inputs that are no tensors."""
    size_relations: tuple[SizeRelation, ...] = ()
    """Conditions on the sizes of the region's inputs."""
    fixed_batch: str = ""
    """Why the batch is a constant in the graph; "" where it is free."""
    region_name: str = ""
    """Path of the region in the model; "" for the whole model."""
    halfeven_original: Original | None = None
    """The float module that it was captured from: its class, children and plain attributes."""

    def recompile(self) -> Any:
        code = super().recompile()
        compiled = [type(self).forward]
        graph = self.graph if self.execution_graph is None else self.execution_graph(self)
        if graph is not self.graph:
            compiled.append(self._compiled(graph))
        forward = compiled[-1]
        if has_training_outputs(self):
            compiled.append(self._compiled(graph_in_training(self, graph)))
            forward = by_mode(forward, compiled[-1])
        own_sources(self, *compiled)
        forward = forward if self.after_call is None else followed(forward, self.after_call)
        type(self).forward = with_labels(self, sizes_checked(forward))
        return code

    def _compiled(self, graph: fx.Graph) -> Callable[..., Any]:
        """Return the code of another graph of this module."""
        # torch.fx makes a separate class for each graph module, and the class's `forward` is the graph's code.
        code: Callable[..., Any] = type(fx.GraphModule(self, graph)).forward
        return code

    def train(self, mode: bool = True) -> "CapturedModule":
        """Set the mode; modules that the original's own `train()` leaves in eval mode stay there."""
        super().train(mode)
        present = dict(self.named_modules()) if self.stays_in_eval else {}
        for path in self.stays_in_eval:
            if path in present:
                present[path].eval()
        return self

    def flat_inputs(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Return the values of the graph's placeholders, in order, for a call with these arguments."""
        # Positional inputs may be given by their names, too.
        names = input_keywords(self.graph) or [op.path for op in operations(self.graph) if op.is_input]
        keywords = {name: kwargs[name] for name in names if name in kwargs}
        return pytree.tree_leaves(in_order_of(self.graph, (args, keywords)))

    def __deepcopy__(self, memo: dict[int, Any]) -> "CapturedModule":
        result: Any = super().__deepcopy__(memo)
        # torch.fx keeps what the graph reads; the copies of all the rest are in the memo.
        complete(result, memo[id(vars(self))])
        for name in KEPT_FIELDS:
            setattr(result, name, getattr(self, name))
        copied: CapturedModule = result
        copied.recompile()
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        _, (state, *_) = super().__reduce__()
        if self.halfeven_original is not None:
            _, state = picklable(self.halfeven_original, state)
        return _unpickled, (state, packed(self.graph))


def _unpickled(state: dict[str, Any], graph: PackedGraph) -> CapturedModule:
    """Return the captured module of a pickle, without recorded shapes."""
    root = nn.Module()
    set_contents(root, state)
    root.training = state["training"]
    result = CapturedModule(root, unpacked(graph))
    complete(result, state)
    for name in KEPT_FIELDS:
        setattr(result, name, state.get(name, getattr(CapturedModule, name)))
    result.recompile()
    return result


def assemble(
    original: nn.Module, unlifted: fx.GraphModule, calls: Calls, training: TrainingOutputs | None = None
) -> CapturedModule:
    """Build the captured module from an exported program's graph and the original's parameters and buffers.

    Args:
        original: the model that was exported.
        unlifted: its graph.
        calls: the traced calls of the modules that are kept in Python.
        training: makes the outputs of training, where they are others.
    """
    graph = unlifted.graph
    # First what needs the graph as torch.export made it: the names of parameters, and the marks of kept modules.
    name_readers(graph, original)
    rows = restore_kept(graph, original, calls)
    modules: dict[str, nn.Module] = {name: original.get_submodule(name) for name in rows}
    for node in list(graph.nodes):
        if any(
            check in str(node.target) for check in CHECK_OPERATORS
        ):  # export's assertions on sizes, without a result
            graph.erase_node(node)
        elif Op(node).is_function:
            make_functional(node)
            _restore_module(node, original, modules)
            _check_mode_is_free(node)
    root = CapturedModule(nn.Module(), fx.Graph())
    # Parents before children: a placed parent would replace children that are there already.
    for name in sorted(modules, key=lambda name: name.count(".")):
        place(root, name, modules[name])
    adopt(root, original, lambda value: value)
    for op in operations(graph):
        if op.is_constant and not has_value(root, op.path):  # a constant that export lifted out of the code
            owner, attribute = owner_of(root, op.path)
            owner.register_buffer(attribute, op.constant.detach(), persistent=False)
    root.kept_rows = rows
    arrange(root, original)
    if training is not None:
        root.add_module(TRAINING_OUTPUTS, training)
    root.graph = graph
    # Takes away the reads of parameters that belong to the restored modules now.
    graph.eliminate_dead_code()
    root.recompile()
    return root


def _check_mode_is_free(node: fx.Node) -> None:
    """Raise CaptureError for a normalization that stayed a function: it would never follow `train()`."""
    op = Op(node)
    flag = op.row.training_flag if op.is_function else None
    if flag is not None and not op.argument(flag):
        raise CaptureError(
            f"the running statistics {op.argument('running_mean')} belong to no module inside of it, so train() could "
            "not update them"
        )


def _restore_module(node: fx.Node, original: nn.Module, modules: dict[str, nn.Module]) -> None:
    if node.target is torch.ops.halfeven.leaf.default:
        name = str(node.args[1])
        _call_module(node, name, original.get_submodule(name), modules)
        return
    built = build_module(node, original)
    if built is None:
        return
    name, module = built
    # The name may be taken: by the same layer, called before, or by a layer with other settings around the same weight.
    present = modules.get(name)
    if present is None and not _is_unused_name(original, name):
        return
    if present is None:
        _call_module(node, name, module, modules)
    # A module's repr has all its settings. Two calls of one weight with different strides are two functions.
    elif repr(present) == repr(module):  # a layer that is used more than once
        _call_module(node, name, present, modules)


def _is_unused_name(original: nn.Module, name: str) -> bool:
    """Return True if no parameter of the original has exactly this name."""
    return name not in dict(original.named_parameters(remove_duplicate=False))


def _call_module(node: fx.Node, name: str, module: nn.Module, modules: dict[str, nn.Module]) -> None:
    modules[name] = module
    replace_call(node, name, (node.args[0],))
