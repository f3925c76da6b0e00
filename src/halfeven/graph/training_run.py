"""Run a model once in training mode, without dropout, and compare two models by what they do there.

A captured graph is that of eval mode. Layers, BatchNorm and dropout are modules in it and follow `train()`; whatever
else a model does in training alone is compared here: outputs, tensors that change, gradients, recomputation.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from halfeven.errors import named
from halfeven.graph.dropout_calls import (
    DropoutCall,
    DropoutCalls,
    WithoutDropout,
    functions_without_dropout,
    switch_off_dropout,
)
from halfeven.graph.parts import called_modules
from halfeven.graph.restoring import same_random_numbers, state_restored
from halfeven.graph.torch_private import pytree

ROUNDING_TOLERANCE = 1e-2
"""Largest difference of two outputs or gradients, over the larger norm, that rounding may cause: BatchNorm on two
samples magnifies it."""
NO_GRADIENT = 1e-5
"""A gradient below this part of the largest, element by element, is rounding alone: that of a bias before BatchNorm."""


@dataclass
class TrainingRun:
    """The results of one forward and backward pass in training mode."""

    structure: Any = None
    """The structure of the outputs."""
    outputs: list[Any] = field(default_factory=list)
    """The outputs without their nesting."""
    changed: dict[str, Tensor] = field(default_factory=dict)
    """Parameters and buffers that the forward pass changed, with their new values."""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """The gradients of parameters, and of the inputs as "input 0"."""
    losses: set[str] = field(default_factory=set)
    """Attributes that the forward pass set to a single number with a gradient."""
    called: set[str] = field(default_factory=set)
    """Modules that the forward pass called."""
    recomputed: set[str] = field(default_factory=set)
    """Modules that the backward pass called again, to save memory."""
    dropouts: tuple[DropoutCall, ...] = ()
    """The calls of functions that contain a dropout, in the forward pass."""
    random: Any = None
    """The random states after the forward pass: they show that it drew numbers, even where these changed nothing."""


def run_in_training(
    model: nn.Module, args: Any, kwargs: Any, parameters: Mapping[str, nn.Parameter] | None = None
) -> TrainingRun:
    """Run a model forward and backward in training mode with dropout 0, and restore all that this changes.

    Args:
        model: any module; its state, attributes, gradients and mode, and the random state, stay as they were.
        args, kwargs: its arguments, of at least two samples.
        parameters: the parameters whose gradients are kept, by name; None: the model's own.
    """
    with restored(model):
        model.train()
        return run_as_is(model, args, kwargs, parameters)


def run_as_is(
    model: nn.Module, args: Any, kwargs: Any, parameters: Mapping[str, nn.Parameter] | None = None
) -> TrainingRun:
    """Run a model as `run_in_training` does, in the mode that its modules have, and restore nothing of the model."""
    switch_off_dropout(model)
    given = parameters or dict(model.named_parameters(remove_duplicate=False))
    # What is compared after the run: the values of tensors, and attributes by identity.
    before = {name: tensor.detach().clone() for name, tensor in _tensors_by_name(model).items()}
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    run = TrainingRun()
    calls = DropoutCalls()
    (args, kwargs), leaves = _with_gradients(args, kwargs)
    with (
        same_random_numbers(),
        _recording_calls(model, run, calls),
        functions_without_dropout(calls),
        WithoutDropout(calls),
        torch.enable_grad(),
    ):
        outputs = model(*args, **kwargs)
        run.dropouts = tuple(calls.found)
        run.random = _random_states()
        run.outputs, run.structure = pytree.tree_flatten(outputs)
        run.losses = _modules_with_losses(model, attributes)
        run.changed = _changed_tensors(before, model)
        run.gradients = _output_gradients(run, given, leaves)
    run.outputs = [x.detach() if isinstance(x, Tensor) else x for x in run.outputs]
    return run


def differences(expected: TrainingRun, found: TrainingRun) -> list[str]:
    """Return the differences between two models in training, a phrase for each kind."""
    said: list[str] = []
    nested_alike = expected.structure == found.structure
    if not nested_alike:
        said.append(f"it returns {_structure_words(expected)} in training, {_structure_words(found)} in eval mode")
    if expected.random != found.random:
        said.append("it draws random numbers in training")
    moved = [name for name in expected.changed if not _are_alike(expected.changed[name], found.changed.get(name))]
    moved += [name for name in found.changed if name not in expected.changed]
    if moved:
        said.append(f"it changes {named(moved)} in training")
    if unset := expected.losses - found.losses:
        said.append(f"it sets {named(sorted(unset))} to a loss")
    # Modules that the captured model calls too: what else was computed again has become a part of its graph.
    if lost := sorted((expected.recomputed & found.called) - found.recomputed):
        said.append(f"it computes {named(lost)} again in the backward pass, to save memory")
    # What follows may be a consequence of the former.
    if not said and not all(_are_alike(e, f) for e, f in zip(expected.outputs, found.outputs, strict=True)):
        said.append("its outputs have other values in training than in eval mode")
    if not said and (turned := _other_gradients(expected.gradients, found.gradients)):
        said.append(f"the gradients of {named(turned)} are not those of its operators")
    return said


def _structure_words(run: TrainingRun) -> str:
    count = len(run.outputs)
    kind = getattr(run.structure.type, "__name__", None) if run.structure.type is not None else None
    return f"a {kind} of {count}" if kind else "a tensor"


def _are_alike(expected: Any, found: Any) -> bool:
    if not (isinstance(expected, Tensor) and isinstance(found, Tensor)):
        return type(expected) is type(found)
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return False
    if not expected.is_floating_point():
        return torch.equal(expected, found)
    e = torch.nan_to_num(expected.float())
    f = torch.nan_to_num(found.float())
    return bool((e - f).norm() <= ROUNDING_TOLERANCE * max(float(e.norm()), float(f.norm())) + 1e-12)


def _other_gradients(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    largest = max((float(g.abs().max()) for g in (*expected.values(), *found.values()) if g.numel()), default=0.0)
    names = []
    for name in dict.fromkeys((*expected, *found)):
        e = expected.get(name)
        f = found.get(name)
        if e is None or f is None:
            # A gradient of zeros is as good as none.
            present = f if e is None else e
            if present is not None and bool(present.any()):
                names.append(name)
            continue
        # The norm of rounding in each element, in proportion to the largest gradient of the model.
        noise = NO_GRADIENT * largest * e.numel() ** 0.5
        if (e - f).norm() > ROUNDING_TOLERANCE * max(float(e.norm()), float(f.norm())) + noise:
            names.append(name)
    return names


def map_tensors(function: Callable[[Tensor], Tensor], arguments: Any) -> Any:
    """Return nested arguments with a function's results for the tensors.

    A tensor that is given twice stays a single tensor, because models compare: `query is key` in torch's attention.
    """
    results: dict[int, Tensor] = {}

    def one(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if id(x) not in results:
            results[id(x)] = function(x)
        return results[id(x)]

    return pytree.tree_map(one, arguments)


# One run


def _with_gradients(args: Any, kwargs: Any) -> tuple[tuple[Any, Any], list[Tensor]]:
    """Return the arguments, detached, whose floating-point tensors collect gradients, and these tensors."""
    leaves: list[Tensor] = []

    def leaf(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        leaves.append(x.detach().clone().requires_grad_())
        # A model may change its input in place, which torch forbids for a tensor that collects a gradient itself.
        return leaves[-1].clone()

    return map_tensors(leaf, (args, kwargs)), leaves


def _output_gradients(
    run: TrainingRun, parameters: Mapping[str, nn.Parameter], leaves: list[Tensor]
) -> dict[str, Tensor]:
    kept = {name: parameter.grad for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    total = torch.zeros(())
    for number, output in enumerate(run.outputs):
        if isinstance(output, Tensor) and output.is_floating_point() and output.requires_grad:
            generator = torch.Generator().manual_seed(number)
            # A random direction, the same in each run: the gradients of a sum could agree by symmetry where the models
            # differ.
            cotangent = torch.randn(output.shape, generator=generator).to(output)
            total = total + (output * cotangent).sum().cpu()
    try:
        if total.requires_grad:
            torch.autograd.backward(total)
        found = {name: p.grad.detach().clone() for name, p in parameters.items() if p.grad is not None}
        inputs = {f"input {n}": x.grad for n, x in enumerate(leaves) if x.grad is not None}
        return found | inputs
    finally:
        for name, parameter in parameters.items():
            parameter.grad = kept[name]


def _modules_with_losses(model: nn.Module, before: Mapping[str, dict[str, Any]]) -> set[str]:
    found = set()
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            loss = isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad
            if loss and before[name].get(attribute) is not value:
                found.add(f"{name}.{attribute}" if name else attribute)
    return found


def _tensors_by_name(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _changed_tensors(before: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    now = _tensors_by_name(model)
    return {
        name: now[name].detach().clone()
        for name, value in before.items()
        if name in now and not (value.shape == now[name].shape and torch.equal(value, now[name].detach()))
    }


@contextmanager
def _recording_calls(model: nn.Module, run: TrainingRun, calls: DropoutCalls) -> Iterator[None]:
    """Record the modules that are called and, after the outputs are there, called again; tell `calls` of each."""

    def enter(name: str) -> None:
        (run.called if run.structure is None else run.recomputed).add(name)
        calls.modules.append(name)

    handles = []
    for name, module in called_modules(model):
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: enter(name), prepend=True))
        handles.append(module.register_forward_hook(lambda *_: calls.leave(), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# What a run leaves as it was


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Restore the parameters, buffers, attributes and modes of a model, and the values of its tensors, at the end."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with state_restored(model, model.parameters()):
            yield
    finally:
        for parameter, requires_grad in trained:
            parameter.requires_grad = requires_grad


def left_in_eval(model: nn.Module) -> tuple[str, ...]:
    """Return the modules that a model's own `train()` leaves in eval mode, such as frozen BatchNorms."""
    if all(type(module).train is nn.Module.train and "train" not in vars(module) for module in model.modules()):
        return ()
    # Its train() may do more, such as taking adapters out of the weights that eval() puts them into.
    with restored(model):
        model.train()
        return tuple(name for name, module in model.named_modules() if name and not module.training)


def _random_states() -> Any:
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]
    kind, keys, *rest = np.random.get_state()
    return [state.numpy().tobytes() for state in states], random.getstate(), (kind, np.asarray(keys).tobytes(), *rest)
