"""Wrap every private name of torch that halfeven uses in a function or a public name.

A new version of torch may rename any of them, and then this is the only file to mend: `tests/test_architecture.py`
forbids private names of torch in other files.
"""

import keyword
import linecache
import re
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import exported_program
from torch.fx import graph as fx_graph
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.fx.graph_module import _loader as sources
from torch.nn.modules.batchnorm import _BatchNorm as AnyBatchNorm
from torch.nn.modules.batchnorm import _NormBase as AnyBatchOrInstanceNorm
from torch.nn.modules.dropout import _DropoutNd as AnyDropout
from torch.utils import _pytree as pytree

__all__ = [
    "AnyBatchNorm",
    "AnyBatchOrInstanceNorm",
    "AnyDropout",
    "KeepsTypes",
    "Parameter",
    "autocast_dtype",
    "blend_all",
    "call_form",
    "compiled_module",
    "convolution_of",
    "copy_all",
    "fake_tensors",
    "forgetting_graphs",
    "functional_form",
    "has_hooks",
    "has_layout_guards",
    "has_own_hooks",
    "in_backward_pass",
    "in_order_of",
    "input_keywords",
    "is_aten",
    "is_mutable",
    "is_operator",
    "is_persistent",
    "is_pure",
    "output_form",
    "overload_named",
    "overload_path",
    "own_buffers",
    "own_modules",
    "own_parameters",
    "own_sources",
    "parameters_of",
    "pytree",
    "set_contents",
    "short_name",
    "size_guards",
    "untracked",
    "with_call_form",
]


# Operators


@dataclass(frozen=True)
class Parameter:
    """A parameter of an ATen operator; `default` is None where it has none and where that is its default."""

    name: str
    has_default: bool
    default: Any


def is_operator(target: Any) -> TypeGuard[OpOverload]:
    """Return True for an overload of an operator of `torch.ops`, such as `torch.ops.aten.add.Tensor`."""
    return isinstance(target, OpOverload)


def is_aten(operator: Any) -> bool:
    """Return True for an operator of PyTorch's own library."""
    return str(operator.namespace) == "aten"


def parameters_of(operator: Any) -> list[Parameter]:
    """Return the parameters of an operator's overload, in the order of its schema."""
    return [
        Parameter(a.name, a.has_default_value(), a.default_value if a.has_default_value() else None)
        for a in operator._schema.arguments
    ]


def is_mutable(operator: Any) -> bool:
    """Return True for an operator that changes an argument in place."""
    return bool(operator._schema.is_mutable)


def is_pure(operator: Any) -> bool:
    """Return True for an operator that gives the same results for the same arguments and changes nothing."""
    return not is_mutable(operator) and torch.Tag.nondeterministic_seeded not in operator.tags


def short_name(operator: Any) -> str:
    """Return an operator's name without its namespace and overload: "add" of `aten.add.Tensor`."""
    return str(operator._schema.name.split("::")[1])


def functional_form(operator: Any) -> OpOverload | None:
    """Return the overload of ATen that returns the result which an in-place operator writes; None if there is none."""
    name = short_name(operator)
    if not is_mutable(operator) or not name.endswith("_"):
        return None
    packet = getattr(torch.ops.aten, name[:-1], None)
    overload = operator._overloadname
    if packet is None or overload not in packet.overloads():
        return None
    found: OpOverload = getattr(packet, overload)
    return found


# Graphs

LAYOUT_FUNCTIONS = re.compile("contiguous|stride|overlapping|view_helper|memory_format|physical_perm|should_swap")
"""Parts of the names of torch's functions on strides: what they decide by sizes concerns memory, and no result."""


def fake_tensors() -> AbstractContextManager[Any]:
    """Return a context in which tensors have sizes and no data, so that operators compute sizes alone."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def output_form(graph: fx.Graph) -> Any:
    """Return the structure of the outputs of a graph that `torch.export` made, for `pytree.tree_unflatten`."""
    codegen: Any = graph._codegen
    return codegen.pytree_info.out_spec


def input_keywords(graph: fx.Graph) -> list[str]:
    """Return the names of the keyword arguments of a graph that `torch.export` made, in the order of its inputs."""
    codegen: Any = graph._codegen
    return list(codegen.pytree_info.in_spec.child(1).context) if hasattr(codegen, "pytree_info") else []


def overload_path(operator: OpOverload) -> tuple[str, str, str]:
    """Return the namespace, name and overload of an operator: ("aten", "add", "Tensor")."""
    return operator.namespace, short_name(operator), operator._overloadname


def overload_named(namespace: str, name: str, overload: str) -> OpOverload:
    """Return the operator that `overload_path` described."""
    found: OpOverload = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    return found


def call_form(graph: fx.Graph) -> Any:
    """Return the form of a graph's arguments and outputs as plain values; None for a graph that takes tensors alone."""
    info = getattr(graph._codegen, "pytree_info", None)
    return None if info is None else tuple(info)


