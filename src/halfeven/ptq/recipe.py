"""Which steps post-training quantization takes, and why: decided from the model, the bits and the data at hand.

White paper, figure 8, with what came after it; each choice is a value with its reason, printed before it is acted upon.
"""

from dataclasses import dataclass

from torch import nn

from halfeven.decision import Decision, switched, table
from halfeven.placement.graph_edits import clipped_relus
from halfeven.placement.insertion import plan_of
from halfeven.ptq.equalization.cross_layer import find_chains, unclipping_sqnr
from halfeven.ptq.equalization.layer_pairs import rewritable_layers
from halfeven.ptq.options import PTQOptions
from halfeven.ptq.transformers.layernorms import norm_sites
from halfeven.quantization.scheme import parse_bits

UNCLIPPING_SQNR = 20.0
"""dB that the values after a ReLU6 must keep, by BatchNorm's statistics, for it to become a ReLU without data: 27 in a
MobileNetV2 that gains by it, 5 in EfficientNet-Lite0, which it would ruin."""


@dataclass(frozen=True)
class Recipe:
    """The decisions, in the order of the steps."""

    equalize: Decision
    relu6: Decision
    absorb: Decision
    smooth: Decision
    reparametrize: Decision
    reconstruct: Decision
    correct_biases: Decision
    blocks: bool
    """Whether reconstruction goes by blocks; by layers otherwise."""
    data: bool

    def __str__(self) -> str:
        rows = {
            "cross-layer equalization": self.equalize,
            "ReLU6 to ReLU": self.relu6,
            "bias absorption": self.absorb,
            "activation smoothing": self.smooth,
            "LayerNorm reparametrization": self.reparametrize,
            "reconstruction": self.reconstruct,
            "bias correction": self.correct_biases,
        }
        return table("Steps of post-training quantization:", rows)


def decide(qmodel: nn.Module, options: PTQOptions, *, data: bool) -> Recipe:
    """Decide the steps for a prepared model.

    Args:
        data: whether calibration data is at hand.
    """
    plan = plan_of(qmodel)
    weight_bits, activation_bits = parse_bits(plan.options.scheme)
    equalize = _equalize(qmodel, options, per_channel=plan.options.per_channel)
    reconstruct = _reconstruct(options, weight_bits, activation_bits, data=data)
    return Recipe(
        equalize=equalize,
        relu6=_relu6(qmodel, options, equalize, data=data),
        absorb=_follows(options.absorb, equalize, "equalization makes large biases", "there is no equalization"),
        smooth=_smooth(qmodel, options, weight_bits, data=data),
        reparametrize=_reparametrize(qmodel, options, weight_bits, activation_bits, data=data),
        reconstruct=reconstruct,
        correct_biases=_correct_biases(options, reconstruct, data=data, per_channel=plan.options.per_channel),
        blocks=options.reconstruct != "layers",
        data=data,
    )


def _equalize(qmodel: nn.Module, options: PTQOptions, *, per_channel: bool) -> Decision:
    if chosen := switched(options.equalize):
        return chosen
    if per_channel:
        return Decision(False, "each weight channel has a scale of its own")
    if not find_chains(rewritable_layers(qmodel)[0]) and not clipped_relus(qmodel):
        return Decision(False, "no two layers follow each other without a branch between them")
    return Decision(True, "one scale serves all channels of a weight, so they need equal ranges")


def _relu6(qmodel: nn.Module, options: PTQOptions, equalize: Decision, *, data: bool) -> Decision:
    clipped = len(clipped_relus(qmodel))
    if not clipped:
        return Decision(False, "the model has none")
    if chosen := switched(options.relu6):
        return chosen
    if not equalize.enabled:
        return Decision(False, "there is no equalization, which alone gains by it")
    if not data:
        return _relu6_by_batchnorm(qmodel)
    return Decision(True, f"{clipped} of them stop the equalization; kept if the quantized model gains, see below")


def _relu6_by_batchnorm(qmodel: nn.Module) -> Decision:
    kept = min(unclipping_sqnr(qmodel).values(), default=float("-inf"))
    if kept >= UNCLIPPING_SQNR:
        return Decision(True, f"BatchNorm says that little is clipped: {kept:.0f} dB of the values stay")
    return Decision(False, "by what BatchNorm says, the float model would not bear it")


def _follows(value: str, first: Decision, yes: str, no: str) -> Decision:
    return switched(value) or Decision(first.enabled, yes if first.enabled else no)


def _smooth(qmodel: nn.Module, options: PTQOptions, weight_bits: int, *, data: bool) -> Decision:
    if reason := _no_norms(qmodel, data=data):
        return Decision(False, reason)
    if chosen := switched(options.smooth):
        return chosen
    if weight_bits < 8:
        return Decision(False, "weights below 8 bits cannot take the outliers of activations over")
    return Decision(True, "outliers after LayerNorm spoil a scale per tensor")


def _reparametrize(
    qmodel: nn.Module, options: PTQOptions, weight_bits: int, activation_bits: int, *, data: bool
) -> Decision:
    if reason := _no_norms(qmodel, data=data):
        return Decision(False, reason)
    if chosen := switched(options.reparametrize):
        return chosen
    if weight_bits < 8:
        return Decision(False, "weights below 8 bits cannot take the outliers of activations over")
    if activation_bits < 8:
        return Decision(True, "below 8 bits each channel after LayerNorm needs a range of its own")
    return Decision(False, "smoothing serves 8-bit activations")


def _no_norms(qmodel: nn.Module, *, data: bool) -> str:
    if not norm_sites(qmodel)[0]:
        return "no LayerNorm is read by linear layers and additions alone"
    return "" if data else "it needs data"


def _reconstruct(options: PTQOptions, weight_bits: int, activation_bits: int, *, data: bool) -> Decision:
    if not data:
        return Decision(False, "it needs data")
    if options.reconstruct != "auto":
        return Decision(options.reconstruct != "off", "as the options say")
    if weight_bits < 7 or activation_bits < 8:
        return Decision(True, "at so few bits rounding to nearest costs accuracy; it learns by blocks")
    return Decision(False, f"at {weight_bits} bits rounding to nearest costs next to nothing")


def _correct_biases(options: PTQOptions, reconstruct: Decision, *, data: bool, per_channel: bool) -> Decision:
    if chosen := switched(options.correct_biases):
        return chosen
    if not data:
        return Decision(True, "analytic: the means come from the folded BatchNorm")
    if reconstruct.enabled:
        return Decision(False, "reconstruction leaves no mean shift to correct")
    if per_channel:
        return Decision(False, "8-bit weights with a scale per channel shift no mean that counts")
    return Decision(True, "tried, and kept if the quantized model gains, see below")
