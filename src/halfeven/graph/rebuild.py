"""Put modules back into an exported graph, under their own names and around the model's own parameters."""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from halfeven.errors import CaptureError
from halfeven.graph.constant_inputs import ConstantInput
from halfeven.graph.followed import followed
from halfeven.graph.functionalize import make_functional
from halfeven.graph.graph_in_pickle import PackedGraph, packed, unpacked
from halfeven.graph.kept_in_python import Calls, restore_kept
from halfeven.graph.labels import with_labels
from halfeven.graph.model_inputs import ModelInput
from halfeven.graph.operators import Arguments, Operator, OperatorKind
from halfeven.graph.parts import Original, arrange, complete, picklable
from halfeven.graph.size_relations import SizeRelation, sizes_checked
from halfeven.graph.tied_names import name_readers
from halfeven.graph.torch_private import (
    AnyDropout,
    KeepsTypes,
    in_order_of,
    input_keywords,
    own_sources,
    pytree,
    set_contents,
)
from halfeven.graph.tree import adopt, has_value, owner_of, place
from halfeven.graph.view import Op, operations, replace_call

BATCH_NORMS: dict[int, type[nn.Module]] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
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
        if self.execution_graph is not None:
            # torch.fx makes a separate class for each graph module, and the class's `forward` is the graph's code.
            running = fx.GraphModule(self, self.execution_graph(self))
            compiled.append(type(running).forward)
        own_sources(self, *compiled)
        type(self).forward = compiled[-1] if self.after_call is None else followed(compiled[-1], self.after_call)
        type(self).forward = with_labels(self, sizes_checked(type(self).forward))
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


