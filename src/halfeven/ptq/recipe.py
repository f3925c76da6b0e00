"""Decide which steps post-training quantization takes, from the model, the bits and the data at hand.

White paper, figure 8 (arXiv:2106.08295), and the methods published after it. Each decision is a value with its reason,
which is printed before anything is done. A new step is a new line of `DECISIONS`, and a `Step` of
`halfeven.ptq.pipeline`.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from halfeven.decision import Decision, decision_of_switch, table
from halfeven.errors import ConfigError
from halfeven.layerwise.blocks import Granularity
from halfeven.placement.insertion import plan_of
from halfeven.placement.quantized_layers import QuantizedLayer
from halfeven.ptq.equalization.cross_layer import clips_between_layers, find_chains, unclipping_sqnr
from halfeven.ptq.equalization.layer_pairs import rewritable_layers
from halfeven.ptq.options import PTQOptions
from halfeven.ptq.transformers.layernorms import layernorm_groups
from halfeven.quantization.model_quantizers import quantizers
from halfeven.quantization.quantizer import Quantizer
from halfeven.quantization.scheme import parse_bits
from halfeven.renamed import renamed_attributes

MIN_UNCLIPPING_SQNR = 20.0
"""dB that the values after a ReLU6 must keep, by BatchNorm's statistics, for it to become a ReLU without data: 27 in a
MobileNetV2 that gains by it, 5 in EfficientNet-Lite0, which it would ruin."""

EQUALIZE = "cross-layer equalization"
UNCLIP = "passing ReLU6"
ABSORB = "bias absorption"
SMOOTH = "activation smoothing"
REPARAMETRIZE = "LayerNorm reparametrization"
RECONSTRUCT = "reconstruction"
CORRECT_BIASES = "bias correction"


@dataclass(frozen=True, kw_only=True)
class Situation:
    """The facts that decisions are made from."""

    qmodel: nn.Module
    options: PTQOptions
    weight_bits: int
    """Fewest bits of a weight, by the scheme and the rules."""
    activation_bits: int
    """Fewest bits of an activation."""
    per_channel: bool
    """Each output channel of every weight has a scale of its own."""
    data: bool
    """Calibration data is at hand."""


Earlier = Mapping[str, Decision]
"""Decisions that have been made already, by the name of the step."""
Decide = Callable[[Situation, Earlier], Decision]


@dataclass(frozen=True)
class PTQRecipe:
    """The decisions, in the order in which they were made."""

    decisions: Mapping[str, Decision]
    """Name of the step -> decision."""
    granularity: Granularity
    """The unit that a reconstruction learns together: layers or blocks."""
    data: bool
    """Calibration data is at hand."""

    def enabled(self, step: str) -> bool:
        """Return True for a step that is to be taken."""
        return self.decisions[step].enabled

    def __str__(self) -> str:
        return table("Steps of post-training quantization:", self.decisions)


def decide(
    qmodel: nn.Module, options: PTQOptions, *, data: bool, decisions: Mapping[str, Decide] | None = None
) -> PTQRecipe:
    """Decide the steps for a prepared model.

    Args:
        qmodel: a model from `prepare` with BatchNorm folded.
        options: the user's switches.
        data: True if calibration data is at hand.
        decisions: step -> function that decides it; None: `DECISIONS`.

    Raises:
        ConfigError: the options insist on a step that cannot be taken.
    """
    plan = plan_of(qmodel)
    # The fewest bits decide, as in training: rules may give single tensors fewer than the scheme.
    weight_bits, activation_bits = _fewest_bits(quantizers(qmodel).values(), parse_bits(plan.options.scheme))
    situation = Situation(
        qmodel=qmodel,
        options=options,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        per_channel=plan.per_channel,
        data=data,
    )
    made: dict[str, Decision] = {}
    for step, decision in (DECISIONS if decisions is None else decisions).items():
        made[step] = decision(situation, made)
    return PTQRecipe(made, "layers" if options.reconstruct == "layers" else "blocks", data)


def _fewest_bits(found: Collection[Quantizer], default: tuple[int, int]) -> tuple[int, int]:
    """Return the fewest bits of the weights and of the activations; the defaults where there are none."""
    weights, activations = ([q.scheme.bits for q in found if q.weight is kind] for kind in (True, False))
    return min(weights, default=default[0]), min(activations, default=default[1])


def _decide_equalize(situation: Situation, earlier: Earlier) -> Decision:
    if chosen := decision_of_switch(situation.options.equalize):
        return chosen
    if situation.per_channel:
        return Decision(False, "each weight channel has a scale of its own")
    if not find_chains(rewritable_layers(situation.qmodel)[0], across_clips=True):
        return Decision(False, "no two layers follow each other without a branch between them")
    return Decision(True, "one scale serves all channels of a weight, so they need equal ranges")


def _decide_unclip(situation: Situation, earlier: Earlier) -> Decision:
    clipped = len(clips_between_layers(situation.qmodel))
    if not clipped:
        return Decision(False, "there is none between two layers")
    # A ReLU is a change of its own; bounds by channel are nothing without factors.
    if not earlier[EQUALIZE].enabled and situation.options.relu6 != "replace":
        return Decision(False, "only equalization gains by it, and there is none")
    if chosen := decision_of_switch(situation.options.relu6):
        return chosen
    if situation.data:
        return Decision(True, f"{clipped} of them stop the equalization; what the quantized model gains by, see below")
    if clips_little(situation.qmodel):
        return Decision(True, "as ReLU: by BatchNorm's statistics little is clipped")
    return Decision(True, "with bounds by channel: by BatchNorm's statistics much is clipped")


def clips_little(qmodel: nn.Module) -> bool:
    """Return True if by BatchNorm's statistics each ReLU6 between layers may become a ReLU."""
    return min(unclipping_sqnr(qmodel).values(), default=float("-inf")) >= MIN_UNCLIPPING_SQNR