def with_call_form(graph: fx.Graph, form: Any) -> None:
    """Give a graph a form that `call_form` returned, in place."""
    if form is not None:
        graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(*form)))


def in_order_of(graph: fx.Graph, arguments: Any) -> Any:
    """Return the (positional, keyword) arguments of a call with dicts in the order of the graph's example.

    A dict's entries are counted in their order, and callers may give another. Dicts and tuples are lists in the result.
    """
    codegen: Any = graph._codegen
    return _in_order(arguments, codegen.pytree_info.in_spec) if hasattr(codegen, "pytree_info") else arguments


def _in_order(value: Any, form: pytree.TreeSpec) -> Any:
    if isinstance(value, dict) and form.type in (dict, OrderedDict) and value.keys() == set(form.context):
        return [_in_order(value[key], form.child(index)) for index, key in enumerate(form.context)]
    if isinstance(value, list | tuple) and form.type in (list, tuple) and len(value) == form.num_children:
        return [_in_order(one, form.child(index)) for index, one in enumerate(value)]
    return value


def size_guards(program: torch.export.ExportedProgram) -> list[str]:
    """Return the conditions on input sizes under which a program is right, in Python: `L['x'].size()[2] <= 64`.

    Those that decide where values lie in memory alone are left out.
    """
    shape_env = _shape_env(program)
    if shape_env is None:
        return []
    guards = [guard for guard in shape_env.guards if not _is_about_layout(guard)]
    with patch.object(shape_env, "guards", guards):
        convert: Callable[[fx.GraphModule], list[str]] = exported_program._convert_guards_to_code
        return convert(program.graph_module)


def has_layout_guards(program: torch.export.ExportedProgram) -> bool:
    """Return True if the sizes of a program's inputs decide where values lie in memory: a view may be a copy there."""
    shape_env = _shape_env(program)
    return shape_env is not None and any(map(_is_about_layout, shape_env.guards))


def _shape_env(program: torch.export.ExportedProgram) -> ShapeEnv | None:
    find: Callable[[fx.GraphModule], ShapeEnv | None] = exported_program._get_shape_env
    return find(program.graph_module)


def _is_about_layout(guard: Any) -> bool:
    where = guard.sloc.framework_loc
    return "/torch/" in getattr(where, "filename", "") and LAYOUT_FUNCTIONS.search(where.name) is not None


def _format_target(base: str, target: str) -> str:
    """Return the code that reads a submodule or a tensor by its path.

    Names that are no names in Python, such as "0" and "class", are read by `getattr`.
    """
    code = base
    for name in target.split("."):
        plain = name.isidentifier() and not keyword.iskeyword(name)
        code = f"{code}.{name}" if plain else f'getattr({code}, "{name}")'
    return code


# torch's own writes `self.class`, which is a syntax error: for a head called "class" no graph could be compiled.
fx_graph._format_target = _format_target


# What torch keeps of graphs that are gone

_sources: "weakref.WeakKeyDictionary[nn.Module, weakref.finalize[..., nn.Module]]" = weakref.WeakKeyDictionary()
"""Forgets the source of each of halfeven's graph modules."""


def own_sources(module: fx.GraphModule, *compiled: Callable[..., Any]) -> None:
    """Make the sources of a graph's compiled functions last as long as its module, or until it is compiled again.

    torch.fx keeps the source of each graph that it compiles, for tracebacks, until the process ends.
    """
    before = _sources.get(module)
    if before is not None:
        before()
    names = [function.__code__.co_filename for function in compiled]
    _sources[module] = weakref.finalize(module, _forget_sources, names)


