"""The report of `verify`."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from halfeven.verification.default_session import DefaultSession
from halfeven.verification.outputs import OutputParity

OVERFLOW = 'this processor has no VNNI, so sums of 8-bit products overflow; with scheme="w7a8" layers do not overflow'

FLOAT_ROWS = 6
"""Rows of the table about operators in float."""


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

    def add(self, found: Tensor, exact: Tensor, layer_alone: Tensor) -> None:
        """Count one batch of integers beside the exact simulation's."""
        distance = (found - exact).abs()
        self.count += found.numel()
        self.different += int((distance > 0).sum())
        self.different_alone += int((found != layer_alone).sum())
        self.largest = max(self.largest, int(distance.max()))

    def add_float(self, found: Tensor, simulated: Tensor, layer_alone: Tensor) -> None:
        """Count the same batch beside the float simulation's integers."""
        self.different_float += int((found != simulated).sum())
        self.different_float_alone += int((found != layer_alone).sum())


@dataclass
class Report:
    """The findings of `verify`; `str(report)` is a table, `to_dict()` plain values.

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
    in the exact simulation, in the output that the labels judge, or else in the first."""
    float_simulation_top1_agreement: float
    """The same for the float simulation."""
    accuracy: dict[str, float]
    """Top-1 in percent of float (where given), simulated and deployed model, where the batches came with labels."""
    latency_ms: dict[str, float]
    """Median milliseconds of a batch of `latency_batch` samples: float and deployed, timed in turn, both without
    bfloat16; empty where they were not timed."""
    latency_batch: int
    latency_ratio: float
    """Deployed over float; NaN where neither was timed."""
    unseen: list[str]
    """Quantized tensors that the file does not have any more, and that were not compared: the converter merged them
    with others."""
    first_difference: str
    """The first activation, in the order of the graph, whose integers differ from the exact simulation; "" if none."""
    overflows: bool = False
    """Integers or outputs differ and sums can overflow: the processor has no VNNI, and weights need more than 7 bits,
    or activations of as many are multiplied together. Never of a file that was evaluated, not run (TensorRT's)."""
    tensors: list[TensorParity] = field(default_factory=list)
    outputs: list[OutputParity] = field(default_factory=list)
    """Each output of the model, in their order."""
    default_session: DefaultSession | None = None
    """The first batch in the runtime's default session; None where the runtime needs no settings."""
    findings: list[str] = field(default_factory=list)
    """A sentence for each difference from a simulation that is too large to be the rounding of float arithmetic."""
    notes: list[str] = field(default_factory=list)
    """Limits of the accuracies, or the reason why there are none."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values for JSON; None stands for NaN, which JSON does not have."""
        values: dict[str, Any] = _plain(asdict(self))
        return values

    def __str__(self) -> str:
        rows = [
            *(self._integer_rows() if self.tensors else []),
            ("largest difference of the output", _difference(self.output_difference)),
            *(self._output_rows() if len(self.outputs) > 1 else []),
            *(self._default_rows(self.default_session) if self.default_session else []),
            ("integer weights equal", "yes" if self.weights_match else "NO"),
            *(self._executed_rows() if self.tensors else [("layers that read integer weights", self._readers())]),
            *(("  in float", name) for name in self.float_layers),
            ("same top-1 as the exact simulation", _percent(self.top1_agreement)),
            ("same top-1 as the float simulation", _percent(self.float_simulation_top1_agreement)),
            *((f"top-1 {name}", f"{value:.2f} %") for name, value in self.accuracy.items()),
            *(("  note", note) for note in self.notes),
        ]
        if self.latency_ms:
            rows += [
                (f"latency {name}, batch {self.latency_batch}", f"{v:.2f} ms") for name, v in self.latency_ms.items()
            ]
            rows += [("latency deployed / float", f"{self.latency_ratio:.2f}")]
        width = max(len(name) for name, _ in rows)
        title = f"{self.path} in {self.runtime}, {self.samples} samples"
        lines = [title, *(f"  {name.ljust(width)}  {value}" for name, value in rows)]
        if self.findings:
            lines += ["FOUND:", *(f"  {finding}" for finding in self.findings)]
        return "\n".join(lines)

    def _integer_rows(self) -> list[tuple[str, str]]:
        return [
            ("integers equal to the exact simulation", _percent(self.integer_match)),
            ("  each layer alone", _percent(self.alone_match)),
            ("  of the last feature map", _percent(self.last_integer_match)),
            ("  largest difference", f"{self.max_lsb_difference} LSB"),
            ("  first difference", self.first_difference or "none"),
            *([("  likely reason", OVERFLOW)] if self.overflows else []),
            *(("  not compared, merged by the converter", name) for name in self.unseen),
            ("integers equal to the float simulation", _percent(self.float_simulation_match)),
        ]

    def _executed_rows(self) -> list[tuple[str, str]]:
        return [
            ("layers executed in integers", f"{self.integer_layers} of {self.quantizable_layers}"),
            ("  share of multiply-accumulates", f"{100 * self.integer_macs:.2f} %"),
            *((f"  in float, {name}", f"{100 * share:.2f} %") for name, share in self._largest_in_float()),
        ]

    def _output_rows(self) -> list[tuple[str, str]]:
        return [
            (f"  {output.name}", f"{_difference(output.difference)}, {_percent(output.equal)} equal")
            for output in self.outputs
        ]

    def _default_rows(self, default: DefaultSession) -> list[tuple[str, str]]:
        return [
            ("difference of the default session", _difference(default.difference)),
            *(("  due to the lack of", setting) for setting in default.settings),
        ]

    def _largest_in_float(self) -> list[tuple[str, float]]:
        """Return the largest shares of work in float by name; small shares are summed up in a last row."""
        rows = list(self.float_macs.items())
        if len(rows) <= FLOAT_ROWS:
            return rows
        rest = rows[FLOAT_ROWS - 1 :]
        return [*rows[: FLOAT_ROWS - 1], (f"{len(rest)} others", sum(share for _, share in rest))]

    def _readers(self) -> str:
        return f"{self.weight_layers} of {self.quantizable_layers}, in floating point"


def _difference(relative: float) -> str:
    return f"{relative:.1e} of the largest" if relative else "none"


def _plain(value: Any) -> Any:
    """Return a value of JSON: None stands for NaN and infinities."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _percent(share: float) -> str:
    return f"{100 * share:.4f} %"
