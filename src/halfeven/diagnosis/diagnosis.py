"""The result of `diagnose`: what was measured, and what to do about it."""

import textwrap
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from halfeven.checked_arguments import checked_arguments
from halfeven.errors import ConfigError
from halfeven.files import json_value
from halfeven.placement.options import Rule
from halfeven.ptq.options import PTQOptions
from halfeven.reporting.page import PageContents, save_page
from halfeven.tables import text_as_html
from halfeven.verification.layer_times import LayerTime

TEXT_WIDTH = 80
MAX_LINES = 40
SHOWN_TENSORS = 8
SHOWN_FINDINGS = 3
PASTED_LINES = 3
"""Largest number of lines of an argument to paste that is printed."""
WORTH_TELLING = 0.1
"""Share of the damage that another remedy must take away to be printed."""


@dataclass(frozen=True, kw_only=True)
class TensorDiagnosis:
    """The errors that quantization makes in a tensor, and their effect on the answers."""

    name: str
    """Name of the activation in files and reports of `verify`, or of the layer."""
    weight: bool
    """True for the weight of the layer `name`."""
    places: tuple[str, ...]
    """Names of the tensors that share the quantizer, as in the plan and in rules."""
    scheme: str
    bits: int
    observer: str
    raised_bits: int | None
    """Bits that it was given for `kl_in_context`; None: float."""
    kl_in_context: float
    """The fall of the divergence where this tensor alone is raised."""
    kl_alone: float
    """The divergence of the answers where it alone is quantized."""
    sqnr: float
    """dB at the tensor, of its own rounding."""
    sqnr_of_outputs: float
    """dB at the outputs where it alone is quantized."""
    clipped_share: float
    vanished_share: float
    """Share of values that are not 0 and become 0."""
    dead_levels: float
    """Share of the grid's integers that no value takes."""
    worst_channels: tuple[tuple[int, float], ...]
    """Channels with the lowest SQNR in dB."""
    low: float
    """Smallest value of the grid."""
    high: float
    """Largest value of the grid."""
    histogram: tuple[int, ...] = ()
    """Counts of values, in bins of equal width from `smallest` to `largest`."""
    smallest: float = 0.0
    largest: float = 0.0
    channel_largest: tuple[float, ...] = ()
    """Largest magnitude of each channel."""

    @property
    def title(self) -> str:
        """Return the name that the plan prints: all its places."""
        return " = ".join(self.places)


