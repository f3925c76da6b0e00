"""The steps of post-training quantization on a prepared model, in the white paper's order (section 3.5, figure 8)."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from halfeven.evaluation import evaluating
from halfeven.graph.capture import inputs_of
from halfeven.layerwise.calibrate import calibrate
from halfeven.layerwise.float_equivalence import float_function, sqnr
from halfeven.ptq.bias_correction import correct_biases
from halfeven.ptq.data_free.calibrate import correct_biases_analytically, ranges_from_batchnorm
from halfeven.ptq.equalization.bias_absorption import absorb_biases
from halfeven.ptq.equalization.cross_layer import equalize, unclip_relu6
from halfeven.ptq.options import PTQOptions
from halfeven.ptq.recipe import Recipe
from halfeven.ptq.reconstruction.reconstruct import adaround, reconstruct
from halfeven.ptq.transformers.smoothing import reparametrize, smooth

TRIAL_SAMPLES = 64
"""Samples on which two forms of a model are compared, to choose one before ranges are set."""
GAIN_SAMPLES = 256
"""Samples on which the last step's gain is measured."""

Log = Callable[[str], None]
Batches = Sequence[Any]


def take_steps(
    qmodel: nn.Module, batches: Batches, recipe: Recipe, options: PTQOptions, log: Log, resume_dir: Path | None = None
) -> nn.Module:
    """Take the steps of a recipe; the quantized model, which may be another object than `qmodel`.

    Args:
        qmodel: a model from `prepare` with BatchNorm folded, its ranges not yet set.
        batches: calibration batches, iterated several times; empty where there is no data.
        log: called with the result of each step.
        resume_dir: folder for the finished units of a reconstruction.
    """
    equalize_channels(qmodel, batches, recipe, options, log)
    if recipe.smooth.enabled:
        log(str(smooth(qmodel, batches, strength=options.smoothing_strength)))
    if recipe.reparametrize.enabled:
        log(str(reparametrize(qmodel, batches)))
    if not recipe.data:
        return _without_data(qmodel, recipe, log)
    calibrate(qmodel, batches)
    both = recipe.reconstruct.enabled and recipe.correct_biases.enabled
    reference = copy.deepcopy(qmodel) if both else None
    if recipe.reconstruct.enabled:
        learn = reconstruct if recipe.blocks else adaround
        report = learn(qmodel, batches, options=options, resume_dir=resume_dir, log=log)
        log(f"Reconstructed {len(report.units)} units in {sum(unit.seconds for unit in report.units):.0f} s.")
        if not recipe.blocks:
            calibrate(qmodel, batches)  # the weights have moved, and the activations with them
    if recipe.correct_biases.enabled:
        qmodel = _corrected(qmodel, reference, batches, options, log)
    return qmodel


def _corrected(
    qmodel: nn.Module, reference: nn.Module | None, batches: Batches, options: PTQOptions, log: Log
) -> nn.Module:
    """The model with corrected biases; the one it was where the options leave it open and nothing is gained."""
    corrected = copy.deepcopy(qmodel)
    report = correct_biases(corrected, batches, reference=reference, options=options)
    calibrate(corrected, batches)
    log(str(report))
    if options.correct_biases == "on":
        return corrected
    trial = _trial(batches, GAIN_SAMPLES)
    wanted = _float_outputs(qmodel if reference is None else reference, trial)
    without, with_ = (sqnr(_outputs(model, trial), wanted) for model in (qmodel, corrected))
    kept = with_ > without
    log(
        f"The quantized outputs have an SQNR of {with_:.2f} dB with the correction, {without:.2f} dB without, so it is "
        f"{'kept' if kept else 'undone'}."
    )
    return corrected if kept else qmodel


