"""The quantizer: a module that fake-quantizes one tensor, with an observed or a learned range."""

import enum
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from halfeven.distributed import is_distributed
from halfeven.errors import CalibrationError
from halfeven.quantization.arithmetic import moved_range, on_grid, scale_and_zero_point
from halfeven.quantization.compile import fused, fused_once_worthwhile
from halfeven.quantization.fake_quantize import UNCLIPPED, Clip, Domain, effective_scale, fake_quantize, stored_scale
from halfeven.quantization.observers import Observer, batch_extremes, check_finite, extremes, make_observer, rows
from halfeven.quantization.own_class import OwnClass, check_count, checked_range
from halfeven.quantization.range_errors import naming
from halfeven.quantization.range_state import RangeState, state_of
from halfeven.quantization.scheme import Scheme
from halfeven.renamed import renamed_attributes

Ranges = Literal["observed", "learned", "clipped", "calibrated"]
"""Movement of a range in training: "observed" follows the data, "learned" follows the loss (LSQ), "clipped" follows
the loss of clipping alone (PACT), "calibrated" stays."""


class Mode(enum.Enum):
    """The mode of a quantizer: fake-quantize the tensor, pass it through, or pass it through and observe it."""

    QUANTIZE = "quantize"
    FLOAT = "float"
    CALIBRATE = "calibrate"