def assemble(original: nn.Module, unlifted: fx.GraphModule, calls: Calls) -> CapturedModule:
    """Build the captured module from an exported program's graph and the original's parameters and buffers.

    Args:
        original: the model that was exported.
        unlifted: its graph.
        calls: the traced calls of the modules that are kept in Python.
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


Built = tuple[str, nn.Module] | None


def _parameter_owner(node: Any, attribute: str) -> str | None:
    """Return the module path of a parameter node called `<path>.<attribute>`, None for any other."""
    if not isinstance(node, fx.Node) or not Op(node).is_constant:
        return None
    return (Op(node).parent_path or None) if Op(node).last_name == attribute else None


def _original_parameter(original: nn.Module, node: Any) -> Any:
    if node is None:
        return None
    return getattr(original.get_submodule(Op(node).parent_path), Op(node).last_name)


def _layer_parameters(arguments: Arguments, original: nn.Module) -> tuple[str, Any, Any] | None:
    """Return the path, weight and bias of a layer whose parameters are named weight and bias; None for any other."""
    path = _parameter_owner(arguments["weight"], "weight")
    bias = arguments["bias"]
    if path is None or (bias is not None and _parameter_owner(bias, "bias") != path):
        return None
    weight = _original_parameter(original, arguments["weight"])
    if not isinstance(weight, nn.Parameter):
        return None
    return path, weight, _original_parameter(original, bias)


def _with_parameters(module: nn.Module, weight: Any, bias: Any) -> nn.Module:
    module.weight = weight
    module.bias = bias
    return module


def _build_convolution(node: fx.Node, a: Arguments, original: nn.Module) -> Built:
    if (layer := _layer_parameters(a, original)) is None:
        return None
    path, weight, bias = layer
    build: Any = Op(node).row.module
    padding = a["padding"] if isinstance(a["padding"], str) else tuple(a["padding"])
    # A convolution's weight is [outputs, inputs / groups, *kernel].
    shape = (weight.shape[1] * a["groups"], weight.shape[0], tuple(weight.shape[2:]), tuple(a["stride"]), padding)
    # device="meta": the new module's own parameters get no memory, since the original's take their place.
    axes = weight.ndim - 2
    dilation = _for_each_axis(a["dilation"], axes)
    module = build(*_spread_over_axes(shape, axes), dilation, a["groups"], bias is not None, device="meta")
    return path, _with_parameters(module, weight, bias)


def _build_transposed(node: fx.Node, a: Arguments, original: nn.Module) -> Built:
    if (layer := _layer_parameters(a, original)) is None:
        return None
    path, weight, bias = layer
    axes = weight.ndim - 2
    build: Any = Op(node).row.module
    module = build(
        weight.shape[0], weight.shape[1] * a["groups"], tuple(weight.shape[2:]), _for_each_axis(a["stride"], axes),
        _for_each_axis(a["padding"], axes), _for_each_axis(a["output_padding"], axes), a["groups"], bias is not None,
        _for_each_axis(a["dilation"], axes), device="meta",
    )  # fmt: skip
    return path, _with_parameters(module, weight, bias)


def _for_each_axis(value: Any, axes: int) -> tuple[int, ...]:
    """Return a number for each axis, from a number or list that may stand for all axes."""
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values * axes if len(values) == 1 else values


def _spread_over_axes(shape: tuple[Any, ...], axes: int) -> tuple[Any, ...]:
    inputs, outputs, kernel, stride, padding = shape
    return (
        inputs,
        outputs,
        kernel,
        _for_each_axis(stride, axes),
        padding if isinstance(padding, str) else _for_each_axis(padding, axes),
    )


def _build_linear(node: fx.Node, a: Arguments, original: nn.Module) -> Built:
    if (layer := _layer_parameters(a, original)) is None:
        return None
    path, weight, bias = layer
    module = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    return path, _with_parameters(module, weight, bias)


def _build_batch_norm(node: fx.Node, a: Arguments, original: nn.Module) -> Built:
    path = _parameter_owner(a["running_mean"], "running_mean")
    # A call that normalizes by the batch in eval mode, too, stays a function: a module would follow the mode.
    if path is None or a["training"] or _parameter_owner(a["running_var"], "running_var") != path:
        return None
    weight = a["weight"]
    bias = a["bias"]
    if any(p is not None and _parameter_owner(p, n) != path for p, n in ((weight, "weight"), (bias, "bias"))):
        return None
    was: Any = original.get_submodule(path)
    # It keeps its process group and its class; rebuilt as BatchNorm2d, it would no longer synchronize.
    if isinstance(was, nn.SyncBatchNorm):
        return path, was
    mean = was.running_mean
    # The operator is the same for all numbers of axes, and the module is not.
    build: Any = BATCH_NORMS[Op(node).inputs[0].ndim]
    # Exported in eval mode, the operator has no true momentum; the module's may be None, for a cumulative average.
    module = build(
        mean.numel(), a["eps"], getattr(was, "momentum", a["momentum"]), affine=weight is not None, device="meta"
    )
    module.running_mean = mean
    module.running_var = was.running_var
    module.num_batches_tracked = getattr(was, "num_batches_tracked", None)
    if weight is not None:
        _with_parameters(module, _original_parameter(original, weight), _original_parameter(original, bias))
    return path, module


def _build_layer_norm(node: fx.Node, a: Arguments, original: nn.Module) -> Built:
    if a["weight"] is None or (layer := _layer_parameters(a, original)) is None:
        return None
    path, weight, bias = layer
    module = nn.LayerNorm(tuple(a["normalized_shape"]), a["eps"], bias=bias is not None, device="meta")
    return path, _with_parameters(module, weight, bias)


def _build_group_norm(node: fx.Node, a: Arguments, original: nn.Module) -> Built:
    if a["weight"] is None or a["bias"] is None or (layer := _layer_parameters(a, original)) is None:
        return None
    path, weight, bias = layer
    module = nn.GroupNorm(a["num_groups"], weight.numel(), a["eps"], device="meta")
    return path, _with_parameters(module, weight, bias)


def _build_dropout(node: fx.Node, a: Arguments, original: nn.Module) -> Built:
    op = Op(node)
    # A dropout called as a function bears the path of the module around it, or of no module.
    try:
        was = original.get_submodule(op.path)
    except AttributeError:
        was = original
    if isinstance(was, AnyDropout):
        return op.path, type(was)(was.p)
    build: Any = op.row.module
    # `F.dropout(x, self.dropout)`: the module around it may have the probability under the node's name.
    name = node.name
    while hasattr(was, name):
        name += "_"
    return f"{op.path}.{name}" if op.path else name, build(a["p"])


Builder = Callable[[fx.Node, Arguments, nn.Module], Built]

BUILDERS: dict[OperatorKind, Builder] = {
    OperatorKind.CONVOLUTION: _build_convolution,
    OperatorKind.TRANSPOSED_CONVOLUTION: _build_transposed,
    OperatorKind.LINEAR: _build_linear,
    OperatorKind.IDENTITY: _build_dropout,
}
NORMALIZATION_BUILDERS: dict[type[nn.Module], Builder] = {
    nn.BatchNorm2d: _build_batch_norm,
    nn.LayerNorm: _build_layer_norm,
    nn.GroupNorm: _build_group_norm,
}


def build_module(node: fx.Node, original: nn.Module) -> Built:
    """Build the standard module that computes the same as the call of an operator.

    Args:
        node: any node.
        original: the model whose parameters the call reads.

    Returns:
        The module's path and the module, around the original's parameters; None where the operator has no such module
        or its parameters belong to none.
    """
    op = Op(node)
    if not op.is_function or (standard := op.row.module) is None:
        return None
    builder = BUILDERS.get(op.kind) or NORMALIZATION_BUILDERS[standard]
    return builder(node, op.arguments, original)
