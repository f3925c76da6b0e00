"""Define the options of `halfeven.prepare`, and the user's rules."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypedDict

from halfeven.errors import ConfigError
from halfeven.graph.dynamic_shapes import DynamicShapes
from halfeven.options import Auto, Options, also_spelled, converted, formerly
from halfeven.quantization.fake_quantize import Domain
from halfeven.quantization.observers import ObserverChoice, ObserverName
from halfeven.quantization.own_class import OwnClass, own_class
from halfeven.quantization.quantizer import Quantizer, Ranges
from halfeven.quantization.scheme import Bits, parse_bits

BatchNormHandling = Literal["keep", "fold", "fold live"]
RangesByPaper = Literal["lsq", "pact"]
"""Further spellings of "learned" and "clipped"."""
RangesChoice = Annotated[Ranges | RangesByPaper, also_spelled(lsq="learned", pact="clipped")]
"""Movement of ranges in training, as options take it."""


def rule_text(fields: Mapping[str, Any]) -> str:
    """Return a rule as a config has it, from its fields: those of `vars(rule)` or of `plain_values`."""
    given = ", ".join(f"{name}={_written(value)}" for name, value in fields.items() if value is not None)
    return f"Rule({given})".replace("'", '"')


def _written(value: Any) -> str:
    """Return a value as a config has it: a class of the user's by its name."""
    own = own_class(value, {}) if isinstance(value, Mapping) else value
    return own.name.rpartition(".")[2] if isinstance(own, OwnClass) else repr(value)


MADE_WITH = tuple(name for name in inspect.signature(Quantizer.__init__).parameters if name != "self")
"""The arguments that a quantizer is made with: its scheme, and the others by name."""


def own_quantizer(value: Any) -> Any:
    """Return the description of a user's quantizer class; any other value as it is.

    Raises:
        ConfigError: the class is no subclass of `Quantizer`, whose ranges files and runtimes read.
    """
    if isinstance(value, type) and not issubclass(value, Quantizer):
        raise ConfigError(
            f"The quantizer {value.__name__} is no subclass of halfeven.Quantizer, so no file could hold its range. "
            "Derive it from halfeven.Quantizer and override forward."
        )
    return own_class(value, {"forward": ("x", "clip")}, MADE_WITH)


QuantizerChoice = Annotated[type[Quantizer] | OwnClass, converted(own_quantizer, OwnClass)]
"""A user's quantizer, as options take it: a subclass of `Quantizer`, made with the same arguments."""


@dataclass(frozen=True, kw_only=True)
class Rule(Options):
    """A user's exception for some operators: another grid, another range, or float.

    A rule holds for the operators whose name matches `pattern` and whose kind is `kind`, if it sets a kind. Where
    several rules hold, the last rule wins, field by field. A field that is None leaves the choice to the options and to
    earlier rules.
    """

    pattern: str = "*"
    """Name with the wildcards of `fnmatch`: "layer1.*", "fc", "x" (an input)."""
    kind: str | None = None
    """Operator kind, for example "convolution", "linear" or "average"; None: any."""
    weight_bits: Bits | None = None
    """Bits of the operator's weight."""
    activation_bits: Bits | None = None
    """Bits of the operator's output, after the BatchNorm and the activation that are fused with it; a rule may name
    any of the three. Tensors that are concatenated share a quantizer, so a rule for any of them holds for all. Widths
    above those that the target runs, up to 16, are simulated alone: `export` refuses such a model."""
    observer: ObserverChoice | None = None
    """Estimator of the ranges of the operator's weight and of its output: a name, or a class of your own."""
    per_channel: bool | None = None
    """The operator's weight has a scale per output channel, or a single scale."""
    symmetric: bool | None = None
    """The operator's output has a zero point of 0, or any zero point."""
    signed: bool | None = None
    """The operator's output is on a signed grid, or on an unsigned grid."""
    ranges: RangesChoice | None = None
    """Movement of the ranges of the operator's weight and of its output in training: observed, learned, ..."""
    power_of_two: bool | None = None
    """Scales of the operator's weight and of its output are powers of two."""
    quantizer: QuantizerChoice | None = None
    """Class of your own that quantizes the operator's weight and its output: a subclass of `halfeven.Quantizer`."""
    quantize: bool | None = None
    """False: the operator computes in float; True: it computes in integers, against an earlier rule."""