@dataclass(frozen=True, kw_only=True)
class TriedRemedy:
    """A remedy, and the share of the damage that it took away."""

    remedy: str
    recovered: float | None
    """1 where the answers are the float model's again, negative where they are worse; None if it cannot be applied."""
    paste: str
    failed: str = ""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A cause, its evidence, and the cheapest remedy that helped."""

    cause: str
    where: str
    """The tensors or layers."""
    evidence: str
    remedy: str
    paste: str
    """The argument of `halfeven.prepare` or `halfeven.quantize`, or the call, that makes the remedy; "" if none."""
    rules: tuple[Rule, ...] = ()
    """The rules in `paste`."""
    options: dict[str, Any] = field(default_factory=dict)
    """The options in `paste`."""
    recovered: float | None = None
    """Share of the damage that the remedy took away, measured; None where the answers cannot tell."""
    tried: tuple[TriedRemedy, ...] = ()
    further: str = ""
    """A call that does better than the remedy, and takes longer; "" if none is known."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Where the accuracy goes. Print it, save it as a page (`save`), or read its fields.

    Divergences are in nats for class scores; `halfeven.diagnosis.divergence.divergence` says what is compared.
    """

    verdict: str
    """One sentence."""
    samples: int
    divergence: float
    """Divergence of the quantized model's answers from the float model's."""
    divergence_without_quantizers: float
    """The same with all quantizers off: 0 unless the model's weights have changed."""
    divergence_of_weights: float
    """With the weights alone quantized."""
    divergence_of_activations: float
    """With the activations alone quantized."""
    sqnr: float
    """dB at the outputs."""
    error_share: float
    """Share of error in the outputs' variation between the samples, 0 to 1, of the output with most."""
    agreement: float | None
    """Share of samples with the float model's top-1 class; None where the outputs are no class scores."""
    tensors: tuple[TensorDiagnosis, ...]
    """The most harmful first."""
    findings: tuple[Finding, ...]
    """The cause to mend first comes first; each further finding is of the model that the remedies before have made."""
    accuracy: dict[str, float] = field(default_factory=dict)
    """Results of `evaluate` for the float, the quantized and the repaired model."""
    notes: tuple[str, ...] = ()
    """Further observations: layers in float, modules in Python, where the file parts from the simulation, and its
    time."""
    latency_ms: dict[str, float] = field(default_factory=dict)
    """Milliseconds of the file and of the float file; empty where they were not run."""
    layer_times: tuple[LayerTime, ...] = ()
    """Milliseconds of each layer in both files, by the runtime's own profile."""
    order: tuple[tuple[str, bool], ...] = ()
    """(name, weight) of all tensors in the order of the graph."""
    plan: dict[str, Any] = field(default_factory=dict)
    """The model's plan, as plain values."""

    def to_dict(self) -> dict[str, Any]:
        """Return the diagnosis as plain values for JSON; None stands for NaN and infinities."""
        values: dict[str, Any] = json_value(asdict(self))
        return values

    @checked_arguments(ConfigError)
    def save(self, path: str | Path) -> Path:
        """Write the diagnosis as one HTML page with charts, which loads nothing from elsewhere, and return its path.

        Raises:
            ConfigError: the package that draws the charts is not installed.
            StorageError: the file cannot be written.
        """
        return save_page(self._page_contents(), path)

    def _page_contents(self) -> PageContents:
        values = self.to_dict()
        by_name = {
            (tensor.name, tensor.weight): {**shown, "name": tensor.title}
            for tensor, shown in zip(self.tensors, values["tensors"], strict=True)
        }
        facts = {
            "SQNR of the outputs": f"{self.sqnr:.1f} dB",
            "error in their variation": f"{self.error_share:.2%}",
            "divergence of the answers": f"{self.divergence:.3g}",
            "by weights alone": f"{self.divergence_of_weights:.3g}",
            "by activations alone": f"{self.divergence_of_activations:.3g}",
            "samples": str(self.samples),
        }
        if self.agreement is not None:
            facts["same top-1 answers"] = f"{self.agreement:.1%}"
        return PageContents(
            title="Diagnosis of a quantized model",
            verdict=self.verdict,
            facts=facts,
            findings=tuple(values["findings"]),
            tensors=tuple(by_name[name] for name in self.order if name in by_name),
            accuracy=self.accuracy,
            latency=self.latency_ms,
            layers=tuple(values["layer_times"]),
            plan=values["plan"],
            notes=self.notes,
        )

    def __str__(self) -> str:
        lines = [*_wrapped_lines(self.verdict), "", *self._measurement_lines()]
        for number, finding in enumerate(self.findings[:SHOWN_FINDINGS], 1):
            told = _finding_lines(number, finding)
            # Whole or not at all: a line to paste that is cut would be no Python.
            if len(lines) + len(told) + 2 > MAX_LINES:
                lines += ["", f"{len(self.findings) + 1 - number} more in diagnosis.findings."]
                break
            lines += ["", *told]
        room = MAX_LINES - len(lines) - 2
        if self.tensors and room > 2:
            lines += ["", *self._tensor_lines(min(SHOWN_TENSORS, room - 1))]
        for number, note in enumerate(self.notes):
            wrapped = [*([] if number else [""]), *_wrapped_lines(note)]
            if len(lines) + len(wrapped) <= MAX_LINES:
                lines += wrapped
        return "\n".join(line[:TEXT_WIDTH] for line in lines[:MAX_LINES])

    def _repr_html_(self) -> str:
        return text_as_html(str(self))

    def _measurement_lines(self) -> list[str]:
        agreement = "" if self.agreement is None else f", {self.agreement:.1%} of the top-1 answers the same"
        rows = [
            f"{self.samples} samples: {self.sqnr:.1f} dB at the outputs, error {self.error_share:.2%} of their "
            f"variation{agreement}",
            f"divergence {self.divergence:.3g}; weights alone {self.divergence_of_weights:.3g}, activations alone "
            f"{self.divergence_of_activations:.3g}",
        ]
        if self.accuracy:
            rows.append(", ".join(f"{name} {value:.4g}" for name, value in self.accuracy.items()))
        return [line for row in rows for line in _wrapped_lines(row)]

    def _tensor_lines(self, count: int) -> list[str]:
        rows = [f"{'most harmful tensors':34} {'bits':>4} {'in context':>10} {'alone':>9} {'SQNR':>6} {'clipped':>8}"]
        for tensor in self.tensors[:count]:
            name = f"{tensor.title} (weight)" if tensor.weight else tensor.title
            name = name if len(name) <= 34 else "..." + name[-31:]
            rows.append(
                f"{name:34} {tensor.bits:>4} {tensor.kl_in_context:>10.2g} {tensor.kl_alone:>9.2g} "
                f"{tensor.sqnr:>6.1f} {tensor.clipped_share:>8.2%}"
            )
        return rows


def _finding_lines(number: int, finding: Finding) -> list[str]:
    lines = _wrapped_lines(f"{number}. {finding.cause[0].upper()}{finding.cause[1:]}: {finding.where}", indent=3)
    lines += _wrapped_lines(f"   {finding.evidence}", indent=3)[:3]
    brought = "" if finding.recovered is None else f" (takes away {finding.recovered:.0%} of the damage)"
    lines += _wrapped_lines(f"   Remedy: {finding.remedy}{brought}.", indent=3)[:2]
    if finding.paste:
        of_quantize = any(hasattr(PTQOptions, name) for name in finding.options)
        lines += _lines_to_paste(f"{finding.paste}{' in halfeven.quantize' if of_quantize else ''}", number)
    if finding.further:
        lines += _wrapped_lines(f"   {finding.further}.", indent=3)[:2]
    other = [t for t in finding.tried if t.recovered is not None and t.paste != finding.paste]
    helped = [t for t in other if (t.recovered or 0.0) >= WORTH_TELLING]
    helped.sort(key=lambda t: -(t.recovered or 0.0))
    if helped:
        told = ", ".join(f"{t.remedy} {t.recovered:.0%}" for t in helped[:4])
        lines += _wrapped_lines(f"   Also tried: {told}.", indent=3)[:2]
    return lines


def _lines_to_paste(text: str, number: int) -> list[str]:
    """Return a line to paste, broken where Python allows it, or where it is found if it is too long to be printed."""
    lines = textwrap.wrap(
        text,
        TEXT_WIDTH,
        initial_indent="   ",
        subsequent_indent="     ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    if len(lines) <= PASTED_LINES and max(map(len, lines)) <= TEXT_WIDTH:
        return lines
    return [f"   The line to paste is long: print(diagnosis.findings[{number - 1}].paste)"]


def _wrapped_lines(text: str, indent: int = 0) -> list[str]:
    return textwrap.wrap(
        text, TEXT_WIDTH, subsequent_indent=" " * indent, drop_whitespace=True, replace_whitespace=False
    )