def _decide_absorb(situation: Situation, earlier: Earlier) -> Decision:
    if chosen := decision_of_switch(situation.options.absorb):
        return chosen
    if earlier[EQUALIZE].enabled:
        return Decision(True, "equalization makes large biases")
    return Decision(False, "there is no equalization")


def _decide_smooth(situation: Situation, earlier: Earlier) -> Decision:
    if reason := _obstacle_after_layernorm(situation):
        return _left_out(situation, "smooth", reason)
    if chosen := decision_of_switch(situation.options.smooth):
        return chosen
    if _bits_after_layernorm(situation)[0] < 8:
        return Decision(False, "weights below 8 bits cannot take over the outliers of activations")
    return Decision(True, "outliers after LayerNorm spoil a scale per tensor")


def _decide_reparametrize(situation: Situation, earlier: Earlier) -> Decision:
    if reason := _obstacle_after_layernorm(situation):
        return _left_out(situation, "reparametrize", reason)
    if chosen := decision_of_switch(situation.options.reparametrize):
        return chosen
    weight_bits, activation_bits = _bits_after_layernorm(situation)
    if weight_bits < 8:
        return Decision(False, "weights below 8 bits cannot take over the outliers of activations")
    if activation_bits < 8:
        return Decision(True, "below 8 bits each channel after LayerNorm needs a range of its own")
    return Decision(False, "smoothing serves 8-bit activations")


def _left_out(situation: Situation, option: str, reason: str) -> Decision:
    """Return the decision against a step that cannot be taken.

    Raises:
        ConfigError: the option insists on it.
    """
    value = getattr(situation.options, option)
    if value not in ("auto", "off"):
        raise ConfigError(
            f'{option}="{value}" of the steps of post-training quantization would have no effect: {reason}. Leave it '
            'at "auto", or give what the step needs.'
        )
    return Decision(False, reason)


def _obstacle_after_layernorm(situation: Situation) -> str:
    """Return why nothing can be moved out of LayerNorms; "" where it can."""
    if not layernorm_groups(situation.qmodel)[0]:
        return "no LayerNorm is read by linear layers and additions alone"
    return "" if situation.data else "it needs data"


def _bits_after_layernorm(situation: Situation) -> tuple[int, int]:
    """Return the fewest bits of the weights that read LayerNorms, and of the activations that they read."""
    linears: list[Any] = [linear for group in layernorm_groups(situation.qmodel)[0] for linear in group.linears]
    quantized = [linear for linear in linears if isinstance(linear, QuantizedLayer)]
    found = [quantizer for linear in quantized for quantizer in (linear.weight_quantizer, *linear.input_quantizers)]
    return _fewest_bits(found, (situation.weight_bits, situation.activation_bits))


def _decide_reconstruct(situation: Situation, earlier: Earlier) -> Decision:
    if not situation.data:
        return _left_out(situation, "reconstruct", "it needs data")
    if situation.options.reconstruct != "auto":
        return Decision(situation.options.reconstruct != "off", "as the options say")
    if situation.weight_bits < 7 or situation.activation_bits < 8:
        return Decision(True, "at so few bits rounding to nearest costs accuracy; it learns by blocks")
    return Decision(False, f"at {situation.weight_bits} bits rounding to nearest costs next to nothing")


def _decide_correct_biases(situation: Situation, earlier: Earlier) -> Decision:
    if chosen := decision_of_switch(situation.options.correct_biases):
        return chosen
    if not situation.data:
        return Decision(True, "analytic: the means come from the folded BatchNorm")
    if earlier[RECONSTRUCT].enabled:
        return Decision(False, "reconstruction leaves no mean shift to correct")
    if situation.per_channel:
        return Decision(False, "weights with a scale per channel shift no mean that counts")
    return Decision(True, "tried, and kept if the quantized model gains, see below")


DECISIONS: dict[str, Decide] = {
    EQUALIZE: _decide_equalize,
    UNCLIP: _decide_unclip,
    ABSORB: _decide_absorb,
    SMOOTH: _decide_smooth,
    REPARAMETRIZE: _decide_reparametrize,
    RECONSTRUCT: _decide_reconstruct,
    CORRECT_BIASES: _decide_correct_biases,
}
"""Name of a step -> function that decides it; a decision may depend on those above it."""

__getattr__ = renamed_attributes(__name__, Recipe="ptq.recipe.PTQRecipe", choose="ptq.recipe.decide")
