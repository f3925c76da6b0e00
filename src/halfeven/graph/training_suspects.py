"""Find the modules whose own code does something in training that a graph of eval mode does not."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.utils.checkpoint import CheckpointFunction

from halfeven.graph.batches import Inputs
from halfeven.graph.operators import is_stochastic_depth
from halfeven.graph.parts import called_modules
from halfeven.graph.torch_private import AnyBatchOrInstanceNorm, AnyDropout, has_hooks, pytree
from halfeven.graph.training_run import differences, map_tensors, restored, run_as_is, run_in_training

Export = Callable[..., nn.Module]


@dataclass(frozen=True)
class Suspicion:
    """The way in which a module's own code differs in training."""

    text: str
    same_outputs: bool = True
    """Its outputs are nested in training as in eval mode."""
    by_flag: bool = False
    """Its own `training` flag alone changes what it returns."""


@dataclass
class _Trace:
    """The calls of one run in training mode."""

    inputs: dict[str, Inputs] = field(default_factory=dict)
    """The arguments of each module's first call, by its name."""
    caller: dict[str, str] = field(default_factory=dict)
    """The module whose code called each module first."""
    functions: dict[Any, str] = field(default_factory=dict)
    """Nodes of the backward pass that are calls of an `autograd.Function`, each with the module whose code calls it."""
    recomputed: set[str] = field(default_factory=set)
    """Modules that were called in the backward pass by no other module."""


def training_inputs(model: nn.Module, args: Any, kwargs: Any) -> dict[str, Inputs]:
    """Return the arguments of each module's first call in training mode, by the module's name."""
    return _trace_run(model, args, kwargs).inputs


def suspects(model: nn.Module, args: Any, kwargs: Any, export: Export) -> Iterator[dict[str, Suspicion]]:
    """Return the modules whose own code trains in a way that a graph of eval mode does not, each with the reason.

    Own code is a module's forward without that of its children. First come modules whose `training` flag alone changes
    what they do, those that call their children under `torch.utils.checkpoint` or call parts of other modules, and
    normalizations of another arithmetic than torch's. Then come, where these were not all, modules that apply an
    `autograd.Function` whose gradient is not that of its operators, and last any others, each captured alone.

    Args:
        model: any module.
        args, kwargs: its arguments, of at least two samples.
        export: captures a part of the model alone, on its arguments.
    """
    trace = _trace_run(model, args, kwargs)
    yield _suspects_by_mode(model, args, kwargs, trace, export)
    found = {}
    judged: dict[Any, bool] = {}
    for node, name in trace.functions.items():
        function = _function_name(node)
        module = model.get_submodule(name)
        # Modules of one class that apply the same function are judged by the first of them.
        kind = (type(module), function)
        if name and kind not in judged:
            judged[kind] = bool(_differences_alone(module, trace.inputs[name], export))
        if judged.get(kind, True):
            found[name] = Suspicion(f"the gradient of its function {function} is not that of its operators")
    yield found
    yield _smallest_that_differ(model, trace, export)


def _smallest_that_differ(model: nn.Module, trace: _Trace, export: Export) -> dict[str, Suspicion]:
    """Return the smallest modules that train otherwise than a graph captured of the module alone."""
    found: dict[str, Suspicion] = {}
    for name, module in reversed(list(model.named_modules())):
        around = any(inner.startswith(f"{name}.") for inner in found)
        if not name or name not in trace.inputs or around or _is_of_torch(module):
            continue
        if said := _differences_alone(module, trace.inputs[name], export):
            found[name] = Suspicion("; ".join(said))
    return found


def _suspects_by_mode(model: nn.Module, args: Any, kwargs: Any, trace: _Trace, export: Export) -> dict[str, Suspicion]:
    found: dict[str, Suspicion] = {}
    # Activation checkpointing: by torch's own function, or told by the calls that it repeats.
    for node, name in trace.functions.items():
        if _function_name(node) == CheckpointFunction.__name__:
            found[name] = Suspicion("it computes its parts again in the backward pass, to save memory")
    for name in sorted(trace.recomputed):
        again = f"it computes {name} again in the backward pass, to save memory"
        found.setdefault(trace.caller.get(name, ""), Suspicion(again))
    # Called as a whole in evaluation, and part by part in training.
    for name in _called_in_parts(trace) & set(_trace_run(model, args, kwargs, training=False).inputs):
        found.setdefault(name, Suspicion("training calls its parts one by one"))
    # Normalizations that are not torch's, and other modules that ask for their mode.
    norms: dict[type, bool] = {}
    for name, module in model.named_modules():
        if name not in trace.inputs or name in found:
            continue
        if isinstance(module, AnyBatchOrInstanceNorm) and not _is_of_torch(module):
            if type(module) not in norms:
                norms[type(module)] = bool(_differences_alone(module, trace.inputs[name], export))
            if norms[type(module)]:
                found[name] = Suspicion("it normalizes in training in a way of its own")
        elif (
            not _follows_the_mode(module) and (suspicion := _suspicion_by_flag(module, *trace.inputs[name])) is not None
        ):
            found[name] = suspicion
    return found


