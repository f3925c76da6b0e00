"""The report of `verify`."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import RenderableType
from torch import Tensor

from halfeven.deployment.file_interface import FloatPrecision
from halfeven.files import json_value
from halfeven.tables import WIDE, Shown, as_html, as_text
from halfeven.verification.default_session import DefaultSession
from halfeven.verification.file_precision import Float32Session
from halfeven.verification.layer_times import LayerTime
from halfeven.verification.outputs import OutputParity
from halfeven.verification.report_tables import summary, whole_table


@dataclass
class TensorParity:
    """The comparison of one activation's integers: how many differ, and by how much at most."""

    name: str
    count: int = 0
    different: int = 0
    """From the exact simulation of the whole model."""
    different_alone: int = 0
    """From the exact simulation of this tensor's own layer, given the runtime's integers before it."""
    different_float: int = 0
    """From the float simulation of the whole model."""
    different_float_alone: int = 0
    """From the float simulation of this tensor's own layer, given the runtime's integers before it."""
    largest: int = 0
    near_zero: bool = False
    """The range's lower end is so near to 0 that the runtime takes it for 0, and forgets the zero point."""

    def add(self, found: Tensor, exact: Tensor, layer_alone: Tensor) -> None:
        """Count one batch of integers beside the exact simulation's."""
        distance = (found - exact).abs()
        self.count += found.numel()
        self.different += int((distance > 0).sum())
        self.different_alone += int((found != layer_alone).sum())
        self.largest = max(self.largest, int(distance.max()) if distance.numel() else 0)

    def add_float(self, found: Tensor, simulated: Tensor, layer_alone: Tensor) -> None:
        """Count the same batch beside the float simulation's integers."""
        self.different_float += int((found != simulated).sum())
        self.different_float_alone += int((found != layer_alone).sum())


@dataclass
class Report:
    """The findings of `verify`; `print(report)` is a summary, `table()` has all, `to_dict()` plain values.

    Shares are between 0 and 1, and NaN where there are no integers to compare (a scheme of weights alone). A difference
    is in units of the tensor's scale (LSB).
    """

    path: str
    runtime: str
    """The program that ran the file."""
    samples: int
    integer_match: float
    """Share of activation integers equal in the runtime and in the exact simulation."""
    alone_match: float
    """The same where each tensor is computed from the runtime's own integers before it: a rounding of float arithmetic
    that falls the other way then does not spread through the layers behind it."""
    last_integer_match: float
    """The share of equal integers of the last quantized activation alone."""
    float_simulation_match: float
    """Share of activation integers equal in the runtime and in the float simulation, which is what was trained."""
    max_lsb_difference: int
    """Largest difference of an integer from the exact simulation."""
    weights_match: bool
    """All integer weights in the file are those of the model."""
    integer_layers: int
    """Layers that the runtime executed with integer kernels; a layer that is called several times counts as often."""
    quantizable_layers: int
    """Layers with quantized weights, counted alike."""
    weight_layers: int
    """Layers that read integer weights and computed in float: all, where the scheme quantizes weights alone."""
    float_layers: list[str]
    """Layers with quantized weights that ran in float, each with its precision and kernel; where the scheme quantizes
    weights alone, the layers whose weights were in float too."""
    integer_macs: float
    """Share of the model's multiply-accumulates that ran with integer kernels. All are counted: those of attention, of
    recurrent cells, of einsum and other products, and of submodules that stayed Python."""
    float_macs: dict[str, float]
    """Shares of the multiply-accumulates that ran in float, by the name of the layer or operator, the largest first."""
    output_difference: float
    """Largest difference of an output from the exact simulation's, over the largest absolute value of that: the largest
    of all outputs. `outputs` has each."""
    top1_agreement: float
    """Share of samples (of pixels, tokens, anchors) whose largest value over the classes is the same in the runtime and
    in the exact simulation, in the output that the labels judge, or else in the first with values; NaN without any."""
    float_simulation_top1_agreement: float
    """The same for the float simulation."""
    accuracy: dict[str, float]
    """Top-1 in percent of float (where given), simulated and deployed model, where the batches came with labels."""
    latency_ms: dict[str, float]
    """Median milliseconds of a batch of `latency_batch` samples: float, in float32, and deployed, timed in turn; empty
    where they were not timed."""
    latency_batch: int
    latency_ratio: float
    """Deployed over float, in float32; NaN where neither was timed."""
    unseen: list[str]
    """Quantized tensors that the file does not have any more, and that were not compared: the converter merged them
    with others."""
    first_difference: str
    """The first activation, in the order of the graph, whose integers differ from the exact simulation; "" if none."""
    float_default_ms: float = math.nan
    """Median milliseconds of the float file in the runtime's default precision: bfloat16 where the processor has it."""
    latency_ratio_default: float = math.nan
    """Deployed over float, in the runtime's default precision."""
    slower: list[str] = field(default_factory=list)
    """Where integers are slower than float in the runtime: the whole file, and its layers with their milliseconds."""
    float_reason: str = ""
    """The likely reason why layers ran in float: the model was made for another runtime; "" if it was not."""
    overflows: bool = False
    """Integers or outputs differ and sums can overflow: the processor has no VNNI, and weights need more than 7 bits,
    or activations of as many are multiplied together. Never of a file that was evaluated, not run (TensorRT's)."""
    tensors: list[TensorParity] = field(default_factory=list)
    outputs: list[OutputParity] = field(default_factory=list)
    """Each output of the model, in their order."""
    default_session: DefaultSession | None = None
    """The first batch in the runtime's default session; None where the runtime needs no settings."""
    slowest_kernels: list[str] = field(default_factory=list)
    """The kernels of the file that take the longest in the runtime's own profile, each with its precision and share of
    the time; empty where the file was not timed, or not run."""
    layer_times: list[LayerTime] = field(default_factory=list)
    """Milliseconds of each layer in the file and in the float file, by the runtime's own profile; empty where the file
    was not timed, or the runtime gives no profile."""
    float_precision: FloatPrecision = "f32"
    """The precision, of what stays float, that the file was written for: float32, or the runtime's choice."""
    float32_session: Float32Session | None = None
    """The integers in a session with float32, of a file that leaves the precision to the runtime and whose integers
    differ in its own session; else None."""
    findings: list[str] = field(default_factory=list)
    """A sentence for each difference from a simulation that is too large to be the rounding of float arithmetic."""
    file_bytes: int = 0
    """Size of the file, with its tensors."""
    threads: int = 0
    """Number of threads that the runtime computes with; 0 where it does not say."""
    settings: list[str] = field(default_factory=list)
    """Settings of the session that the file was run with, as `name=value`."""
    notes: list[str] = field(default_factory=list)
    """Limits of the accuracies, or the reason why there are none, and differences in the runtime's own precision
    where a session in float32 was judged in its place."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values for JSON; None stands for NaN, which JSON does not have."""
        values: dict[str, Any] = json_value(asdict(self))
        return values

    def __str__(self) -> str:
        """Return a summary; findings, if there are any, come last."""
        return as_text(summary(self))

    def __rich__(self) -> RenderableType:
        return summary(self)

    def _repr_html_(self) -> str:
        """Return the summary for a notebook, and all figures behind a click."""
        whole = f"<details><summary>all figures</summary>{as_html(whole_table(self), WIDE)}</details>"
        return as_html(summary(self)) + whole

    def table(self) -> Shown:
        """Return all figures to print, with the parity of each activation."""
        return Shown(whole_table(self))