def _without_data(qmodel: nn.Module, recipe: Recipe, log: Log) -> nn.Module:
    if recipe.correct_biases.enabled:
        log(str(correct_biases_analytically(qmodel)))
    log(str(ranges_from_batchnorm(qmodel)))
    log(
        "No data was given: activation ranges are guesses from BatchNorm, rounding is to nearest, and nothing was "
        "measured. A few hundred unlabelled inputs make a better model: halfeven.quantize(model, loader)."
    )
    return qmodel


# Equalization, and whether ReLU6 becomes ReLU for it


def equalize_channels(qmodel: nn.Module, batches: Batches, recipe: Recipe, options: PTQOptions, log: Log) -> None:
    """Cross-layer equalization and what belongs to it, in place, as far as a recipe takes them; ranges that were set
    before must be set anew."""
    unclip = recipe.relu6.enabled
    if unclip and recipe.data and options.relu6 != "replace":
        unclip = _gains_without_relu6(qmodel, batches, recipe, log)
    _equalize(qmodel, batches, recipe, log, unclip=unclip)


def _gains_without_relu6(qmodel: nn.Module, batches: Batches, recipe: Recipe, log: Log) -> bool:
    trial = _trial(batches)
    wanted = _float_outputs(qmodel, trial)
    kept, replaced = copy.deepcopy(qmodel), copy.deepcopy(qmodel)
    for model, unclip in ((kept, False), (replaced, True)):
        _equalize(model, batches, recipe, lambda text: None, unclip=unclip)
    without, with_ = (sqnr(_quantized_outputs(model, trial), wanted) for model in (kept, replaced))
    changed = _float_outputs(replaced, trial)
    log(
        f"ReLU6 to ReLU: the quantized outputs have an SQNR of {with_:.1f} dB with it, {without:.1f} dB without, so it "
        f"{'is done' if with_ > without else 'is left'}; it moves the float model's own outputs to "
        f"{sqnr(changed, wanted):.1f} dB{_agreement(changed, wanted)}."
    )
    return with_ > without


def _equalize(qmodel: nn.Module, batches: Batches, recipe: Recipe, log: Log, *, unclip: bool) -> None:
    if unclip:
        unclip_relu6(qmodel)
    if recipe.equalize.enabled:
        log(str(equalize(qmodel)).split("\n")[0])
    if recipe.absorb.enabled:
        log(str(absorb_biases(qmodel, batches or None)).split("\n")[0])


def _trial(batches: Batches, enough: int = TRIAL_SAMPLES) -> Batches:
    """The first batches that hold enough samples to compare two models on."""
    found: list[Any] = []
    samples = 0
    for batch in batches:
        found.append(batch)
        samples += max((x.shape[0] for x in pytree.tree_leaves(inputs_of(batch)) if isinstance(x, Tensor)), default=1)
        if samples >= enough:
            break
    return found


def _quantized_outputs(qmodel: nn.Module, trial: Batches) -> list[Tensor]:
    calibrate(qmodel, trial)
    with evaluating(qmodel):
        return _outputs(qmodel, trial)


def _float_outputs(qmodel: nn.Module, trial: Batches) -> list[Tensor]:
    with float_function(qmodel):
        return _outputs(qmodel, trial)


@torch.no_grad()
def _outputs(model: nn.Module, trial: Batches) -> list[Tensor]:
    """All real-valued outputs of a model in eval mode."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    found: list[Tensor] = []
    for batch in trial:
        args, kwargs = pytree.tree_map_only(Tensor, lambda x: x.to(device), inputs_of(batch))
        leaves = pytree.tree_leaves(model(*args, **kwargs))
        found += [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
    return found


def _agreement(found: list[Tensor], wanted: list[Tensor]) -> str:
    """Share of equal top-1 answers, in words, where the outputs look like those of a classifier."""
    if any(x.ndim != 2 or x.shape[1] < 2 for x in wanted):
        return ""
    same = torch.cat([f.argmax(1) == w.argmax(1) for f, w in zip(found, wanted, strict=True)])
    return f", with {100 * float(same.float().mean()):.1f} % of its top-1 answers the same"
