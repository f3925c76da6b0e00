"""The optimizer, its parameter groups, and the learning rate of each step, as functions of the options."""

import math
from typing import Any

import torch
from torch import nn

from halfeven.graph.torch_private import AnyBatchOrInstanceNorm
from halfeven.quantization.quantizer import quantizers
from halfeven.training.options import TrainingOptions

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
        The groups that are not empty. "rate" is the factor on the learning rate of each step.
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
        small = id(parameter) in norms or name.rpartition(".")[2] == "bias"
        keeps = small and not options.decay_norms_and_biases
        group = learned if id(parameter) in scales else free if keeps else decayed
        (clipped if id(parameter) in clipping else group).append(parameter)
    factor = options.scale_rate if options.optimizer == "sgd" else 1.0
    # "rate" is a key of our own: each step sets "lr" anew from the schedule, times this factor (`Trainer._take_step`).
    own = {"lr": options.learning_rate * factor, "rate": factor}
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": free, "weight_decay": 0.0},
        {"params": learned, "weight_decay": 0.0, **own},
        {"params": clipped, "weight_decay": options.weight_decay, **own},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, options: TrainingOptions) -> torch.optim.Optimizer:
    """Return the optimizer that the options name, over the parameters of the model that require gradients."""
    groups = parameter_groups(model, options)
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=options.learning_rate, momentum=options.momentum)
    return torch.optim.AdamW(groups, lr=options.learning_rate)


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
    epoch = step // steps_per_epoch
    if options.schedule == "cosine":
        if options.schedule_by == "epoch":
            done = epoch
            whole = math.ceil(total_steps / steps_per_epoch)
        else:
            done = step - options.warmup_steps
            whole = total_steps - options.warmup_steps
        return options.learning_rate * 0.5 * (1 + math.cos(math.pi * done / max(whole, 1)))
    if options.schedule == "step":
        passed = sum(epoch >= milestone for milestone in options.step_epochs)
        return float(options.learning_rate * options.step_factor**passed)
    return options.learning_rate