@dataclass(frozen=True, kw_only=True)
class QuantizationOptions(Options):
    """Options that decide how a model is quantized.

    Raises:
        ConfigError: a value that its field cannot have.
    """

    target: str = "openvino"
    """Runtime whose rules place the quantizers: "openvino", "onnxruntime" or "tensorrt"."""
    scheme: str = "w8a8"
    """Bits of weights and activations, such as "w4a8", of every layer that no rule excepts; "w8a16" and "w4a16" leave
    activations in float."""
    ranges: Annotated[Ranges | RangesByPaper | Auto, also_spelled(lsq="learned", pact="clipped")] = "auto"
    """In training: "observed": ranges follow the data; "learned" or "lsq": scales are parameters, trained with the
    weights (LSQ); "clipped" or "pact": the same, except that activations learn from clipped values alone (PACT);
    "calibrated": ranges stay as calibrated. "auto": "learned" where a tensor, or the scheme, has 4 bits or fewer, else
    "observed"; in post-training quantization "observed"."""
    scale_domain: Domain = "linear"
    """Learned scales are stored and trained directly ("linear") or as their logarithms ("log")."""
    gradient_scale: Literal["lsq", "off"] = "lsq"
    """Multiply the gradient of a learned scale by 1 / sqrt(N * quant_max), for the N values that share it, as LSQ does
    (section 2.2), or leave it as it is."""
    learn_zero_points: bool = False
    """Zero points of asymmetric activations are learned with their scales (LSQ+); they stay integers."""
    weight_observer: ObserverName | Auto = "auto"
    """Estimator of weight ranges; "auto": "minmax" for 8 bits, "mse" below, where clipping outliers pays."""
    activation_observer: ObserverName = "mse"
    """Estimator of activation ranges in calibration."""
    quantize_outputs: bool = False
    """The model's outputs are quantized too, so that the last layer writes integers. Ranges of class scores are then
    estimated by "cross_entropy" where the other activations' are by "mse" or "lp"."""
    quantize_gates: bool = False
    """The gates of SiLU and hard-swish behind a convolution (a sigmoid and a hard sigmoid) are quantized, so that ONNX
    Runtime computes these activations as products of integers, with one rounding more. Other targets compute them with
    the layer before, TensorRT by its documentation, not run."""
    batchnorm: BatchNormHandling | Auto = "auto"
    """"keep": BatchNorm stays live in training and is folded at export; "fold": folded before, as per-tensor weights
    need; "fold live": folded anew at every step, so that it stays live and per-tensor weights fit. "auto": "fold" in
    post-training quantization, else "keep"."""
    per_channel: bool = True
    """Weights have a scale per output channel."""
    first_and_last_bits: Annotated[Bits | Auto, formerly(0)] = "auto"
    """Bits of the first and of the last layer, for their weights and input tensors. The results of the LSQ paper keep
    them at 8; "auto": the bits of `scheme`, as in the white paper. Rules override it."""
    rules: tuple[Rule, ...] = ()
    """Exceptions by name pattern or operator kind."""
    leave_out: tuple[str, ...] = ()
    """Submodules that stay Python, in float."""
    dynamic_shapes: DynamicShapes = field(default_factory=dict, hash=False)
    """Axes that may have any size, besides the batch: input name -> {axis: the axis's name}, for example
    `{"ids": {1: "tokens"}, "mask": {1: "tokens"}}`. Axes of one name are equal; files carry the names."""

    def __post_init__(self) -> None:
        parse_bits(self.scheme)
        if self.gradient_scale == "off" and self.ranges in ("observed", "calibrated"):
            raise ConfigError(
                f'gradient_scale="off" is for learned scales, and with ranges="{self.ranges}" none has a gradient, so '
                'it would have no effect. Leave it out, or set ranges="learned".'
            )


class QuantizationFields(TypedDict, total=False):
    """The fields of `QuantizationOptions` as keyword arguments, for type checkers."""

    target: str
    scheme: str
    ranges: Ranges | RangesByPaper | Auto
    scale_domain: Domain
    gradient_scale: Literal["lsq", "off"]
    learn_zero_points: bool
    weight_observer: ObserverName | Auto
    activation_observer: ObserverName
    quantize_outputs: bool
    quantize_gates: bool
    batchnorm: BatchNormHandling | Auto
    per_channel: bool
    first_and_last_bits: int | Auto
    rules: tuple[Rule, ...]
    leave_out: tuple[str, ...]
    dynamic_shapes: DynamicShapes