@contextmanager
def forgetting_graphs() -> Iterator[None]:
    """Make torch forget, at the end, the graphs that its exporters and converters made within.

    These are the sources of the graphs, and the last 256 calls of each of `ShapeEnv`'s methods, which hold the sizes
    and the tensors of every program that was exported. A process that exports again and again grows by both.
    """
    before = set(sources.eval_cache)
    try:
        yield
    finally:
        # Sources of graphs that are still in use stay: the finalizer of each module has their names.
        owned = [finalizer.peek() for finalizer in list(_sources.values())]
        kept = before.union(*(found[2][0] for found in owned if found))
        _forget_sources([name for name in list(sources.eval_cache) if name not in kept])
        for method in list(vars(ShapeEnv).values()):
            if hasattr(method, "cache_clear"):
                method.cache_clear()


def untracked(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Return a program without the list of its inputs that torch's tracer has kept.

    Only the tracer reads it. Its tensors hold the program's sizes from C++, and the sizes hold the list. Python's
    garbage collector cannot see this circle, so the program's tensors would stay until the process ends.
    """
    for node in program.graph.find_nodes(op="placeholder"):
        shape_env = getattr(getattr(node.meta.get("val"), "fake_mode", None), "shape_env", None)
        if shape_env is not None and shape_env.tracked_fakes:
            shape_env.tracked_fakes.clear()
    return program


def _forget_sources(names: Sequence[str]) -> None:
    for name in names:
        sources.eval_cache.pop(name, None)
        linecache.cache.pop(name, None)


# Modes


def autocast_dtype(block: torch.autocast) -> torch.dtype | None:
    """Return the type that a block of automatic mixed precision computes in; None where it is switched off."""
    return block.fast_dtype if block._enabled else None


# Modules


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return a module's own table of parameters; an absent parameter is None, and changes take effect."""
    return module._parameters


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """Return a module's own table of buffers; an absent buffer is None, and changes take effect."""
    return module._buffers


def own_modules(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return a module's own table of submodules; changes take effect."""
    return module._modules


def has_hooks(module: nn.Module) -> bool:
    """Return True for a module with functions that its call runs before or after its forward."""
    return bool(module._forward_pre_hooks or module._forward_hooks)


def has_own_hooks(module: nn.Module) -> bool:
    """Return True for a module with functions of the user's that its call or its backward pass runs, and not torch's.

    Normalizations of weights and pruning are torch's.
    """
    tables = (module._forward_pre_hooks, module._forward_hooks, module._backward_hooks, module._backward_pre_hooks)
    hooks = [hook for table in tables for hook in table.values()]
    return any(not str(getattr(hook, "__module__", "")).startswith("torch.") for hook in hooks)


class KeepsTypes(nn.Module):
    """A module whose submodules with a true `keeps_dtype` keep the types of their tensors in any conversion."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        keepers = [module for module in self.modules() if getattr(module, "keeps_dtype", False)]
        tensors = [t for module in keepers for t in (*module.parameters(False), *module.buffers(False))]
        kept = {id(t) for tensor in tensors for t in (tensor, tensor.grad) if t is not None}

        def convert(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return tensor.to(result.device) if id(tensor) in kept and result.dtype != tensor.dtype else result

        parent: Any = super()
        return parent._apply(convert, recurse)


def set_contents(module: nn.Module, state: dict[str, Any]) -> None:
    """Give a module the parameters, buffers and submodules of another's `vars`, in their order."""
    for name in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
        vars(module)[name] = state[name]


def compiled_module(module: nn.Module) -> nn.Module | None:
    """Return the module that `torch.compile` was given, of the module that it returned; None for any other."""
    # The modules of TorchScript have a mapping without `get`.
    return dict(module._modules.items()).get("_orig_mod")


def is_persistent(module: nn.Module, buffer: str) -> bool:
    """Return True for a buffer of a module's own that its state dict contains."""
    return buffer not in module._non_persistent_buffers_set


def convolution_of(layer: Any) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """Return the function of (input, weight, bias) that a convolution module computes, with its padding mode."""
    compute: Callable[[Tensor, Tensor, Tensor | None], Tensor] = layer._conv_forward
    return compute


# The backward pass


def in_backward_pass() -> bool:
    """Return True while a backward pass runs: a module that is called then is computed again, to save memory."""
    # -1 is the number of no task: no backward pass runs.
    return torch._C._current_graph_task_id() != -1


# Lists of tensors, in a single kernel


def copy_all(into: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy each value into the tensor at the same place; all tensors have the same dtype and device."""
    torch._foreach_copy_(list(into), list(values))


def blend_all(into: Sequence[Tensor], values: Sequence[Tensor], weight: float) -> None:
    """Move each tensor towards the value at the same place: into + weight * (value - into), in place."""
    torch._foreach_lerp_(list(into), list(values), weight)
