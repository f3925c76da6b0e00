"""Build the standard module of an operator's call around the original's own parameters: a convolution, a BatchNorm."""

from collections.abc import Callable
from typing import Any

from torch import fx, nn

from halfeven.graph.operators import Arguments, OperatorKind
from halfeven.graph.torch_private import AnyBatchOrInstanceNorm, AnyDropout
from halfeven.graph.view import Op

BATCH_NORMS: dict[int, type[nn.Module]] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
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


def _build_instance_norm(node: fx.Node, a: Arguments, original: nn.Module) -> Built:
    # Without running statistics it computes the same in both modes, and stays a function.
    path = _parameter_owner(a["running_mean"], "running_mean")
    was = original.get_submodule(path) if path is not None and not a["use_input_stats"] else None
    return (path, was) if path is not None and isinstance(was, AnyBatchOrInstanceNorm) else None


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
    nn.InstanceNorm2d: _build_instance_norm,
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