def _function_name(node: Any) -> str:
    """Return the name of the `autograd.Function` that a node of the backward pass is a call of."""
    return type(node).__name__.removesuffix("Backward")


def _called_in_parts(trace: _Trace) -> set[str]:
    """Return the modules that code outside of them reaches into, to call one of their parts."""
    found = set()
    for name, caller in trace.caller.items():
        inside = name.rpartition(".")[0]
        while inside and inside != caller and not caller.startswith(f"{inside}."):
            found.add(inside)
            inside = inside.rpartition(".")[0]
    return found


def _follows_the_mode(module: nn.Module) -> bool:
    """Return True for a module whose training mode a captured graph has, or whose code does not depend on it."""
    if isinstance(module, AnyBatchOrInstanceNorm | AnyDropout | nn.RNNBase) or is_stochastic_depth(module):
        return True
    return _is_of_torch(module) and not isinstance(module, nn.RReLU) and not has_hooks(module)


def _is_of_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.modules")


def _suspicion_by_flag(module: nn.Module, args: Any, kwargs: Any) -> Suspicion | None:
    """Return the effect of a module's own `training` flag, while those of its children are on; None without any."""
    try:
        expected = run_in_training(module, args, kwargs)
        with restored(module):
            module.train()
            module.training = False
            found = run_as_is(module, args, kwargs)
    except Exception:  # one of its modes does not run alone; then the whole model is compared
        return None
    said = differences(expected, found)
    return Suspicion("; ".join(said), expected.structure == found.structure, by_flag=True) if said else None


def _differences_alone(module: nn.Module, arguments: Inputs, export: Export) -> list[str]:
    """Return the differences, in training, between a module and the graph that is captured of it alone."""
    try:
        captured = export(module, *arguments)
        parameters = dict(module.named_parameters(remove_duplicate=False))
        expected = run_in_training(module, *arguments, parameters)
        return differences(expected, run_in_training(captured, *arguments, parameters))
    except Exception:  # then no graph can take its place
        return ["it cannot be captured alone"]


def _trace_run(model: nn.Module, args: Any, kwargs: Any, *, training: bool = True) -> _Trace:
    trace = _Trace()
    with restored(model), _recording_calls(model, trace):
        model.train(training)
        run_as_is(model, args, kwargs)
    return trace


def _own_functions(outputs: Any, before: set[Any], known: Mapping[Any, str]) -> Iterator[Any]:
    """Return the calls of an `autograd.Function` that lead to some outputs, from the inputs on.

    Args:
        outputs: what a module returned.
        before: what made the module's inputs.
        known: calls of which the module is known.
    """
    waiting: list[Any] = [x.grad_fn for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor)]
    seen = set(before)
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, BackwardCFunction) and node not in known:
            yield node
        waiting += [following for following, _ in node.next_functions]


@contextmanager
def _recording_calls(model: nn.Module, trace: _Trace) -> Iterator[None]:
    """Record the calls of all modules, in the forward pass and, for recomputation, in the backward pass."""
    stack: list[tuple[str, set[Any]]] = []

    def enter(name: str, args: Any, kwargs: Any) -> None:
        if name not in trace.inputs:
            trace.inputs[name] = map_tensors(_detached_copy, (args, kwargs))
            trace.caller[name] = stack[-1][0] if stack else ""
        elif not stack:  # the model is done: the backward pass calls it
            trace.recomputed.add(name)
        made = {x.grad_fn for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        stack.append((name, made))

    def leave(outputs: Any) -> None:
        name, made = stack.pop()
        for node in list(_own_functions(outputs, made, trace.functions)):
            trace.functions[node] = name

    handles = []
    for name, module in called_modules(model):
        handles.append(
            module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: enter(name, args, kwargs), with_kwargs=True, prepend=True
            )
        )
        handles.append(module.register_forward_hook(lambda _, args, outputs: leave(outputs), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _detached_copy(x: Tensor) -> Tensor:
    return x.detach().clone()