class Quantizer(nn.Module):
    """Fake-quantizes one tensor.

    In training an observed range follows the data while `state.observing`: the range of a weight with the observer
    "minmax" is that of the present weight, the range of an activation is a moving average over the batches. It never
    moves in `eval()`. A learned range is the parameter `scale` (LSQ) and, with `learns_zero_point`, the parameter
    `zero_point` (LSQ+), of which the nearest integer of the grid is used. A calibrated range stays.

    The state dict has its final shapes, [] or [channels], from the start: `scale` (buffer, or parameter when learned,
    stored as `domain` says; NaN without a range), `zero_point` (int32 buffer, or float32 parameter when learned),
    `observing` (uint8, the code of `state`) and, for activations whose range is not learned, `low` and `high`.

    Args:
        scheme: the integer grid and its granularity.
        channels: size of the scheme's axis; None for one scale per tensor.
        observer: range estimator of the calibration, a key of `halfeven.quantization.observers.OBSERVERS` or a class
            of the user's.
        ranges: how the range moves in training.
        domain: how a learned scale is stored: as itself, or as its binary logarithm.
        learns_zero_point: True to learn the zero point of an asymmetric grid too.
        scales_gradient: multiply the gradient of a learned scale by LSQ's 1 / sqrt(N * quant_max).
        weight: True for a weight, which is at hand in each step and needs no moving average.
    """

    keeps_dtype = True
    """`model.bfloat16()` and `model.double()` leave its tensors in float32: files have float32 scales."""

    scale: Tensor
    zero_point: Tensor
    observing: Tensor
    low: Tensor
    high: Tensor

    def __init__(
        self,
        scheme: Scheme,
        *,
        channels: int | None = None,
        observer: str | OwnClass = "minmax",
        ranges: Ranges = "observed",
        domain: Domain = "linear",
        learns_zero_point: bool = False,
        scales_gradient: bool = True,
        weight: bool = False,
    ) -> None:
        super().__init__()
        shape = () if channels is None else (channels,)
        learned = ranges in ("learned", "clipped")
        self.scheme = scheme
        self.observer_name = observer
        self.learned = learned
        self.weight = weight
        self.scales_gradient = scales_gradient
        self.domain: Domain = domain
        self.ranges: Ranges = ranges
        # Placement sets both after construction: a user's class is made with the arguments of `Quantizer` alone.
        self.name = ""
        self.own_class: OwnClass | None = None
        self.mode = Mode.QUANTIZE
        self.observer: Observer | None = None
        self.is_recomputation: Callable[[], bool] | None = None
        self.caches_output = False
        self.cached: Tensor | None = None
        # NaN stands for a range that is not set, also in files: `_read_state` takes a finite scale for a range.
        unset = torch.full(shape, float("nan"))
        if learned:
            self.scale = nn.Parameter(unset)
        else:
            self.register_buffer("scale", unset)
        # A step of the optimizer is much smaller than 1, so a learned zero point is stored as a real number;
        # `fake_quantize` rounds it in each call.
        if learned and learns_zero_point and not scheme.symmetric:
            self.zero_point = nn.Parameter(torch.zeros(shape))
        else:
            self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int32))
        # A search such as "mse" is too slow for each step, so a searched range of a weight stays as calibrated.
        self._observable = ranges == "observed" and (not weight or observer == "minmax")
        # The buffer holds the state in the file; the attribute is read in each step, without waiting for a device.
        self.state = RangeState.STARTING if self._observable else RangeState.UNSET
        self.register_buffer("observing", torch.tensor(self.state.code, dtype=torch.uint8))
        # The ends of the moving average: scale and zero point are made of them anew at each batch.
        if not learned and not weight:
            self.register_buffer("low", unset.clone())
            self.register_buffer("high", unset.clone())
        # Loading changes the tensors alone; the attribute `state` is then read from them.
        hook_after_load: Callable[..., Any] = self.register_load_state_dict_post_hook
        hook_after_load(_read_state)

    def forward(self, x: Tensor, clip: Clip = UNCLIPPED) -> Tensor:
        """Fake-quantize a tensor; shape and dtype stay.

        Args:
            x: any shape, floating, with the channels on the scheme's axis.
            clip: bounds of an activation function that is fused into the quantizer.

        Raises:
            CalibrationError: there is no range.
        """
        if clip != UNCLIPPED and self.mode is not Mode.QUANTIZE:
            # An observer must see the tensor that is quantized, which is the clipped one.
            x = torch.clamp(x, *clip)
            clip = UNCLIPPED
        # A weight in calibration goes on below, with the range that it has just got: the activations behind it are then
        # those of quantized weights.
        if self.mode is Mode.FLOAT or (self.mode is Mode.CALIBRATE and not self._observe(x)):
            return x
        # In eval mode, too, the range is that of the present weight; but only training writes to the state dict.
        if self.state.observing and self.weight:
            scale, zero_point = self._present_range(x)
            if self.training:
                self._store_range(scale, zero_point)
            return self._quantized_once(
                x, lambda precomputed: fake_quantize(x, scale, zero_point, self.scheme, precomputed=precomputed)
            )
        follows = self.follows_batches and not self._recomputes()
        if follows:
            self._follow_batch(x, clip)
        if not self.state.has_range:
            raise CalibrationError(
                f"The quantizer {self.name or '(unnamed)'} has no range yet, so its integers mean nothing. "
                "Run halfeven.calibrate(qmodel, loader) first, or load a checkpoint."
            )
        factor = self._gradient_factor(x) if self.learned and self.scales_gradient else 1.0
        # A scale that `fix` has made a buffer is the scale in use, also where it was stored as a logarithm before.
        domain = self.domain if self.learned else None
        rounding = self.ranges != "clipped"
        # A quantizer that several tensors share moves its range at each of them; the backward pass of the tensors
        # before must see the range that they were quantized with.
        scale = self.scale.clone() if follows else self.scale
        zero_point = self.zero_point.clone() if follows else self.zero_point
        return self._quantized_once(
            x,
            lambda precomputed: fake_quantize(
                x, scale, zero_point, self.scheme, factor,
                domain=domain, clip=clip, rounding_gradient=rounding, precomputed=precomputed,
            ),
        )  # fmt: skip

    def _recomputes(self) -> bool:
        """Return True in the second call of a step that saves memory by checkpointing, whose range must stay."""
        known = self.is_recomputation is not None and not torch.compiler.is_compiling()
        return known and self.is_recomputation()  # type: ignore[misc]

    def _quantized_once(self, x: Tensor, quantized: Callable[[Tensor | None], Tensor]) -> Tensor:
        """Return the fake-quantized tensor: the cached one, where weights are quantized once."""
        result = quantized(self.cached)
        if self.caches_output and isinstance(x, nn.Parameter):  # a computed weight is another tensor in every call
            self.cached = result.detach()
        return result

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Set scale and zero point from a float range.

        Args:
            low: lower end of the range, [], [1] or [channels].
            high: upper end of the range, of the same shape.

        Raises:
            CalibrationError: an end is NaN or infinite.
        """
        check_count(self.name, low.numel(), self.scale.numel())
        low = low.reshape(self.scale.shape)
        high = high.reshape(self.scale.shape)
        if not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
            raise CalibrationError(
                f"The range of {self.name or 'a quantizer'} is not finite (low {low.tolist()}, high {high.tolist()}), "
                "so it has no scale. Look for NaN or infinity in the weights and in the calibration data."
            )
        if not self.learned and not self.weight:
            self.low.copy_(low)
            self.high.copy_(high)
        self._store_range(*scale_and_zero_point(low, high, self.scheme))

    @torch.no_grad()
    def _store_range(self, scale: Tensor, zero_point: Tensor) -> None:
        # In place: the optimizer and DDP hold this very tensor.
        self.scale.copy_(stored_scale(scale, self.domain) if self.learned else scale)
        self.zero_point.copy_(zero_point)
        if not self.state.has_range:
            self.state = state_of(observing=self.state.observing, has_range=True)

    def set_observing(self, on: bool) -> None:
        """Switch on or off that training batches move an observed range.

        A learned, searched or fixed range never moves by them.
        """
        if not self.state.fixed:
            observing = on and self._observable
            self._set_state(state_of(observing=observing, has_range=self.state.has_range))

    def _set_state(self, state: RangeState) -> None:
        self.state = state
        self.observing.fill_(state.code)

    def fix(self) -> None:
        """Keep the range in use for good, a learned scale and zero point as buffers: nothing moves it any more."""
        if self.learned:
            # What is in use takes the place of what is stored: what is not learned is read as it is, and a learned zero
            # point is a real number, which may lie beyond the grid.
            used = {"scale": self._effective_scale().detach().clone(), "zero_point": self.used_zero_point().clone()}
            for name, value in used.items():
                delattr(self, name)
                self.register_buffer(name, value)
            self.learned = False
        self._set_state(RangeState.FIXED)

    def fix_range(self, bounds: tuple[float, float] | None) -> None:
        """Set a range that is known beforehand, such as that of a softmax, and keep it for good; None does nothing."""
        if bounds is not None:
            self.set_range(*(torch.full_like(self.scale, bound) for bound in bounds))
            self._set_state(RangeState.FIXED)

    def fix_scale(self, scale: Tensor) -> None:
        """Set a scale, [] or [channels], and keep it for good; the zero point stays."""
        if not self.learned and not self.weight:
            # The range that gives this scale again: on a symmetric grid it goes from -quant_max to quant_max, narrow or
            # not.
            low = -self.scheme.quant_max if self.scheme.symmetric and self.scheme.signed else self.scheme.quant_min
            self.low.copy_((low - self.zero_point) * scale)
            self.high.copy_((self.scheme.quant_max - self.zero_point) * scale)
        self._store_range(scale.reshape(self.scale.shape), self.zero_point)
        self._set_state(RangeState.FIXED)

    def used_scale(self, x: Tensor) -> Tensor:
        """Return the scale that `forward` uses for `x`, [] or [channels], without its gradient."""
        with torch.no_grad():
            if self.state.observing and self.weight:
                return self._present_range(x)[0]
            return self._effective_scale() if self.learned else self.scale

    def _effective_scale(self) -> Tensor:
        return effective_scale(self.scale, self.domain, self.scheme.power_of_two)

    def used_zero_point(self) -> Tensor:
        """Return the zero point that `forward` uses, [] or [channels], int32."""
        if not self.zero_point.is_floating_point():
            return self.zero_point
        ends = self.scheme.quant_min, self.scheme.quant_max
        return on_grid(self.zero_point.detach(), *ends, self.scheme.power_of_two).to(torch.int32)

    def start_calibration(self) -> None:
        """Pass the tensor through unchanged and collect its statistics until `finish_calibration`."""
        self.mode = Mode.CALIBRATE
        self.observer = make_observer(self.observer_name, self.scheme)
        if self.weight and not self.state.fixed:  # each calibration sees the present weight, once
            self.state = state_of(observing=self.state.observing, has_range=False)

    def finish_calibration(self) -> None:
        """Set the range from the statistics collected.

        Raises:
            CalibrationError: no batch reached the tensor, which the message names.
        """
        observer = self.observer
        assert observer is not None
        self.mode = Mode.QUANTIZE
        self.observer = None
        with self._naming_errors():
            self.set_range(*self._proposed_range(observer))

    def _proposed_range(self, observer: Observer) -> tuple[Tensor, Tensor]:
        own = self.observer_name
        return checked_range(own, observer.range()) if isinstance(own, OwnClass) else observer.range()

    def _observe(self, x: Tensor) -> bool:
        """Collect statistics. Returns True for a tensor to quantize at once: a weight, whose range is known then."""
        assert self.observer is not None
        if self.weight and self.state.has_range:
            return True
        with self._naming_errors():
            self.observer.update(self._channels_first(x))
            if self.weight:
                self.set_range(*self._proposed_range(self.observer))
        return self.weight

    @torch.no_grad()
    def _follow_batch(self, x: Tensor, clip: Clip) -> None:
        """Move the range by the extremes of a batch that is going to be clipped."""
        low, high = batch_extremes(self._channels_first(x), clip)
        if not is_distributed():  # several processes check the range that they share
            self._check_finite(low, high)
        low = low.reshape(self.low.shape)
        high = high.reshape(self.high.shape)
        # The first batch sets the range: before it, low and high are NaN.
        kept = (self.low, self.high) if self.state.has_range else (low, high)
        low, high, scale, zero_point = fused(moved_range)(*kept, low, high, self.scheme)
        self.low.copy_(low)
        self.high.copy_(high)
        self._store_range(scale, zero_point)

    @property
    def follows_batches(self) -> bool:
        """True where training batches move the range of an activation."""
        return self.training and self.state.observing and not self.weight

    @torch.no_grad()
    def move_to(self, low: Tensor, high: Tensor) -> None:
        """Set an observed range in training, ends of shape [] or [channels], without a wait for a device.

        Raises:
            CalibrationError: an end on the CPU is NaN or infinite.
        """
        self._check_finite(low, high)
        self.low.copy_(low)
        self.high.copy_(high)
        self._store_range(*fused(scale_and_zero_point)(low, high, self.scheme))

    def _check_finite(self, low: Tensor, high: Tensor) -> None:
        if low.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere it waits; NaN shows in the loss
            with self._naming_errors():
                check_finite(low, high)

    def _present_range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero_point = fused_once_worthwhile(_range_of, x)(rows(self._channels_first(x)), self.scheme)
        return scale.reshape(self.scale.shape), zero_point.reshape(self.scale.shape)

    def _gradient_factor(self, x: Tensor) -> float:
        """Return LSQ's 1 / sqrt(N * quant_max) (section 2.2) for the N weights of a scale or features of a sample."""
        # N counts the features of one sample. With those of the whole batch, the gradient would depend on the batch
        # size.
        sharing = self.scale.numel() if self.weight else x.shape[0]
        elements = x.numel() // max(sharing, 1)
        return float((max(elements, 1) * self.scheme.quant_max) ** -0.5)

    def _channels_first(self, x: Tensor) -> Tensor:
        """Return the tensor in the shape that observers take: [channels, ...], or [1, ...] for one scale."""
        return x.detach()[None] if self.scheme.axis is None else x.detach().movedim(self.scheme.axis, 0)

    def _naming_errors(self) -> AbstractContextManager[None]:
        return naming(self.name, weight=self.weight, observer=self.observer_name)

    def extra_repr(self) -> str:
        return f"{self.scheme}, {'learned' if self.learned else self.observer_name}"


def _range_of(values: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Return scale and zero point, [channels] each, of the extremes of each row of [channels, elements]."""
    return scale_and_zero_point(*extremes(values), scheme)


def _read_state(quantizer: nn.Module, incompatible_keys: Any) -> None:
    """Set a quantizer's state from the tensors that were just loaded into it."""
    assert isinstance(quantizer, Quantizer)
    code = int(quantizer.observing)
    has_range = bool(torch.isfinite(quantizer.scale).all())
    # Files written before code 2 existed have 0 for a fixed range.
    fixed = code == RangeState.FIXED.code or (code == 0 and quantizer.state.fixed)
    quantizer.state = RangeState.FIXED if fixed and has_range else state_of(observing=code == 1, has_range=has_range)


__getattr__ = renamed_attributes(
    __name__,
    quantizers="quantization.model_quantizers.quantizers",
    set_observing="quantization.model_quantizers.set_observing",
    weights_quantized_once="quantization.model_quantizers.weights_quantized_once",
    set_mode="quantization.model_quantizers.set_mode",
)
