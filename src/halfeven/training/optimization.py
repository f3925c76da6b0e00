"""The optimizer, its parameter groups, and the learning rate of each step, as functions of the options."""

import math
from typing import Any

import torch
from torch import nn

from halfeven.errors import ConfigError
from halfeven.graph.torch_private import AnyBatchOrInstanceNorm
from halfeven.quantization.model_quantizers import quantizers
from halfeven.training.joined_optimizers import JoinedOptimizers
from halfeven.training.options import TrainingOptions

ONECYCLE_START = 1 / 25
"""Share of the highest learning rate at which the schedule "onecycle" begins; torch's OneCycleLR has the same."""
ONECYCLE_END = ONECYCLE_START / 1e4
"""Share at which it ends."""
NORMALIZATIONS = (AnyBatchOrInstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def parameter_groups(model: nn.Module, options: TrainingOptions) -> list[dict[str, Any]]:
    """Return parameter groups for an optimizer: with weight decay, without, and learned scales at their own rate.

    Scales do not decay: decay would pull the step size to zero whatever the loss says. Under SGD they learn more slowly
    than the weights (white paper, section 4.4): BatchNorm makes up for any length of a weight, while a scale that moves
    as far clips. Scales that learn from clipping alone do decay: nothing else makes them smaller (PACT, arXiv
    1805.06085, section 3).

    Args:
        model: the model; parameters that do not require gradients are left out.
        options: learning rate, weight decay, and the scales' share of the learning rate (`scale_rate`).

    Returns:
        The groups that are not empty. "rate" is the factor on the learning rate of each step, "scales" is True for
        learned scales.
    """
    found = quantizers(model).values()
    # By identity: tensors have no useful equality, and a shared parameter must be in one group only.
    scales = {id(p) for quantizer in found for p in quantizer.parameters(recurse=False)}
    clipping = {id(q.scale) for q in found if q.ranges == "clipped" and q.domain == "linear"}
    norms = {id(p) for m in model.modules() if isinstance(m, NORMALIZATIONS) for p in m.parameters(recurse=False)}
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    learned: list[nn.Parameter] = []
    clipped: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        small = id(parameter) in norms or _is_bias(name.rpartition(".")[2])
        keeps = small and not options.decay_norms_and_biases
        group = learned if id(parameter) in scales else free if keeps else decayed
        (clipped if id(parameter) in clipping else group).append(parameter)
    # White paper, section 4.4: Adam and RMSProp need no smaller rate, since they divide each gradient by its own size.
    factor = options.scale_rate if scale_optimizer(options) == "sgd" or has_two_optimizers(options) else 1.0
    # "rate" and "scales" are keys of our own: each step sets "lr" anew from the schedule, times "rate"
    # (`Trainer._take_step`), and "scales" tells whose optimizer a group has.
    own = {"lr": options.learning_rate * factor, "rate": factor, "scales": True}
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": free, "weight_decay": 0.0},
        {"params": learned, "weight_decay": 0.0, **own},
        {"params": clipped, "weight_decay": options.weight_decay, **own},
    ]
    return [group for group in groups if group["params"]]


def _is_bias(name: str) -> bool:
    """Return True for the name of a bias: "bias", those of recurrent layers ("bias_ih_l0") and of attention."""
    return name.startswith("bias_") or name.endswith("bias")


def scale_optimizer(options: TrainingOptions) -> str:
    """Return the name of the optimizer of learned scales."""
    return options.optimizer if options.scale_optimizer == "auto" else options.scale_optimizer


def has_two_optimizers(options: TrainingOptions) -> bool:
    """Return True where learned scales have another optimizer than the weights."""
    return scale_optimizer(options) != options.optimizer


def make_optimizer(model: nn.Module, options: TrainingOptions) -> torch.optim.Optimizer:
    """Return the optimizer that the options name, over the parameters of the model that require gradients.

    Raises:
        ConfigError: scales have an optimizer of their own, and the model has no learned scale; or no parameter is
            trained.
    """
    groups = parameter_groups(model, options)
    if not groups:
        raise ConfigError(
            "No parameter of this model requires a gradient, so there is nothing to train. Give a model that is not "
            "frozen as a whole (requires_grad=False)."
        )
    if not has_two_optimizers(options):
        return _make_optimizer(options.optimizer, groups, options)
    scales = [group for group in groups if "scales" in group]
    if not scales:
        raise ConfigError(
            f'training.scale_optimizer="{options.scale_optimizer}" is for learned scales, and this model has none, so '
            'it would have no effect. Leave it out, or set quantization.ranges="learned".'
        )
    weights = [group for group in groups if "scales" not in group]
    parts = [_make_optimizer(options.optimizer, weights, options)] if weights else []
    return JoinedOptimizers(*parts, _make_optimizer(scale_optimizer(options), scales, options))


def _make_optimizer(name: str, groups: list[dict[str, Any]], options: TrainingOptions) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(groups, lr=options.learning_rate, momentum=options.momentum, nesterov=options.nesterov)
    if name == "rmsprop":
        return torch.optim.RMSprop(groups, lr=options.learning_rate, momentum=options.momentum)
    kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
    return kind(groups, lr=options.learning_rate)


def learning_rate(step: int, total_steps: int, steps_per_epoch: int, options: TrainingOptions) -> float:
    """Return the learning rate of an optimizer step.

    Args:
        step: number of the step, from 0.
        total_steps: number of steps of the run.
        steps_per_epoch: number of steps of an epoch.
        options: schedule and warm-up.
    """
    if step < options.warmup_steps:
        # From step 0 on: a rate of 0 would waste the first step.
        return options.learning_rate * (step + 1) / (options.warmup_steps + 1)
    if options.schedule == "onecycle":
        return options.learning_rate * _onecycle(step, total_steps, options.onecycle_rise)
    # Schedules by epochs move between epochs alone; the others follow each step.
    epoch = step // steps_per_epoch
    if options.schedule == "step":
        passed = sum(epoch >= milestone for milestone in options.step_epochs)
        return float(options.learning_rate * options.step_factor**passed)
    if options.schedule == "constant":
        return options.learning_rate
    if options.schedule_by == "epoch":
        done = epoch / max(math.ceil(total_steps / steps_per_epoch), 1)
    else:
        done = (step - options.warmup_steps) / max(total_steps - options.warmup_steps, 1)
    left = _decay_left(done, options)
    return options.learning_rate * (options.end_rate + (1 - options.end_rate) * left)


def _decay_left(done: float, options: TrainingOptions) -> float:
    """Return the share of the decay that is left after the share `done` of the run."""
    if options.schedule == "cosine":
        # Half a cosine from 1 to 0 (Loshchilov and Hutter, arXiv:1608.03983, without restarts).
        return 0.5 * (1 + math.cos(math.pi * done))
    power = options.polynomial_power if options.schedule == "polynomial" else 1.0
    return float((1 - done) ** power)


def _onecycle(step: int, total_steps: int, rise: float) -> float:
    """Return the share of the highest learning rate, as torch's OneCycleLR has it by default."""
    # As in OneCycleLR the top may lie between two steps.
    top = rise * total_steps - 1
    last = total_steps - 1
    if step <= top:
        return _half_cosine(ONECYCLE_START, 1.0, step / top if top > 0 else 1.0)
    return _half_cosine(1.0, ONECYCLE_END, (step - top) / (last - top) if last > top else 1.0)


def _half_cosine(start: float, end: float, done: float) -> float:
    """Return the value of a half cosine from `start` to `end`."""
    return end + (start - end) / 2 * (1 + math.cos(math.pi * done))
